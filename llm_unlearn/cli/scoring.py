"""What the scripts that score a checkpoint share: processes, device, the model, and where results are kept."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.processes import is_first_process, set_up_logging

logger = logging.getLogger("llm_unlearn")

_SCORING = ("statistics", "token_statistics", "packing", "generation", "mia")


def start_processes(flags):
    """Join the other processes, choose the device and seed everything; returns the device."""
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()
    if flags.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if flags.tf32 is not None and not flags.use_cpu:
        torch.backends.cuda.matmul.allow_tf32 = flags.tf32
    elif flags.tf32:
        logger.warning("--tf32 needs an NVIDIA GPU of the Ampere generation or newer; float32 runs instead")
    set_seed(flags.seed)
    return PartialState(cpu=flags.use_cpu).device


def say_notes(parsed):
    """Start logging, and say what the parser has to say about flags that changed nothing."""
    set_up_logging()
    for note in dict.fromkeys(parsed.notes):
        logger.info(note)


def prepare(parsed, kind):
    """Join the other processes, and refuse an output directory or models before anything is loaded.

    Args:
        parsed: ParsedEvaluation.
        kind: of the results: "eval", "mia", or an attack's, which replaces no results of another kind.
    Returns:
        (output directory, device).
    """
    from llm_unlearn.evaluation.results import check_output_directory

    flags, name, domain = parsed.flags, parsed.model.model_name_or_path, parsed.data.domain
    device = start_processes(flags)
    folder = Path(flags.output_dir or default_directory(name, kind, domain))
    own = () if kind in ("eval", "mia") else (kind,)
    check_output_directory(folder, name, domain, flags.overwrite_output_dir, *own)
    check_models(parsed)
    return folder, device


def show_results(record, folder, more=""):
    """Print the table of results.json and say where that is, on the first process; then wait for the others.

    Args:
        record: contents of results.json; None where there is nothing to show.
        folder: output directory.
        more: text below the table.
    """
    from llm_unlearn.evaluation.results import table

    if record is not None and is_first_process():
        sys.stdout.write(table(record) + more)
        sys.stdout.flush()
        logger.info("the results are in %s", folder / "results.json")
    finish_processes()


def finish_processes():
    """Leave the process group, if there is one."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def default_directory(model, kind, domain):
    """Return where results go that were given no place: beside a local model, else below ./eval_results.

    Args:
        model: folder or name on the Hub.
        kind: "eval" or "mia".
        domain: --domain, or None.
    """
    place = Path(model) if Path(model).is_dir() else Path("eval_results") / model.replace("/", "--")
    return place / kind / (domain or "lm_eval")


def check_models(parsed):
    """Refuse what cannot be loaded before anything is, and before another model is scored for nothing."""
    from llm_unlearn.evaluation.loading import check_name
    from llm_unlearn.evaluation.results import check_writable

    flags, folders = parsed.flags, parsed.flags.statistics_dir
    others = (getattr(flags, name, None) for name in ("reference_model", "target_model", "gold"))
    for name in (parsed.model.model_name_or_path, *others):
        if name:
            check_name(name)
    if folders:
        check_writable(Path(folders), "--statistics_dir")
    for flag in ("toxicity_model", "embedding_model"):
        judge = getattr(flags, flag, None)
        if judge and judge.startswith((".", "/", "~")) and not Path(judge).expanduser().is_dir():
            raise UserError(f"--{flag} '{judge}' is not a folder")


def load_model_of(parsed, name, device, quantization=None):
    """Return the Checkpoint of a name, loaded as the flags say, or quantized as transformers' configuration says."""
    from llm_unlearn.evaluation.loading import load_checkpoint

    model = parsed.model
    if quantization is None and (model.load_in_4bit or model.load_in_8bit):
        from trl import get_quantization_config

        try:
            # What is not quantized keeps the checkpoint's precision; TRL wants a name.
            named = dataclasses.replace(model, dtype="bfloat16") if model.dtype == "auto" else model
            quantization = get_quantization_config(named)
        except ImportError as error:
            raise UserError(
                "4-bit and 8-bit weights need the package bitsandbytes; pip install bitsandbytes"
            ) from error
    return load_checkpoint(name, model, hub_options(parsed, name), device, quantization)


def hub_options(parsed, name):
    """Return what the Hub is told to load a model by its name: revision, cache_dir, token, trust_remote_code."""
    model = parsed.model
    return {
        # A revision belongs to the scored model, not to the one that it is compared with.
        "revision": model.model_revision if name == model.model_name_or_path else None,
        "cache_dir": parsed.data.cache_dir, "token": parsed.data.token, "trust_remote_code": model.trust_remote_code,
    }  # fmt: skip


def statistics_folder(parsed, checkpoint, folder):
    """Return the folder of the results by example; its name holds everything that they depend on but the questions.

    The questions themselves, template, data and length included, are in the key of each record.
    """
    from accelerate import PartialState

    from llm_unlearn.records import package_versions

    flags, model = parsed.flags, parsed.model
    code = hashlib.sha256()
    for name in _SCORING:
        code.update((Path(__file__).parents[1] / "evaluation" / f"{name}.py").read_bytes())
    versions = package_versions()
    depends = {
        **checkpoint.fingerprints,
        "dtype": str(checkpoint.model.dtype),
        "attention": model.attn_implementation,
        "quantized": [model.load_in_4bit, model.load_in_8bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant],
        "hide_pads": getattr(flags, "legacy_metrics", False),
        "code": code.hexdigest(),
        "versions": [versions["torch"], versions["transformers"]],
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    # Results that were given no place of their own share one place beside the model, whichever script made them.
    place = folder if flags.output_dir else folder.parent.parent
    found = Path(flags.statistics_dir or place / "statistics") / key
    if parsed.data.overwrite_cache and found not in parsed.cleared:
        parsed.cleared.add(found)
        if is_first_process():
            shutil.rmtree(found, ignore_errors=True)
        PartialState().wait_for_everyone()
    return str(found)
