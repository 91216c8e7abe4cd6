"""A checkpoint to score: whole, an adapter on its base, or refused with what is wrong with it."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_unlearn.data.tokenized_cache import tokenizer_sha256
from llm_unlearn.errors import UserError
from llm_unlearn.models import check_vocabulary, context_length, load_model, load_tokenizer, model_fingerprint

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_SHARDED = {
    "pytorch_model_fsdp_*": "accelerate merge-weights",
    "*.distcp": "accelerate merge-weights",
    "global_step*": "the zero_to_fp32.py beside it",
    "zero_pp_rank*": "the zero_to_fp32.py beside it",
}


@dataclass
class Checkpoint:
    """A loaded model with what identifies it.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: its tokenizer.
        fingerprints: {"weights", "tokenizer"[, "base"]}.
        context_length: tokens that it reads at most, or None.
    """

    model: torch.nn.Module
    tokenizer: object
    fingerprints: dict
    context_length: int | None


def load_checkpoint(name, flags, hub, device, quantization=None):
    """Load a model for scoring.

    Args:
        name: folder or name on the Hub.
        flags: TokenizerFlags with TRL's ModelConfig.
        hub: revision, cache_dir, token, trust_remote_code.
        device: where it goes.
        quantization: BitsAndBytesConfig or another configuration of transformers, or None.
    Returns:
        Checkpoint.
    Raises:
        UserError: no weights, weights still sharded, an adapter without its base, no tokenizer, NaN weights.
    """
    folder = Path(name)
    adapter = check_name(name)
    base = _base_of(folder, adapter) if adapter else name
    more = {"attn_implementation": flags.attn_implementation, "quantization_config": quantization}
    # Quantized weights cannot be moved; left alone, they would go to a GPU in spite of --use_cpu.
    more |= {"device_map": {"": device}} if quantization else {}
    try:
        tokenizer = _tokenizer(name, base, flags, hub)
        fingerprints = {"weights": _adapter_fingerprint(folder) if adapter else model_fingerprint(name, **hub)}
        if adapter:
            fingerprints["base"] = model_fingerprint(base, **hub)
        model = load_model(base, flags.dtype, **more, **hub)
    except UserError as error:
        about = f"the adapter in '{folder}' belongs to '{base}': " if adapter else ""
        about = about or ("" if folder.is_dir() else f"'{name}' is no folder here, and not on the Hub: ")
        raise UserError(f"{about}{error}") from error
    fingerprints["tokenizer"] = tokenizer_sha256(tokenizer)
    fingerprints["configuration"] = _configuration_fingerprint(folder, Path(base))
    if adapter:
        model = _with_adapter(model, folder, merge=quantization is None)
    check_vocabulary(model, tokenizer)
    check_finite(model, name)
    model = model.eval() if quantization else model.eval().to(device)
    return Checkpoint(model, tokenizer, fingerprints, context_length(base, **hub))


def check_name(name):
    """Refuse a model that cannot be loaded, as far as a look at its folder tells.

    Args:
        name: folder or name on the Hub.
    Returns:
        the adapter's configuration where the folder holds nothing but an adapter, else None.
    Raises:
        UserError: no such folder, no weights, a missing base.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"the model folder '{name}' does not exist")
        return None
    adapter = _adapter_config(folder)
    check_folder(folder, adapter is not None)
    if adapter:
        _base_of(folder, adapter)
    return adapter


def check_folder(folder, is_adapter=False):
    """Refuse a folder that holds no model that can be loaded.

    Raises:
        UserError: saying what is there instead.
    """
    sharded = next((pattern for pattern in _SHARDED if any(folder.glob(pattern))), None)
    whole = [path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.name != "training_args.bin"]
    whole = [path for path in whole if is_adapter or not path.name.startswith("adapter_model")]
    if not whole and sharded:
        raise UserError(
            f"the weights in '{folder}' are still sharded over processes ({sharded}); join them with "
            f"{_SHARDED[sharded]}, or score the folder that the run left when it ended"
        )
    if not whole:
        nested = sorted(path.parent.name for path in folder.glob("*/*.safetensors"))
        hint = f"; did you mean '{folder / nested[0]}'?" if nested else ""
        raise UserError(f"the model folder '{folder}' holds no weights (*.safetensors or *.bin){hint}")
    if not is_adapter and not (folder / "config.json").is_file():
        raise UserError(f"the model folder '{folder}' holds weights, but no config.json that says what they are")


