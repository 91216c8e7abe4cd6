"""The command line of SOUL, WAGLE and ILU: a configuration and its overrides to the run_unlearn.py command, which runs.

python utils/unlearn_model.py --config_file configs/unlearn/Tofu/GradDiff+WAGLE.json \
    --unlearn.mask_path mask/tofu_0.95.pt --unlearn.lr 1e-5 --dry_run

A JSON file that is there is read; for a published one that is not, the recipe of that run stands in. Keys are
--section.key VALUE, as published; --extra holds flags of run_unlearn.py, and they win. `origin` and
--unlearn.resume_path train nothing and become a run_eval.py command.

Differs from the authors' command line: no evaluation follows; the run lies in ROOT/NAME/checkpoints, where NAME is the
configuration's and not the time; forget rows are the first ones, not drawn ones, and --dataset.forget_ratio cuts the
retain set too; a text becomes all its chunks and not the first one; [/INST] is written so, and not [\\INST], for every
model whose name has llama in it, however it is written; masked weights do not decay. NPO of the mean over the tokens is
NPO of their sum with beta and weight divided by their number, where that is about known: 40 for TOFU, a full row for
WMDP. The weight that `*_epoch` raises once an epoch rises steadily, with the same mean.
"""

import math
import os
import re
import shlex
import sys
from pathlib import Path

from llm_unlearn.cli.launching import (
    LauncherParser,
    given_flags,
    num_processes,
    require_number,
    run_words,
    start_words,
)
from llm_unlearn.cli.published_soul_request import (
    EPOCHS,
    FORGET,
    MASK,
    METHOD,
    MODEL,
    RATIO,
    RETAIN,
    SOPHIA,
    STEPS,
    read_request,
    typed_keys,
)
from llm_unlearn.cli.published_soul_tables import FORGET_SETS, LOSSES, NUMBERS, REFUSED_RETAIN_SETS, RETAIN_SETS, SCORES
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.processes import set_up_logging
from llm_unlearn.weight_mask_flags import READS

