"""Maximum-entropy unlearning: on the forget set, every next token becomes as likely as any other."""
# Shapes: B sequences, T tokens, N counted positions.

from dataclasses import dataclass

import torch

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions
from llm_unlearn.objectives.entropy import max_entropy, random_target
from llm_unlearn.objectives.labels import random_labels
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments

FORMS = ("exact", "random_target", "top_k")
TOP_K = 100


@dataclass
class MaxEntropyArguments(RetainArguments):
    """Arguments of `max_entropy`."""

    form: str = flag(
        "exact",
        "Forget term: exact, the cross-entropy of the uniform distribution over the vocabulary; random_target, that of "
        "one token drawn anew at each step, whose expectation the former is; top_k, the exact form over the likeliest "
        "tokens alone.",
        choices=["exact", "random_target", "top_k"],
    )
    top_k: int | None = flag(None, "How many of the likeliest tokens --form top_k reads (default 100), at least 2.")

    def __post_init__(self):
        if self.form not in FORMS:
            raise UserError(f"--form must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, but is '{self.form}'")
        if self.top_k is not None and self.form != "top_k":
            raise UserError(f"--top_k has no effect with --form {self.form}; pass --form top_k")
        if self.form == "top_k":
            self.top_k = TOP_K if self.top_k is None else self.top_k
            if self.top_k < 2:
                raise UserError(f"--top_k must be at least 2, but is {self.top_k}")
        if "max_entropy" in (self.regularizer or []):
            raise UserError(
                "--regularizer max_entropy is what max_entropy does by itself; pass --forget_weight instead"
            )
        super().__post_init__()


class MaxEntropyTrainer(UnlearnTrainer):
    """Flatten the next-token distribution over forget tokens, instead of making the right token unlikely.

        L = forget_weight * mean C(forget) / log V + retain_weight * (retain term)
        C = logsumexp_v z_v - mean_v z_v, the cross-entropy of the uniform distribution under the model

    The forget term starts above 2 where a model knows what comes next, and is 1 when nothing is left to forget. Random
    targets are drawn by the seed, the row and the optimizer step alone: accumulation, the number of processes and a
    resume change none.

    Source: EleutherAI/unlearn 2026, whose default is the random-target form.
    """

    args_class = MaxEntropyArguments
    streams = ("forget", "retain")
    token_terms = ("forget", "retain")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        if (self.args.top_k or 0) > self.vocabulary:
            raise UserError(f"--top_k {self.args.top_k} is more than the model's {self.vocabulary} tokens")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        terms = {}
        if self.args.form == "random_target":
            inputs = {**inputs, "forget": self._with_random_targets(inputs["forget"])}
            outputs = self.forward(model, inputs)
            terms["forget"] = random_target(outputs["forget"].logps, self.vocabulary)
        else:
            outputs = self.forward(model, inputs, uniform={"forget": self.args.top_k})
            # None where the forget stream does not have its turn.
            if outputs["forget"].uniform is not None:
                terms["forget"] = max_entropy(outputs["forget"].uniform, self.args.top_k or self.vocabulary)
        terms["retain"] = self.retain_term(outputs, inputs)
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)

    def _with_random_targets(self, stream):
        """Return the stream with labels drawn uniformly from the vocabulary at the tokens that count."""
        labels, counted = stream["labels"].clone(), torch.nn.functional.pad(counted_positions(stream), (1, 0))
        for number, row in enumerate(stream["index"].tolist()):
            generator = torch.Generator().manual_seed(_draw_seed(self.args.seed, row, self.state.global_step))
            drawn = random_labels(labels[number][counted[number]].cpu(), self.vocabulary, generator)
            labels[number][counted[number]] = drawn.to(labels.device)
        return {**stream, "labels": labels}


def _draw_seed(seed, row, step):
    return ((seed * 1_000_003 + row) * 1_000_003 + step) % 2**63
