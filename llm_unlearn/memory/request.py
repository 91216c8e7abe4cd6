"""`--estimate_memory`: what is asked, and the flags of the sharding backend, which no process group must start for."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.command_line import load_json, split_config
from llm_unlearn.errors import UserError

GB = 1e9
FLAG = "estimate_memory"
_BACKEND_FLAGS = ("fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap", "deepspeed")
_OFF = ("false", "no", "0", "none", "")


@dataclass(frozen=True)
class Request:
    """What `--estimate_memory` asks.

    Attributes:
        processes: how many share the run.
        device_bytes: memory of each one's device; None asks about this machine.
        backend: {flag: value} of FSDP and DeepSpeed, taken out of the command line because parsing them would start a
            process group, or drop them on a machine that cannot run them.
        uses_cpu: whether the command line chooses the CPU, rather than a machine without anything else.
    """

    processes: int
    device_bytes: float | None
    backend: dict
    uses_cpu: bool = False


def split_request(argv):
    """Take `--estimate_memory` out of a command line.

    Args:
        argv: list of words.
    Returns:
        (Request, words without the flag and the backend's, the config as one more `dict`), or (None, argv, {}) where no
        estimate is asked for.
    Raises:
        UserError: a value that is neither True, nor gigabytes, nor PROCESSESxGIGABYTES; an unreadable config.
    """
    words, config = split_config(list(argv))
    config = {name.replace("-", "_"): value for name, value in config.items()}
    asked, words = _take(FLAG, words)
    asked = config.pop(FLAG, None) if asked is None else asked
    if asked is None or str(asked).lower() in _OFF:
        return None, list(argv), {}
    backend = {}
    for name in _BACKEND_FLAGS:
        given, words = _take(name, words)
        from_config = config.pop(name, None)
        backend[name] = from_config if given is None else given
    chosen = config.get("use_cpu", config.get("no_cuda", False))
    for name in ("use_cpu", "no_cuda"):
        given, _ = _take(name, words)
        chosen = chosen if given is None else given
    processes, device_bytes = _device(str(asked))
    return Request(processes, device_bytes, backend, str(chosen).lower() not in _OFF), words, config


def write_config(config, folder):
    """Write what is left of a config, and return the words that name it; none for an empty one."""
    if not config:
        return []
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config, default=str), encoding="utf-8")
    return ["--config", str(path)]


def fsdp_settings(backend):
    """Return the FSDP configuration that the flags describe, or None without FSDP.

    Args:
        backend: {flag: value} of a Request.
    Raises:
        UserError: an unknown word of --fsdp, or both FSDP and DeepSpeed.
    """
    from llm_unlearn.training_arguments import _FSDP_WORDS

    given = backend["fsdp"]
    if given is None or str(given).lower() in _OFF:
        return None
    if backend["deepspeed"]:
        raise UserError("--fsdp and --deepspeed exclude each other; pass one of them")
    config = dict(load_json(backend["fsdp_config"]) or {})
    for word in [] if str(given).lower() == "true" else str(given).split():
        if word not in _FSDP_WORDS:
            raise UserError(f"unknown --fsdp option '{word}'. Known: {', '.join(_FSDP_WORDS)}")
        config.setdefault(*_FSDP_WORDS[word])
    return config


def _take(name, words):
    """Return (the last value of a flag or None, the other words); a flag without a value is True."""
    found, rest, position = None, [], 0
    while position < len(words):
        flag, sign, value = words[position].partition("=")
        position += 1
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name:
            rest.append(words[position - 1])
            continue
        if not sign:
            has_value = position < len(words) and not words[position].startswith("--")
            value, position = (words[position], position + 1) if has_value else ("True", position)
        found = value
    return found, rest


def _device(asked):
    """Return (processes, bytes of a device or None)."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if asked.lower() in ("true", "yes"):
        return processes, None
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)(?:\s*GB)?", asked, re.IGNORECASE)
    if match is None or float(match[2]) <= 0 or match[1] == "0":
        raise UserError(
            f"--{FLAG} must be True, the gigabytes of a device (24) or PROCESSESxGIGABYTES (8x80), but is '{asked}'"
        )
    return int(match[1] or processes), float(match[2]) * GB
