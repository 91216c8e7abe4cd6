"""EleutherAI/unlearn's launcher: its options to the run_unlearn.py command that they become, printed and run.

recipes/launch/run_unlearn.sh -a cb|ct|lens|seq|mu --rm R --ret R [options]

Differs from the authors' launcher: it runs here instead of submitting a job, on NPROC processes (one by default, there
4 GPUs); texts become all their chunks of 2048 tokens and not the first one, so that the number of steps is given and
not the epoch; orthogonality is asked for with --orth (there it is on, with one row on a device, which leaves no pair,
so that its value is 0), and then two rows are put on a device where there would be one row in all; the map of ct is the
identity, because the published maps belong one layer below where they are applied; no evaluation follows.
"""

import math
import os
import shlex
import sys
from dataclasses import dataclass, field

from llm_unlearn.cli.launching import (
    LauncherParser,
    given_flags,
    num_processes,
    require_number,
    run_words,
    start_words,
)
from llm_unlearn.errors import UserError, run_cli, unknown_name

MODEL = "EleutherAI/deep-ignorance-unfiltered"
WIKITEXT = "hub:EleutherAI/wikitext_document_level/wikitext-103-raw-v1:train#page"
# A quarter as many as the texts, as published, is a fifth of all.
WITH_CHAT = f"{WIKITEXT}=0.8,hub:HuggingFaceH4/ultrachat_200k:train_sft=0.2"
STEP_ROWS = 32


@dataclass(frozen=True)
class Algorithm:
    """What the launcher knows of one algorithm.

    Attributes:
        method: id in METHODS.
        tag: its name in the output folder.
        learning_rate, examples, rows: defaults of --lr, --examples and --pdbs.
        forget: the flag that --rm becomes.
        flags: {flag: value} of run_unlearn.py.
        lora, whole: further ones with and without adapters.
        alpha: of LoRA; None takes the rank.
        all_linear: whether adapters go on all linear layers; else PEFT chooses, for GPT-NeoX query_key_value.
    """

    method: str
    tag: str
    learning_rate: str
    examples: int = 1024
    rows: int = 1
    forget: str = "forget_weight"
    flags: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    whole: dict = field(default_factory=dict)
    alpha: int | None = 16
    all_linear: bool = False


# Its launcher passes retain_warmup.
CB = Algorithm("circuit_breakers", "cb", "1e-3", flags={"retain_schedule": "0.1:1"}, alpha=None, all_linear=True)
CT = Algorithm(
    "checkpoint_transfer", "ct", "1e-3", 2048, 2, all_linear=True,
    lora={"retain_loss": "kl"}, whole={"retain_loss": "nll"},
    flags={
        "teacher_model_name_or_path": "EleutherAI/deep-ignorance-pretraining-stage-unfiltered",
        "teacher_revision": "global_step38144",
    },
)  # fmt: skip
LENS = Algorithm(
    "tuned_lens", "lens", "1e-3", whole={"retain_loss": "kl"},
    flags={"lens_path": "EleutherAI/deep-ignorance-unfiltered-lens", "allow_pickle_lens": "True"},
)  # fmt: skip
SEQ = Algorithm(
    "sequential", "seq", "2e-4", alpha=None, whole={"retain_loss": "kl", "retain_schedule": "0.25:1"},
    flags={"start_layer": 31, "end_layer": 0, "layer_step": 1},
)  # fmt: skip
MU = Algorithm("max_update", "mu", "2e-4", forget="update_weight")
ALGORITHMS = {
    "cb": CB, "circuit_breakers": CB, "ct": CT, "checkpoint": CT, "lens": LENS, "seq": SEQ, "sequential": SEQ,
    "mu": MU, "maxupdate": MU,
}  # fmt: skip

_REFUSED_ALGORITHMS = dict.fromkeys(
    ("mp", "module_parallel"),
    "as published it applies no gradient to any weight, because it looks for names of blocks among those of "
    "parameters, so that there is nothing to repeat; the nearest is -a seq --sft, where each layer has its phase",
)
# What a flag of --extra brings its own of, with it.
_COMPANIONS = {
    "domain": "retain_data", "data_dir": "retain_data", "lens_path": "allow_pickle_lens",
    "teacher_model_name_or_path": "teacher_revision", "candidate_revisions": "teacher_revision",
    "unlearn_optimizer": "optim",
}  # fmt: skip


