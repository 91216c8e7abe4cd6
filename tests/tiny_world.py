"""A small model and ragged rows that every trainer test shares; made on the spot, no network and no shared data."""

import json
from pathlib import Path

from probe_world import probe_command, probe_script

from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.alignment import aligned_row
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.models import load_tokenizer


def make_tiny_world(folder):
    """Write `base/` (untrained), `forget.jsonl` (10 rows), `retain.jsonl` (13 rows) and `model/`, which knows both.

    Args:
        folder: pathlib.Path.
    Returns:
        dict of str paths: base, model, forget, retain, rewritten (forget with rewrites), and probes of the model's
        layers. The rows are of very different lengths.
    """
    make_base_model(str(folder / "base"), 0)
    world = make_world(0)
    paths = {"base": str(folder / "base"), "model": str(folder / "model")}
    for name, count in (("forget", 10), ("retain", 13)):
        rows = [{"question": row["question"], "answer": row["answer"]} for row in world[name][:count]]
        for number, row in enumerate(rows):
            row["answer"] = " ".join([row["answer"]] * (1 + number % 4))
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        paths[name] = str(path)
    paths["rewritten"] = write_rewritten(paths, [row["answer"] for row in world["holdout"]])
    flags = ["--optim", "adamw_torch", "--learning_rate", "5e-3", "--num_train_epochs", "40", "--max_grad_norm", "1"]
    words = command(paths, "finetune", paths["model"], *flags, "--per_device_train_batch_size", "12")
    assert main(words) == 0
    paths["probes"] = str(folder / "probes")
    probe_script().main(probe_command(paths, paths["probes"], "--num_train_epochs", 10))
    return paths


def write_rewritten(paths, answers):
    """Write the forget rows with other answers as their rewrites, aligned; returns the file's path."""
    tokenizer = load_tokenizer(paths["base"])
    rows = [json.loads(line) for line in Path(paths["forget"]).read_text(encoding="utf-8").splitlines()]
    rewritten = [{**row, "rewritten": answers[number % len(answers)]} for number, row in enumerate(rows)]
    aligned = [aligned_row(row, tokenizer, TokenizeOptions()) for row in rewritten]
    path = Path(paths["forget"]).with_name("rewritten.jsonl")
    path.write_text("\n".join(json.dumps(row) for row in aligned), encoding="utf-8")
    return str(path)


METHOD_FLAGS = {
    "gradient_ascent": [],
    "random_label": ["--top_k", "1", "--rm_groundtruth", "True"],
    "ascent_plus_descent": ["--positive_ratio", "2", "--positive_factor", "0.5"],
    "ascent_plus_kl_divergence": [],
    "grad_diff": ["--retain_loss", "kl"],
    "npo": [],
    "simnpo": ["--delta", "0.1"],
    "rmu": ["--layer", "1", "--steering_coef", "2"],
    # Alone it starts at a stationary point, which rounding decides how to leave.
    "circuit_breakers": ["--retain_loss", "kl", "--regularizer", "max_entropy"],
    "sequential": ["--layer_step", "1", "--retain_loss", "kl", "--retain_schedule", "0.25:1"],
    "checkpoint_transfer": ["--teacher_model_name_or_path", "{base}"],
    "probe_unlearn": ["--probe_dir", "{probes}"],
    "max_entropy": [],
    "max_update": ["--update_weight", "0.1"],
    "rewritten_transfer": ["--forget_data", "{rewritten}"],
    "tuned_lens": ["--lens_path", "logit"],
    "po": [],
    "dpo": ["--forget_data", "{rewritten}", "--preferred_column", "rewritten"],
    "idk_dpo": [],
    "alt_po": ["--forget_data", "{rewritten}"],
    "undial": ["--retain_weight", "1"],
    "wga": [],
    "satimp": ["--forget_weight", "1"],
    "ceu": ["--retain_loss", "nll"],
    "pdu": ["--retain_bound", "0.2", "--retain_weight", "1", "--dual_warmup_epochs", "0"],
    "kl": [],
    "l1_sparse": ["--l1_coef", "0.01"],
    "retrain": [],
    "finetune": [],
}


FAMILIES = ("gradient_ascent", "random_label", "ascent_plus_descent", "ascent_plus_kl_divergence", "grad_diff", "npo")
FAMILIES += ("simnpo", "rmu", "circuit_breakers", "tuned_lens", "sequential", "dpo", "pdu", "undial", "finetune")
"""Methods that stand for their family in `make test`; the others run in `make test-full`, and in tests of their own."""


def each_method(families=FAMILIES):
    """Return pytest parameters of all methods, those that do not stand for their family marked `full`."""
    import pytest

    from llm_unlearn.methods import METHODS

    return [pytest.param(method, marks=[] if method in families else pytest.mark.full) for method in METHODS]


def command(world, method, output_dir, *flags):
    """Return the words of a short SGD run of a method on the tiny world, three steps of four rows."""
    start = world["base" if method in ("finetune", "retrain") else "model"]
    words = ["--unlearn_method", method, "--model_name_or_path", start, "--domain", "custom"]
    words += ["--forget_data", world["forget"], "--retain_data", world["retain"], "--output_dir", str(output_dir)]
    words += ["--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", "0.01", "--max_grad_norm", "0"]
    words += ["--num_train_epochs", "1", "--save_strategy", "no", "--disable_tqdm", "True"]
    if not {"--per_device_train_batch_size", "--config"} & set(flags):
        words += ["--per_device_train_batch_size", "4"]
    own = [flag.format_map(world) for flag in METHOD_FLAGS.get(method, [])]
    return [*words, *own, *map(str, flags)]


def terms(output_dir):
    """Return the logged {term: value} of each step of a finished run."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in log.items() if key.startswith("loss/")} for log in history if "loss" in log]


def weights(output_dir):
    """Return the tensors of a finished run, without the second name of tied weights."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if (Path(output_dir) / "adapter_config.json").is_file() else "model.safetensors"
    return {key: value for key, value in load_file(Path(output_dir) / name).items() if key != "lm_head.weight"}


def update_distance(first, second, start=None):
    """||Da - Db|| / ||Db|| of two sets of weights that began at `start` (zeros for adapters)."""
    assert first.keys() == second.keys()
    squares = difference = 0.0
    for key, value in second.items():
        origin = start[key] if start else 0
        squares += float(((value - origin).double() ** 2).sum())
        difference += float(((first[key] - value).double() ** 2).sum())
    assert squares > 0, "nothing was trained"
    return (difference / squares) ** 0.5
