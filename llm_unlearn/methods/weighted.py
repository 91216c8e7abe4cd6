"""Ascent that weighs each token by how likely it still is: WGA, SatImp and CE-U."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.distillation import cross_entropy_unlearning
from llm_unlearn.objectives.weighted import saturation_importance, weighted_ascent
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class WGAArguments(RetainArguments):
    """Arguments of `wga`; defaults as in open-unlearning."""

    beta: float = flag(1.0, "Exponent of each token's probability in its weight, >= 0; 0 is plain ascent.")

    def __post_init__(self):
        _require_not_negative(self, "beta")
        super().__post_init__()


class WGATrainer(UnlearnTrainer):
    """Gradient ascent that leaves tokens alone once they are unlikely.

    Source: Wang et al. 2025, arXiv:2502.19301. Differs from the code of open-unlearning, which holds a reference that
    it never asks.
    """

    args_class = WGAArguments
    streams = ("forget", "retain")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs)
        forget = weighted_ascent(outputs["forget"].logps, self.args.beta)
        terms = {"forget": forget, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


@dataclass
class SatImpArguments(RetainArguments):
    """Arguments of `satimp`; defaults of open-unlearning's configuration, whose code exchanges the two weights."""

    beta1: float = flag(5.0, "Exponent of each token's probability in its weight, >= 0.")
    beta2: float = flag(1.0, "Exponent of one minus that probability, >= 0.")
    forget_weight: float = flag(0.1, "Weight of the forget term.")

    def __post_init__(self):
        _require_not_negative(self, "beta1", "beta2")
        super().__post_init__()


class SatImpTrainer(UnlearnTrainer):
    """Gradient ascent on tokens that are neither forgotten yet nor known for certain.

    Source: Yang et al. 2025, arXiv:2505.11953. Differs from the code of open-unlearning, which holds a reference that
    it never asks.
    """

    args_class = SatImpArguments
    streams = ("forget", "retain")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs)
        forget = saturation_importance(outputs["forget"].logps, self.args.beta1, self.args.beta2)
        terms = {"forget": forget, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


@dataclass
class CEUArguments(RetainArguments):
    """Arguments of `ceu`; defaults as published, so without a retain term."""

    skip_answer_tokens: int | None = flag(
        None,
        "How many tokens at the beginning of each forget answer do not count, so that the model still begins one: "
        "default 1, and 0 with --token_selection, which says itself what counts.",
    )
    retain_loss: str = flag(
        "none",
        "Retain term: none leaves it out, nll descends on the retain set, kl holds the model to its reference there.",
        choices=["none", "nll", "kl"],
    )

    def __post_init__(self):
        if self.token_selection and self.skip_answer_tokens:
            raise UserError("--skip_answer_tokens has no effect with --token_selection, which says itself what counts")
        if self.skip_answer_tokens is None:
            self.skip_answer_tokens = 0 if self.token_selection else 1
        _require_not_negative(self, "skip_answer_tokens")
        super().__post_init__()


class CEUTrainer(UnlearnTrainer):
    """Pull forget tokens to the model's own distribution over all other tokens, hardest where it is sure of the truth.

    Its gradient is that of ascent times p / (1 - p), made without a quotient, so that it also holds for tokens of
    probability 1. Texts have no answer, so that none of their tokens is skipped.

    Source: Yang 2025, arXiv:2503.01224. Differs from the authors' code: see `cross_entropy_unlearning`.
    """

    args_class = CEUArguments
    streams = ("forget", "retain")

    def prepare_streams(self, streams, tokenizer, args):
        """Let the first tokens of each forget answer not count."""
        rows = [_without_first(row, args.skip_answer_tokens) for row in streams["forget"]]
        rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
        if not rows:
            raise UserError(
                f"--skip_answer_tokens {args.skip_answer_tokens} leaves no token of the forget set; pass a smaller one"
            )
        return {**streams, "forget": rows}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, of_logits={"forget": _without_reference})
        terms = {"forget": outputs["forget"].of_logits, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


def _without_reference(logits, labels, ref_logits):
    return cross_entropy_unlearning(logits, labels)


def _without_first(row, count):
    """Return a row whose first counted tokens do not count; a text, which counts from its first token, stays whole."""
    counted = [n for n, label in enumerate(row["labels"]) if label != IGNORED]
    if not count or not counted or counted[0] == 0:
        return row
    skipped = set(counted[:count])
    return {**row, "labels": [IGNORED if n in skipped else label for n, label in enumerate(row["labels"])]}


def _require_not_negative(args, *names):
    for name in names:
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} must be >= 0, but is {getattr(args, name)}")
