"""One table: unrelated task -> Hub data set, splits and columns, and how a row becomes a question with its answer."""

import functools
import logging
import string
from dataclasses import dataclass, replace
from pathlib import Path

from llm_unlearn.data.rows import SUFFIXES, canonical_row, check_rows, filled_columns, read_rows, text_of
from llm_unlearn.data.sources import HubOptions, Source, hub_name, hub_rows
from llm_unlearn.errors import UserError, unknown_name

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
"""Share of a file, its last rows, that is held out where there is no split for it."""
HELD_OUT_NAMES = ("test", "validation", "validation_matched", "dev")
MARKS_ANSWER = "#### "
"""What stands before the result in an answer of GSM8K."""


@dataclass(frozen=True)
class DownstreamTask:
    """Where an unrelated task lives, and what its rows ask.

    Attributes:
        hub: data set on the Hub.
        config: its configuration, or None.
        held_out: split with labels that is not trained on.
        question: text with the row's columns in braces; they must all be there.
        label: column with the number of the right choice, or with the answer where there are no choices.
        choices: the choices, in the order of the labels, or the columns of the row that hold them, in braces; empty
            where the answer is free text.
        first_label: number of the first choice.
        stated: columns that must end in a full stop, which is added where it is missing.
    """

    hub: str
    config: str | None
    held_out: str
    question: str
    label: str
    choices: tuple = ()
    first_label: int = 0
    stated: tuple = ()

    @property
    def columns(self):
        """The columns that a row must have."""
        texts = (self.question, *self.choices)
        found = [name for text in texts for _, name, _, _ in string.Formatter().parse(text) if name]
        return tuple(dict.fromkeys([*found, self.label]))


_GLUE = "nyu-mll/glue"
TASKS = {
    "gsm8k": DownstreamTask("openai/gsm8k", "main", "test", "{question}", "answer"),
    "agnews": DownstreamTask(
        "fancyzhx/ag_news", None, "test", "{text}\nIs this news about World, Sports, Business or Technology?", "label",
        ("World", "Sports", "Business", "Technology"),
    ),
    "sst2": DownstreamTask(
        _GLUE, "sst2", "validation", "{sentence}\nIs this sentence positive or negative?", "label",
        ("negative", "positive"),
    ),
    "winogrande": DownstreamTask(
        "allenai/winogrande", "winogrande_xl", "validation",
        "{sentence}\nIn the previous sentence, does _ refer to {option1} or {option2}?", "answer",
        ("{option1}", "{option2}"), first_label=1,
    ),
    "mnli": DownstreamTask(
        _GLUE, "mnli", "validation_matched", "{premise}\n{hypothesis} True, False or Neither?", "label",
        ("True", "Neither", "False"), stated=("hypothesis",),
    ),
    "qqp": DownstreamTask(
        _GLUE, "qqp", "validation",
        "Question 1: {question1}\nQuestion 2: {question2}\nDo both questions ask the same thing?", "label",
        ("no", "yes"),
    ),
}  # fmt: skip
"""The six tasks of ILU (arXiv:2506.01339); wording of SST-2, MNLI and QQP as lm_eval has it, of WinoGrande as in
PromptSource, labels of AG News as in arXiv:2102.09690. GSM8K is trained on its worked solutions."""


@dataclass
class TaskRows:
    """The rows of one task.

    Attributes:
        name: of the task.
        train: rows to fine-tune on.
        held_out: rows that are scored.
        origins: {"train" | "held_out": where they come from, as `sources.Source.origins`}.
    """

    name: str
    train: list
    held_out: list
    origins: dict


def task_row(task, row):
    """Return the rows that a row of a task's own columns becomes; one in another accepted form is taken as it is.

    Args:
        task: DownstreamTask.
        row: dict.
    Returns:
        list of one row: question, answer, and with choices `choices` and `answer_index`.
    Raises:
        ValueError: saying what is wrong with the row.
    """
    row = filled_columns(row)
    if not set(task.columns) <= set(row) or "choices" in row:
        return [canonical_row(row)]
    texts = {name: text_of(row, name).strip() for name in task.columns if name != task.label}
    for name in task.stated:
        texts[name] += "" if texts[name].endswith(".") else "."
    question = task.question.format_map(texts)
    if not task.choices:
        return [canonical_row({"question": question, "answer": row[task.label]})]
    choices = [choice.format_map(texts) for choice in task.choices]
    number = str(row[task.label]).strip()
    if not number.isdigit() or not 0 <= int(number) - task.first_label < len(choices):
        last = task.first_label + len(choices) - 1
        raise ValueError(
            f"'{task.label}' must be a number from {task.first_label} to {last}, but is {row[task.label]!r}"
        )
    return [canonical_row({"question": question, "choices": choices, "answer": int(number) - task.first_label})]


