"""TrainingArguments with our flags, and the older names folded into today's."""

import importlib.util
import logging
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from llm_unlearn.arguments import REFERENCE_MODES, UnlearnFlags, flag
from llm_unlearn.command_line import load_json
from llm_unlearn.errors import UserError
from llm_unlearn.processes import is_first_process
from llm_unlearn.regularizer_flags import resolve_regularizers
from llm_unlearn.schedules import CONSTANT, parse_schedule

logger = logging.getLogger(__name__)

_FSDP_WORDS = {
    "full_shard": ("reshard_after_forward", True),
    "shard_grad_op": ("reshard_after_forward", False),
    "offload": ("cpu_offload", True),
    "auto_wrap": ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
}
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "the methods define their own losses",
    "dataloader_drop_last": "the last batch is filled with rows of weight zero",
    "auto_find_batch_size": "the plan of batches is fixed before training; pass --per_device_train_batch_size",
    "hub_strategy": "the Trainer never pushes; --push_to_hub uploads once, after everything is on disk",
    "hub_always_push": "the Trainer never pushes; --push_to_hub uploads once, after everything is on disk",
    "enable_jit_checkpoint": "a SIGTERM saves a checkpoint anyway",
    "ignore_data_skip": "a resumed run continues at the row where it stopped",
}


