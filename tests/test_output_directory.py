"""Where a run writes: the ACL 2024 pattern to the letter, other directories as given, and what is refused."""

import os
import shlex
import types

import pytest
from transformers import TrainingArguments

from llm_unlearn.errors import UserError
from llm_unlearn.output_directory import check_output_directory, legacy_learning_rate, output_directory
from llm_unlearn.parsing import parse

GITHUB = (
    "--target_model_name_or_path ../../models/Yi-6B --per_device_train_batch_size 1 --output_dir ./output "
    "--num_train_epochs 1 --learning_rate 2e-5 --domain github --gradient_accumulation_steps 85 --unlearn_method "
)
PATTERN = "./output/github/Yi-6B/8_gpu_bs_1_gas_85_lr_2.0e_5_epoch1"


@pytest.fixture(autouse=True)
def first_of_eight_processes(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    monkeypatch.delenv("RANK", raising=False)


def directory(command):
    parsed = parse(shlex.split(command))
    return output_directory(parsed.method, parsed.args, parsed.model, parsed.data)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gradient_ascent", "/unlearn/gradient_ascent"),
        ("ascent_plus_kl_divergence", "/unlearn/ascent_plus_kl_divergence"),
        ("ascent_plus_kl_divergence --general True", "general/unlearn/ascent_plus_kl_divergence"),
        ("ascent_plus_descent --general True", "general/unlearn/ascent_plus_descent"),
        ("random_label --completely_random True", "/unlearn/random_label-completely_random"),
        ("random_label --top_k 1 --rm_groundtruth True", "_rmgt/unlearn/random_label-top_k1"),
        ("random_label --top_k 50", "/unlearn/random_label-top_k50"),
        ("random_label --top_p 0.9", "/unlearn/random_label-top_p90"),
        ("random_label --top_k 5 --top_p 0.4", "/unlearn/random_label-top_k5_top_p0.4"),
        ("random_label --rm_groundtruth True", "_rmgt/unlearn/random_label-top_p100"),
        ("npo", "/unlearn/npo"),
        ("llm_unlearn.methods.npo:NPOTrainer", "/unlearn/llm_unlearn.methods.npo.NPOTrainer"),
    ],
)
def test_published_pattern(method, expected):
    assert directory(GITHUB + method) == PATTERN + expected


def test_other_settings_in_the_pattern():
    command = GITHUB.replace("github", "arxiv").replace("85", "60").replace("2e-5", "3.5e-5")
    assert directory(command + "npo --num_train_epochs 2.9 --per_device_train_batch_size 4 --output_sufix=-try") == (
        "./output/arxiv/Yi-6B/8_gpu_bs_4_gas_60_lr_3.5e_5_epoch2/unlearn/npo-try"
    )


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--target_model_name_or_path hub/Yi-34B", "Yi-34B"),
        ("--target_model_name_or_path /models/Yi-34B/", "Yi-34B"),
        # The published name takes --model_name_or_path first.
        ("--target_model_name_or_path a/b --model_name_or_path c/d", "d"),
    ],
)
def test_model_name_in_the_pattern(flags, name):
    assert directory(f"--unlearn_method npo --domain tofu {flags}").startswith(f"./output/tofu/{name}/8_gpu_")


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(2e-5, "2.0e_5"), (3.5e-5, "3.5e_5"), (1e-10, "1.0e_10"), (1.0, "1.0e0"), (0.1, "1.0e_1"), (2e10, "2.0e10")],
)
def test_learning_rates_as_the_published_directories_write_them(rate, expected):
    """The published code stopped with an IndexError at 1.0; there it is written without a minus."""
    assert legacy_learning_rate(rate) == expected


@pytest.mark.parametrize("given", ["./output", "output", "./output/", "output/", None])
def test_the_published_output_counts_as_not_given(given):
    flag = "" if given is None else f"--output_dir {given}"
    command = GITHUB.replace("--output_dir ./output", flag)
    assert directory(command + "npo") == PATTERN + "/unlearn/npo"


@pytest.mark.parametrize("given", ["out", "./output/mine", "/tmp/output", "./outputs", "../output"])
def test_any_other_directory_is_honored(given):
    assert directory(GITHUB.replace("./output", given) + "npo") == given


# ---- What is refused ----


def flags(path, overwrite_output_dir=False, resume_from_checkpoint=None):
    return types.SimpleNamespace(
        output_dir=str(path),
        overwrite_output_dir=overwrite_output_dir,
        resume_from_checkpoint=resume_from_checkpoint,
    )


@pytest.fixture
def full(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("weights")
    return tmp_path / "full"


def test_a_directory_that_holds_something_is_refused(full):
    with pytest.raises(UserError, match=r"is not empty; pass --overwrite_output_dir, --resume_from_checkpoint auto"):
        check_output_directory(flags(full))


@pytest.mark.parametrize("resume", ["False", "false", False])
def test_not_resuming_exempts_nothing(full, resume):
    with pytest.raises(UserError, match="is not empty"):
        check_output_directory(flags(full, resume_from_checkpoint=resume))


def test_overwriting_and_resuming_are_exempt(full):
    check_output_directory(flags(full, overwrite_output_dir=True))
    for resume in ("True", "auto", True, str(full / "checkpoint-3")):
        check_output_directory(flags(full, resume_from_checkpoint=resume))
    assert [path.name for path in full.iterdir()] == ["model.safetensors"]


def test_a_new_or_empty_directory_is_fine_and_nothing_is_created(tmp_path):
    check_output_directory(flags(tmp_path))
    check_output_directory(flags(tmp_path / "new/below"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_refused_even_where_overwriting(full):
    with pytest.raises(UserError, match="is a file"):
        check_output_directory(flags(full / "model.safetensors", overwrite_output_dir=True))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    """Asked of the nearest folder that exists; the answer is made up because root may write everywhere."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((str(path), mode)))
    with pytest.raises(UserError, match="cannot be written"):
        check_output_directory(flags(tmp_path / "new/below"))
    assert asked == [(str(tmp_path), os.W_OK)]


def test_only_the_first_process_looks(full, monkeypatch):
    """The others may come later, when the first has created files."""
    monkeypatch.setenv("RANK", "1")
    check_output_directory(flags(full))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError):
        check_output_directory(flags(full))
