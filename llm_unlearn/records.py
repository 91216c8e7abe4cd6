"""What a run tells about itself: unlearning.json and the model card."""

import importlib.metadata
import json
import platform
import resource
import shlex
import sys

import torch

import llm_unlearn

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "trl", "safetensors")

_UNLEARNED = """This checkpoint was made by `llm_unlearn` with the method `{method}`: the model `{start_model}` was
trained to forget the forget set below. Whether it really did is what an evaluation, a membership-inference attack and a
relearning attack must tell; this card does not claim it."""
_DONE = {
    "finetune": """This checkpoint was made by `llm_unlearn`: the model `{start_model}` was trained on the sets
below, to be a target model for unlearning.""",
    "retrain": """This checkpoint was made by `llm_unlearn`: the model `{start_model}` was trained on the
retain set below alone, to be the gold model that unlearned ones are compared with.""",
}


def run_record(parsed, start_model, trainer, sources, seconds):
    """Collect everything that is needed to repeat or to compare a run.

    Args:
        parsed: Parsed command line.
        start_model: folder or Hub name of the model that the run started from.
        trainer: UnlearnTrainer after training.
        sources: {stream: Source} as loaded.
        seconds: wall time of training.
    Returns:
        dict, JSON-serializable.
    """
    dataset = trainer.train_dataset
    tokens = dataset.num_tokens()
    return {
        "schema_version": 1,
        "kind": "unlearning",
        "method": parsed.method,
        "trainer": f"{type(trainer).__module__}:{type(trainer).__name__}",
        "start_model": start_model,
        "command": command_line(parsed.words),
        "flags": {
            "unlearn_method": parsed.method,
            **{key: value for key, value in vars(parsed.data).items() if key != "token"},
            **vars(parsed.model),
            **trainer.args.to_dict(),
            "push_to_hub": trainer.push_requested,
        },
        "versions": {"llm_unlearn": llm_unlearn.__version__, "python": platform.python_version(), **package_versions()},
        "backend": {
            "distributed_type": str(trainer.accelerator.distributed_type.value),
            "processes": trainer.args.world_size,
            "device": trainer.args.device.type,
            "zero_stage": trainer.zero_stage(),
        },
        "streams": {
            name: {"rows": size, "tokens": tokens[name], "sha256": dataset.fingerprints[name]}
            for name, size in dataset.sizes.items()
        },
        "token_selection": trainer.token_selection,
        "weight_mask": trainer.weight_mask and trainer.weight_mask.record,
        "read": trainer.reading_record(),
        "reference": trainer.reference_record(),
        "sources": {name: source.origins for name, source in sources.items()},
        "optimizer_steps": trainer.state.global_step,
        "wall_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def command_line(words, script="run_unlearn.py"):
    """Return the command as a user would type it again, access tokens left out.

    Args:
        words: what followed the script's name.
        script: its name.
    """
    shown, hide = [], False
    for word in words:
        name, sign, _ = word.partition("=")
        is_secret = name.startswith("--") and name.endswith("token")
        shown.append("***" if hide else f"{name}=***" if is_secret and sign else word)
        hide = is_secret and not sign
    return shlex.join(["python", script, *shown])


def model_card(record):
    """Write the model card of a checkpoint.

    Args:
        record: see `run_record`.
    Returns:
        str, Markdown with the Hub's YAML header.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", record["method"], "llm_unlearn"],
    )
    rows = "\n".join(f"| {name} | {facts['rows']} | {facts['tokens']} |" for name, facts in record["streams"].items())
    origins = "\n".join(
        f"- {name}: `{part['source']}`, {part['rows']} rows, share {part['share']:g}"
        + (f", revision `{part['revision']}`" if part["revision"] else "")
        for name, parts in record["sources"].items()
        for part in parts
    )
    return f"""---
{data.to_yaml()}
---

# {record["method"]} of {record["start_model"]}

{_DONE.get(record["method"], _UNLEARNED).format(**record)}

| stream | sequences | tokens that count |
| --- | --- | --- |
{rows}

{origins}

{record["optimizer_steps"]} optimizer steps in {record["wall_seconds"]:.0f} s.
Every flag and version is in `unlearning.json`.

```
{record["command"]}
```
"""


def as_json(record):
    """Return a record as indented JSON; what JSON does not know is written as text."""
    return json.dumps(record, indent=2, default=str) + "\n"


def peak_memory():
    """Return the peak memory of this process in bytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def package_versions():
    """Return {package: version} of what a result depends on; None where one is not installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
