"""Running only the layers that the losses read: the others are out while it trains, back when it is saved."""
# Shapes: B sequences, T tokens, D hidden size. Layer L is the decoder layer of index L, counted from 0; "its output" is
# what it hands to layer L + 1: hidden_states[L + 1] of transformers, and its input is hidden_states[L].

import contextlib
from itertools import chain

from torch import nn

from llm_unlearn.decoder import DEPTH, causal_lm, decoder_layers, final_norm, layers_and_owner, places, separate_head
from llm_unlearn.errors import UserError


def truncate(model, last_layer, first_layer=0, offload=False):
    """Make a model run its layers up to one only, in place; hidden states and gradients stay bit for bit the same.

    The layers above leave the list; those below `first_layer` leave empty places in it, so that each layer keeps its
    index and its parameters their names. The final norm and the head go too: the logits have shape (B, T, 0). The
    config is left alone, so that what is saved describes the whole model.

    Shorten BEFORE the model is wrapped: FSDP2 and ZeRO-3 then never shard or gather the rest, and DDP finds a gradient
    for every parameter that it has. What `restore` brings back after FSDP2 or ZeRO-3 is not sharded.

    Args:
        model: PreTrainedModel or PeftModel that is not wrapped yet; its optimizer is made afterwards.
        last_layer: index of the last layer that runs.
        first_layer: index of the first that runs; above 0 the model is called through `run_from_layer` alone.
        offload: keep what was taken out on the CPU meanwhile; otherwise it stays where it is.
    Returns:
        Truncation, to save (`full_state_dict`) and to undo (`restore`).
    Raises:
        UserError: a layer that the model does not have.
    """
    return Truncation(model, last_layer, first_layer, offload)


class Truncation:
    """What `truncate` returns: the way to save a shortened model and to make it whole again.

    Attributes:
        model: the model that was given, shortened in place.
        first_layer, last_layer: indices of the layers that run, inclusive.
    """

    def __init__(self, model, last_layer, first_layer=0, offload=False):
        self.model, self.first_layer, self.last_layer, self._offload = model, first_layer, last_layer, offload
        whole = model.state_dict(keep_vars=True)
        self._cut = Cut(model, first_layer, last_layer)
        kept = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
        self._keys, kept_keys = list(whole), set(kept.values())
        absent = {key: tensor for key, tensor in whole.items() if key not in kept_keys}
        # A second name of what is trained, the tied head, must not be saved as it was before training.
        self._tied = {key: kept[id(tensor)] for key, tensor in absent.items() if id(tensor) in kept}
        self._rest = {key: tensor for key, tensor in absent.items() if key not in self._tied}
        if offload:
            self._cut.move_absent("cpu")

    def restore(self, to_run=True):
        """Put every part back: the same modules and Parameter objects.

        Args:
            to_run: bring them to the device of those that were left, without which only saving is possible.
        """
        if to_run:
            self._cut.move_absent(next(decoder_layers(self.model)[self.last_layer].parameters()).device)
        self._cut.undo()

    @contextlib.contextmanager
    def whole(self, to_run=True):
        """Have the whole model back while the context is open: for an evaluation, or with `to_run=False` for a save."""
        self.restore(to_run)
        try:
            yield self.model
        finally:
            self._cut = Cut(self.model, self.first_layer, self.last_layer)
            if self._offload:
                self._cut.move_absent("cpu")

    def full_state_dict(self, state_dict=None):
        """Complete a state dict of the shortened model with what was taken out; under ZeRO-3 all processes call it.

        Args:
            state_dict: {name: tensor} of `model`, as it was trained; None takes the model's own.
        Returns:
            {name: tensor} with the keys of the whole model in their order, for save_pretrained; that is called inside
            `whole(to_run=False)`, because PEFT saves the adapters of the layers that it finds.
        """
        trained = self.model.state_dict() if state_dict is None else state_dict
        found = {key: _gathered(tensor) for key, tensor in self._rest.items()} | trained
        found |= {key: found[source] for key, source in self._tied.items() if source in found}
        return {key: found[key] for key in self._keys if key in found} | found


class Cut:
    """The parts that are out of a model, and where they belong."""

    def __init__(self, model, first, last):
        self.model = model
        self.layers, owner = layers_and_owner(model)
        if not 0 <= first <= last < len(self.layers):
            asked = f"layer {last}" if first in (0, last) else f"the range of layers {first} to {last}"
            raise UserError(f"{asked} does not exist: the model has layers 0 to {len(self.layers) - 1}")
        self.depth_before = getattr(self.layers, DEPTH, None)
        setattr(self.layers, DEPTH, self.depth_before or len(self.layers))
        self.above, self.below = list(self.layers[last + 1 :]), list(self.layers[:first])
        # In place, so that whoever holds the list sees what the model sees.
        del self.layers[last + 1 :]
        for index, layer in enumerate(self.below):
            self.layers[index] = Skipped(layer)
        language_model = causal_lm(model)
        self.replaced = []
        stand_ins = ((final_norm(owner, language_model), nn.Identity()), (separate_head(language_model), _NoHead()))
        for absent, stand_in in stand_ins:
            for parent, name in places(language_model, absent):
                self.replaced.append((parent, name, absent))
                setattr(parent, name, stand_in)

    def undo(self):
        for parent, name, module in self.replaced:
            setattr(parent, name, module)
        self.layers.extend(self.above)
        for index, layer in enumerate(self.below):
            self.layers[index] = layer
        if self.depth_before is None and hasattr(self.layers, DEPTH):
            delattr(self.layers, DEPTH)
        self.replaced, self.above, self.below = [], [], []

    def move_absent(self, device):
        kept = {id(tensor) for tensor in chain(self.model.parameters(), self.model.buffers())}
        for module in (*self.above, *self.below, *(module for _, _, module in self.replaced)):
            # model.eval() has not reached what is out of the model.
            module.train(self.model.training)
            for tensor in chain(module.parameters(), module.buffers()):
                if id(tensor) not in kept:  # module.to would take a tied head's weight away from the embedding
                    tensor.data = tensor.data.to(device)


class Skipped(nn.Module):
    """The place of a layer that does not run; `run_from_layer` replaces what it hands on."""

    def __init__(self, layer):
        super().__init__()
        # Which mask a layer gets stands on the layer in some models (`attention_type`), and the model asks all of them.
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | int)}
        vars(self).update({name: value for name, value in plain.items() if not name.startswith("_")})

    def forward(self, hidden_states, *args, **kwargs):
        # An axis in front serves both where layers return a tensor and where the model takes entry 0 of a tuple.
        return hidden_states.reshape(1, *hidden_states.shape[-3:])


class _NoHead(nn.Module):
    """The head of a model whose logits nobody reads: (B, T, 0), no weight."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states[..., :0]

    def register_parameter(self, name, param):
        """Take no weight: tie_weights, which accelerate calls under FSDP2, would hand it the embedding's."""


def _gathered(tensor):
    """Return a tensor's values; a parameter that ZeRO-3 keeps in parts is put together on the CPU."""
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone()
