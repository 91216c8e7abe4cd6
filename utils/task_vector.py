"""Take a task's direction out of a model's weights: theta - alpha * (theta_forget - theta_base), without training.

python utils/task_vector.py --target_model_name_or_path MODEL --forget_model_name_or_path MODEL_ON_FORGET \
    [--base_model_name_or_path MODEL] --alpha 1.0 --output_dir OUT

theta_forget is a model that was trained (further) on the forget set, as run_unlearn.py --unlearn_method finetune
--domain custom --forget_data FILE makes one, and theta_base the one from which that training started, by default the
target itself. The weights are read and written in parts, so that no model has to fit into memory; OUT gets the target's
files of the same names, its configs and tokenizer, unlearning.json and a manifest, complete or not at all.

Source: Ilharco et al. 2023, arXiv:2212.04089 (negated task vectors); as an unlearning baseline Shi et al. 2024,
arXiv:2407.06460 (MUSE).
"""

import json
import logging
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llm_unlearn.arguments import flag
from llm_unlearn.cli.script_flags import parse_script
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.processes import set_up_logging

SCRIPT = "utils/task_vector.py"
logger = logging.getLogger("llm_unlearn.task_vector")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# All that a model's folder holds besides weights, and what is ours.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.py",
)
_BESIDE += ("chat_template*", "special_tokens_map.json", "preprocessor_config.json")


