"""utils/unlearn_model.py: what losses, data sets and keys of SOUL and WAGLE become, what is refused, and one run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from soul_world import ROOT, configuration, flags_of, folder, plain, refused, shown, value_of, write
from tiny_world import terms

from llm_unlearn.cli.published_soul import main
from llm_unlearn.cli.published_soul_tables import FORGET_SETS, LOSSES, RETAIN_SETS
from llm_unlearn.cli.unlearn import main as unlearn

__all__ = ["folder", "shown"]

# ---- Every loss ----

# {loss: (keys of its section, method, flags that must come of them)}
BECOMES = {
    "FT": ({}, "grad_diff", {"forget_weight": 0, "retain_weight": 1, "retain_loss": "nll"}),
    "l1_sparse": ({"alpha": 1e-7}, "l1_sparse", {"l1_coef": 1e-7, "max_steps": 400}),
    "GA": ({}, "gradient_ascent", {}),
    "GA+FT": ({"gamma": 0.3}, "grad_diff", {"forget_weight": 1, "retain_weight": 0.3, "retain_loss": "nll"}),
    "GA+KL": ({"gamma": 0.3}, "grad_diff", {"forget_weight": 0.3, "retain_weight": 0.7, "retain_loss": "kl"}),
    "GA_FT_epoch": ({"gamma": 2}, "grad_diff", {"retain_weight": 0}),
    "RL": ({}, "random_label", {"label_source": "retain_answers"}),
    "KL": ({"gamma": 0.5}, "kl", {"forget_weight": 0.5, "retain_weight": 1}),
    "CL": ({}, "po", {"retain_weight": 0}),
    "CL+FT": ({}, "po", {"forget_weight": 1, "retain_weight": 1, "retain_loss": "nll"}),
    "CL+KL": ({"gamma": 4}, "po", {"retain_weight": 4, "retain_loss": "kl"}),
    "CL_FT_epoch": ({"gamma": 4}, "po", {"retain_weight": 0}),
    "NPO": ({"gamma": 2}, "npo", {"beta": 0.1 / 40, "forget_weight": 1 / 40, "retain_weight": 2}),
    "NPO+FT": ({"gamma": 2, "beta": 0.2}, "npo", {"beta": 0.2 / 40, "forget_weight": 1 / 40, "retain_weight": 2}),
}


def test_every_loss_has_its_line():
    assert {*BECOMES} == {*LOSSES}


@pytest.mark.parametrize("name", BECOMES)
def test_a_loss_becomes_a_method_with_its_weights(name, shown):
    keys, method, expected = BECOMES[name]
    parsed = flags_of(shown(*plain(name, **keys)))
    assert parsed.method == method and parsed.notes == []
    assert {flag: value_of(parsed, flag) for flag in expected} == pytest.approx(expected)
    assert parsed.data.domain == "tofu" and parsed.data.forget_split == "forget10"
    args = parsed.args
    assert args.question_template == "[INST] {question} [/INST]{answer}" and args.max_length == 512
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (1e-4, 1, 1)
    assert (args.weight_decay, args.warmup_steps, args.seed, args.bf16, args.optim) == (
        0.1,
        0.1,
        0,
        True,
        "adamw_torch",
    )
    assert args.save_strategy == "no" and args.output_dir == f"files/logs/{name}/checkpoints"


@pytest.mark.parametrize(("name", "method"), [("GA_FT_epoch", "grad_diff"), ("CL_FT_epoch", "po")])
def test_a_weight_raised_once_an_epoch_has_the_same_mean(name, method, shown):
    """Epochs 0 to 4 of 5 weigh 0, 1/5, ..., 4/5: mean 2/5, as that of a line from 0 to 4/5."""
    parsed = flags_of(shown(*plain(name, gamma=2), "--unlearn.num_epochs", "5"))
    assert (parsed.method, parsed.args.retain_weight, parsed.args.retain_schedule) == (method, 2.0, "0:0.8")
    start, end = (float(part) for part in parsed.args.retain_schedule.split(":"))
    assert (start + end) / 2 == pytest.approx(sum(epoch / 5 for epoch in range(5)) / 5)


def test_npo_of_the_mean_over_tokens_is_npo_of_their_sum_with_the_converted_numbers(shown):
    """By hand, a row of 1,023 tokens whose NLL rose by 0.5 a token: -(2/b) log sigmoid(-b (logp - ref)) both ways."""
    import torch

    from llm_unlearn.objectives.preference import npo

    words = [word if word not in ("Tofu_forget10", "Tofu_retain90", "400") else {"400": "1"}.get(word, "WMDPBio")
             for word in plain("NPO")]  # fmt: skip
    parsed = flags_of(shown(*words))
    assert parsed.data.domain == "wmdp_bio" and parsed.data.retain_data is None and parsed.args.max_length == 1024
    ours = parsed.args.forget_weight * npo(torch.tensor([-1023 * 2.5]), torch.tensor([-1023 * 2.0]), parsed.args.beta)
    theirs = -torch.nn.functional.logsigmoid(torch.tensor(0.1 * (2.5 - 2.0))) * 2 / 0.1
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


# ---- Data ----


@pytest.mark.parametrize("name", FORGET_SETS)
def test_every_forget_set_parses_with_its_retain_set(name, shown):
    retain = FORGET_SETS[name].retain or "WMDPALL"
    extra = ["--extra", "--forget_data mine.jsonl"] if name == "HP" else []
    words = [{"Tofu_forget10": name, "Tofu_retain90": retain, "400": "1"}.get(word, word) for word in plain("CL+FT")]
    parsed = flags_of(shown(*words, *extra))
    assert parsed.data.max_train_samples is None and parsed.data.retain_split is None
    assert (parsed.data.forget_data is None) == (name not in ("HP", "WMDPALL"))
    assert (parsed.args.question_template is None) == name.startswith("WMDP")


def test_shares_of_the_joined_corpora_are_those_of_their_texts():
    """1,000 of 25,453 texts to forget and 4,473 of 65,360 to keep are of cybersecurity."""
    forget, retain = FORGET_SETS["WMDPALL"].flags["forget_data"], RETAIN_SETS["WMDPALL"]["retain_data"]
    for spec, cyber, biology in ((forget, 1000, 24453), (retain, 4473, 60887)):
        shares = [float(part.rpartition("=")[2]) for part in spec.split(",")]
        assert shares == pytest.approx([cyber / (cyber + biology), biology / (cyber + biology)], abs=5e-5)
        assert sum(shares) == pytest.approx(1)


def test_other_retain_sets(shown):
    def retained(name):
        return flags_of(shown(*plain("GA+FT"), "--dataset.retain_dataset_name", name)).data

    assert retained("Tofu_full").retain_split == "full" and retained("Tofu_retain90").retain_split is None
    assert retained("C4").retain_data == "hub:allenai/c4/en:train"
    assert retained("wikitext").retain_data.endswith("wikitext-2-raw-v1:train#page")


def test_how_many_rows(shown):
    def rows(ratio):
        return flags_of(shown(*plain("GA"), "--dataset.forget_ratio", ratio)).data.max_train_samples

    assert [rows(ratio) for ratio in ("400.0", "1", "0.25", "30")] == [None, None, 100, 30]


# ---- What is refused ----

BASE = plain("GA+FT")
BAD = {
    "loss": (plain("GA+FX"), "unknown --unlearn.unlearn_method 'GA+FX'; did you mean 'GA+FT'?"),
    "no gamma": (plain("GA_KL_epoch"), "--unlearn.unlearn_method GA_KL_epoch is not offered: as published it has no"),
    "sys": (plain("sys"), "type python run_eval.py --model_name_or_path MODEL --domain tofu --system_prompt FILE"),
    "simnpo": (plain("SimNPO+FT"), "--config recipes/wmdp/simnpo.yaml"),
    "file": (["--config_file", "configs/x/y.json"], "'configs/x/y.json' does not exist, and no recipe stands for it"),
    "key": ([*BASE, "--unlearn.lrr", "1"], "unknown key '--unlearn.lrr'; did you mean '--unlearn.lr'?"),
    "other loss": ([*BASE, "--unlearn.CL+FT.gamma", "1"], "--unlearn.CL+FT.gamma has no effect with --unlearn."),
    "no section": ([*BASE, "--unlearn.FT.gamma", "1"], "unknown key '--unlearn.FT.gamma'"),
    "value": ([*BASE, "--unlearn.lr"], "--unlearn.lr needs a value"),
    "word": ([*BASE, "--learning_rate", "1"], "unrecognized argument '--learning_rate'; keys are --section.key VALUE"),
    "number": ([*BASE, "--unlearn.lr", "x"], "--unlearn.lr must be a number >= 0, but is 'x'"),
    "switch": ([*BASE, "--unlearn.sophia", "maybe"], "--unlearn.sophia must be true or false, but is 'maybe'"),
    "rho": ([*BASE, "--unlearn.sophia_params.rho", "1"], "sophia_params.rho has no effect without --unlearn.sophia"),
    "swa": ([*BASE, "--unlearn.swa", "true"], "--unlearn.swa true is not offered: weights are not averaged here"),
    "optim": ([*BASE, "--unlearn.optim", "x"], "--unlearn.optim x is not offered: pass --unlearn.sophia true"),
    "self_retain": ([*BASE, "--dataset.self_retain", "1"], "--dataset.self_retain 1 is not offered: pass --extra"),
    "perturb": ([*BASE, "--dataset.perturb_dataset_name", "GSM8K"], "--extra '--regularizer ilu --ilu_data FILE'"),
    "retain": ([*BASE, "--dataset.retain_dataset_name", "BookCorpus"], "BookCorpus is not offered: it is a script"),
    "task": ([*BASE, "--dataset.forget_dataset_name", "SafePku"], "Tofu_retain90 goes with a forget set of TOFU, not"),
    "HP": ([*BASE, "--dataset.forget_dataset_name", "HP"], "HP is a text under copyright, which nobody may hand out"),
    "ratio": ([*BASE, "--dataset.forget_ratio", "401"], "forget_ratio must be a share or a number of the 400 rows"),
    "share": (
        [*plain("GA"), "--dataset.forget_dataset_name", "SafePku", "--dataset.forget_ratio", "0.5"],
        "--dataset.forget_ratio 0.5 is a share of rows that are not counted; pass their number",
    ),
    "kl": (plain("KL"), "--unlearn.KL.gamma must be above 0: the model would only be held to what it is"),
    "ga kl": (plain("GA+KL", gamma=1.5), "--unlearn.GA+KL.gamma must be at most 1, but is 1.5"),
    "l1": (plain("l1_sparse"), "--unlearn.l1_sparse.alpha must be above 0: without a penalty it is FT"),
    "epochs": ([*plain("CL_FT_epoch"), "--unlearn.max_steps", "5"], "--unlearn.max_steps has no effect on CL_FT_epoch"),
    "lora": (
        [*BASE, "--unlearn.use_lora", "1", "--unlearn.mask_path", "m.pt"],
        "--unlearn.use_lora has no effect with --unlearn.mask_path",
    ),
    "mask name": ([*BASE, "--unlearn.mask_path", "m.pt"], "'m.pt' does not exist; name it TASK_RATIO.pt"),
    "decay": (["--overall.model_name", "m", "--unlearn.unlearn_method", "GA"], "--unlearn.weight_decay is missing"),
    "model": (plain("GA")[2:], "--overall.model_name is missing"),
    "recipe's loss": (
        ["--config_file", "configs/tofu/FO_PO.json", "--unlearn.unlearn_method", "GA"],
        "--unlearn.unlearn_method GA has no effect, because a recipe stands for the configuration",
    ),
    "recipe's optimizer": (
        ["--config_file", "configs/tofu/FO_PO.json", "--unlearn.sophia", "1"],
        "--unlearn.sophia 1 has no effect, because a recipe stands for the configuration",
    ),
    "nothing trained": (
        ["--config_file", "configs/tofu/origin.json", "--unlearn.lr", "1"],
        "--unlearn.lr has no effect where nothing is trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_honored_is_refused_by_name(case, folder, capsys):
    words, message = BAD[case]
    assert message in refused(capsys, *words)


def test_bad_files_are_refused(folder, capsys):
    Path("broken.json").write_text("{")
    assert "not valid JSON" in refused(capsys, "--config_file", "broken.json")
    assert "must hold an object of sections" in refused(capsys, "--config_file", write([1]))
    assert "unknown key '--unlearn.alpha'" in refused(capsys, "--config_file", write({"unlearn": {"alpha": 1}}))


def test_processes_come_from_the_environment(shown, monkeypatch, capsys):
    monkeypatch.setenv("NPROC", "4")
    words = shown(*plain("l1_sparse", alpha=1e-7), "--unlearn.num_epochs", "5")
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=4", "run_unlearn.py"]
    assert words[words.index("--max_steps") + 1] == str(5 * 400 // 4)


def test_lora_is_theirs(shown):
    model = flags_of(shown(*BASE, "--unlearn.use_lora", "true")).model
    assert model.use_peft and (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 32, 0.05)
    assert model.lora_target_modules == ["q_proj", "v_proj"]


def test_keys_that_change_nothing_are_said(shown, caplog):
    with caplog.at_level("INFO", logger="llm_unlearn"):
        shown(*BASE, "--dataset.dataset_seed", "1000", "--unlearn.mu", "1e-6")
    said = " ".join(record.message for record in caplog.records)
    assert "--dataset.dataset_seed changes nothing: rows are taken from the front" in said and "--unlearn.mu" in said


# ---- Runs ----


def test_the_script_prints_a_command_that_parses(folder):
    write(configuration("TOFU/SO_GradDiff"), "configs/mine.json")
    words = [sys.executable, ROOT / "utils/unlearn_model.py", "--config_file", "configs/mine.json", "--dry_run"]
    result = subprocess.run(words, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    parsed = flags_of(shlex.split(result.stdout))
    assert parsed.method == "grad_diff" and parsed.args.unlearn_optimizer == "soul_legacy"


def test_what_is_printed_is_what_is_run_by_a_shell(folder, capsys):
    """Also where a template has two lines."""
    ran = []
    words = ["--config_file", write(configuration("Toxic/FO_PO_opt")), "--logger.name", "it's\n\\ a"]
    assert main(words, lambda command: ran.append(command) or 7) == 7
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[:-1] == ran[0] and any("\n" in word for word in ran[0])
    assert main([*words, "--dry_run"], ran.append) == 0
    assert capsys.readouterr().out == line and len(ran) == 1


def test_second_order_preference_optimization_runs(folder, tiny_world, capsys):
    """A file of their form with files of ours, from the command line to the logged terms."""
    sections = configuration("TOFU/SO_PO")
    sections["overall"]["model_name"] = str(tiny_world["model"])
    sections["logger"]["json"]["root"] = str(folder / "out")
    extra = f"--domain custom --forget_data {tiny_world['forget']} --retain_data {tiny_world['retain']} --use_cpu True"
    extra += " --bf16 False --disable_tqdm True --max_steps 2"
    words = ["--config_file", write(sections), "--unlearn.lr", "1e-3", "--extra", extra]
    assert main(words, lambda command: unlearn(command[2:])) == 0
    logged = terms(folder / "out/config/checkpoints")
    assert len(logged) == 2 and {"loss/forget", "loss/retain"} <= set(logged[0])
    record = json.loads((folder / "out/config/checkpoints/unlearning.json").read_text())
    assert "soul_legacy" in json.dumps(record)