@dataclass
class UnlearnArguments(UnlearnFlags, TrainingArguments):
    """TrainingArguments of every unlearning method; a method's own arguments class adds its knobs.

    Older names are folded into today's (`warmup_ratio`, `fsdp="full_shard auto_wrap"`,
    `fsdp_transformer_layer_cls_to_wrap`), and what this machine cannot do is dropped with one warning that names what
    runs instead: tf32 without CUDA, bf16 without an accelerator, FSDP on one process or without an accelerator.

    Raises:
        UserError: contradicting flags, or a flag that cannot take effect.
    """

    own_regularizers = ()

    train_sampling_strategy: str = flag(
        "group_by_length",
        "Which rows meet: group_by_length, rows of similar length, drawn for windows of 20 steps; batch_rebalance, "
        "any rows, ordered by length inside a step, which changes no update; random, as they are drawn. A step divides "
        "by its own tokens, so that under group_by_length tokens of short rows weigh more.",
        choices=["group_by_length", "batch_rebalance", "random"],
    )

    logging_steps: float = flag(1, "Log every this many steps, or every this share of them below 1.")

    warmup_steps: float | None = flag(None, "Steps spent warming up, or their share below 1; default 0.")

    def __post_init__(self):
        resolve_regularizers(self, self.own_regularizers)
        self._refuse_without_effect()
        self._refuse_unseen_backend()
        self._fold_warmup()
        self._fold_precision()
        self._fold_fsdp()
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        compute_dtype_is_ours = self._prepare_deepspeed()
        super().__post_init__()
        if compute_dtype_is_ours:
            self.bf16 = True
        self.autocast_in_forward = compute_dtype_is_ours
        if self.deepspeed and self.use_cpu:
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")

    def _refuse_without_effect(self):
        fields = type(self).__dataclass_fields__
        for name, reason in _WITHOUT_EFFECT.items():
            if name in fields and getattr(self, name) != fields[name].default:
                raise UserError(f"--{name} has no effect here: {reason}")
        if not 0 <= self.learning_rate < math.inf:
            raise UserError(f"--learning_rate must not be negative, but is {self.learning_rate}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, but is {getattr(self, name)}")
        weights = {name: getattr(self, name) for name in ("forget_weight", "retain_weight") if hasattr(self, name)}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"--{name} must be at least 0, and finite, but is {weight}")
        if weights and not any(weights.values()):
            raise UserError(f"{' and '.join(f'--{name}' for name in weights)} are 0, so that nothing would be trained")
        if getattr(self, "retain_loss", None) == "none" and not weights["forget_weight"]:
            raise UserError("--forget_weight 0 with --retain_loss none: nothing would be trained")
        if self.max_retain_rows is not None and self.max_retain_rows < 1:
            raise UserError(f"--max_retain_rows must be at least 1, but is {self.max_retain_rows}")
        if self.reference not in (None, *REFERENCE_MODES):
            raise UserError(f"--reference must be live, adapter_off or cached, but is '{self.reference}'")
        if self.reference_cache and self.reference not in (None, "cached"):
            raise UserError(f"--reference_cache has no effect with --reference {self.reference}")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, but is {self.seed}")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"--max_length must be at least 1, but is {self.max_length}")
        if self.num_train_epochs <= 0 and self.max_steps < 0:
            raise UserError(f"--num_train_epochs must be above 0, but is {self.num_train_epochs}")
        if self.train_sampling_strategy not in ("group_by_length", "batch_rebalance", "random"):
            raise UserError(
                "--train_sampling_strategy must be group_by_length, batch_rebalance or random, but is "
                f"'{self.train_sampling_strategy}'"
            )
        if self.eval_suite not in ("light", "full"):
            raise UserError(f"--eval_suite must be light or full, but is '{self.eval_suite}'")
        evaluates = self.do_eval or str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        if self.eval_suite == "full" and not evaluates:
            raise UserError("--eval_suite full has no effect without --do_eval True --eval_strategy steps or epoch")
        if self.retain_reference and self.eval_suite != "full":
            raise UserError("--retain_reference has no effect without --eval_suite full")
        if self.max_steps == 0:
            raise UserError("--max_steps 0 would train nothing; pass a positive number, or leave it out")

    def require_packages(self):
        """Refuse, before a model is loaded, what needs a package that is not installed."""
        optim = str(getattr(self.optim, "value", self.optim))
        if ("8bit" in optim or "paged" in optim) and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"--optim {optim} needs bitsandbytes: pip install bitsandbytes")

    def _refuse_unseen_backend(self):
        """Refuse what a launcher chose through environment variables: nothing here would know of it, or save for it."""
        for name in ("fsdp", "deepspeed"):
            is_on = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("true", "1")
            if is_on and not getattr(self, name):
                raise UserError(
                    f"the launcher switched {name} on (ACCELERATE_USE_{name.upper()}), but --{name} was not given; let "
                    f"accelerate start the processes only (recipes/launch/accelerate.yaml) and pass --{name}"
                )

    def _fold_warmup(self):
        if self.warmup_ratio is None:
            self.warmup_steps = self.warmup_steps or 0
            return
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio must lie in [0, 1), but is {self.warmup_ratio}")
        if self.warmup_steps not in (None, self.warmup_ratio):
            raise UserError("--warmup_ratio and --warmup_steps contradict each other; pass one of them")
        self.warmup_steps = self.warmup_ratio

    def _fold_precision(self):
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True
            if self.bf16:
                _say("--bf16: there is no accelerator, bfloat16 runs on the CPU")
        if self.tf32 and (self.use_cpu or not is_torch_tf32_available()):
            _say("--tf32 needs an NVIDIA GPU of the Ampere generation or newer; float32 runs instead")
            self.tf32 = None

    def _fold_fsdp(self):
        """Turn the words of `fsdp` into fsdp_config, or drop it where no FSDP can run."""
        if not self.fsdp or str(self.fsdp).lower() == "false":
            self.fsdp = None
            for name in ("fsdp_transformer_layer_cls_to_wrap", "fsdp_config"):
                if getattr(self, name):
                    raise UserError(f"--{name} has no effect without --fsdp")
            return
        if self.deepspeed:
            raise UserError("--fsdp and --deepspeed exclude each other; pass one of them")
        config = dict(load_json(self.fsdp_config) or {})
        if self.fsdp_transformer_layer_cls_to_wrap:
            config["transformer_layer_cls_to_wrap"] = [self.fsdp_transformer_layer_cls_to_wrap]
        if isinstance(self.fsdp, str) and self.fsdp.lower() != "true":
            for word in self.fsdp.split():
                if word not in _FSDP_WORDS:
                    raise UserError(f"unknown --fsdp option '{word}'. Known: {', '.join(_FSDP_WORDS)}")
                config.setdefault(*_FSDP_WORDS[word])
        if not fsdp_can_run(self):
            one = int(os.environ.get("WORLD_SIZE", "1")) == 1
            _say(f"--fsdp: {'one process runs without it' if one else 'no accelerator, DDP runs instead'}")
            self.fsdp = self.fsdp_config = None
            return
        self.fsdp, self.fsdp_config = True, config

    def _prepare_deepspeed(self):
        """Ready the process for DeepSpeed; returns whether bfloat16 compute is ours to run (weights stay float32)."""
        if not self.deepspeed:
            return False
        if "WORLD_SIZE" not in os.environ:
            raise UserError("--deepspeed needs a launcher; type torchrun --nproc_per_node=1 run_unlearn.py ...")
        if self.use_cpu:
            import deepspeed

            # Compiling this operator takes a minute and more; gloo does the same work (deepspeed 0.19).
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = dict(load_json(self.deepspeed))
        # DeepSpeed clips at 1.0 where its file says nothing, whatever max_grad_norm is.
        config.setdefault("gradient_clipping", float(self.max_grad_norm))
        zero = config.get("zero_optimization", {})
        if zero.get("stage") == 3:
            # Without it a ZeRO-3 run saves no weights that from_pretrained can load.
            config["zero_optimization"] = {**zero, "stage3_gather_16bit_weights_on_model_save": True}
        self.deepspeed = config
        own_bf16 = self.bf16 and str(config.get("bf16", {}).get("enabled", "auto")).lower() != "true"
        if own_bf16:
            # The engine's own bf16 mode writes bfloat16 checkpoints, which rounds small updates away; and it switches
            # an autocast of ours off on CUDA, so that it must bring its own.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
            self.bf16 = False
        return own_bf16


