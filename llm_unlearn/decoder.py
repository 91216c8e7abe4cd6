"""Where a causal language model of any architecture keeps its decoder layers, its final norm and its head."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_unlearn.errors import UserError

DEPTH = "_whole_depth"
"""Attribute of a shortened list of layers: how many there are in the whole model, which the config still says."""

_PATH = "_decoder_layers_path"
"""Attribute of a model whose decoder layers the user has named."""


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
    return layers_and_owner(model)[0]


def causal_lm(model):
    """Return the transformers model inside whatever wraps it, as PEFT or DDP; UserError where there is none."""
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise UserError(f"activations are read in transformers models, but {type(model).__name__} holds none")
    return found


def name_decoder_layers(model, path):
    """Say where a model of an unknown architecture keeps its decoder layers, for all functions here.

    Args:
        model: as for `decoder_layers`.
        path: attribute of the transformers model, for example "model.layers".
    Raises:
        UserError: it is no ModuleList of this model; the message names those that are there.
    """
    language_model = causal_lm(model)
    lists = [name for name, module in language_model.named_modules() if isinstance(module, nn.ModuleList)]
    if path not in lists:
        raise UserError(
            f"--decoder_layers '{path}' is no list of modules of {type(language_model).__name__}; it has "
            f"{', '.join(lists) or 'none'}"
        )
    setattr(language_model, _PATH, path)


def layers_and_owner(model):
    """Return (the ModuleList of decoder layers, the module that holds it); see `decoder_layers`."""
    language_model = causal_lm(model)
    path = getattr(language_model, _PATH, None)
    if path is not None:
        return language_model.get_submodule(path), language_model.get_submodule(path.rpartition(".")[0])
    depth = language_model.config.get_text_config(decoder=True).num_hidden_layers
    found = [pair for pair in _outermost_lists(language_model) if getattr(pair[0], DEPTH, len(pair[0])) == depth]
    if len(found) > 1:
        found = [pair for pair in found if isinstance(pair[0][-1], GradientCheckpointingLayer)]
    if len(found) != 1 or language_model.config.is_encoder_decoder:
        lists = [name for name, module in language_model.named_modules() if isinstance(module, nn.ModuleList)]
        raise UserError(
            f"activations are read in decoder-only models, but {type(language_model).__name__} has "
            f"{len(found) or 'no'} list{'s' * (len(found) != 1)} of {depth} layers; pass --decoder_layers with the "
            f"attribute that holds them ({', '.join(lists) or 'it has no list of modules'})"
        )
    return found[0]


def _outermost_lists(module):
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child, module
        else:
            yield from _outermost_lists(child)


def final_norm(owner, language_model):
    """Return the one module beside the layers whose parameters are vectors of size D, or None: a norm may stay, too."""
    size = language_model.config.get_text_config(decoder=True).hidden_size

    def is_norm(module):
        shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()]
        return bool(shapes) and all(shape == (size,) for shape in shapes)

    # Bloom normalizes its embeddings as well.
    found = [module for name, module in owner.named_children() if "embed" not in name and is_norm(module)]
    return found[0] if len(found) == 1 else None


def separate_head(language_model):
    """Return the head where it is a module of its own, or None where it is the embedding itself."""
    head = language_model.get_output_embeddings()
    return None if head is language_model.get_input_embeddings() else head


def places(root, module):
    """Return [(parent, name)] of every place at which a module stands under a root."""
    return [(up, name) for up in root.modules() for name, child in up.named_children() if child is module]