def main(argv=None, run=None):
    """Print every command and run it; returns the exit code, that of the first command which fails.

    Args:
        argv: list of words; None takes the process's own.
        run: function of a command's words that runs it and returns its exit status; None starts a process.
    """
    options = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    _check(options)
    for words in commands(options, os.environ):
        sys.stdout.write(shlex.join(words) + "\n")
        sys.stdout.flush()
        status = 0 if options.dry_run else (run or run_words)(words)
        if status:
            return status
    return 0


def commands(options, environment):
    """Return the commands that the options become, one for each learning rate.

    Args:
        options: namespace of the launcher's options, checked.
        environment: MODEL, NPROC and OUTPUT_ROOT are read.
    Returns:
        list of lists of words.
    Raises:
        UserError: options that cannot be honored together.
    """
    processes, start = num_processes(environment), start_words(environment)
    extra = shlex.split(options.extra)
    rates = (options.lr or ALGORITHMS[options.algorithm].learning_rate).split(",")
    if len(rates) > 1 and "output_dir" in given_flags(extra):
        raise UserError("--output_dir in --extra would be the same for every learning rate; set OUTPUT_ROOT instead")
    found = []
    for rate in rates:
        flags = _flags(options, rate, processes, environment, extra)
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        found.append([*start, "run_unlearn.py", *words, *extra])
    return found


