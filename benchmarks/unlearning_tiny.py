"""What the recipes of recipes/tiny forget and keep, on two small worlds: likelihoods and entropy before and after.

    OMP_NUM_THREADS=1 python benchmarks/unlearning_tiny.py --worlds demo
    OMP_NUM_THREADS=1 python benchmarks/unlearning_tiny.py --tofu_dir DIR --seeds 0 1 2 --output table.md

The demo world is made on the spot: a Llama of two layers that learns it, and the untrained one as its early checkpoint.
DIR holds the other: models/stories260K-tofu-hf, which knows tofu_small/{forget,retain}.jsonl, and stories260K-hf, which
does not. A lens, probes, maps and rewrites are made once for each world, in --output_dir.

A row is met where the NLL of the forget answers, or the entropy over them, has risen by GAIN nats, and the NLL of the
retain answers by BOUND nats at most. The exit code is 1 where one is not.
"""

import argparse
import importlib.util
import json
import logging
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from llm_unlearn.cli.demo import TARGET_FLAGS, make_base_model, write_keep_file
from llm_unlearn.cli.unlearn import main as unlearn
from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset, pad_id
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.head import counted_labels, counted_states
from llm_unlearn.models import load_model, load_tokenizer
from llm_unlearn.objectives.likelihood import token_entropy, token_logps

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes/tiny"
GAIN, BOUND = 1.0, 0.3
logger = logging.getLogger("llm_unlearn.unlearning_tiny")


@dataclass(frozen=True)
class World:
    """A model that knows something, and what it is to forget and to keep.

    Attributes:
        name: demo or tofu.
        model, early: folders of the model and of a checkpoint that knows nothing of it yet.
        forget, retain: files of rows.
        folder: where what belongs to the world is made.
    """

    name: str
    model: str
    early: str
    forget: str
    retain: str
    folder: Path

    def data(self):
        """Return the flags that name the rows."""
        return ["--domain", "custom", "--forget_data", self.forget, "--retain_data", self.retain]


# ---- What a recipe reads besides the model and the rows, and how it is made ----


def lens(world):
    """Return the folder of a tuned lens."""
    words = ["--model_name_or_path", world.model, "--domain", "custom", "--forget_data", world.retain]
    return _made(world, "lens", "train_tuned_lens", [*words, "--max_steps", "200"])


def probes(world):
    """Return the folder of probes of all layers."""
    words = ["--model_name_or_path", world.model, "--early_model_name_or_path", world.early, "--domain", "custom"]
    return _made(world, "probes", "train_probe", [*words, "--forget_data", world.forget, "--num_train_epochs", "60"])


def affine_map(world):
    """Return the folder of maps from the early checkpoint's states to the model's."""
    words = ["--teacher_model_name_or_path", world.early, "--target_model_name_or_path", world.model]
    return _made(world, "affine_map", "fit_affine_map", [*words, "--domain", "custom", "--forget_data", world.retain])


def rewrites(world):
    """Return the forget rows with refusals as their rewrites."""
    words = ["--kind", "refusal", "--target_model_name_or_path", world.model, "--domain", "custom"]
    words += ["--forget_data", world.forget]
    return _made(world, "rewritten.jsonl", "rewrite_forget_set", words, "--output_file")


NEEDS = {
    "lens_path": lens,
    "probe_dir": probes,
    "affine_map": affine_map,
    "forget_data": rewrites,
    "teacher_model_name_or_path": lambda world: world.early,
}
"""{flag that a recipe sets to a place of its own: function of the world that returns the place here}"""


def _made(world, name, script, words, flag="--output_dir"):
    place = world.folder / name
    if not place.exists():
        _run(_script(script), f"utils/{script}.py", [*words, "--use_cpu", "True", flag, str(place)])
    return str(place)


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"utils/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda words: run_cli(lambda: module.main(words))


def _run(command, name, words):
    logger.info("$ python %s %s", name, shlex.join(words))
    if command(words) != 0:
        raise UserError(f"this failed: python {name} {shlex.join(words)}")


# ---- The worlds ----


def demo_world(folder, seed=0):
    """Make the demo world: its model learns it where that is not there yet."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keep, base, model = write_keep_file(folder, seed), str(folder / "base"), folder / "model"
    forget = folder / "forget.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in make_world(seed)["forget"]), encoding="utf-8")
    found = World("demo", str(model), base, str(forget), str(keep), folder)
    if not (model / "manifest.json").is_file():
        make_base_model(base, seed)
        words = ["--unlearn_method", "finetune", "--model_name_or_path", base, *found.data(), *TARGET_FLAGS.split()]
        words += ["--save_strategy", "no", "--output_dir", str(model), "--overwrite_output_dir", "--use_cpu", "True"]
        _run(unlearn, "run_unlearn.py", [*words, "--disable_tqdm", "True"])
    return found


def tofu_world(source, folder):
    """Return the world of a small model that knows some rows of TOFU.

    Args:
        source: the folder with models/ and tofu_small/.
        folder: for what is made.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    models, rows = source / "models", source / "tofu_small"
    paths = [models / "stories260K-tofu-hf", models / "stories260K-hf", rows / "forget.jsonl", rows / "retain.jsonl"]
    missing = next((path for path in paths if not path.exists()), None)
    if missing:
        raise UserError(f"--tofu_dir '{source}' has no {missing.relative_to(source)}")
    return World("tofu", *map(str, paths), folder)


# ---- Measuring ----


