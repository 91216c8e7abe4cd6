"""The two models that unlearning is measured against: the target, which knows all, and the retrained gold standard."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments


@dataclass
class FinetuneArguments(UnlearnArguments):
    """Arguments of `finetune`, whose steps mix rows of all lengths: a model that learns needs them."""

    train_sampling_strategy: str = flag(
        "batch_rebalance",
        "Which rows meet: batch_rebalance, any rows, ordered by length inside a step, which changes no update; "
        "group_by_length, rows of similar length; random, in the order drawn.",
        choices=["group_by_length", "batch_rebalance", "random"],
    )


@dataclass
class RetrainArguments(FinetuneArguments):
    """Arguments of `retrain`."""


class FinetuneTrainer(UnlearnTrainer):
    """Make a target model: train on the forget set, and on the retain set where one is given, as one set.

    Source: the target models of TOFU, Maini et al. 2024, arXiv:2401.06121.
    """

    args_class = FinetuneArguments
    optional_streams = ("retain",)
    token_terms = ("train",)

    def prepare_streams(self, streams, tokenizer, args):
        """Join the sets, so that an epoch sees each row of both once."""
        return {"train": [row for rows in streams.values() for row in rows]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the negative log-likelihood over the tokens of the step."""
        outputs = self.forward(model, inputs)
        return self.total_loss({"train": nll(outputs["train"].logps)}, outputs, return_outputs, num_items_in_batch)


class RetrainTrainer(FinetuneTrainer):
    """Make the gold model: train on the retain set alone, from the model before it ever saw the forget set.

    Source: exact unlearning, Cao and Yang 2015; the baseline of Yao et al. 2024, arXiv:2402.15159.
    """

    args_class = RetrainArguments
    streams = ("retain",)
    optional_streams = ()
