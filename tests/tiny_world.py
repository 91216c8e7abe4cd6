"""A small model and ragged rows that every trainer test shares; made on the spot, no network and no shared data."""

import json
from pathlib import Path

from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.synthetic import make_world


def make_tiny_world(folder):
    """Write `base/` (untrained), `forget.jsonl` (10 rows), `retain.jsonl` (13 rows) and `model/`, which knows both.

    Args:
        folder: pathlib.Path.
    Returns:
        dict of str paths: base, model, forget, retain. The rows are of very different lengths.
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
    flags = ["--optim", "adamw_torch", "--learning_rate", "5e-3", "--num_train_epochs", "40", "--max_grad_norm", "1"]
    words = command(paths, "finetune", paths["model"], *flags, "--per_device_train_batch_size", "12")
    assert main(words) == 0
    return paths


METHOD_FLAGS = {
    "gradient_ascent": [],
    "random_label": ["--top_k", "1", "--rm_groundtruth", "True"],
    "ascent_plus_descent": ["--positive_ratio", "2", "--positive_factor", "0.5"],
    "ascent_plus_kl_divergence": [],
    "grad_diff": ["--retain_loss", "kl"],
    "npo": [],
    "simnpo": ["--delta", "0.1"],
    "retrain": [],
    "finetune": [],
}


def command(world, method, output_dir, *flags):
    """Return the words of a short SGD run of a method on the tiny world, three steps of four rows."""
    start = world["base" if method in ("finetune", "retrain") else "model"]
    words = ["--unlearn_method", method, "--model_name_or_path", start, "--domain", "custom"]
    words += ["--forget_data", world["forget"], "--retain_data", world["retain"], "--output_dir", str(output_dir)]
    words += ["--optim", "sgd", "--lr_scheduler_type", "constant", "--learning_rate", "0.01", "--max_grad_norm", "0"]
    words += ["--num_train_epochs", "1", "--save_strategy", "no", "--disable_tqdm", "True"]
    if not {"--per_device_train_batch_size", "--config"} & set(flags):
        words += ["--per_device_train_batch_size", "4"]
    return [*words, *METHOD_FLAGS.get(method, []), *map(str, flags)]


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