@torch.no_grad()
def measure(folder, world):
    """Return {"forget_nll", "forget_entropy", "retain_nll"}: nats per counted token, in evaluation mode.

    Args:
        folder: of a checkpoint, with adapters or without.
        world: World.
    """
    model, tokenizer = load_model(str(folder)).eval(), load_tokenizer(world.model)
    options, found = TokenizeOptions(model_length=model.config.max_position_embeddings), {}
    for name, path in (("forget", world.forget), ("retain", world.retain)):
        dataset = UnlearnDataset({name: tokenize_rows(read_rows(path), tokenizer, options, name)})
        nlls, entropies, count = 0.0, 0.0, len(dataset)
        for first in range(0, count, 64):
            rows = [dataset[name, row] for row in range(first, min(first + 64, count))]
            stream = UnlearnCollator(pad_id(tokenizer))(rows)[name]
            inputs = {key: stream[key] for key in ("input_ids", "attention_mask")}
            logits = counted_states(model(**inputs).logits, stream)
            nlls -= float(token_logps(logits, counted_labels(stream)).sum())
            entropies += float(token_entropy(logits).sum())
        tokens = dataset.num_tokens()[name]
        found |= {f"{name}_nll": nlls / tokens, f"{name}_entropy": entropies / tokens}
    return {key: found[key] for key in ("forget_nll", "forget_entropy", "retain_nll")}


def is_met(before, after):
    """Return whether a run forgot, and kept what it should keep."""
    gain = max(after[name] - before[name] for name in ("forget_nll", "forget_entropy"))
    return gain >= GAIN and after["retain_nll"] - before["retain_nll"] <= BOUND


def recipes(world, chosen=()):
    """Return the recipes that there are for a world: `<name>.yaml`, in its place `<name>.<world>.yaml`.

    Args:
        world: name of the world.
        chosen: names of recipes; () takes all.
    """
    names = sorted({path.name.split(".")[0] for path in RECIPES.glob("*.yaml")})
    found = {}
    for name in names:
        own = [path for path in (RECIPES / f"{name}.{world}.yaml", RECIPES / f"{name}.yaml") if path.is_file()]
        if own and (not chosen or name in chosen):
            found[name] = own[0]
    return found


def command(recipe, world, seed, output_dir):
    """Return the words of run_unlearn.py that run a recipe on a world."""
    words = ["--config", str(recipe.relative_to(ROOT)), "--target_model_name_or_path", world.model]
    data, given = world.data(), yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for flag in (flag for flag in NEEDS if flag in given):
        place = NEEDS[flag](world)
        if f"--{flag}" in data:
            data[data.index(f"--{flag}") + 1] = place
        else:
            words += [f"--{flag}", place]
    return [*words, *data, "--seed", str(seed), "--output_dir", str(output_dir)]


def run_recipe(name, recipe, world, seed, before):
    """Run a recipe and measure what it left; returns a line of the table as a dict."""
    output_dir = world.folder / f"{name}-{seed}"
    words, started = command(recipe, world, seed, output_dir), time.monotonic()
    _run(unlearn, "run_unlearn.py", [*words, "--overwrite_output_dir", "--disable_tqdm", "True", "--use_cpu", "True"])
    seconds, after = time.monotonic() - started, measure(output_dir, world)
    steps = json.loads((output_dir / "unlearning.json").read_text(encoding="utf-8"))["optimizer_steps"]
    line = {"recipe": recipe.stem, "world": world.name, "seed": seed, "steps": steps, "seconds": seconds}
    return {**line, "before": before, "after": after, "met": is_met(before, after), "command": words}


def table(lines):
    """Return the rows as a Markdown table, with their commands below."""
    names = ("forget_nll", "forget_entropy", "retain_nll")
    heads = ["recipe", "world", "seed", "steps", *(name.replace("_", " ") for name in names), "seconds", "met"]
    rows = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 3) + "---|"]
    for line in lines:
        values = [f"{line['before'][name]:.3f} to {line['after'][name]:.3f}" for name in names]
        cells = [line["recipe"], line["world"], line["seed"], line["steps"], *values, f"{line['seconds']:.1f}"]
        rows.append("| " + " | ".join(map(str, [*cells, "yes" if line["met"] else "NO"])) + " |")
    typed = [f"python run_unlearn.py {shlex.join(line['command'])}" for line in lines]
    return "\n".join([*rows, "", "```", *typed, "```", ""])


def main(argv=None):
    """Run the recipes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", nargs="+", choices=["demo", "tofu"], help="Default: demo, and tofu with --tofu_dir."
    )
    parser.add_argument("--tofu_dir", help="Folder with models/ and tofu_small/.")
    parser.add_argument("--recipes", nargs="+", default=(), help="Names of recipes; default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of training.")
    parser.add_argument("--output_dir", type=Path, default=Path("output/tiny"), help="For models, lenses and the like.")
    parser.add_argument("--output", type=Path, help="Where the table goes; default: to the terminal alone.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    lines = []
    for name in args.worlds or ["demo", *(["tofu"] if args.tofu_dir else [])]:
        if name == "tofu" and not args.tofu_dir:
            raise UserError("--worlds tofu needs --tofu_dir, the folder with models/ and tofu_small/")
        folder = args.output_dir / name
        world = demo_world(folder) if name == "demo" else tofu_world(args.tofu_dir, folder)
        before = measure(world.model, world)
        for recipe, path in recipes(name, args.recipes).items():
            for seed in args.seeds:
                lines.append(run_recipe(recipe, path, world, seed, before))
                sys.stderr.write(table(lines[-1:]).split("\n")[2] + "\n")
    sys.stdout.write(table(lines))
    if args.output:
        args.output.write_text(table(lines), encoding="utf-8")
    return 0 if all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
