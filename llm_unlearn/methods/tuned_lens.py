"""Unlearning through a tuned lens: what hidden states inside the model say about the next token is erased."""
# Shapes: B sequences, T tokens, D hidden size, V vocabulary, N counted positions.

from dataclasses import dataclass

import torch

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.frozen_lens import LOGIT, frozen_lens, lens_entropy
from llm_unlearn.head import counted_positions, scatter
from llm_unlearn.objectives.entropy import random_target
from llm_unlearn.objectives.labels import random_labels
from llm_unlearn.objectives.likelihood import ascent
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RampedArguments

LOSSES = ("entropy", "random_target", "cross_entropy")


@dataclass
class TunedLensArguments(RampedArguments):
    """Arguments of `tuned_lens`."""

    lens_path: str | None = flag(
        None,
        "Folder or Hub name of the lens that utils/train_tuned_lens.py trained for this model, or logit for the logit "
        "lens, which needs no training.",
    )
    lens_loss: str = flag(
        "entropy",
        "Forget term: entropy, the cross-entropy of the uniform distribution under the lens; random_target, that of "
        "one token drawn anew at each step, whose expectation the former is; cross_entropy, ascent on the true next "
        "token.",
        choices=["entropy", "random_target", "cross_entropy"],
    )
    allow_pickle_lens: bool = flag(
        False, "Read a published lens that is a pickle (params.pt): its tensors, and nothing else."
    )

    def __post_init__(self):
        if not self.lens_path:
            raise UserError(
                "--lens_path is missing; train a lens with utils/train_tuned_lens.py and pass its folder, or pass logit"
            )
        if self.lens_loss not in LOSSES:
            raise UserError(f"--lens_loss must be {', '.join(LOSSES[:-1])} or {LOSSES[-1]}, but is '{self.lens_loss}'")
        if self.lens_path == LOGIT and self.allow_pickle_lens:
            raise UserError("--allow_pickle_lens has no effect with --lens_path logit, which reads no file")
        super().__post_init__()


class TunedLensTrainer(UnlearnTrainer):
    """Make what every layer already says about the next token, read through a lens, say nothing.

        L = forget_weight * mean_t (1/|layers|) sum_l loss(lens_l(h_lt)) + retain_weight * (retain term)
        entropy         (logsumexp_v z_v - mean_v z_v) / ln V, z the lens's logits; 1 where it is uniform, else above
        random_target   -log p(y) / ln V, y ~ Uniform{0, ..., V-1}, whose expectation the former is
        cross_entropy   log p(x), x the true next token

    The lens, made of the model as it was, is frozen; the gradient goes through the hidden states. entropy and
    random_target read each forget token's own state, the first of a row left out; cross_entropy reads the state before
    each forget token, from the third token of a row on. No layer above the highest of --layers runs where the retain
    term reads states too.

    Source: EleutherAI/unlearn 2026 (tuned-lens unlearning), its defaults and ramps. Differs from the authors' code: the
        output of layer l goes through the translator of hidden_states[l + 1], that of the last layer through none,
        where their hooks put it through the translator of hidden_states[l]; the entropy form is the expectation of
        their random target, without its noise; cross_entropy is in their README alone; the retain term defaults to
        states (l2) for full fine-tuning too, where theirs is a KL over padding as well; padding never counts.
    """

    args_class = TunedLensArguments
    streams = ("forget", "retain")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layers = self.layers_for(self.args)
        self.lens = frozen_lens(self, self.layers)
        self.lens_sha256 = self.lens.sha256()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, layers=self.layers, scored=("retain",))
        forget = self.layer_mean(outputs["forget"], self.lens_values(inputs["forget"]))
        terms = {"forget": forget, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)

    def lens_values(self, stream):
        """Return the function that `layer_mean` takes: of (layer, its states (B, T-1, D)), to forget values (B, T-1).

        Args:
            stream: forget stream of an UnlearnBatch.
        """
        loss = self.args.lens_loss
        if loss == "entropy":
            return lambda layer, hidden: lens_entropy(self, self.lens, layer, hidden, stream)
        counted, labels = counted_positions(stream), stream["labels"][:, 1:]
        if loss == "random_target":
            labels = self._random_labels(stream, counted)
        else:
            # hidden[:, t] is the state of token t + 1, which predicts token t + 2, whose place is t + 1.
            counted = torch.cat([torch.zeros_like(counted[:, :1]), counted[:, 1:]], 1)
        weights = stream["weights"][:, 1:] if "weights" in stream else torch.ones_like(labels, dtype=torch.float32)
        targets, weights = labels[counted], weights[counted]

        def values(layer, hidden):
            states = hidden[counted] if loss == "random_target" else hidden[:, :-1][counted[:, 1:]]
            with self.reference_autocast(is_plain_module=True):
                (logps,) = self.lens.scores(layer + 1, states, targets, linear=weights)
            found = scatter(logps, counted)
            return ascent(found) if loss == "cross_entropy" else random_target(found, len(self.lens.head_weight))

        return values

    def run_state(self):
        """What a resumed run must share: the lens too."""
        return {**super().run_state(), "lens": self.lens_sha256}

    def _random_labels(self, stream, counted):
        """Return (B, T-1) labels drawn by the seed, the row and the optimizer step alone, the same for all layers."""
        labels, vocabulary = torch.zeros_like(stream["labels"][:, 1:]), len(self.lens.head_weight)
        for number, row in enumerate(stream["index"].tolist()):
            seed = ((self.args.seed * 1_000_003 + row) * 1_000_003 + self.state.global_step) % 2**63
            places = labels[number][counted[number]]
            drawn = random_labels(places.cpu(), vocabulary, torch.Generator().manual_seed(seed))
            labels[number, counted[number]] = drawn.to(labels.device)
        return labels