def load_tasks(names, files, task_dir, hub, num_train=None, num_held_out=None):
    """Load the rows of every task that is asked for.

    Args:
        names: names of TASKS.
        files: words NAME=FILE or NAME=FOLDER; a folder holds train.jsonl, and test.jsonl or validation.jsonl.
        task_dir: folder with `<name>/train.*`, which replaces the Hub, or None.
        hub: HubOptions.
        num_train: rows to train on, the first ones; None or 0: all.
        num_held_out: rows to score, the first ones; None: all.
    Returns:
        list of TaskRows.
    Raises:
        UserError: an unknown task, a missing or malformed file, no rows for one of the two sets, a name given twice.
    """
    found = []
    for name in names:
        if name not in TASKS:
            error = unknown_name("--tasks", name, TASKS)
            raise UserError(f"{error}; --task {name}=FILE takes rows of your own")
        limits = (num_train or None, num_held_out)
        folder = Path(task_dir, name) if task_dir else None
        load = functools.partial(_from_folder, name, folder) if folder else functools.partial(_from_hub, name, hub=hub)
        found.append(load(limits=limits))
    for word in files:
        name, sign, place = word.partition("=")
        if not (sign and name and place):
            raise UserError(f"--task takes NAME=FILE, but was given '{word}'")
        load = _from_folder if Path(place).is_dir() else _from_file
        found.append(load(name, Path(place), limits=(num_train or None, num_held_out)))
    named = [task.name for task in found]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice:
        raise UserError(f"the task '{twice}' is named twice; each task has one name")
    return found


def split_held_out(rows, source):
    """Split the rows of one file: the last tenth, one row at least, is held out.

    Args:
        rows: list of dicts.
        source: what to call them in an error message.
    Returns:
        (rows to train on, rows held out).
    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} row, of which none can be held out; a task takes at least two")
    count = max(1, int(len(rows) * HELD_OUT_SHARE))
    return rows[:-count], rows[-count:]


def result_of(answer):
    """Return the part of an answer that an exact match compares: the number after GSM8K's `####`, else all of it.

    Args:
        answer: text.
    Returns:
        str in lower case, white space collapsed; of a result also without commas, dollar signs and a last full stop.
    Source: the strict match of lm_eval's gsm8k, which looks at the first `####`.
    """
    _, mark, result = answer.partition(MARKS_ANSWER)
    if not mark:
        return " ".join(answer.split()).lower()
    result = result.strip().split("\n")[0].strip()
    return result.replace(",", "").replace("$", "").removesuffix(".").strip().lower()


def _from_hub(name, hub, limits):
    task, sources = TASKS[name], {}
    # Commits of the domain's own sets mean nothing here.
    hub = replace(hub or HubOptions(), revision=None)
    reshape = functools.partial(task_row, task)
    for part, split, limit in (("train", "train", limits[0]), ("held_out", task.held_out, limits[1])):
        try:
            rows, commit = hub_rows(task.hub, task.config, split, None, limit, hub, reshape)
        except UserError as error:
            raise UserError(f"{error}; --task_dir DIR takes {name}/train.jsonl from a folder") from error
        sources[part] = Source.single(hub_name(task.hub, task.config, split), rows, commit)
    return _rows(name, sources)


def _from_folder(name, folder, limits):
    reshape = _reshape(name)
    train = _find(folder, ("train",))
    whole = _find(folder.parent, (folder.name,)) if train is None else None
    if whole is not None:
        return _from_file(name, whole, limits)
    if train is None:
        suffixes = ",".join(suffix[1:] for suffix in SUFFIXES)
        raise UserError(f"the task {name} needs {folder}/train.{{{suffixes}}} or {folder}.{{{suffixes}}}")
    held_out = _find(folder, HELD_OUT_NAMES)
    if held_out is None:
        return _from_file(name, train, limits)
    sources = {
        part: Source.single(str(path), read_rows(path, reshape)[:limit], None)
        for part, path, limit in (("train", train, limits[0]), ("held_out", held_out, limits[1]))
    }
    return _rows(name, sources)


def _from_file(name, path, limits):
    parts = split_held_out(read_rows(path, _reshape(name)), str(path))
    logger.info("%s: no rows were set apart, so that the last %d of %s are held out", name, len(parts[1]), path)
    sources = {
        part: Source.single(str(path), rows[:limit], None)
        for part, rows, limit in zip(("train", "held_out"), parts, limits, strict=True)
    }
    return _rows(name, sources)


def _reshape(name):
    """Return what makes rows of a task's own columns, where the name is one of the table."""
    return functools.partial(task_row, TASKS[name]) if name in TASKS else None


def _find(folder, names):
    paths = (folder / (name + suffix) for name in names for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _rows(name, sources):
    for part, source in sources.items():
        check_rows(source.rows, f"the {part} set of {name}")
    origins = {part: source.origins for part, source in sources.items()}
    return TaskRows(name, sources["train"].rows, sources["held_out"].rows, origins)
