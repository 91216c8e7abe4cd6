"""Which results belong to which training run: a run is one checkpoint, with a name, a role and a look of its own."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.report.results import ATTACKS, DEMO, Training, find_records, is_checkpoint, read_training

# What a run is to the others, in the order of the columns.
ROLES = {
    "base": "before any training",
    "target": "target, before unlearning",
    "unlearned": "unlearned",
    "unknown": "no training record",
    "retrained": "retrained without the forget set",
}
# These are compared with each other; the rest is there to measure them against.
COMPETING = ("unlearned", "unknown")
NUM_COLORS = 7
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
_REFERENCE_DASHES = {"base": (0, (3, 3)), "target": (0, (1, 2.5)), "retrained": (0, (6, 1.5, 1, 1.5, 1, 1.5))}
_REFERENCE_MARKERS = {"base": ("x", "1", "2"), "target": ("o", "h", "p"), "retrained": ("*", "8", "H")}


@dataclass(frozen=True)
class Look:
    """How plots and tables show a run: name of the color, matplotlib marker and dashes, filled or hollow."""

    color: str
    marker: str
    dashes: object
    filled: bool


@dataclass
class Run:
    """One checkpoint with what is known of it; `checkpoint` is its name if it is one in mid-training."""

    model: str
    parts: tuple
    training: Training | None = None
    checkpoint: str = ""
    results: list = field(default_factory=list)
    name: str = ""
    role: str = "unknown"
    look: Look | None = None
    number: int = 0

    @property
    def method(self):
        """Method id of the training record, or "" where there is none."""
        return str(self.training.record.get("method") or "") if self.training else ""

    @property
    def competes(self):
        """Whether this run is ranked: it is neither the model before unlearning nor one retrained without the data."""
        return self.role in COMPETING

    def result(self, domain, label):
        """Return the Result of a domain and a label ("eval", "mia", "tamper", ...), or None."""
        return next((result for result in self.results if (result.domain, result.label) == (domain, label)), None)

    def history(self):
        """Return the rows of trainer_state.json that this run is to draw; a checkpoint leaves them to its training."""
        return self.training.history if self.training and not self.checkpoint else ()


def gather_runs(folders):
    """Find the runs in some folders: references before, unlearned runs as found, retrained models last.

    Args:
        folders: paths.
    Returns:
        (list of Run, at least one; list of Audit).
    Raises:
        UserError: nothing to report, a folder that does not exist, or a malformed record.
    """
    records = find_records(folders)
    trainings, runs = records.trainings, {}
    for result in records.results:
        training, checkpoint = _training_of(result, trainings)
        _attach(runs, _run_of(result.model, training, checkpoint), result, records.audits)
    with_training = {run.training.folder for run in runs.values() if run.training and not run.checkpoint}
    attacked = {result.path.parent for result in records.results if result.kind in ATTACKS}
    for folder, training in trainings.items():
        # What an attack trained on its way is no run of the user's.
        if folder not in with_training and not attacked & set(folder.parents):
            runs[("training", folder)] = Run(str(folder), folder.parts, training)
    if not runs:
        given = ", ".join(f"'{folder}'" for folder in folders)
        raise UserError(f"nothing to report in {given}: no results.json, unlearning.json or trainer_state.json below")
    found = list(runs.values())
    _drop_what_an_evaluation_says_better(found)
    _tell_attacks_apart(found)
    _set_roles(found)
    _set_roles_of_audits(found, records.audits)
    order = list(ROLES)
    # The unlearned and those without a record keep the order in which they were found.
    found.sort(key=lambda run: order.index("unlearned" if run.competes else run.role))
    _set_names(found)
    _set_looks(found)
    return found, records.audits


def components(text):
    """Return the components of a path or Hub name, of either system's kind."""
    return tuple(part for part in re.split(r"[\\/]+", text.strip()) if part not in ("", "."))


def _ends_with(parts, tail):
    return bool(tail) and parts[-len(tail) :] == tail


def _training_of(result, trainings):
    """Return (Training or None, name of the checkpoint in mid-training or "") of a result's model.

    A training around the results with the model's folder name wins, so that copied runs stay together; then the folder
    on disk; then the only training whose folder, or whose --output_dir, is what `model` names.
    """
    parts, checkpoint = components(result.model), ""
    if parts and is_checkpoint(parts[-1]):
        parts, checkpoint = parts[:-1], parts[-1]
    is_absolute = result.model.lstrip().startswith(("/", "\\")) or ":" in result.model[:3]
    for parent in result.path.parents:
        if parent in trainings and (not parts or _ends_with(parent.parts, parts[-1:] if is_absolute else parts)):
            return trainings[parent], checkpoint
    on_disk = Path(result.model).resolve()
    folder = on_disk.parent if checkpoint else on_disk
    if folder in trainings or (folder / "unlearning.json").is_file():
        return trainings.get(folder) or read_training(folder), checkpoint
    if on_disk.exists():
        return None, ""
    matches = [training for training in trainings.values() if _is_named(training, parts, is_absolute)]
    return (matches[0], checkpoint) if len(matches) == 1 else (None, "")


def _is_named(training, parts, is_absolute):
    output = components(str((training.record.get("flags") or {}).get("output_dir") or ""))
    if is_absolute:
        # A single component, as in `--output_dir out`, is too little to tell two machines' folders apart.
        return output == parts or (len(output) > 1 and _ends_with(parts, output))
    return output == parts or _ends_with(training.folder.parts, parts)


def _run_of(model, training, checkpoint):
    if training:
        folder = training.folder / checkpoint if checkpoint else training.folder
        return Run(str(folder), folder.parts, training, checkpoint)
    return Run(model, _parts_of(model))