def _flags(options, rate, processes, environment, extra):
    """Return {flag: value} of run_unlearn.py, without those that --extra gives."""
    algorithm, model = ALGORITHMS[options.algorithm], environment.get("MODEL", MODEL)
    given = given_flags(extra)
    rows = options.pdbs or algorithm.rows
    if options.orth and options.pdbs is None and rows * processes < 2:
        rows = 2
    accumulation = max(1, STEP_ROWS // (rows * processes))
    examples = options.examples or algorithm.examples
    flags = {"unlearn_method": algorithm.method, "target_model_name_or_path": model}
    flags |= _data_flags(options, given)
    flags |= {"max_length": 2048, "max_train_samples": examples}
    flags |= {algorithm.forget: options.rm, "retain_weight": options.ret, **algorithm.flags}
    flags |= algorithm.whole if options.sft else algorithm.lora
    flags |= _adapter_flags(options, algorithm, processes)
    if options.orth:
        flags["orth_coef"] = options.orth
    flags |= {"learning_rate": rate, "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    layers = _phases({**flags, **given}) if algorithm is SEQ else 1
    flags |= {"max_steps": layers * math.ceil(examples / (rows * processes * accumulation)), "weight_decay": 0.01}
    flags |= {"unlearn_optimizer": "muon"} if options.muon else {"optim": "adamw_torch"}
    flags |= {options.dtype: "True", "save_strategy": "no"}
    flags |= {"report_to": "wandb"} if options.wandb else {}
    folder = f"{os.path.basename(os.path.normpath(model))}_{_tag(options, algorithm, rate)}"
    flags["output_dir"] = os.path.join(environment.get("OUTPUT_ROOT", "output"), folder)
    if float(options.ret) == 0:
        flags.pop("retain_schedule", None)
        flags.pop("retain_loss", None)
    dropped = {*given, *(_COMPANIONS[name] for name in given if name in _COMPANIONS)}
    return {name: value for name, value in flags.items() if name not in dropped}


def _data_flags(options, given):
    retain = {} if float(options.ret) == 0 else {"retain_data": WITH_CHAT if options.use_ultrachat else WIKITEXT}
    own = sorted({"domain", "data_dir", "retain_data"} & set(given))
    if options.use_ultrachat and (own or not retain):
        why = f"--{own[0]} in --extra brings a retain set of its own" if own else "--ret 0 reads no retain set"
        raise UserError(f"--use_ultrachat has no effect: {why}")
    return {"domain": "wmdp_bio", **retain}


def _adapter_flags(options, algorithm, processes):
    if options.sft:
        return {"fsdp": "full_shard auto_wrap"} if processes > 1 else {}
    rank = options.rank or 16
    found = {"use_peft": "True", "lora_r": rank, "lora_alpha": algorithm.alpha or rank, "lora_dropout": 0.05}
    return found | ({"lora_target_modules": "all-linear"} if algorithm.all_linear else {})


def _phases(flags):
    """Return how many layers have a phase, each of one pass over the examples."""
    try:
        return (int(flags["start_layer"]) - int(flags["end_layer"])) // int(flags["layer_step"]) + 1
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"--start_layer, --end_layer and --layer_step in --extra must be numbers: {error}") from error


def _tag(options, algorithm, rate):
    kind = "sft" if options.sft else "lora"
    parts = [algorithm.tag, kind, f"ret{options.ret}", f"{'up' if algorithm is MU else 'rm'}{options.rm}"]
    parts += [f"orth{options.orth}"] if options.orth else []
    parts += [] if options.sft else [f"r{options.rank or 16}"]
    parts += [f"lr{rate}"] + (["muon"] if options.muon else []) + ([options.dtype] if options.dtype != "bf16" else [])
    parts += (["ultrachat"] if options.use_ultrachat else []) + ([options.tag_suffix] if options.tag_suffix else [])
    return "_".join(parts)


def _check(options):
    if options.algorithm in _REFUSED_ALGORITHMS:
        raise UserError(f"-a {options.algorithm} is not offered: {_REFUSED_ALGORITHMS[options.algorithm]}")
    if options.algorithm not in ALGORITHMS:
        raise unknown_name("-a", options.algorithm, ALGORITHMS)
    for name in ("rm", "ret", "orth"):
        require_number(name, getattr(options, name), 0)
    for rate in (options.lr or "1").split(","):
        require_number("lr", rate, 0)
    if options.orth is not None and float(options.orth) == 0:
        options.orth = None
    if options.nodes != 1:
        raise UserError("--nodes is not offered: several machines are started with recipes/launch/torchrun_nodes.sh or "
                        "slurm.sbatch, which take the flags that --dry-run prints")  # fmt: skip
    if options.time:
        raise UserError("--time is not offered: nothing is submitted; give sbatch recipes/launch/slurm.sbatch --time")
    if options.sft and options.rank is not None:
        raise UserError("--rank has no effect with --sft, which trains no adapter")
    if options.orth and ALGORITHMS[options.algorithm] is not CB:
        raise UserError(
            "--orth is an option of -a cb; elsewhere pass --extra '--regularizer orthogonality --orth_coef C'"
        )
    if options.orth and options.pdbs == 1 and os.environ.get("NPROC", "1") == "1":
        raise UserError(
            "--orth has no effect with --pdbs 1 on one process, where no pair of rows is left; pass --pdbs 2"
        )
    for name in ("rank", "examples", "pdbs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")


def _parser():
    parser = LauncherParser(
        "run_unlearn.sh",
        "run_unlearn.sh",
        description=__doc__,
        epilog="MODEL, NPROC (processes, torchrun above 1) and OUTPUT_ROOT (output) are variables of the environment.",
    )
    add = parser.add_argument
    add("-a", "--algorithm", required=True, help="cb, ct (checkpoint), lens, seq (sequential) or mu (maxupdate).")
    add("--rm", required=True, help="Weight of the forget term; of mu, of the size of the update.")
    add("--ret", required=True, help="Weight of the retain term; 0 reads no retain set.")
    add("-r", "--rank", type=int, help="Of LoRA; default 16.")
    add("--lr", help="Learning rate, or several with commas, one run for each; default 1e-3, of seq and mu 2e-4.")
    add("-n", "--examples", type=int, help="Forget rows and retain rows; default 1024, of ct 2048.")
    add("--pdbs", type=int, help="Rows on a device; default 1, of ct 2, with --orth at least 2 in all.")
    add("--sft", dest="sft", action="store_true", help="Train the whole model, sharded where there are processes.")
    add("--lora", dest="sft", action="store_false", help="Train adapters, which is the default.")
    add("--orth", help="Of cb: weight of orthogonality; 0 or without it, there is none.")
    add("--dtype", choices=["bf16", "fp16"], default="bf16", help="Precision that is computed in; default bf16.")
    add("--use_ultrachat", action="store_true", help="Mix chat into the retain set; needs a chat template.")
    add("--wandb", action="store_true", help="Report to Weights & Biases.")
    add("--tag-suffix", default="", help="Appended to the output folder's name.")
    add("--extra", default="", help="Further flags of run_unlearn.py in one pair of quotes; they win.")
    add("--dry-run", action="store_true", help="Print the commands and run nothing.")
    add("--muon", action="store_true", help="Muon for the layers' matrices, AdamW for the rest; default AdamW.")
    add("--nodes", type=int, default=1, help="Refused above 1.")
    add("--time", help="Refused: nothing is submitted.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
