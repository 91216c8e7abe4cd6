"""How an attack trains: the flags of the scripts that fine-tune, and the settings of one configuration of theirs."""

import math
from dataclasses import asdict, dataclass, field

from llm_unlearn.arguments import TokenizeFlags, flag
from llm_unlearn.errors import UserError, unknown_name

SCHEDULERS = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")
_PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True)
class FinetuningSettings:
    """How one fine-tuning goes; weights are float32 whatever the checkpoint holds.

    Attributes:
        learning_rate: of the first step after the warm-up.
        lr_scheduler: constant, linear or cosine; a warm-up goes before any of them.
        warmup: optimizer steps spent warming up, or their share below 1.
        epochs: passes over the rows, where max_steps does not say how long.
        max_steps: optimizer steps; -1 leaves it to epochs.
        batch_size: sequences in a forward, on each process.
        grad_accumulation: forwards in an optimizer step.
        optimizer: adamw or muon.
        weight_decay: decoupled.
        lora_r: rank of an adapter, which trains instead of the weights; 0 trains all weights.
        lora_target: names of the modules with an adapter; () takes PEFT's choice for the architecture.
        autocast: None computes in float32; bf16 or fp16 computes in that over float32 weights.
        eval_every: optimizer steps between evaluations.
        save_steps: optimizer steps between checkpoints to resume from; 0 writes none.
        seed: of the order of the rows, and of an adapter's weights.
        use_cpu: whether an accelerator is left alone.
        tokenize: how rows become tokens.
    """

    learning_rate: float = 2e-5
    lr_scheduler: str = "constant"
    warmup: float = 0.0
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 4
    grad_accumulation: int = 4
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    lora_r: int = 0
    lora_target: tuple = ()
    autocast: str | None = None
    eval_every: int = 10
    save_steps: int = 0
    seed: int = 42
    use_cpu: bool = False
    tokenize: TokenizeFlags = field(default_factory=TokenizeFlags)

    def record(self):
        """Return the settings as JSON-serializable values, for results.json and to tell two runs apart."""
        found = {**asdict(self), **asdict(self.tokenize)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
                if name not in ("use_cpu", "tokenize")}  # fmt: skip


@dataclass
class FinetuningFlags:
    """Flags of the attacks that fine-tune, with the published defaults; mixed into a script's flags."""

    num_train_examples: int = flag(
        0, "Sequences, or chunks of documents, to train on; more than there are go round again. 0: all, once."
    )
    epochs: float = flag(1.0, "Passes over them.")
    max_steps: int = flag(-1, "Optimizer steps; replaces --epochs.")
    eval_every: int = flag(10, "Optimizer steps between evaluations; the model is evaluated before the first too.")
    lr: float = flag(2e-5, "Learning rate.")
    lr_scheduler: str = flag("constant", "How it goes after the warm-up.", choices=list(SCHEDULERS))
    warmup_ratio: float = flag(0.0, "Share of the steps spent warming up, in [0, 1).")
    warmup_steps: int = flag(0, "Steps spent warming up; excludes --warmup_ratio.")
    batch_size: int = flag(4, "Sequences in a forward, on each process.")
    grad_accumulation: int = flag(4, "Forwards in an optimizer step; 4 of 4 sequences are the published 16.")
    optimizer: str = flag(
        "adamw", "adamw, or muon for the decoder layers' matrices and AdamW for the rest.", choices=list(OPTIMIZERS)
    )
    weight_decay: float = flag(0.01, "Decoupled weight decay.")
    precision: str | None = flag(
        None,
        "Compute in bf16 or fp16; default: float32. The weights are float32 always, whatever the checkpoint: a step of "
        "AdamW moves a weight by about the learning rate, and 2e-5 is below half of what separates two bfloat16 "
        "numbers from 0.01 on, so that an attack on bfloat16 weights would hardly move, and look resisted.",
        choices=list(_PRECISIONS),
    )
    bf16: bool = flag(False, "The same as --precision bf16.")
    lora_r: int = flag(0, "Rank of a LoRA adapter that trains instead of the weights, its alpha the same; 0: none.")
    lora_target: str | None = flag(
        None, "Modules with an adapter, separated by commas; default: what PEFT takes for the architecture."
    )
    save_steps: int = flag(
        0, "Optimizer steps between checkpoints that a killed attack resumes from; 0 writes none: it starts again."
    )


