"""The ACL 2024 pair: ascent on the forget set plus descent on, or divergence from the reference over, a retain set."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.likelihood import ascent, sequence_mean_nll
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments


@dataclass
class AscentPlusArguments(UnlearnArguments):
    """Arguments of both ACL 2024 methods with a retain set."""

    general: bool = flag(False, "Take the retain set from the general domain instead of the forget set's own.")
    positive_ratio: int = flag(1, "Retain sequences for each forget sequence.")
    positive_factor: float | None = flag(None, "The published name of --retain_weight (default 1).")
    forget_weight: float = flag(1.0, "Weight of the forget term.")
    retain_weight: float | None = flag(None, "Weight of the retain term (default 1); 0 loads no retain set.")

    def __post_init__(self):
        if self.positive_ratio < 1:
            raise UserError(f"--positive_ratio must be at least 1, but is {self.positive_ratio}")
        given = {value for value in (self.positive_factor, self.retain_weight) if value is not None}
        if len(given) > 1:
            raise UserError("--positive_factor and --retain_weight name the same weight; pass one of them")
        self.settings_given = bool(given) or self.positive_ratio != 1
        self.retain_weight = given.pop() if given else 1.0
        super().__post_init__()


@dataclass
class AscentPlusDescentArguments(AscentPlusArguments):
    """Arguments of `ascent_plus_descent`."""


@dataclass
class AscentPlusKLDivergenceArguments(AscentPlusArguments):
    """Arguments of `ascent_plus_kl_divergence`."""


class AscentPlusDescentTrainer(UnlearnTrainer):
    """Ascend on forget sequences, descend on retain sequences, each sequence weighing the same.

        L = mean over all sequences i of f_i * mean_t nll_it,   f_i = -forget_weight or +retain_weight

    Source: Yao et al. 2024, arXiv:2402.15159. Differs from the authors' code: where retain rows run out they start
    over, instead of shifting the factors onto forget rows.
    """

    args_class = AscentPlusDescentArguments
    streams = ("forget", "retain")
    token_terms = ()
    pooled = True

    def rows_per_anchor(self):
        """`--positive_ratio` retain rows for each forget row."""
        return {"retain": self.args.positive_ratio}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average over the forget and retain sequences of the step together."""
        outputs = self.forward(model, inputs)
        values = {name: sequence_mean_nll(out.logps, out.mask, out.weights) for name, out in outputs.items()}
        terms = {**values, "forget": -values["forget"]}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


class AscentPlusKLDivergenceTrainer(UnlearnTrainer):
    """Ascend on the forget tokens while the retain tokens' distribution is held to the reference's.

        L = forget_weight * mean log p(forget) + retain_weight * mean KL(r || p)

    Source: Yao et al. 2024, arXiv:2402.15159. Differs from the authors' code: a true KL (0 at the start) over the
    tokens that count, not a cross-entropy over padding too.
    """

    args_class = AscentPlusKLDivergenceArguments
    retain_loss = "kl"
    streams = ("forget", "retain")
    token_terms = ("forget", "retain")

    def rows_per_anchor(self):
        """`--positive_ratio` retain rows for each forget row."""
        return {"retain": self.args.positive_ratio}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average each term over the tokens of its stream."""
        outputs = self.forward(model, inputs)
        terms = {"forget": ascent(outputs["forget"].logps), "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
