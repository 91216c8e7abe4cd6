"""Configurations as SOUL and WAGLE published them, and the helpers of the tests that translate them."""

import json
from pathlib import Path

import pytest

from llm_unlearn.cli.published_soul import main
from llm_unlearn.errors import run_cli
from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]
TOFU, ZEPHYR = "locuslab/tofu_ft_llama2-7b", "HuggingFaceH4/zephyr-7b-beta"
LLAMA, OPT = "meta-llama/Llama-2-7b-hf", "facebook/opt-1.3b"
ON_TOFU, ON_PKU, ON_WMDP = ("Tofu_forget10", "Tofu_retain90", 400), ("SafePku", "C4", 200), ("WMDPALL", "WMDPALL", 1.0)
SOPHIA = {"sophia": True, "sophia_params": {"betas_low": 0.9, "betas_high": 0.95, "rho": 0.04}}


def masked(path, steps=-1):
    return {"mask_path": f"./mask/{path}", "mu": 1e-6, "max_steps": steps, "sophia": False, "p": 0.01, "q": 0.01,
            "resume_path": None, "use_lora": False}  # fmt: skip


# What was published: folder and name, model, data, loss, gamma, epochs, learning rate, weight decay, seed, the rest.
PUBLISHED = {
    "TOFU/FO_GradDiff": (TOFU, ON_TOFU, "GA+FT", 0.3, 5, 5e-6, 0.1, 0, {}),
    "TOFU/SO_GradDiff": (TOFU, ON_TOFU, "GA+FT", 2, 5, 5e-6, 0.1, 0, SOPHIA),
    "TOFU/FO_PO": (TOFU, ON_TOFU, "CL+FT", 1.0, 5, 2e-5, 0.1, 0, {}),
    "TOFU/SO_PO": (TOFU, ON_TOFU, "CL+FT", 5.0, 5, 1e-5, 0.1, 0, SOPHIA),
    "Toxic/FO_PO_llama": (LLAMA, ON_PKU, "CL+FT", 1.0, 10, 1e-5, 0.0, 0, {}),
    "Toxic/SO_PO_llama": (LLAMA, ON_PKU, "CL+FT", 0.1, 10, 1e-5, 0.0, 0, SOPHIA),
    "Toxic/FO_PO_opt": (OPT, ON_PKU, "CL+FT", 0.1, 5, 2e-5, 0.0, 0, {}),
    "Toxic/SO_PO_opt": (OPT, ON_PKU, "CL+FT", 0.1, 5, 2e-5, 0.0, 0, SOPHIA),
    "Tofu/GradDiff+WAGLE": (TOFU, ON_TOFU, "GA+FT", 1.0, 5, 7e-6, 0.1, 0, masked("tofu_0.95.pt")),
    "Tofu/NPO+WAGLE": (TOFU, ON_TOFU, "NPO+FT", 1.0, 5, 1e-5, 0.1, 1, masked("tofu_0.95.pt", 400)),
    "Tofu/PO+WAGLE": (TOFU, ON_TOFU, "CL+FT", 1.0, 5, 2e-5, 0.1, 0, masked("tofu_0.8.pt")),
    "wmdp/GradDiff+WAGLE": (ZEPHYR, ON_WMDP, "GA+FT", 1.0, 5, 5e-6, 0.0, 3, masked("wmdp_0.4.pt", 500)),
    "wmdp/NPO+WAGLE": (ZEPHYR, ON_WMDP, "NPO+FT", 1.0, 5, 1e-5, 0.0, 0, masked("wmdp_0.6.pt", 500)),
}


def configuration(name):
    """Return the sections of a published configuration."""
    model, (forget, retain, ratio), loss, gamma, epochs, rate, decay, seed, rest = PUBLISHED[name]
    return {
        "overall": {"model_name": model, "logger": "json", "seed": seed},
        "unlearn": {
            "unlearn_method": loss, "num_epochs": epochs, "lr": rate, "weight_decay": decay,
            "gradient_accumulation_steps": 4, loss: {"gamma": gamma}, **rest,
        },
        "dataset": {
            "forget_dataset_name": forget, "retain_dataset_name": retain, "dataset_seed": 1000, "forget_ratio": ratio,
            "self_retain": False, "batch_size": 1,
        },
        "logger": {"json": {"root": "files/results/x"}},
    }  # fmt: skip


def key_of(name):
    folder, _, stem = name.partition("/")
    return folder.lower(), stem


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with the recipes, and the masks that the configurations name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPROC", raising=False)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "mask").mkdir()
    for mask in ("tofu_0.95", "tofu_0.8", "wmdp_0.4", "wmdp_0.6"):
        (tmp_path / f"mask/{mask}.safetensors").touch()
    return tmp_path


@pytest.fixture
def shown(folder):
    """Function of options that returns the command which they run, as a list of words."""

    def show(*options):
        ran = []
        assert main(options, lambda words: ran.append(words) or 0) == 0
        return ran[0]

    return show


def refused(capsys, *words):
    """Return the sentence with which words are refused, before anything is printed or run."""
    ran = []
    assert run_cli(lambda: main(words, ran.append)) == 2
    said = capsys.readouterr()
    assert said.out == "" and not ran and "Traceback" not in said.err
    return said.err.splitlines()[-1]


def write(sections, name="config.json"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections), encoding="utf-8")
    return str(path)


def flags_of(words):
    """Return the Parsed command line of a command, which must start run_unlearn.py."""
    assert words[0] == "python" and words[1] == "run_unlearn.py"
    return parse(words[2:])


def value_of(parsed, name):
    (holder,) = (part for part in (parsed.args, parsed.data, parsed.model) if hasattr(part, name))
    found = getattr(holder, name)
    return getattr(found, "value", found)


def plain(method, **keys):
    """Words of a run on TOFU without a file; keys are of the loss's section."""
    words = ["--overall.model_name", "m-llama", "--unlearn.unlearn_method", method, "--unlearn.weight_decay", "0.1",
             "--dataset.forget_dataset_name", "Tofu_forget10", "--dataset.retain_dataset_name", "Tofu_retain90",
             "--dataset.forget_ratio", "400", "--dataset.batch_size", "1"]  # fmt: skip
    return [*words, *(word for key, value in keys.items() for word in (f"--unlearn.{method}.{key}", str(value)))]