def check_finite(model, name):
    """Refuse weights that are NaN or infinite before anything is scored.

    Raises:
        UserError: naming the first of them and how many there are.
    """
    # A tensor class of its own, as torchao's, holds integers behind the dtype that it shows, and cannot be summed.
    plain = {key: value for key, value in model.named_parameters() if type(value.data) is torch.Tensor}
    broken = [key for key, value in plain.items() if value.is_floating_point() and not _is_finite(value)]
    if broken:
        raise UserError(
            f"{len(broken)} weights of '{name}' are NaN or infinite, the first is {broken[0]}; the run diverged"
        )


def _is_finite(value):
    # The sum is NaN or infinite where an element is, and needs no mask as large as the weights.
    return bool(torch.isfinite(value.detach().float().sum() if value.numel() < 2**20 else value.detach().abs().max()))


def _adapter_config(folder):
    path = folder / ADAPTER
    if not path.is_file() or ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))):
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error


def _base_of(folder, config):
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter in '{folder}' does not say which model it belongs to (base_model_name_or_path)")
    nearby = folder / base
    found = base if not nearby.is_dir() or Path(base).is_absolute() else str(nearby)
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1
    if looks_local and not Path(found).expanduser().is_dir():
        raise UserError(
            f"the adapter in '{folder}' belongs to the model '{base}', which is not there; put it back, or correct "
            f"base_model_name_or_path in {ADAPTER}"
        )
    return found


def _with_adapter(model, folder, merge):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError

    try:
        stored = _stored_names(folder)
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"the adapter in '{folder}' does not fit its base model: {first_line}") from error
    differing = stored ^ set(get_peft_model_state_dict(adapted)) if stored else None
    if differing:
        raise UserError(
            f"the adapter in '{folder}' does not fit its base model: {len(differing)} weights are only in one of them, "
            f"{min(differing)} for example"
        )
    # Prompts that were learned have no weights to merge into.
    if not merge or not hasattr(adapted.base_model, "merge_and_unload"):
        return adapted
    # PEFT leaves what it merged frozen, and attacks train it.
    return adapted.merge_and_unload().requires_grad_(True)


def _stored_names(folder):
    """Return the names of an adapter's tensors, or None where they lie in a pickle."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return set(file.keys())


def _adapter_fingerprint(folder):
    from llm_unlearn.checkpoints import file_sha256

    path = next(iter(sorted(folder.glob("adapter_model*"))), None)
    if path is None:
        raise UserError(f"the adapter folder '{folder}' holds no adapter_model.safetensors")
    return file_sha256(path)


def _configuration_fingerprint(*folders):
    """Return the sha256 of the files that change what the same weights say."""
    digest = hashlib.sha256()
    for path in (folder / name for folder in folders for name in ("config.json", "generation_config.json", ADAPTER)):
        if path.is_file():
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load_tokenizer_of(name, flags, hub):
    """Load the tokenizer of a model without the model.

    Args:
        name: folder or name on the Hub.
        flags: TokenizerFlags.
        hub: revision, cache_dir, token, trust_remote_code.
    Returns:
        its tokenizer.
    Raises:
        UserError: no such model, no weights, an adapter without its base, no tokenizer.
    """
    folder, adapter = Path(name), check_name(name)
    try:
        return _tokenizer(name, _base_of(folder, adapter) if adapter else name, flags, hub)
    except UserError as error:
        about = "" if folder.is_dir() else f"'{name}' is no folder here, and not on the Hub: "
        raise UserError(f"{about}{error}") from error


def _tokenizer(name, base, flags, hub):
    if flags.tokenizer_name:
        return load_tokenizer(flags.tokenizer_name, **hub)
    folder = Path(name)
    has_one = not folder.is_dir() or any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
    if not has_one and base == name:
        raise UserError(f"the model folder '{name}' holds no tokenizer; pass --tokenizer_name FOLDER_OR_HUB_NAME")
    return load_tokenizer(name if has_one else base, **hub)
