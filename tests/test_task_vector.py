"""utils/task_vector.py: the arithmetic by hand, in parts and over shards, what it refuses, what it leaves behind."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_unlearn import checkpoint_arithmetic
from llm_unlearn.checkpoint_arithmetic import CheckpointFiles, subtract_task, task_vector_difference
from llm_unlearn.checkpoints import incompleteness
from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.errors import UserError, run_cli

SCRIPT = Path(__file__).parents[1] / "utils/task_vector.py"


def run(*words):
    spec = importlib.util.spec_from_file_location("task_vector", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_cli(lambda: module.main([str(word) for word in words]))


def write(folder, tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return CheckpointFiles(folder, "target model")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three models of one shape, the first with the demo's tokenizer, in two shards and tied."""
    folder = tmp_path_factory.mktemp("models")
    make_base_model(str(folder / "with_tokenizer"), 0)
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "with_tokenizer"))
    for seed, name in enumerate(("target", "forget", "base")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="40KB" if name == "target" else "50GB")
        for path in (folder / "with_tokenizer").glob("*token*"):
            shutil.copyfile(path, folder / name / path.name)
    return folder


def flags_of(models, output_dir, *more):
    words = ["--target_model_name_or_path", models / "target", "--forget_model_name_or_path", models / "forget"]
    return [*words, "--base_model_name_or_path", models / "base", "--output_dir", output_dir, *more]


def test_the_difference_worked_out_by_hand():
    """3 - 2 * (5 - 4) = 1 and -1 - 2 * (0 - 1) = 1; at alpha -1 the direction is put in: 3 + 1 = 4."""
    theta, forget, base = torch.tensor([3.0, -1.0]), torch.tensor([5.0, 0.0]), torch.tensor([4.0, 1.0])
    assert task_vector_difference(theta, forget, base, 2.0).tolist() == [1.0, 1.0]
    assert task_vector_difference(theta, forget, base, -1.0).tolist() == [4.0, -2.0]
    assert task_vector_difference(theta.bfloat16(), forget, base.half(), 2.0).dtype == torch.float32


@pytest.mark.parametrize("elements", [1, 7, 2**24], ids=["row_by_row", "in_parts", "whole"])
def test_a_file_written_in_parts_is_what_safetensors_reads(tmp_path, monkeypatch, elements):
    """Odd shapes, a scalar, an empty tensor, integers that all models share, two precisions."""
    monkeypatch.setattr(checkpoint_arithmetic, "CHUNK_ELEMENTS", elements)
    made, generator = {}, torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "vector": (11,), "scalar": (), "empty": (0, 4), "deep": (2, 3, 2)}
    for name in ("target", "forget", "base"):
        made[name] = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        made[name]["vector"] = made[name]["vector"].bfloat16()
        made[name]["ids"] = torch.arange(4)
    models = {name: write(tmp_path / name, tensors) for name, tensors in made.items()}
    (tmp_path / "out").mkdir()
    change = subtract_task(*models.values(), 0.5, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == made["target"].keys()
    squares = 0.0
    for key, theta in made["target"].items():
        forget, base = made["forget"][key], made["base"][key]
        assert found[key].dtype == theta.dtype and found[key].shape == theta.shape
        expected = theta if key == "ids" else (theta.float() - 0.5 * (forget.float() - base.float())).to(theta.dtype)
        assert torch.equal(found[key], expected)
        squares += float((forget.double() - base.double()).square().sum())
    assert change.norm == pytest.approx(squares**0.5, rel=1e-6) and change.changed == 5 * 3 + 11 + 1 + 12


def test_changes_below_the_resolution_are_counted(tmp_path):
    """bfloat16 has 8 bits: beside 1 a change of 2^-10 is lost, one of 2^-6 is not; float32 keeps both."""
    ones = torch.ones(2, dtype=torch.bfloat16)
    moved = torch.tensor([2.0**-10, 2.0**-6])
    models = [write(tmp_path / "t", {"w": ones}), write(tmp_path / "f", {"w": moved})]
    models.append(write(tmp_path / "b", {"w": torch.zeros(2)}))
    (tmp_path / "out").mkdir()
    change = subtract_task(*models, 1.0, tmp_path / "out")
    assert (change.changed, change.swallowed) == (2, 1)
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [1.0, 1 - 2.0**-6]
    change = subtract_task(*models, 1.0, tmp_path / "out", "F32")
    assert change.swallowed == 0
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [1 - 2.0**-10, 1 - 2.0**-6]


def test_the_script_writes_a_complete_checkpoint(models, tmp_path):
    assert run(*flags_of(models, tmp_path / "out", "--alpha", 0.25)) == 0
    assert incompleteness(tmp_path / "out") is None and not (tmp_path / "out/.saving").exists()
    shards = sorted(path.name for path in (models / "target").glob("*.safetensors"))
    assert len(shards) > 1 and shards == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    found, theta, forget, base = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (tmp_path / "out", models / "target", models / "forget", models / "base")
    )
    for name in theta:
        assert torch.equal(found[name], theta[name] - 0.25 * (forget[name] - base[name])), name
    given = AutoTokenizer.from_pretrained(models / "target")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == given.get_vocab()
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["method"] == "task_vector" and record["kind"] == "unlearning" and record["flags"]["alpha"] == 0.25
    assert record["models"]["base"]["name"] == str(models / "base")
    assert len({part["fingerprint"] for part in record["models"].values()}) == 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((models / "target/model.safetensors.index.json").read_text())["weight_map"]
    assert (tmp_path / "out/README.md").read_text().startswith("---\n")