def _parts_of(model):
    """Return the components of a model's path, resolved where it is on disk, or those of its name."""
    path = Path(model)
    return components(str(path.resolve() if path.exists() else path)) or (model,)


def _attach(runs, run, result, audits):
    """Add a result to its run.

    A second score of the same domain becomes a run of its own; a run may hold several attacks of one kind. What an
    audit asked of a model in the same way as another did before, as of the target of both, is there already.
    """
    key = run.parts
    held = runs[key].results if key in runs else []
    if any(_is_repetition(result, other, audits) for other in held):
        return
    if result.kind in ATTACKS:
        runs.setdefault(key, run).results.append(result)
        return
    while key in runs and runs[key].result(result.domain, result.kind):
        held = runs[key].result(result.domain, result.kind)
        if DEMO in (held.path.name, result.path.name) and held.path.name != result.path.name:
            break
        key = (*key, "again")
    runs.setdefault(key, run).results.append(result)


def _is_repetition(result, other, audits):
    if not any(audit.contains(found.path) for audit in audits for found in (result, other)):
        return False
    return all(
        getattr(result, name) == getattr(other, name)
        for name in ("domain", "kind", "fingerprints", "splits", "definitions")
    ) and attack_settings(result) == attack_settings(other)


def attack_settings(result):
    """Return how a model was attacked, as [(name of the curve, its settings)]; [] of what has no curves."""
    return [(curve["name"], curve["settings"]) for curve in result.payload.get("curves", ())]


def _tell_attacks_apart(runs):
    """Give the attacks of a kind variants, by their folders, where any run has several of them on one domain."""
    counts = Counter((number, result.domain, result.kind) for number, run in enumerate(runs) for result in run.results)
    repeated = {(domain, kind) for (_, domain, kind), count in counts.items() if count > 1 and kind in ATTACKS}
    for run in runs:
        seen = Counter()
        for place, result in enumerate(run.results):
            if (result.domain, result.kind) in repeated:
                folder = result.path.parent
                variant = folder.parent.name if folder.name == result.domain else folder.name
                variant = variant.removeprefix(result.kind).strip("_-") or "plain"
                seen[result.kind, variant] += 1
                number = seen[result.kind, variant]
                variant = f"{variant} #{number}" if number > 1 else variant
                run.results[place] = replace(result, variant=_printable(variant))


def _drop_what_an_evaluation_says_better(runs):
    """Leave out what demo.json says of a model where a results.json of the same domain says it with standard errors."""
    for run in runs:
        better = {(result.domain, result.kind) for result in run.results if result.path.name != DEMO}
        run.results = [
            result for result in run.results if result.path.name != DEMO or (result.domain, result.kind) not in better
        ]


def _set_roles(runs):
    """Tell references from what competes, by the method of each run and by which model others started from."""
    by_method = {"finetune": "target", "retrain": "retrained"}
    started_from = {"base": [], "target": []}
    for run in runs:
        if run.method:
            start = str(run.training.record.get("start_model") or "")
            started_from["base" if run.method in by_method else "target"].append(start)
    for run in runs:
        if run.method:
            run.role = by_method.get(run.method, "unlearned")
            continue
        for role, starts in started_from.items():
            if any(_is_same_model(run, start) for start in starts):
                run.role = role


def _set_roles_of_audits(runs, audits):
    """Let the audits say which model is the target and which is the gold standard; they know, by name or by folder."""
    for role, attribute, folder in (("unlearned", "model", None), ("retrained", "gold", "gold"), ("target",) * 3):
        for audit in audits:
            model = getattr(audit, attribute)
            for run in runs:
                is_there = folder and any(audit.folder / folder in result.path.parents for result in run.results)
                if model and (is_there or _is_same_model(run, model)):
                    run.role = role


def audited_run(runs, audit):
    """Return the run that an audit is about: that of its model, or else that of the results directly below it."""
    named = [run for run in runs if _is_same_model(run, audit.model)]
    inside = [
        run
        for run in runs
        if any(
            len(result.path.relative_to(audit.folder).parts) == 2
            for result in run.results
            if audit.contains(result.path)
        )
    ]
    return next(iter([*named, *inside]), None)


def _is_same_model(run, start):
    return bool(start) and (start == run.model or components(str(Path(start).resolve())) == run.parts)


def _set_names(runs):
    """Give each run the shortest end of its path that no other has; a second score of one model tells its folder."""
    lengths = {run.parts: 1 + is_checkpoint(run.parts[-1]) for run in runs}
    while True:
        names = {parts: "/".join(parts[-length:]) for parts, length in lengths.items()}
        counts = Counter(names.values())
        longer = [parts for parts, length in lengths.items() if counts[names[parts]] > 1 and length < len(parts)]
        if not longer:
            break
        for parts in longer:
            lengths[parts] += 1
    seen, shown = Counter(), Counter()
    for number, run in enumerate(runs):
        name = names[run.parts]
        if seen[run.parts] and run.results:
            name = f"{name} ({run.results[0].path.parent.name})"
        seen[run.parts] += 1
        name = _printable(name)
        shown[name] += 1
        run.name = f"{name} #{shown[name]}" if shown[name] > 1 else name
        run.number = number


def _printable(text):
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _set_looks(runs):
    """Give each run a color, marker and dash pattern; the pairs repeat after 56 competing runs at the earliest."""
    used = Counter()
    for run in runs:
        family = "competing" if run.competes else run.role
        number = used[family]
        used[family] += 1
        if run.competes:
            color, marker, dashes = number % NUM_COLORS, MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
            run.look = Look(f"run-{color}", marker, dashes, True)
        else:
            markers = _REFERENCE_MARKERS[run.role]
            dashes = _REFERENCE_DASHES[run.role]
            run.look = Look("reference", markers[number % len(markers)], dashes, run.role == "retrained")
