"""Rewritten activation transfer: forget rows are represented as their rewrites are, which the model learns to write."""

from dataclasses import dataclass, field

from llm_unlearn.activations import capture
from llm_unlearn.arguments import flag
from llm_unlearn.data.pairs import SOURCE, RewritePairs
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import own_states, split
from llm_unlearn.methods.rmu import DOWN_PROJECTIONS
from llm_unlearn.models import checked_layers
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.objectives.transfer_rewritten import aligned_transfer
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments

PUBLISHED_DEPTH = 32
PUBLISHED_LAYERS = (2, 4, 12, 20, 22, 26, 28, 30)
PUBLISHED_MLP_LAYERS = (1, 8, 16, 24, 31)


@dataclass
class RewrittenTransferArguments(RetainArguments):
    """Arguments of `rewritten_transfer`."""

    transfer_weight: float = flag(
        0.5, "Share of the states' distance in the forget loss, in (0, 1); the rest is the NLL of the rewrites."
    )
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers, from 0, whose outputs are compared; default: 2 4 12 20 22 26 28 30 of 32."},
    )
    mlp_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers, from 0, whose MLP results are compared; default: 1 8 16 24 31 of 32."},
    )

    def __post_init__(self):
        if not 0 < self.transfer_weight < 1:
            raise UserError(f"--transfer_weight must lie in (0, 1), but is {self.transfer_weight}")
        if not self.forget_weight > 0:
            raise UserError("--forget_weight must be above 0: rewritten_transfer is its forget and its rewritten term")
        for name in ("layers", "mlp_layers"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) != len(given)):
                raise UserError(f"--{name} must name at least one layer, and each once, but is {given}")
        super().__post_init__()