_CONSTANT = {"warmup_ratio": 0.1, "bf16": True, "logging_steps": 0.05, "save_strategy": "no"}
_LORA = {
    "use_peft": True, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
# Flags that say which data, and what a flag of --extra replaces besides itself.
_DATA = ("domain", "data_dir", "forget_data", "forget_split", "retain_data", "retain_split", "max_train_samples")
_COMPANIONS = {
    "domain": _DATA[2:6], "forget_data": ("forget_split",), "retain_data": ("retain_split",),
    "unlearn_optimizer": ("optim", "sophia_betas", "sophia_rho"),
    "optim": ("unlearn_optimizer", "sophia_betas", "sophia_rho"),
}  # fmt: skip


def main(argv=None, run=None):
    """Print the command and run it; returns its exit status.

    Args:
        argv: list of words; None takes the process's own.
        run: function of the command's words that runs it and returns its exit status; None starts a process.
    """
    set_up_logging()
    options, words = _parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    request = read_request(options.config_file, typed_keys(words), shlex.split(options.extra))
    command = command_of(request, os.environ)
    sys.stdout.write(_quoted(command) + "\n")
    sys.stdout.flush()
    return 0 if options.dry_run else (run or run_words)(command)


def command_of(request, environment):
    """Return the words of the command that a request becomes.

    Args:
        request: Request.
        environment: mapping; NPROC says on how many processes.
    Raises:
        UserError: keys that cannot be honored together, a missing mask.
    """
    settings, given = request.settings, given_flags(request.extra)
    if MODEL not in settings:
        raise UserError(f"--{MODEL} is missing")
    if settings[FORGET] == "HP" and not {"forget_data", "data_dir", "domain"} & set(given):
        raise UserError(
            f"--{FORGET} HP is a text under copyright, which nobody may hand out; pass --extra '--forget_data FILE'"
        )
    if settings[METHOD] == "origin" or "unlearn.resume_path" in settings:
        script, flags = ["run_eval.py"], _evaluation_flags(request)
    else:
        recipe = [] if request.is_whole else ["--config", f"recipes/{request.known.recipe}.yaml"]
        script, flags = ["run_unlearn.py", *recipe], _training_flags(request, num_processes(environment))
    flags = _without(flags, given)
    return [*start_words(environment), *script, *_words(flags), *request.extra]


def _words(flags):
    """Return the words of {flag: value or list of values}."""
    found = []
    for name, value in flags.items():
        found += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return found


def _quoted(words):
    """Return words for a shell, on one line where a template has several."""
    escapes = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n"})
    return " ".join(f"$'{word.translate(escapes)}'" if "\n" in word else shlex.quote(word) for word in words)


def _without(flags, given):
    """Leave out what --extra gives, and what goes with it."""
    dropped = {*given, *(name for flag in given for name in _COMPANIONS.get(flag, ()))}
    return {name: value for name, value in flags.items() if name not in dropped}


# ---- What the keys become ----


def _training_flags(request, processes):
    flags = {}
    if request.is_whole:
        flags = {"unlearn_method": request.loss.method}
    flags["target_model_name_or_path"] = request.settings[MODEL]
    flags |= _data_flags(request, request.keys)
    if request.is_whole:
        flags |= request.loss.flags
    flags |= _weights(request) | _steps(request, processes) | _optimizer(request)
    if request.is_on("unlearn.use_lora"):
        if MASK in request.settings:
            raise UserError(f"--unlearn.use_lora has no effect with --{MASK}, which is of the model's own weights")
        flags |= _LORA
    flags |= _mask(request) if MASK in request.settings else {}
    flags |= _CONSTANT if request.is_whole else {}
    flags |= {"cache_dir": request.settings["overall.cache_dir"]} if "overall.cache_dir" in request.keys else {}
    return flags | {"output_dir": os.path.join(_folder(request), "checkpoints")}


def _evaluation_flags(request):
    forget, settings = request.forget, request.settings
    flags = {"model_name_or_path": settings.get("unlearn.resume_path", settings[MODEL])}
    flags |= {name: value for name, value in forget.flags.items() if name in ("domain", "forget_split")}
    flags |= {"domain": forget.evaluated} if forget.evaluated else {}
    flags |= {"max_length": forget.max_length, **_template(request)}
    flags |= {"cache_dir": settings["overall.cache_dir"]} if "overall.cache_dir" in settings else {}
    return flags | {"output_dir": _folder(request)}


def _folder(request):
    return os.path.join(request.settings["logger.json.root"], request.settings.get("logger.name", request.name))


def _template(request):
    is_llama = "llama" in request.settings[MODEL].lower()
    template = request.forget.llama if is_llama else request.forget.others
    return {} if template is None else {"question_template": template}


def _data_flags(request, keys):
    forget, retain = request.forget, request.settings[RETAIN]
    flags = dict(forget.flags) if FORGET in keys else {}
    if request.loss.reads_retain and {FORGET, RETAIN} & keys and retain != forget.retain:
        if retain in REFUSED_RETAIN_SETS and not {"retain_data", "domain"} & set(given_flags(request.extra)):
            raise UserError(f"--{RETAIN} {retain} is not offered: {REFUSED_RETAIN_SETS[retain]}")
        if retain.startswith("Tofu") and flags.get("domain", "tofu") != "tofu":
            raise UserError(f"--{RETAIN} {retain} goes with a forget set of TOFU, not with {request.settings[FORGET]}")
        flags |= RETAIN_SETS.get(retain, {})
    if FORGET in keys:
        flags["max_length"] = forget.max_length
    flags |= _template(request) if {FORGET, MODEL} & keys else {}
    if RATIO in keys:
        rows = _num_rows(request)
        flags |= {} if rows == forget.rows or request.number(RATIO) == 1 else {"max_train_samples": rows}
    return flags


def _num_rows(request):
    """Return how many forget rows are asked for; None where a share of an unknown number is all of them."""
    ratio, rows = request.number(RATIO), request.forget.rows
    if ratio == 1:
        return rows
    if ratio < 1 and rows is None:
        raise UserError(
            f"--{RATIO} {request.settings[RATIO]} is a share of rows that are not counted; pass their number"
        )
    count = int(ratio if ratio > 1 else ratio * rows)
    if count < 1 or (rows is not None and count > rows):
        most = "" if rows is None else f" of the {rows} rows of {request.settings[FORGET]}"
        raise UserError(f"--{RATIO} must be a share or a number{most}, but is {request.settings[RATIO]}")
    return count


def _weights(request):
    """Return what the keys of the loss's own section become."""
    flags, prefix = {}, f"unlearn.{request.settings[METHOD]}."
    for name, key in request.loss.section.items():
        # NPO's numbers are of the forget set's tokens.
        follows = name == "beta" and FORGET in request.keys
        if not (request.is_whole or prefix + name in request.keys or follows):
            continue
        given = request.settings.get(prefix + name, str(key.default))
        require_number(prefix + name, given, 0)
        if float(given) == 0 and key.zero:
            raise UserError(f"--{prefix}{name} must be above 0: {key.zero}")
        if key.most is not None and float(given) > key.most:
            raise UserError(f"--{prefix}{name} must be at most {key.most}, but is {given}")
        flags |= {flag: f"{of(float(given), request.forget.tokens):.6g}" for flag, of in key.flags.items()}
    return flags


def _steps(request, processes):
    settings, loss = request.settings, request.loss
    flags = {flag: settings[key] for key, (flag, _) in NUMBERS.items() if key in request.keys}
    has_steps = request.number(STEPS) > 0
    if STEPS in request.keys and (has_steps or not request.is_whole):
        flags["max_steps"] = settings[STEPS]
    if loss.rises and has_steps:
        raise UserError(f"--{STEPS} has no effect on {settings[METHOD]}, which goes by epochs")
    if loss.rises:
        epochs = math.ceil(request.number(EPOCHS))
        flags |= {"retain_weight": 0} if epochs < 2 else {"retain_schedule": f"0:{(epochs - 1) / epochs:.6g}"}
    if loss.method == "l1_sparse" and not has_steps:
        rows = _num_rows(request)
        if rows is None:
            raise UserError(
                f"--{EPOCHS} goes over the forget set, which l1_sparse does not read; pass --{STEPS} NUMBER"
            )
        step = request.number("dataset.batch_size") * request.number("unlearn.gradient_accumulation_steps") * processes
        flags["max_steps"] = max(1, int(request.number(EPOCHS) * rows // step))
    return flags


def _optimizer(request):
    if not request.is_on(SOPHIA):
        return {"optim": "adamw_torch"} if request.is_whole else {}
    flags = {"unlearn_optimizer": "soul_legacy"} if SOPHIA in request.keys else {}
    low, high, rho = (f"unlearn.sophia_params.{name}" for name in ("betas_low", "betas_high", "rho"))
    if {low, high} & request.keys:
        flags["sophia_betas"] = [request.settings[low], request.settings[high]]
    return flags | ({"sophia_rho": request.settings[rho]} if rho in request.keys else {})


def _mask(request):
    """Return the flags of a weight mask: the file that was named, or one of ours of the same name."""
    path = Path(os.path.normpath(request.settings[MASK]))
    ours = path.with_suffix(".safetensors")
    if path.is_file():
        return {"weight_mask": path} | ({} if path == ours else {"allow_pickle_mask": True})
    if ours.is_file():
        return {"weight_mask": ours}
    ratio = re.search(r"_(\d*\.?\d+)\.[^.]+$", path.name)
    if ratio is None:
        raise UserError(f"--{MASK} '{path}' does not exist; name it TASK_RATIO.pt, as in mask/tofu_0.95.pt")
    command = ["python", "utils/make_weight_mask.py", *_words(_making(request, path, ratio[1])), "--output", str(ours)]
    raise UserError(f"--{MASK} '{path}' does not exist, nor does '{ours}'; make it: {_quoted(command)}")


def _making(request, path, ratio):
    """Return the flags of utils/make_weight_mask.py that make a mask for this run."""
    score, given = SCORES.get(path.parent.name, "wagle"), given_flags(request.extra)
    flags = {"target_model_name_or_path": request.settings[MODEL]}
    flags |= _without(_data_flags(request, {MODEL, FORGET, RETAIN, RATIO}), given)
    flags |= {name: given[name] for name in _DATA if name in given}
    flags |= {"score": score, "ratio": ratio}
    if request.loss.method == "po" and score in ("wagle", "snip", "grad_norm"):
        # The refusals that will be trained on.
        flags |= {"forget_loss": "refusal", "seed": request.settings["overall.seed"]}
    rows = _num_rows(request)
    if "unlearn.mu" in request.settings and rows and READS[score] == ("forget", "retain"):
        # Theirs divides a sum over batches, ours the mean.
        batches = math.ceil(rows / request.number("dataset.batch_size"))
        flags["gamma"] = f"{request.number('unlearn.mu') / batches:.6g}"
    return flags


def _parser():
    parser = LauncherParser(
        "utils/unlearn_model.py",
        "python utils/unlearn_model.py",
        description=__doc__,
        epilog="NPROC (processes, torchrun above 1) is a variable of the environment. Losses: "
        f"{', '.join((*LOSSES, 'origin'))}. Forget sets: {', '.join(FORGET_SETS)}. Retain sets: "
        f"{', '.join(RETAIN_SETS)}.",
    )
    add = parser.add_argument
    add("--config_file", "--config-file", help="JSON file of sections, or the name of a published one.")
    add("--dry_run", "--dry-run", action="store_true", help="Print the command and run nothing.")
    add("--extra", default="", help="Flags of run_unlearn.py in one pair of quotes; they win.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
