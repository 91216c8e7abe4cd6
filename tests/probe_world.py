"""Probes of the tiny world's model, for tests of the method that reads through them."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "utils/train_probe.py"


def probe_script():
    """Return utils/train_probe.py as a module; it is not importable."""
    spec = importlib.util.spec_from_file_location("train_probe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe_command(world, folder, *flags):
    """Return the words that train probes of the tiny world: from its untrained model to the one that knows it."""
    words = ["--model_name_or_path", world["model"], "--early_model_name_or_path", world["base"], "--use_cpu", "True"]
    words += ["--domain", "custom", "--forget_data", world["forget"], "--output_dir", str(folder)]
    return [*words, *map(str, flags)]
