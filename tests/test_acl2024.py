"""The ACL 2024 command lines, as published, chained: tokenize, then unlearn with each of the seven methods."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_world import terms

from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.synthetic import write_world

ROOT = Path(__file__).parents[1]
PUBLISHED = (
    "--per_device_train_batch_size 1 --do_unlearn --output_dir ./output --overwrite_output_dir --num_train_epochs 1 "
    "--logging_steps 1 --learning_rate 2e-5 --warmup_ratio 0.03 --overwrite_cache --save_total_limit 1 "
    "--fsdp|full_shard auto_wrap|--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --bf16 True --tf32 True "
    "--weight_decay 0. --lr_scheduler_type cosine"
)
SEVEN = {
    "gradient_ascent": "gradient_ascent",
    "random_label --completely_random True": "random_label-completely_random",
    "random_label --top_k 1 --rm_groundtruth True": "random_label-top_k1",
    "ascent_plus_descent": "ascent_plus_descent",
    "ascent_plus_descent --general True": "ascent_plus_descent",
    "ascent_plus_kl_divergence": "ascent_plus_kl_divergence",
    "ascent_plus_kl_divergence --general True": "ascent_plus_kl_divergence",
}


def published(model, data_dir, domain, method, gas):
    """Split the published command line into words; only model, data and accumulation are ours."""
    before, fsdp, after = PUBLISHED.split("|")
    words = ["--target_model_name_or_path", model, "--data_dir", str(data_dir), *before.split(), fsdp, *after.split()]
    return [*words, "--domain", domain, "--gradient_accumulation_steps", str(gas), "--unlearn_method", *method.split()]


def script(name):
    """Load a script of utils/, which is not importable, and return its main."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"utils/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_world):
    """A folder with the data of the demo world, tokenized by both published scripts."""
    folder = tmp_path_factory.mktemp("acl")
    write_world(folder / "data")
    common = ["--tokenizer_name_or_path", tiny_world["model"], "--data_dir", str(folder / "data")]
    common += ["--output_dir", str(folder / "tokenized_dataset")]
    script("save_tokenized_dataset")([*common, "--use_cpu"])
    script("ascent_plus_descent_tokenizer")(common)
    return folder


@pytest.mark.parametrize("domain", ["arxiv", "github"])
@pytest.mark.parametrize("method", SEVEN)
def test_published_commands_run_chained(method, domain, workplace, tiny_world, monkeypatch, caplog):
    monkeypatch.chdir(workplace)
    gas = {"arxiv": 6, "github": 5}[domain]
    assert main(published(tiny_world["model"], workplace / "data", domain, method, gas)) == 0
    general = "general" if "--general" in method else ""
    rmgt = "_rmgt" if "--rm_groundtruth" in method else ""
    expected = f"output/{domain}/model/1_gpu_bs_1_gas_{gas}_lr_2.0e_5_epoch1{general}{rmgt}/unlearn/{SEVEN[method]}"
    record = json.loads((workplace / expected / "unlearning.json").read_text())
    assert (workplace / expected / "model.safetensors").is_file()
    assert record["flags"]["bf16"] is True and record["flags"]["tf32"] is None
    said = "\n".join(caplog.messages)
    assert "using the tokenized data set tokenized_dataset" in said
    for warning in ("--tf32 needs", "bfloat16 runs on the CPU", "--fsdp: one process runs without it"):
        assert said.count(warning) == 1, warning
    assert f"the unlearned model is in ./{expected}" in said


def test_no_pickle_is_written(workplace):
    written = {path.suffix for path in (workplace / "tokenized_dataset").rglob("*") if path.is_file()}
    assert written == {".arrow", ".json"}