def finetuning_settings(parsed, **changes):
    """Return the FinetuningSettings of a parsed command line.

    Args:
        parsed: ParsedEvaluation whose flags are FinetuningFlags and ScoringFlags.
        **changes: fields that this configuration has otherwise, as in `learning_rate=1e-4`.
    Returns:
        FinetuningSettings.
    Raises:
        UserError: a value out of its range, or two flags that contradict each other.
    """
    flags = parsed.flags
    check_finetuning(flags)
    if flags.warmup_ratio and flags.warmup_steps:
        raise UserError("--warmup_ratio and --warmup_steps contradict each other; pass one of them")
    if flags.bf16 and flags.precision == "fp16":
        raise UserError("--bf16 and --precision fp16 contradict each other; pass one of them")
    given = {
        "learning_rate": flags.lr, "lr_scheduler": flags.lr_scheduler, "epochs": flags.epochs,
        "warmup": flags.warmup_ratio or flags.warmup_steps, "max_steps": flags.max_steps,
        "batch_size": flags.batch_size, "grad_accumulation": flags.grad_accumulation, "optimizer": flags.optimizer,
        "weight_decay": flags.weight_decay, "lora_r": flags.lora_r,
        "lora_target": tuple(name.strip() for name in (flags.lora_target or "").split(",") if name.strip()),
        "autocast": "bf16" if flags.bf16 else flags.precision, "eval_every": flags.eval_every,
        "save_steps": flags.save_steps, "seed": flags.seed, "use_cpu": flags.use_cpu,
        "tokenize": TokenizeFlags(
            flags.max_length, flags.question_template, flags.chat_template_kwargs, flags.system_prompt
        ),
    }  # fmt: skip
    settings = FinetuningSettings(**{**given, **changes})
    if settings.lora_target and not settings.lora_r:
        raise UserError("--lora_target has no effect without --lora_r RANK")
    return settings


def check_finetuning(flags):
    """Refuse FinetuningFlags out of their range.

    Raises:
        UserError: naming the flag, what was given and what is allowed.
    """
    for name in ("batch_size", "grad_accumulation", "eval_every"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")
    for name in ("num_train_examples", "save_steps", "warmup_steps", "lora_r"):
        if getattr(flags, name) < 0:
            raise UserError(f"--{name} must not be negative, but is {getattr(flags, name)}")
    if flags.lr is not None and not 0 < flags.lr < math.inf:
        raise UserError(f"--lr must be above 0, and finite, but is {flags.lr}")
    if not 0 <= flags.warmup_ratio < 1:
        raise UserError(f"--warmup_ratio must lie in [0, 1), but is {flags.warmup_ratio}")
    if not 0 <= flags.weight_decay < math.inf:
        raise UserError(f"--weight_decay must not be negative, and finite, but is {flags.weight_decay}")
    if flags.max_steps != -1 and flags.max_steps < 1:
        raise UserError(f"--max_steps must be at least 1, or -1 for --epochs, but is {flags.max_steps}")
    if flags.max_steps == -1 and not 0 < flags.epochs < math.inf:
        raise UserError(f"--epochs must be above 0, but is {flags.epochs}")
    for name, known in (("lr_scheduler", SCHEDULERS), ("optimizer", OPTIMIZERS), ("precision", _PRECISIONS)):
        if getattr(flags, name) not in (None, *known):
            raise unknown_name(f"--{name}", getattr(flags, name), known)


def require_float32(parsed):
    """Have models loaded in float32, and refuse flags that ask for other weights.

    Args:
        parsed: ParsedEvaluation.
    Raises:
        UserError: --dtype of another precision, or quantized weights.
    """
    if parsed.model.dtype not in ("auto", "float32"):
        raise UserError(
            f"--dtype {parsed.model.dtype}: an attack trains float32 weights, because bfloat16 and float16 swallow its "
            "updates; to compute faster, pass --precision bf16"
        )
    if parsed.model.load_in_4bit or parsed.model.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit have no effect here: an attack trains float32 weights")
    parsed.model.dtype = "float32"
