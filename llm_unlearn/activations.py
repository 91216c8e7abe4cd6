"""Hidden states inside a decoder: catching them, running only the layers that matter, resuming from cached ones."""
# Shapes: B sequences, T tokens, D hidden size. Layer L is the decoder layer of index L, counted from 0; "its output" is
# what it hands to layer L + 1: hidden_states[L + 1] of transformers, and its input is hidden_states[L].

import contextlib
import copy
from functools import partial
from itertools import chain

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_unlearn.errors import UserError

_DEPTH = "_whole_depth"
"""Attribute of a shortened list of layers: how many there are in the whole model, which the config still says."""


def decoder_layers(model):
    """Return the decoder layers of a causal language model of any architecture.

    They are found by structure: the outermost ModuleList that is as long as the config says the model is deep.

    Args:
        model: PreTrainedModel, plain or inside a PeftModel, DDP, FSDP2, DeepSpeed or torch.compile; of one that was
            truncated the layers that are left are returned, each at its own index.
    Returns:
        torch.nn.ModuleList.
    Raises:
        UserError: the model is an encoder-decoder, or no list or several lists could be meant.
    """
    return _layers_and_owner(model)[0]


@contextlib.contextmanager
def capture(*modules):
    """Catch the hidden states that modules return while the context is open, gradients kept.

    For layer L that is hidden_states[L + 1] of transformers, but not for the last layer: there transformers gives what
    the final norm returns, and this what it gets. Open the context after wrapping, because the hidden states have to
    pass the hooks of FSDP2 and DeepSpeed first, and call the wrapped model, never the inner one.

    Gradient checkpointing has to be non-reentrant, the default of transformers. It also makes the embedding's output
    carry gradients, all through the frozen layers; `model.disable_input_require_grads()` undoes that.

    Args:
        *modules: as `decoder_layers(model)[L]`; what returns a tuple counts with its first entry.
    Yields:
        a list with a place for each module, None until a forward fills it with (B, T, D); the last forward counts.

    Example:
        with capture(layers[5], layers[7]) as hidden:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        at_5, at_7 = hidden
    """
    hidden = [None] * len(modules)
    hooks = [module.register_forward_hook(partial(_keep, hidden, place)) for place, module in enumerate(modules)]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


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
        self._cut = _Cut(model, first_layer, last_layer)
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
            self._cut = _Cut(self.model, self.first_layer, self.last_layer)
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