def test_labels_drawn_beforehand_are_those_drawn_while_training(workplace, tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    losses = []
    for name, cache in (("cached", "tokenized_dataset"), ("online", "nowhere")):
        words = published(
            tiny_world["model"], workplace / "data", "arxiv", "random_label --top_k 1 --rm_groundtruth True", 4
        )
        words += ["--output_dir", str(tmp_path / name), "--tokenized_dataset", cache, "--bf16", "False"]
        assert main(words) == 0
        losses.append([log["loss/forget"] for log in terms(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_adversarial_labels_differ_from_the_text(workplace):
    from datasets import load_from_disk

    folder = workplace / "tokenized_dataset/arxiv/arxiv_forget_500"
    plain, drawn = (load_from_disk(str(folder / part)) for part in ("normal", "random_label/top_k1_top_p1.0_rmgt"))
    assert plain["input_ids"] == drawn["input_ids"]
    for text, labels in zip(plain["labels"], drawn["labels"], strict=True):
        assert not any(a == b for a, b in zip(text[1:], labels[1:], strict=True))


def test_a_stale_tokenized_set_is_refused(workplace, tiny_world, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(workplace)
    words = published(tiny_world["model"], workplace / "data", "arxiv", "gradient_ascent", 6)
    words += ["--output_dir", str(tmp_path / "out"), "--max_length", "64"]
    assert main([word for word in words if word != "--overwrite_cache"]) == 2
    assert "was made with another max_length" in capsys.readouterr().err.splitlines()[-1]
    assert main(words) == 0
    assert any("tokenizing anew" in message for message in caplog.messages)


def test_one_positional_json_is_read_as_published(workplace, tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    flags = {
        "target_model_name_or_path": tiny_world["model"], "domain": "github", "data_dir": str(workplace / "data"),
        "unlearn_method": "ascent_plus_descent", "output_dir": str(tmp_path / "out"), "learning_rate": 2e-5,
        "gradient_accumulation_steps": 4, "positive_factor": 0.5, "num_train_epochs": 1,
        "tokenized_dataset": "nowhere",
    }  # fmt: skip
    (workplace / "run.json").write_text(json.dumps(flags))
    assert main(["run.json"]) == 0
    assert json.loads((tmp_path / "out/unlearning.json").read_text())["flags"]["retain_weight"] == 0.5


def test_general_takes_the_general_retain_set(workplace, tiny_world, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    words = published(tiny_world["model"], workplace / "data", "arxiv", "ascent_plus_descent --general True", 6)
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    sources = json.loads((tmp_path / "out/unlearning.json").read_text())["sources"]
    assert sources["retain"][0]["source"].endswith("general/retain.jsonl")
    assert sources["forget"][0]["source"].endswith("arxiv/forget.jsonl")


def test_ascent_gradients_are_the_negated_descent_gradients(tiny_world, tmp_path):
    """Section 12 point 2: one micro-batch of GA gives exactly the negated gradients of plain cross-entropy."""
    from transformers import AutoModelForCausalLM

    from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset
    from llm_unlearn.methods.gradient_ascent import GradientAscentTrainer
    from llm_unlearn.training_arguments import UnlearnArguments

    # float64: in float32 the memorized tokens' p - 1 cancels to a few digits, in another order on either side.
    model = AutoModelForCausalLM.from_pretrained(tiny_world["model"]).double().eval()
    rows = [{"input_ids": [5, 9, 14, 7, 30, 2], "labels": [-100, -100, 14, 7, 30, 2]}]
    data = UnlearnDataset({"forget": rows})
    trainer = GradientAscentTrainer(model=model, args=UnlearnArguments(output_dir=str(tmp_path)), train_dataset=data)
    batch = UnlearnCollator()([data[("forget", 0)]])
    trainer.compute_loss(model, batch).backward()
    ascent = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    stream = batch["forget"]
    # transformers' own loss would round the logits to float32.
    logits = model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], stream["labels"][0, 1:]).backward()
    for name, value in model.named_parameters():
        assert torch.allclose(-value.grad, ascent[name], rtol=1e-9, atol=1e-12)