@dataclass
class TaskVectorFlags:
    """Flags of this script."""

    target_model_name_or_path: str | None = flag(None, "The model that is to forget, folder or Hub name.")
    forget_model_name_or_path: str | None = flag(
        None, "A model that was trained on the forget set, from the base model."
    )
    base_model_name_or_path: str | None = flag(
        None, "The model from which that one was trained; default: the target model."
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of the target model on the Hub.")
    forget_revision: str | None = flag(None, "The same of the model that was trained on the forget set.")
    base_revision: str | None = flag(None, "The same of the base model.")
    alpha: float = flag(1.0, "How much of the direction is taken out; below 0 it is put in.")
    dtype: str = flag(
        "auto",
        "Precision of the weights that are written: auto, as each of the target's is, float32, bfloat16, float16.",
    )
    output_dir: str | None = flag(None, "Where the model goes.")
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")


def main(argv=None):
    """Write the model; returns the exit code."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parsed = parse_script(words, TaskVectorFlags, ("cache_dir", "token"), SCRIPT)
    if parsed is None:
        return
    flags, data = parsed
    set_up_logging()
    _check(flags)
    from llm_unlearn.checkpoint_arithmetic import CheckpointFiles, subtract_task
    from llm_unlearn.checkpoints import move_into_place, write_manifest
    from llm_unlearn.manifests import STAGING, recover
    from llm_unlearn.output_directory import check_output_directory

    started, folders = time.time(), _folders(flags, data)
    flags.resume_from_checkpoint = None
    for folder in folders.values():
        check_output_directory(flags, str(folder))
    _require_one_tokenizer(folders)
    models = {name: CheckpointFiles(folder, f"{name} model") for name, folder in folders.items()}
    output_dir = Path(flags.output_dir)
    recover(output_dir)
    staging = output_dir / STAGING
    staging.mkdir(parents=True)
    try:
        change = subtract_task(*models.values(), flags.alpha, staging, DTYPES.get(flags.dtype))
        _copy_beside(folders["target"], staging, flags.dtype)
        _write_record(staging, flags, words, folders, change, started)
        write_manifest(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    move_into_place(staging, output_dir)
    _say(change, flags)


def _check(flags):
    for name in ("target_model_name_or_path", "forget_model_name_or_path", "output_dir"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is missing; {SCRIPT} --help says what it takes")
    if not math.isfinite(flags.alpha) or flags.alpha == 0:
        raise UserError(f"--alpha must be a number other than 0, but is {flags.alpha}")
    if flags.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}, but is '{flags.dtype}'")
    if flags.base_revision and not flags.base_model_name_or_path:
        raise UserError("--base_revision has no effect without --base_model_name_or_path")
    flags.base_model_name_or_path = flags.base_model_name_or_path or flags.target_model_name_or_path
    flags.base_revision = flags.base_revision or flags.model_revision


def _folders(flags, data):
    """Return {"target", "forget", "base": folder}, downloaded where they are on the Hub."""
    given = {
        "target": (flags.target_model_name_or_path, flags.model_revision),
        "forget": (flags.forget_model_name_or_path, flags.forget_revision),
        "base": (flags.base_model_name_or_path, flags.base_revision),
    }
    return {name: _folder(place, revision, data) for name, (place, revision) in given.items()}


def _folder(name, revision, data):
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"the model folder '{name}' does not exist")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", *_BESIDE]
    options = {"cache_dir": data.cache_dir, "token": data.token, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(name, revision=revision, **options))
    except Exception as error:  # whatever the network raises, the model cannot be had
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"the model '{name}' is no folder here, and cannot be had from the Hub: {reason}") from error


def _require_one_tokenizer(folders):
    """Refuse models whose token ids mean something else; a folder without a tokenizer says nothing."""
    from llm_unlearn.models import load_tokenizer

    has_one = [
        f for f in folders.values() if (f / "tokenizer_config.json").is_file() or (f / "tokenizer.json").is_file()
    ]
    if folders["target"] not in has_one:
        logger.warning("'%s' has no tokenizer beside it, and so the result will have none", folders["target"])
    vocabularies = {str(folder): load_tokenizer(str(folder)).get_vocab() for folder in has_one}
    first = next(iter(vocabularies), None)
    for folder, vocabulary in vocabularies.items():
        if vocabulary != vocabularies[first]:
            raise UserError(f"'{folder}' has another tokenizer than '{first}'; pass models of one family")


def _copy_beside(source, staging, dtype):
    for pattern in _BESIDE:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, staging / path.name)
    config = staging / "config.json"
    if dtype != "auto" and config.is_file():
        described = json.loads(config.read_text(encoding="utf-8"))
        described.pop("torch_dtype", None)
        config.write_text(json.dumps({**described, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _write_record(staging, flags, words, folders, change, started):
    """Write unlearning.json and the model card."""
    from huggingface_hub import ModelCardData

    import llm_unlearn
    from llm_unlearn.models import model_fingerprint
    from llm_unlearn.records import as_json, command_line, package_versions, peak_memory

    named = {name: getattr(flags, f"{name}_model_name_or_path") for name in folders}
    record = {
        "schema_version": 1,
        "kind": "unlearning",
        "method": "task_vector",
        "start_model": named["target"],
        "models": {
            name: {"name": named[name], "fingerprint": model_fingerprint(str(folder))}
            for name, folder in folders.items()
        },
        "command": command_line(words, SCRIPT),
        "flags": asdict(flags),
        "versions": {"llm_unlearn": llm_unlearn.__version__, **package_versions()},
        "streams": {},
        "sources": {},
        "task_vector": asdict(change),
        "optimizer_steps": 0,
        "wall_seconds": round(time.time() - started, 3),
        "peak_memory_bytes": peak_memory(),
    }
    (staging / "unlearning.json").write_text(as_json(record), encoding="utf-8")
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["unlearning", "task_vector", "llm_unlearn"]
    )
    (staging / "README.md").write_text(
        f"""---
{data.to_yaml()}
---

# task_vector of {named["target"]}

This checkpoint was made by `llm_unlearn` without training: from the weights of `{named["target"]}`, {flags.alpha:g}
times the difference between those of `{named["forget"]}` and of `{named["base"]}` was taken out. Whether it forgot is
what an evaluation, a membership-inference attack and a relearning attack must tell; this card does not claim it.

```
{record["command"]}
```
""",
        encoding="utf-8",
    )


def _say(change, flags):
    share = change.swallowed / change.changed
    if share > 0.01:
        logger.warning(
            "%.0f%% of the changed weights stayed as they were, because the change is below the resolution of their "
            "precision; pass --dtype float32 to keep it", 100 * share,
        )  # fmt: skip
    logger.info("the difference has the norm %.4g; the unlearned model is in %s", change.norm, flags.output_dir)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
