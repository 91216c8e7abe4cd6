"""The tuned lens: what a hidden state inside a model already says about the next token, read with its own head.

Translator i belongs to hidden_states[i] of transformers, which is the INPUT of decoder layer i. So what layer l hands
on goes through translator l + 1, and what the last layer hands on through none: there the lens is the model itself.
"""
# Shapes: N positions, D hidden size, V vocabulary, L decoder layers.

import contextlib
import copy
import hashlib

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_unlearn.activations import capture
from llm_unlearn.chunked_head import token_scores
from llm_unlearn.decoder import causal_lm, decoder_layers, final_norm, layers_and_owner
from llm_unlearn.errors import UserError
from llm_unlearn.head_reading import Head
from llm_unlearn.projection import Projection

_PROBE_TOKENS = 8


class TunedLens(nn.Module):
    """An affine map for each depth, then frozen copies of the model's final norm and head.

        lens_i(h) = softmax(head(norm(h + A_i h + b_i)))

    A and b begin at 0, where the lens is the logit lens. A depth without a translator is read through none.

    Attributes:
        num_layers: L of the model.
        translators: {str(i): Linear (D, D)}, `weight` is A_i and `bias` b_i; float32, the only parameters that train.
        norm: the model's final norm, or an identity where it has none.

    Args:
        num_layers: L.
        norm: module, which is kept.
        projection: Projection of the model's head.
        indices: the i in [0, L) that get a translator.
    Source: Belrose et al. 2023, arXiv:2303.08112; nostalgebraist 2020 for the logit lens.
    """

    def __init__(self, num_layers, norm, projection, indices=()):
        super().__init__()
        self.num_layers, self.norm = num_layers, norm.requires_grad_(False).eval()
        self.scale, self.softcap = projection.scale, projection.softcap
        self.register_buffer("head_weight", projection.weight.detach())
        self.register_buffer("head_bias", None if projection.bias is None else projection.bias.detach())
        self.translators = nn.ModuleDict()
        self.add_translators(indices)

    @classmethod
    def of(cls, model, indices=(), copies=None):
        """Make the logit lens of a model as it is.

        Args:
            model: causal language model, plain or with PEFT adapters, which the lens leaves out; whole, not truncated.
            indices: see the class.
            copies: function of a list of parameters that returns whole, plain copies of them where they are wanted;
                None copies them on their device. Needed where the parameters are in parts.
        Returns:
            TunedLens.
        Raises:
            UserError: the head is not one matrix of numbers.
        """
        layers, owner = layers_and_owner(model)
        language_model = causal_lm(model)
        head = Head(language_model)
        module = head.frozen_module() or head.module
        weight = getattr(module, "weight", None)
        size = language_model.config.get_text_config(decoder=True).hidden_size
        if not isinstance(module, nn.Linear) or not weight.is_floating_point() or module.in_features != size:
            raise UserError(
                f"no lens can be had of a {type(language_model).__name__}: its head is no matrix of numbers that takes "
                f"the {size} numbers of a hidden state"
            )
        norm = final_norm(owner, language_model)
        parts = [*(norm.parameters() if norm is not None else ()), *module.parameters()]
        copied = (copies or _copies)(parts)
        found = dict(zip(map(id, parts), copied, strict=True))
        memo = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in found.items()}
        norm = nn.Identity() if norm is None else copy.deepcopy(norm, memo)
        for parameter in norm.parameters():  # a norm has few numbers, and takes states of any precision in float32
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        bias = None if module.bias is None else found[id(module.bias)]
        return cls(len(layers), norm, Projection(found[id(weight)], bias, head.scale, head.softcap), indices)

    @property
    def hidden_size(self):
        """D."""
        return self.head_weight.shape[1]

    @property
    def projection(self):
        """The head, as `token_scores` takes it."""
        return Projection(self.head_weight, self.head_bias, self.scale, self.softcap)

    def hidden(self, index, states):
        """Return what the head gets.

        Args:
            index: i, in [0, L].
            states: (..., D) hidden_states[i], before the final norm also where i is L.
        Returns:
            (..., D) in the dtype of the states, with gradients to them and to the translator.
        """
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        if str(index) in self.translators:
            translator = self.translators[str(index)]
            # The correction runs in the states' precision (or autocast's), what it is added to does not.
            weight, bias = translator.weight.to(states.dtype), translator.bias.to(states.dtype)
            wide = wide + nn.functional.linear(states, weight, bias)
        return self.norm(wide).to(states.dtype)

    def scores(self, index, states, labels, **wanted):
        """Score tokens under the lens's distributions, chunk by chunk.

        Args:
            index: i, in [0, L].
            states: (N, D) hidden_states[i].
            labels: (N,) int64.
            **wanted: see `chunked_head.token_scores`.
        Returns:
            (K, N) float32 at least, nats; see there.
        """
        if states.requires_grad and torch.is_grad_enabled():
            # What the norm would keep for the backward is several times the states, at every depth.
            hidden = checkpoint(self.hidden, index, states, use_reentrant=False)
        else:
            hidden = self.hidden(index, states)
        return token_scores(hidden, self.projection, labels, **wanted)

    @torch.no_grad()
    def add_translators(self, indices, values=None):
        """Give depths a translator each.

        Args:
            indices: the i in [0, L).
            values: {i: (weight (D, D), bias (D,))}; None begins at 0.
        """
        size = self.hidden_size
        for index in indices:
            # Without first values, which would be drawn at random.
            made = nn.utils.skip_init(nn.Linear, size, size, device=self.head_weight.device, dtype=torch.float32)
            weight, bias = values[index] if values else (torch.zeros(size, size), torch.zeros(size))
            made.weight.copy_(weight)
            made.bias.copy_(bias)
            self.translators[str(index)] = made

    def sha256(self):
        """Return the sha256 of the translators."""
        found = hashlib.sha256()
        for name, tensor in self.translators.state_dict().items():
            found.update(name.encode())
            found.update(tensor.float().cpu().contiguous().numpy().data)
        return found.hexdigest()

    def narrow(self, dtype):
        """Keep head and translators, frozen from here on, in the dtype in which they are multiplied anyway."""
        self.requires_grad_(False)
        self.translators.to(dtype)
        self.head_weight = self.head_weight.to(dtype)
        self.head_bias = None if self.head_bias is None else self.head_bias.to(dtype)

    def require_agreement(self, model):
        """Refuse a model that does more between its last layer and its logits than this lens knows.

        Args:
            model: the whole model, which runs on a few tokens.
        Raises:
            UserError: its logits are not those of the lens at the last layer.
        """
        device, was_training = next(model.parameters()).device, model.training
        input_ids = torch.arange(min(_PROBE_TOKENS, len(self.head_weight)), device=device).unsqueeze(0)
        model.eval()
        try:
            with torch.no_grad(), capture(decoder_layers(model)[-1]) as captured:
                logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
        finally:
            model.train(was_training)
        states = self.hidden(self.num_layers, captured[0][0])
        own = self.projection.logits(states, torch.promote_types(states.dtype, self.head_weight.dtype))
        # A product that was rounded to 8 bits once or twice differs by a few times their resolution.
        tolerance = 0.05 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if logits.shape[-1] != len(own[0]) or (own - logits[0]).abs().max() > tolerance * logits.abs().max():
            raise UserError(
                f"no lens can be had of a {type(causal_lm(model)).__name__}: between its last layer and its logits it "
                "does more than a norm, one matrix, a scale and a softcap"
            )


def whole_copies(parameters, trainer):
    """Return copies of parameters on the device, whole and the same on every process; all processes call it.

    Args:
        parameters: of a model that is not wrapped yet, under ZeRO-3 in parts.
        trainer: UnlearnTrainer.
    """
    with gathered(parameters, trainer.zero_stage()):
        kept = [parameter.detach().to(trainer.args.device, copy=True) for parameter in parameters]
    # A loader that spares the host's memory fills the weights of the first process only.
    return [broadcast(tensor) for tensor in kept] if trainer.args.world_size > 1 else kept


def gathered(parameters, zero_stage):
    """Return a context in which parameters are whole on each process, also where ZeRO-3 keeps them in parts."""
    if zero_stage != 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]