def test_without_a_base_the_target_is_it_and_a_precision_can_be_chosen(models, tmp_path):
    words = [*flags_of(models, tmp_path / "out", "--dtype", "bfloat16")]
    at = words.index("--base_model_name_or_path")
    del words[at : at + 2]
    assert run(*words) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theta, forget = (AutoModelForCausalLM.from_pretrained(models / name).state_dict() for name in ("target", "forget"))
    assert found.dtype == torch.bfloat16
    for name, value in found.state_dict().items():
        assert torch.equal(value, (2 * theta[name] - forget[name]).bfloat16()), name


BAD = {
    "no output": (lambda m, o: flags_of(m, "")[:-1], "--output_dir"),
    "alpha 0": (lambda m, o: flags_of(m, o, "--alpha", 0), "--alpha must be a number other than 0"),
    "dtype": (lambda m, o: flags_of(m, o, "--dtype", "int8"), "--dtype must be auto, float32"),
    "onto the target": (lambda m, o: flags_of(m, m / "target"), "would overwrite the model"),
    "missing": (lambda m, o: [*flags_of(m, o), "--forget_model_name_or_path", m / "nowhere"], "does not exist"),
    "same": (lambda m, o: [*flags_of(m, o), "--forget_model_name_or_path", m / "base"], "have the same weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_and_leave_nothing(case, models, tmp_path, capsys):
    words, reason = BAD[case]
    assert run(*words(models, tmp_path / "out")) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("unlearning.json"))


@pytest.mark.parametrize(
    "changed, reason",
    [
        (lambda t: {k: v for k, v in t.items() if k != "w"}, "has no tensor w"),
        (lambda t: {**t, "w": torch.zeros(3)}, r"has the shape \[3\]"),
        (lambda t: {**t, "w": t["w"] * float("nan")}, "NaN or infinite"),
        (lambda t: {**t, "ids": t["ids"] + 1}, "cannot be subtracted"),
        (lambda t: {**t, "w": t["w"].to(torch.float8_e4m3fn)}, "w of .* is quantized"),
    ],
    ids=["missing", "shape", "nan", "integers", "quantized"],
)
def test_models_that_do_not_fit_are_refused(changed, reason, tmp_path):
    given = {"w": torch.randn(2, generator=torch.Generator().manual_seed(0)), "ids": torch.arange(2)}
    target, forget, base = given, changed(given), {**given, "w": given["w"] + 1}
    if "quantized" in reason:
        target, forget = forget, target
    models = [write(tmp_path / str(n), tensors) for n, tensors in enumerate((target, forget, base))]
    with pytest.raises(UserError, match=reason):
        subtract_task(*models, 1.0, tmp_path)


def test_adapters_pickles_and_torn_files_are_refused(tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/model.safetensors").write_bytes(b"1234")
    write(tmp_path / "adapters", {"w": torch.zeros(1)})
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    (tmp_path / "pickle").mkdir()
    for name, reason in (("torn", "cannot be read"), ("adapters", "merge them"), ("pickle", "no weights in safetens")):
        with pytest.raises(UserError, match=reason):
            CheckpointFiles(tmp_path / name, "base model")
