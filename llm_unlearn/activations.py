"""Hidden states inside a decoder: catching them, running only the layers that matter, resuming from cached ones."""
# Shapes: B sequences, T tokens, D hidden size. Layer L is the decoder layer of index L, counted from 0; "its output" is
# what it hands to layer L + 1: hidden_states[L + 1] of transformers, and its input is hidden_states[L].

import contextlib
import copy
from functools import partial

from llm_unlearn.decoder import DEPTH, causal_lm, decoder_layers
from llm_unlearn.truncation import Cut, Skipped


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


@contextlib.contextmanager
def capture_layers(model, layers):
    """Catch what some decoder layers hand on; see `capture`.

    Args:
        model: as for `decoder_layers`.
        layers: indices.
    Yields:
        {layer: (B, T, D)}, filled by a forward; empty until then.
    """
    states, modules = {}, decoder_layers(model) if layers else []
    with capture(*(modules[layer] for layer in layers)) as hidden:
        yield states
    states.update(zip(layers, hidden, strict=True))


def run_without_head(model, input_ids, attention_mask):
    """Run a model for what is captured inside it; returns {} as the answers of its head."""
    model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return {}


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
    is_cut = hasattr(own, DEPTH) and len(own) == last + 1 and all(isinstance(lower, Skipped) for lower in own[:first])
    with contextlib.ExitStack() as stack:
        if not is_cut:
            stack.callback(Cut(model, first, last).undo)
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
