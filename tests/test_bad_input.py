"""Each mistake ends in exit code 2 and one sentence that names it, before anything is written."""

import json

import pytest
from tiny_world import command

from llm_unlearn.cli.unlearn import main


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


LONG = {"question": "why " * 600, "answer": "so"}
BAD_SETS = {
    "missing_file": (None, "does not exist"),
    "empty": ([], "has no rows"),
    "malformed": ([{"question": "a", "answer": "b"}, '{"question": "a", "ans'], "row 2"),
    "missing_column": ([{"question": "a"}], "no column 'answer'"),
    "number_in_text": ([{"question": "a", "answer": 5}], "'answer' must be text"),
    "empty_answer": ([{"question": "a", "answer": "  "}], "'answer' is empty"),
    "all_masked": ([LONG, LONG], "no token left that counts"),
    "no_columns": ([{"foo": "a"}], "foo"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_bad_forget_sets(case, tiny_world, tmp_path, capsys):
    rows, expected = BAD_SETS[case]
    path = str(tmp_path / "set.jsonl")
    if rows is not None:
        write(tmp_path / "set.jsonl", *rows)
    words = command({**tiny_world, "forget": path}, "npo", tmp_path / "out")
    assert main(words) == 2
    assert expected in last_line(capsys)
    assert not (tmp_path / "out").exists()


BAD_FLAGS = {
    "lora_r": (["--lora_r", "64"], "--lora_r has no effect without --use_peft"),
    "negative_weight": (["--retain_weight", "-3"], "--retain_weight must be at least 0"),
    "seed": (["--seed", "-1"], "--seed must not be negative"),
    "max_train_samples": (["--max_train_samples", "-3"], "--max_train_samples must be at least 1"),
    "forget_split": (["--forget_split", "forget01"], "--forget_split has no effect with --forget_data"),
    "sampling": (["--train_sampling_strategy", "sequential"], "sequential"),
    "long_name": (["--retain_data", "a" * 300], "does not exist"),
    "template_kwargs": (["--chat_template_kwargs", "{date"], "is not valid JSON"),
    "nop": (["--unlearn_method", "nop"], "did you mean 'npo'"),
    "domain": (["--domain", "tofoo"], "did you mean 'tofu'"),
    "wmdp": (["--domain", "wmdp"], "wmdp_bio"),
    "not_applicable": (["--completely_random", "True"], "does not apply to npo; it is a flag of random_label"),
    "typo": (["--bta", "0.1"], "did you mean '--beta'"),
    "beta": (["--beta", "0"], "--beta must be > 0"),
    "retain_loss": (["--retain_loss", "l2"], "--retain_loss"),
    "learning_rate": (["--learning_rate", "-1"], "must not be negative"),
    "max_steps": (["--max_steps", "0"], "--max_steps 0"),
    "label_smoothing": (["--label_smoothing_factor", "0.1"], "has no effect"),
    "max_length": (["--max_length", "4096"], "beyond the model's context of 512"),
    "lora_without_peft": (["--load_in_4bit", "True"], "without --use_peft"),
    "remote_code": (["--trust_remote_code", "True"], "pin it with --model_revision"),
    "no_model_folder": (["--model_name_or_path", "./nowhere"], "'./nowhere' does not exist"),
    "mixture": (["--retain_data", "a.jsonl=0.5,b.jsonl=0.6"], "add up to 1"),
    "template": (["--question_template", "{question}"], "{answer}"),
    "lora_target": (["--use_peft", "True", "--lora_target_modules", "nothing"], "LoRA cannot wrap"),
    "deepspeed": (["--deepspeed", "ds_configs/zero2.json"], "torchrun"),
    "config": (["--config", "nowhere.yaml"], "'nowhere.yaml' does not exist"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, tiny_world, tmp_path, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    flags, expected = BAD_FLAGS[case]
    words = command(tiny_world, "npo", tmp_path / "out")
    if flags[0] == "--unlearn_method":
        words = words[2:]
    assert main([*words, *flags]) == 2
    assert expected in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_retain_set_names_what_to_type(tiny_world, tmp_path, capsys):
    words = command(tiny_world, "npo", tmp_path / "out", "--retain_loss", "kl")
    at = words.index("--retain_data")
    del words[at : at + 2]
    assert main(words) == 2
    assert last_line(capsys) == (
        "--retain_loss kl needs a retain set, but domain 'custom' was given none; "
        "pass --retain_data FILE or --retain_loss none"
    )
    assert main([*words[: words.index("--retain_loss")], "--retain_loss", "none", "--max_steps", "1"]) == 0


def test_an_output_directory_that_holds_something(tiny_world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out/mine.txt"
    kept.write_text("kept")
    words = command(tiny_world, "gradient_ascent", tmp_path / "out", "--max_steps", "1")
    assert main(words) == 2
    assert "is not empty; pass --overwrite_output_dir" in last_line(capsys)
    assert main([*words, "--overwrite_output_dir"]) == 0
    assert kept.read_text() == "kept"


def test_a_tokenizer_of_another_model(tiny_world, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["model"])
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    words = command(tiny_world, "npo", tmp_path / "out", "--tokenizer_name", tmp_path / "other")
    assert main(words) == 2
    assert "another model's tokenizer" in last_line(capsys)


def test_warmup_that_leaves_no_learning_rate_is_warned(tiny_world, tmp_path, caplog):
    flags = ["--max_steps", "1", "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine"]
    words = command(tiny_world, "npo", tmp_path / "out", *flags)
    assert main(words) == 0
    assert any("the model will not change" in message for message in caplog.messages)


def test_pure_bfloat16_weights_are_allowed_and_warned(tiny_world, tmp_path, caplog):
    assert main(command(tiny_world, "grad_diff", tmp_path / "out", "--dtype", "bfloat16", "--max_steps", "1")) == 0
    assert any("swallows small updates" in message for message in caplog.messages)


def test_a_failed_push_costs_nothing(tiny_world, tmp_path, capsys, monkeypatch):
    from huggingface_hub import HfApi

    from llm_unlearn.checkpoints import incompleteness

    def refuse(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    words = command(tiny_world, "npo", tmp_path / "out", "--push_to_hub", "True", "--hub_model_id", "someone/thing")
    assert main([*words, "--max_steps", "1"]) == 3
    assert "retry with: python utils/push_checkpoint.py" in last_line(capsys)
    assert incompleteness(tmp_path / "out") is None


def test_retraining_the_target_is_warned(tiny_world, tmp_path, caplog):
    words = command(tiny_world, "retrain", tmp_path / "out", "--max_steps", "1")
    assert main(words) == 0 and "gold model" not in "".join(caplog.messages)
    words = [word.replace("--model_name_or_path", "--target_model_name_or_path") for word in words]
    assert main([*words, "--overwrite_output_dir"]) == 0 and "gold model" in "".join(caplog.messages)


def test_the_model_that_a_run_starts_from_is_never_overwritten(tiny_world, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_world["model"], tmp_path / "mine/checkpoint-1")
    world = {**tiny_world, "model": str(tmp_path / "mine/checkpoint-1")}
    for output_dir in (tmp_path / "mine", tmp_path / "mine/checkpoint-1"):
        assert main(command(world, "npo", output_dir, "--overwrite_output_dir", "--max_steps", "1")) == 2
        assert "which the run starts from" in last_line(capsys)
    assert (tmp_path / "mine/checkpoint-1/model.safetensors").is_file()


def test_full_weights_over_an_adapter_and_back_reload(tiny_world, tmp_path):
    from transformers import AutoModelForCausalLM

    for flags in ([], ["--use_peft", "True"], []):
        words = command(tiny_world, "npo", tmp_path / "out", "--max_steps", "1", "--overwrite_output_dir", *flags)
        assert main(words) == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
        assert (tmp_path / "out/adapter_config.json").is_file() == bool(flags)


def test_a_truncated_model_file(tiny_world, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_world["model"], tmp_path / "broken")
    path = tmp_path / "broken/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(command({**tiny_world, "model": str(tmp_path / "broken")}, "npo", tmp_path / "out")) == 2
    assert "cannot be loaded" in last_line(capsys)


def test_a_mistake_on_another_node_is_said_there(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["--unlearn_method", "nop"]) == 2
    assert "did you mean 'npo'" in last_line(capsys)
