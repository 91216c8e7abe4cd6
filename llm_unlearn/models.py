"""Models and tokenizers: loaded in float32, wrapped with LoRA where asked."""

import dataclasses
import difflib
import fnmatch
import hashlib
import logging
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_unlearn.checkpoints import file_sha256
from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

LOADED_WITH = "_loaded_with"
"""Attribute of a loaded model with the arguments of its from_pretrained, for loading the same one again."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES |= {"float64": torch.float64}


def load_model(name, dtype="float32", **kwargs):
    """Load a causal language model, in float32 unless asked otherwise.

    Weights in bfloat16 swallow updates below their resolution, which at the learning rates of unlearning is most of
    them; compute in bfloat16 on float32 weights is what `--bf16 True` gives.

    Args:
        name: folder or name on the Hub.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
        **kwargs: passed on to from_pretrained.
    Returns:
        PreTrainedModel.
    Raises:
        UserError: the model cannot be loaded.
    """
    kwargs = {"dtype": _DTYPES.get(dtype, dtype), **kwargs}
    model, found = _load(AutoModelForCausalLM, name, "model", output_loading_info=True, **kwargs)
    if found["missing_keys"]:
        # They would be drawn at random, and the run would go on.
        raise UserError(
            f"the model '{name}' lacks {len(found['missing_keys'])} weights, {min(found['missing_keys'])} is one"
        )
    setattr(model, LOADED_WITH, {key: value for key, value in kwargs.items() if value is not None})
    return model


def load_tokenizer(name, **kwargs):
    """Load a tokenizer that pads on the right.

    Args:
        name: folder or name on the Hub.
        **kwargs: passed on to from_pretrained.
    Returns:
        a transformers tokenizer.
    Raises:
        UserError: the tokenizer cannot be loaded.
    """
    return _load(AutoTokenizer, name, "tokenizer", padding_side="right", **kwargs)


def model_fingerprint(name, **kwargs):
    """Return what tells the weights of two models apart without loading them.

    Args:
        name: folder or name on the Hub.
        **kwargs: passed on to from_pretrained.
    Returns:
        the commit on the Hub, or the sha256 of a folder's weight files.
    """
    config = _load(AutoConfig, name, "model", **kwargs)
    if getattr(config, "_commit_hash", None):
        return config._commit_hash
    files = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")])
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


def loaded_fingerprint(model):
    """Return the `model_fingerprint` of what a model was loaded from, or None for one that was made in memory.

    Args:
        model: PreTrainedModel.
    Raises:
        UserError: what it was loaded from is gone.
    """
    name, how = getattr(model.config, "_name_or_path", None), getattr(model, LOADED_WITH, {})
    where = {key: how[key] for key in ("revision", "cache_dir", "token") if key in how}
    return model_fingerprint(name, **where) if name else None


def context_length(name, **kwargs):
    """Return how many tokens a model reads at most, or None where its config does not say.

    Args:
        name: folder or name on the Hub.
        **kwargs: passed on to from_pretrained.
    """
    return getattr(_load(AutoConfig, name, "model", **kwargs), "max_position_embeddings", None)


def quantization_config(config):
    """Return how the weights are quantized when loaded, from TRL's ModelConfig, or None.

    Args:
        config: trl.ModelConfig.
    Returns:
        BitsAndBytesConfig or None.
    Raises:
        UserError: LoRA or quantization flags without --use_peft.
    """
    adapters = ("lora_", "bnb_", "use_rslora", "use_dora", "use_bnb", "load_in_")
    fields = [field for field in dataclasses.fields(config) if field.name.startswith(adapters)]
    given = [field.name for field in fields if getattr(config, field.name) != field.default]
    if given and not config.use_peft:
        raise UserError(f"--{given[0]} has no effect without --use_peft")
    from trl import get_quantization_config

    return get_quantization_config(config)


def with_lora(model, config):
    """Wrap a model with the adapters that TRL's ModelConfig describes.

    Args:
        model: PreTrainedModel.
        config: trl.ModelConfig.
    Returns:
        PeftModel, or the model itself without `use_peft`.
    Raises:
        UserError: target modules that the model does not have.
    """
    if not config.use_peft:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training
    from trl import get_peft_config

    if config.load_in_4bit or config.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        return get_peft_model(model, get_peft_config(config))
    except ValueError as error:
        raise UserError(f"LoRA cannot wrap this model: {error}") from error


def train_only(model, patterns):
    """Let only the parameters with these names train; the others get neither a gradient nor an optimizer state.

    Called before the optimizer is made: transformers gives it what requires a gradient at that moment. A tied weight
    trains where any of its names matches.

    Args:
        model: PreTrainedModel, or PeftModel, whose names begin with "base_model.model.".
        patterns: names in which *, ? and [5-7] stand for others as in file names, for example
            "model.layers.[5-7].mlp.down_proj.weight".
    Returns:
        list of str, the names of the parameters that train, as `named_parameters` gives them.
    Raises:
        UserError: no pattern, one that matches no parameter, or one whose parameter is quantized.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not patterns:
        raise UserError("no parameter would train: name at least one, '*' for all")
    trained = set()
    for pattern in patterns:
        matching = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, parameters, n=1, cutoff=0)
            raise UserError(f"no parameter of the model is named '{pattern}'; did you mean '{near[0]}'?")
        integers = [name for name in matching if not parameters[name].is_floating_point()]
        if integers:
            raise UserError(f"'{integers[0]}' is quantized and cannot be trained; train adapters instead (--use_peft)")
        trained |= {id(parameters[name]) for name in matching}
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def checked_layers(layers, depth):
    """Return indices of decoder layers in order, all of them for None.

    Raises:
        UserError: one that a model of this depth does not have.
    """
    for layer in layers or ():
        if not 0 <= layer < depth:
            raise UserError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1}")
    return tuple(range(depth)) if layers is None else tuple(sorted(layers))


def check_vocabulary(model, tokenizer):
    """Refuse a tokenizer whose ids go beyond the model's embedding.

    Raises:
        UserError: with both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds {rows}: it is another model's tokenizer"
        )


def _load(auto_class, name, what, **kwargs):
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise UserError(f"the {what} folder '{name}' does not exist")
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"the {what} '{name}' cannot be loaded: {first_line}") from error