def run_from_layer(model, hidden, first, last, attention_mask=None, layers=None, **inputs):
    """Run layers `first..last` on given hidden states, as the whole forward would.

    It is the model's own forward, with its own positions, masks and windows, in which the layers below `first` are
    skipped and the input of layer `first` is replaced. So a frozen prefix is run once and its output cached by row.
    Padding has to be on the right, because positions count from the first column.

    On a model truncated to just these layers nothing is rebuilt. Under FSDP2 that, or a forward of the model before, is
    required: the first forward decides which layers are sharded together.

    Args:
        model: causal language model, wrapped or not, truncated or not.
        hidden: (B, T, D) output of layer `first - 1`.
        first, last: indices of layers, inclusive.
        attention_mask: (B, T), 1 where there is a token; None where there is no padding.
        layers: modules that run in the place of layers `first..last` (`frozen_copies`); None runs the model's own.
        **inputs: passed on to the model's forward.
    Returns:
        (B, T, D) output of layer `last`, with its gradient unless under torch.no_grad.
    Raises:
        UserError: a layer that the model does not have.
    """
    own, language_model = decoder_layers(model), causal_lm(model)
    is_cut = hasattr(own, _DEPTH) and len(own) == last + 1 and all(isinstance(lower, _Skipped) for lower in own[:first])
    with contextlib.ExitStack() as stack:
        if not is_cut:
            stack.callback(_Cut(model, first, last).undo)
        if layers is not None:
            stack.enter_context(_in_place_of(own, first, layers))
        # Before all other hooks: those of FSDP2 and DeepSpeed have to see the hidden states that the layer gets.
        hook = own[first].register_forward_pre_hook(partial(_substitute, hidden), with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        captured = stack.enter_context(capture(own[last]))
        embedding = language_model.get_input_embeddings()
        unused = hidden.new_zeros(*hidden.shape[:2], embedding.embedding_dim, dtype=embedding.weight.dtype)
        model(inputs_embeds=unused, attention_mask=attention_mask, use_cache=False, **inputs)
    return captured[0]


def frozen_copies(model, first, last):
    """Copy layers as they are before training, for `run_from_layer`: a reference that shares the frozen layers below.

    What is frozen already is shared with the model, so that only the trained parameters take memory twice. To be made
    before the model is wrapped, and not under ZeRO-3, whose parameters are in parts.

    Args:
        model: causal language model, its trained parameters chosen.
        first, last: indices of layers, inclusive.
    Returns:
        torch.nn.ModuleList in evaluation mode, without gradients.
    """
    layers = decoder_layers(model)[first : last + 1]
    shared = {id(parameter): parameter for parameter in layers.parameters() if not parameter.requires_grad}
    shared[id(causal_lm(model).config)] = causal_lm(model).config
    return copy.deepcopy(layers, shared).requires_grad_(False).eval()


def causal_lm(model):
    """Return the transformers model inside whatever wraps it, as PEFT or DDP; UserError where there is none."""
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise UserError(f"activations are read in transformers models, but {type(model).__name__} holds none")
    return found


class _Cut:
    """The parts that are out of a model, and where they belong."""

    def __init__(self, model, first, last):
        self.model = model
        self.layers, owner = _layers_and_owner(model)
        if not 0 <= first <= last < len(self.layers):
            asked = f"layer {last}" if first in (0, last) else f"the range of layers {first} to {last}"
            raise UserError(f"{asked} does not exist: the model has layers 0 to {len(self.layers) - 1}")
        self.depth_before = getattr(self.layers, _DEPTH, None)
        setattr(self.layers, _DEPTH, self.depth_before or len(self.layers))
        self.above, self.below = list(self.layers[last + 1 :]), list(self.layers[:first])
        # In place, so that whoever holds the list sees what the model sees.
        del self.layers[last + 1 :]
        for index, layer in enumerate(self.below):
            self.layers[index] = _Skipped(layer)
        language_model = causal_lm(model)
        self.replaced = []
        stand_ins = ((_final_norm(owner, language_model), nn.Identity()), (_head(language_model), _NoHead()))
        for absent, stand_in in stand_ins:
            for parent, name in _places(language_model, absent):
                self.replaced.append((parent, name, absent))
                setattr(parent, name, stand_in)

    def undo(self):
        for parent, name, module in self.replaced:
            setattr(parent, name, module)
        self.layers.extend(self.above)
        for index, layer in enumerate(self.below):
            self.layers[index] = layer
        if self.depth_before is None and hasattr(self.layers, _DEPTH):
            delattr(self.layers, _DEPTH)
        self.replaced, self.above, self.below = [], [], []

    def move_absent(self, device):
        kept = {id(tensor) for tensor in chain(self.model.parameters(), self.model.buffers())}
        for module in (*self.above, *self.below, *(module for _, _, module in self.replaced)):
            # model.eval() has not reached what is out of the model.
            module.train(self.model.training)
            for tensor in chain(module.parameters(), module.buffers()):
                if id(tensor) not in kept:  # module.to would take a tied head's weight away from the embedding
                    tensor.data = tensor.data.to(device)


class _Skipped(nn.Module):
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


def _layers_and_owner(model):
    language_model = causal_lm(model)
    depth = language_model.config.get_text_config(decoder=True).num_hidden_layers
    found = [pair for pair in _outermost_lists(language_model) if getattr(pair[0], _DEPTH, len(pair[0])) == depth]
    if len(found) > 1:
        found = [pair for pair in found if isinstance(pair[0][-1], GradientCheckpointingLayer)]
    if len(found) != 1 or language_model.config.is_encoder_decoder:
        raise UserError(
            f"activations are read in decoder-only models, but {type(language_model).__name__} has "
            f"{len(found) or 'no'} list{'s' * (len(found) != 1)} of {depth} layers"
        )
    return found[0]


def _outermost_lists(module):
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child, module
        else:
            yield from _outermost_lists(child)


def _final_norm(owner, language_model):
    """Return the one module beside the layers whose parameters are vectors of size D, or None: a norm may stay, too."""
    size = language_model.config.get_text_config(decoder=True).hidden_size

    def is_norm(module):
        shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()]
        return bool(shapes) and all(shape == (size,) for shape in shapes)

    # Bloom normalizes its embeddings as well.
    found = [module for name, module in owner.named_children() if "embed" not in name and is_norm(module)]
    return found[0] if len(found) == 1 else None


def _head(language_model):
    head = language_model.get_output_embeddings()
    return None if head is language_model.get_input_embeddings() else head


def _places(root, module):
    return [(up, name) for up in root.modules() for name, child in up.named_children() if child is module]


def _keep(hidden, place, module, args, output):
    hidden[place] = output[0] if isinstance(output, tuple) else output


def _substitute(hidden, module, args, kwargs):
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextlib.contextmanager
def _in_place_of(layers, first, substitutes):
    own = list(layers[first : first + len(substitutes)])
    for index, layer in enumerate(substitutes, first):
        layers[index] = layer
    try:
        yield
    finally:
        for index, layer in enumerate(own, first):
            layers[index] = layer


def _gathered(tensor):
    """Return a tensor's values; a parameter that ZeRO-3 keeps in parts is put together on the CPU."""
    if not hasattr(tensor, "ds_id"):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone()
