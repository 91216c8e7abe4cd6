"""Reading a model's answers where its head stands, inside the forward of the wrapped model."""
# Shapes: B sequences, T tokens, D hidden size, V vocabulary, N positions, C positions of a chunk.

import contextlib
import logging

import torch
from torch.utils.checkpoint import checkpoint

from llm_unlearn.chunked_head import chunk_rows, token_scores
from llm_unlearn.head import (
    StreamOutput,
    concatenate,
    counted_labels,
    counted_positions,
    counted_states,
    counted_weights,
    split,
)
from llm_unlearn.objectives.entropy import uniform_cross_entropy
from llm_unlearn.objectives.likelihood import kl_divergence, token_entropy, token_logps
from llm_unlearn.projection import Projection

logger = logging.getLogger(__name__)
_PROBE_TOKENS = 8


class HeadReader:
    """Runs a model and reads it at its head: the head's place is taken by a function of the hidden states.

    It runs inside the wrapped model's own forward, where sharded weights are gathered and where FSDP2 and ZeRO-3 learn
    that the head will be needed in the backward; a head called from outside raises there. The function makes what is
    wanted at the positions that count, so that logits of all tokens never exist.

    What some models do to their logits afterwards (softcap, scale) is known to `Head`. A first forward of a few tokens
    finds out whether that is all; where it is not, the function reads the model's own logits instead.

    Args:
        model: causal language model, not wrapped but for PEFT.
    """

    def __init__(self, model):
        self.language_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = Head(self.language_model)
        self.is_probed = False

    def __call__(self, model, read, input_ids, attention_mask):
        """Run the model and return what `read` made of its hidden states.

        Args:
            model: the wrapped model.
            read: function of (Head, hidden states (B, T, D)); with gradients enabled it must return one tensor.
            input_ids: (B, T).
            attention_mask: (B, T).
        Returns:
            what `read` returned; a tensor comes back as the wrapped model's own output, with its gradient.
        """
        if not self.is_probed:
            self._probe(model, input_ids, attention_mask)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.head.is_dense:
            return read(self.head, model(**inputs).logits)
        with self._replaced(read) as found:
            output = model(**inputs).logits
        return output.view(found[0].shape) if torch.is_grad_enabled() else found[0]

    @contextlib.contextmanager
    def _replaced(self, read):
        """Let `read` stand in for the head, and its result for the logits, whatever the model does to them."""
        module, found, kept = self.head.module, [], []
        original, was_set = module.forward, "forward" in vars(module)

        def forward(hidden):
            found.append(read(self.head, hidden))
            # Three axes, as logits have, for models that look at them.
            return found[0].view(1, 1, -1) if torch.is_grad_enabled() else hidden.new_zeros(*hidden.shape[:-1], 1)

        def replace_logits(_module, _arguments, output):
            output.logits = kept[0]
            return output

        self.head.project = original
        module.forward = forward
        # After the hooks of ZeRO-3 on the head, before those of FSDP2 on the model: both must see the result.
        hooks = [
            module.register_forward_hook(lambda _module, _arguments, output: kept.append(output)),
            self.language_model.register_forward_hook(replace_logits, prepend=True),
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
            module.forward = original
            if not was_set:
                del module.forward

    @torch.no_grad()
    def _probe(self, model, input_ids, attention_mask):
        """Compare what the model makes of its head's output with what `Head` would; all processes together.

        It is one and the same product on both sides, so that only what is done to it afterwards can differ.
        """
        self.is_probed = True
        if self.head.is_dense:
            return
        ids, mask = input_ids[:1, :_PROBE_TOKENS], attention_mask[:1, :_PROBE_TOKENS]
        was_training, products = model.training, []
        hook = self.head.module.register_forward_hook(lambda _module, _arguments, output: products.append(output))
        model.eval()
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()
            model.train(was_training)
        if not products or not self.head.agrees(products[-1], logits):
            logger.warning("this model changes its logits in a way of its own: they are made whole, which takes memory")
            self.head.is_dense = True


def score_streams(
    reader, model, inputs, streams, pad_token_id, entropy=(), linear=(), ref_hidden=None, ref_projection=None,
    uniform=(), scored=None, of_logits=None,
):  # fmt: skip
    """Score the counted tokens of streams in one forward.

    Args:
        reader: HeadReader.
        model: the wrapped model.
        inputs: UnlearnBatch.
        streams: names, in the order of the stack.
        pad_token_id: fills shorter streams.
        entropy: names of the streams whose entropy is wanted.
        linear: names of the streams whose loss is one number times each token's value; see `token_scores`.
        ref_hidden: {stream: (N, D) last hidden states of the reference} of the streams whose divergence is wanted, or
            whose function of the logits takes the reference's.
        ref_projection: the reference's head, see `Head.scores`.
        uniform: names of the streams whose cross-entropy with the uniform distribution is wanted, or {name: top_k}.
        scored: names of the streams that are read, at least one; the others only run. None reads all.
        of_logits: {stream: function (logits (N, V), labels (N,), the reference's logits (N, V) or None) -> (N,)} of the
            streams for which something else is wanted that takes the whole vocabulary; it must be in float32 at least,
            and takes the place of the divergence.
    Returns:
        {stream: StreamOutput} of the streams that are read.
    """
    scored = tuple(streams) if scored is None else scored
    ref_hidden, of_logits = ref_hidden or {}, of_logits or {}
    top_k = uniform if isinstance(uniform, dict) else {}
    wanted = {
        name: [True, name in ref_hidden and name not in of_logits, name in entropy, name in uniform, name in of_logits]
        for name in scored
    }

    def read(head, states):
        found = []
        parts = split(states, inputs, streams)
        for name in scored:
            part, stream = parts[name], inputs[name]
            weights = counted_weights(stream) if name in linear else None
            hidden, labels = counted_states(part, stream), counted_labels(stream)
            wants = {"entropy": name in entropy, "uniform": name in uniform, "top_k": top_k.get(name)}
            wants["of_logits"] = of_logits.get(name)
            scores = head.scores(hidden, labels, ref_hidden.get(name), ref_projection, linear=weights, **wants)
            found.append(scores.reshape(-1))
        return torch.cat(found)

    flat = reader(model, read, *concatenate(inputs, streams, pad_token_id))
    return _outputs(flat, inputs, wanted)


def _outputs(flat, inputs, wanted):
    """Return {stream: StreamOutput} of all values end to end, those of a stream row by row, as far as wanted."""
    sizes = {name: int(counted_positions(inputs[name]).sum()) for name in wanted}
    outputs = {}
    for name, part in zip(wanted, flat.split([sum(wanted[name]) * sizes[name] for name in wanted]), strict=True):
        rows = iter(part.view(sum(wanted[name]), sizes[name]))
        outputs[name] = StreamOutput.of(inputs[name], *[next(rows) if given else None for given in wanted[name]])
    return outputs


class Head:
    """A causal language model's output layer, as `HeadReader` hands it to what reads there.

    Attributes:
        module: the output layer, or None where the model has none.
        is_dense: whether hidden states are the model's finished logits, and the projection the identity.
        project: the output layer's own forward.
    """

    def __init__(self, language_model):
        config = language_model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        find = getattr(language_model, "get_output_embeddings", None)
        self.module = find() if find else None
        self.is_dense = self.module is None
        self.project = None

    def agrees(self, product, logits):
        """Return whether logits are the head's product with scale and softcap, and nothing else.

        Args:
            product: (B, T, V) what the head returned.
            logits: what the model returned.
        """
        if product.shape != logits.shape:
            return False
        expected, logits = self._finished(product), logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_narrow = product.dtype in (torch.bfloat16, torch.float16)
        # Scale and softcap round once more where the model applies them in its own narrow dtype.
        tolerance = 1e-2 if is_narrow and (self.softcap or self.scale != 1) else 1e-5
        return torch.allclose(expected.to(logits.dtype), logits, rtol=tolerance, atol=tolerance)

    def is_plain(self):
        """Return whether the head is one weight and at most a bias: no adapter on it, no quantized weight."""
        weight = getattr(self.module, "weight", None)
        return isinstance(self.module, torch.nn.Linear) and weight.is_floating_point() and weight.dim() == 2

    def frozen_module(self):
        """Return the module that projects for the reference where PEFT wraps the head, else None."""
        for name in ("base_layer", "original_module"):
            if hasattr(self.module, name):
                return getattr(self.module, name)
        return None

    def trains(self):
        """Return whether the reference's projection differs from this one's after training, and has to be kept."""
        if self.is_dense or self.frozen_module() is not None:
            return False
        return any(parameter.requires_grad for parameter in self.module.parameters())

    def logits(self, hidden):
        """Return (N, V) finished logits of (N, D) hidden states; for a few positions."""
        return hidden if self.is_dense else self._finished(self.project(hidden))

    def scores(
        self,
        hidden,
        labels,
        ref_hidden=None,
        ref_projection=None,
        entropy=False,
        linear=None,
        uniform=False,
        top_k=None,
        of_logits=None,
    ):
        """Score tokens; see `chunked_head.token_scores`.

        Args:
            hidden: (N, D).
            labels: (N,) int64.
            ref_hidden: (N, D) of the reference, or None.
            ref_projection: Projection of the reference's head; None takes this one, which then must not train.
            entropy: whether to return it.
            linear: (N,), see there.
            uniform, top_k: see there.
            of_logits: see `score_streams`; its values come last.
        Returns:
            (K, N) nats.
        """
        if of_logits or self.is_dense or not self.is_plain():
            wanted = entropy, uniform, top_k, of_logits
            return self._scores_of_any_head(hidden, labels, ref_hidden, ref_projection, *wanted)
        module = self.module
        own = Projection(module.weight, module.bias, self.scale, self.softcap)
        reference = None
        if ref_hidden is not None:
            kept = (module.weight.detach(), None if module.bias is None else module.bias.detach())
            kept = kept if ref_projection is None else (ref_projection.weight, ref_projection.bias)
            reference = ref_hidden, Projection(*kept, self.scale, self.softcap)
        return token_scores(hidden, own, labels, reference, entropy, linear, uniform, top_k)

    def _scores_of_any_head(self, hidden, labels, ref_hidden, *wanted):
        """The same through the head's own forward, chunk by chunk, each recomputed in the backward."""
        if len(hidden) == 0:
            # An empty chunk keeps the graph, so that every process has a gradient for every weight.
            return self._chunk_scores(hidden, labels, ref_hidden, *wanted)
        rows = chunk_rows(self._vocabulary(hidden), hidden.device)
        found = []
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            ref_part = None if ref_hidden is None else ref_hidden[part]
            arguments = (hidden[part], labels[part], ref_part, *wanted)
            found.append(
                checkpoint(self._chunk_scores, *arguments, use_reentrant=False)
                if torch.is_grad_enabled()
                else self._chunk_scores(*arguments)
            )
        return torch.cat(found, 1)

    def _chunk_scores(self, hidden, labels, ref_hidden, ref_projection, entropy, uniform, top_k, of_logits):
        logits, ref_logits = self.logits(hidden), None
        rows = [token_logps(logits, labels)]
        if ref_hidden is not None:
            with torch.no_grad():
                ref_logits = self._reference_logits(ref_hidden.to(hidden.dtype), ref_projection)
        if ref_hidden is not None and not of_logits:
            rows.append(kl_divergence(logits, ref_logits))
        if entropy:
            rows.append(token_entropy(logits))
        if uniform:
            rows.append(uniform_cross_entropy(logits, top_k))
        if of_logits:
            rows.append(of_logits(logits, labels, ref_logits))
        return torch.stack(rows)

    def _reference_logits(self, hidden, projection):
        if self.is_dense:
            return hidden
        if projection is not None:
            return self._finished(torch.nn.functional.linear(hidden, projection.weight, projection.bias))
        return self._finished((self.frozen_module() or self.project)(hidden))

    def _finished(self, logits):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)

    def _vocabulary(self, hidden):
        if self.is_dense:
            return hidden.shape[-1]
        return getattr(self.module, "out_features", None) or self.module.weight.shape[0]