@dataclass
class RetainArguments(UnlearnArguments):
    """Arguments of a method with a retain term."""

    forget_weight: float = flag(1.0, "Weight of the forget term.")
    retain_weight: float = flag(1.0, "Weight of the retain term; 0 loads no retain set.")
    retain_loss: str = flag(
        "nll",
        "Retain term: nll descends on the retain set, kl holds the model to its reference there, none leaves it out.",
        choices=["nll", "kl", "none"],
    )

    forget_schedule: str = flag(
        CONSTANT, "How the weight of the forget term goes: constant, or START:END, factors of it as in 1:0.75."
    )
    retain_schedule: str = flag(
        CONSTANT, "How the weight of the retain term goes: constant, or START:END, factors of it as in 0:1."
    )

    retain_losses = ("nll", "kl", "none")

    def __post_init__(self):
        if self.retain_loss not in self.retain_losses:
            known = f"{', '.join(self.retain_losses[:-1])} or {self.retain_losses[-1]}"
            raise UserError(f"--retain_loss must be {known}, but is '{self.retain_loss}'")
        starts = {}
        for stream in ("forget", "retain"):
            name = f"{stream}_schedule"
            starts[stream] = parse_schedule(getattr(self, name), f"--{name}")[0] * getattr(self, f"{stream}_weight")
        if self.retain_loss == "none" or not self.retain_weight:
            starts["retain"] = 0.0
            if self.retain_schedule != type(self).__dataclass_fields__["retain_schedule"].default:
                raise UserError("--retain_schedule has no effect without a retain term")
        is_scheduled = {self.forget_schedule, self.retain_schedule} != {CONSTANT}
        if is_scheduled and not any(starts.values()):
            raise UserError("the weights of all terms start at 0, so that the first step would train nothing")
        super().__post_init__()


@dataclass
class ActivationArguments(RetainArguments):
    """Arguments of a method whose losses read hidden states."""

    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers whose output the losses read, counted from 0; default: all."},
    )
    retain_loss: str = flag(
        "l2",
        "Retain term: l2 holds the hidden states at --layers to the reference's, kl the output distribution, nll "
        "descends on the retain set, none leaves it out.",
        choices=["l2", "kl", "nll", "none"],
    )

    retain_losses = ("l2", "kl", "nll", "none")

    def __post_init__(self):
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise UserError(f"--layers must name at least one layer, and each once, but is {self.layers}")
        super().__post_init__()


@dataclass
class RampedArguments(ActivationArguments):
    """Arguments of a method with the weights and ramps that EleutherAI/unlearn gives most of its methods."""

    forget_weight: float = flag(5.0, "Weight of the forget term.")
    retain_weight: float = flag(5.0, "Weight of the retain term; 0 loads no retain set.")
    forget_schedule: str = flag(
        "1:0.75", "How the weight of the forget term goes: constant, or START:END, factors of it as in 1:0.75."
    )
    retain_schedule: str = flag(
        "0:1", "How the weight of the retain term goes: constant, or START:END, factors of it as in 0:1."
    )


def fsdp_can_run(args):
    """Return whether FSDP would really shard: several processes and an accelerator."""
    return not args.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _say(message):
    if is_first_process():
        logger.warning(message)