class RewrittenTransferTrainer(UnlearnTrainer):
    """Pull the states of forget tokens to those of the aligned tokens of a rewrite, and learn to write the rewrite.

        L = forget_weight * (w * mean_t transfer_t + (1 - w) * NLL(rewrite)) + retain_weight * (retain term)

    transfer_t is the mean over modules of (1/D) ||h_t - sg[g_a(t)]||^2 (`aligned_transfer`): the outputs of some
    decoder layers, and what the MLPs of others add to the residual stream. The rows carry `rewritten` and `alignment`,
    written by utils/rewrite_forget_set.py; a row and its rewrite meet in one forward, so that both states are those of
    the model as it is. The first token of a rewrite is never a target.

    Source: EleutherAI/unlearn 2026 (transfer_rewritten), which logs no result. Differs from the authors' code: its
    cross-entropy carries no gradient, and is NaN where no label is left; retain rows come in the same steps, not in
    phases of their own; the logits of the head are not among the modules, which would need all of them at once; states
    of the tokens that count are compared, not of the prompt; long texts are cut into windows that stay aligned, not at
    1024 tokens.
    """

    args_class = RewrittenTransferArguments
    streams = ("forget", "rewritten", "retain")
    paired_streams = {"rewritten": "forget"}
    token_terms = ("rewritten", "retain")

    @classmethod
    def check_rows(cls, rows, tokenizer, args):
        """Refuse forget rows without a rewrite, or aligned for another tokenizer."""
        pairs = RewritePairs(tokenizer, args.tokenize_options(None))
        for number, row in enumerate(rows["forget"], start=1):
            pairs.check(row, number)

    def forget_note(self, tokenizer, args):
        """Which row each token is of, to find its rewrite after the cut."""
        self._pairs = RewritePairs(tokenizer, self.tokenize_options)
        return self._pairs

    def prepare_streams(self, streams, tokenizer, args):
        """Make the stream of rewrites, where the data set does not bring it."""
        if all("alignment" in row for row in streams["forget"]) and "rewritten" in streams:
            return streams
        if "rewritten" in streams or not all(SOURCE in row for row in streams["forget"]):
            raise UserError("a tokenized data set needs the column `alignment` and the stream `rewritten`; pass rows")
        originals, rewrites = self._pairs.pair(streams["forget"])
        others = {name: rows for name, rows in streams.items() if name != "forget"}
        return {"forget": originals, "rewritten": rewrites, **others}

    def weight_of(self, stream, args=None):
        """The forget weight is shared by the two terms of the forget loss."""
        share = (args or self.args).transfer_weight
        shares = {"forget": share, "rewritten": 1 - share}
        if stream not in shares:
            return super().weight_of(stream, args)
        return shares[stream] * super().weight_of("forget", args)

    def runs(self, stream):
        """The states of the rewrites are needed where it is the originals' turn."""
        return super().runs(stream) or (stream == "rewritten" and self._only == "forget" and super().runs("forget"))

    def layers_for(self, args):
        """`--layers`, by default those at the published shares of the depth."""
        return checked_layers(args.layers or at_depth(PUBLISHED_LAYERS, self.depth), self.depth)

    def last_layer_for(self, args):
        """The rewrites' likelihood is read at the head."""
        return None

    def transfer(self, inputs, outputs, mlp_states):
        """Return the distance of each forget token (B, T-1) from the aligned token of its rewrite.

        Args:
            inputs: UnlearnBatch.
            outputs: {stream: StreamOutput} of a forward with `layers`.
            mlp_states: list of (B, T, D) of that forward's whole batch, what MLPs return.
        """
        running = [name for name in inputs if self.runs(name)]
        inside = [split(states, inputs, running) for states in mlp_states]
        layers = self.layers_for(self.args)
        forget, rewritten = (
            [*(outputs[name].hidden[layer] for layer in layers), *(own_states(part[name]) for part in inside)]
            for name in ("forget", "rewritten")
        )
        # Own states begin with the second token.
        return aligned_transfer(forget, rewritten, inputs["forget"]["alignment"][:, 1:] - 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the distance over forget tokens, the NLL over those of the rewrites, the retain term over its own."""
        layers = self.layers_for(self.args)
        modules = mlp_outputs(model, self.args.mlp_layers or at_depth(PUBLISHED_MLP_LAYERS, self.depth))
        with capture(*modules) as found:
            outputs = self.forward(model, inputs, layers=layers, scored=("rewritten", "retain"))
        terms = {
            "forget": self.transfer(inputs, outputs, found) if self.runs("forget") else None,
            "rewritten": nll(outputs["rewritten"].logps) if super().runs("rewritten") else None,
            "retain": self.retain_term(outputs, inputs),
        }
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


def at_depth(layers, depth):
    """Return the decoder layers of a model that stand where these stand in one of 32 layers, each once.

    Args:
        layers: indices in 0..31.
        depth: decoder layers of the model.
    Returns:
        list of indices: layer l goes to the layer whose output is as near as can be to the share (l + 1) / 32.
    """
    return sorted({max(int((layer + 1) * depth / PUBLISHED_DEPTH + 0.5) - 1, 0) for layer in layers})


def mlp_outputs(model, layers):
    """Return the modules that return what the MLPs of decoder layers add to the residual stream.

    Falcon adds the result of its attention to that in place, so that both are read there.

    Args:
        model: as for `decoder_layers`.
        layers: indices.
    Returns:
        list of modules.
    Raises:
        UserError: a layer that the model does not have, or in which no such module has a known name.
    """
    own = decoder_layers(model)
    found = []
    for layer in checked_layers(layers, len(own)):
        names = dict(own[layer].named_modules())
        known = [name.removesuffix(".weight") for name in DOWN_PROJECTIONS]
        chosen = next((names[name] for name in known if name in names), None)
        if chosen is None:
            raise UserError(
                f"layer {layer} of this model has no MLP output of a known name ({', '.join(known)}), as mixtures of "
                "experts have none; rewritten_transfer cannot read it"
            )
        found.append(chosen)
    return found
