"""Sweeps, resuming them, repair and LoRA through the command line, and on two processes."""

import json
import shutil

import pytest
from tamper_cases import attack, results, rows_of, tamper, words_on

from llm_unlearn.attacks.sweeps import Configuration, configurations, join_sweeps
from llm_unlearn.cli.tamper import TamperFlags


def test_a_sweep_is_the_product_of_its_values():
    assert configurations(None, TamperFlags(lr=3e-5)) == [Configuration("lr 3e-05", "", {})]
    found = configurations(" lr=1e-5,2e-5; lr_scheduler=linear,cosine", TamperFlags())
    assert [one.name for one in found] == [
        "lr 1e-05, lr_scheduler linear", "lr 1e-05, lr_scheduler cosine",
        "lr 2e-05, lr_scheduler linear", "lr 2e-05, lr_scheduler cosine",
    ]  # fmt: skip
    assert found[1].changes == {"lr": 1e-5, "lr_scheduler": "cosine"}
    assert found[1].folder == "lr_1e-05-lr_scheduler_cosine"
    (typed,) = configurations("max_steps=3;precision=bf16;weight_decay=0", TamperFlags())
    assert typed.changes == {"max_steps": 3, "precision": "bf16", "weight_decay": 0.0}
    assert type(typed.changes["max_steps"]) is int


def test_several_sweeps_are_one():
    words = ["--sweep", "lr=1,2", "--domain", "demo", "--sweep=seed=1,2"]
    assert join_sweeps(words) == ["--domain", "demo", "--sweep", "lr=1,2;seed=1,2"]
    assert join_sweeps(["--domain", "demo"]) == ["--domain", "demo"]


@pytest.fixture(scope="module")
def swept(tiny_world, tmp_path_factory):
    """The folder of a sweep over two learning rates."""
    import torch

    folder = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        attack(tiny_world, folder, "--sweep", "lr=1e-3,1e-2", "--max_steps", 3)
    return folder


def test_each_configuration_has_its_folder_and_the_strongest_counts(swept):
    record = results(swept)
    assert [curve["name"] for curve in record["curves"]] == ["lr 0.001", "lr 0.01"]
    assert [curve["settings"]["learning_rate"] for curve in record["curves"]] == [1e-3, 1e-2]
    for curve, name in zip(record["curves"], ("lr_0.001", "lr_0.01"), strict=True):
        (path,) = (swept / name).glob("tamper_results_*.json")
        assert json.loads(path.read_text()) == curve["rows"] and path.with_suffix(".png").is_file()
    assert len(list(swept.glob("tamper_results_*.png"))) == 1, "one plot of all"
    first, second = rows_of(record, 0), rows_of(record, 1)
    assert first[0] == second[0], "each attacks the model as it was"
    assert first[-1]["forget/probability"] < second[-1]["forget/probability"]
    assert record["strongest"] == "lr 0.01"
    best = record["metrics"]["forget/probability/best"]["value"]
    assert best == max(row["forget/probability"] for row in second)
    recovered = [record["sweep"][name]["forget/probability"]["recovered"] for name in ("lr 0.001", "lr 0.01")]
    assert recovered[0] < recovered[1] == record["metrics"]["forget/probability/recovered"]["value"]
    assert record["counters"]["attacks"] == 2 and record["counters"]["optimizer_steps"] == 6


@pytest.mark.usefixtures("one_cpu_process")
def test_a_killed_sweep_goes_on(tiny_world, swept, tmp_path, monkeypatch):
    """The first configuration is finished, the second one was killed at its second evaluation."""
    from llm_unlearn.attacks import finetuning

    folder = tmp_path / "out"
    shutil.copytree(swept, folder)
    (folder / "results.json").unlink()
    state = json.loads((folder / "lr_0.01/attack.json").read_text())
    kept = state["rows"][:1]
    state |= {"finished": False, "rows": kept}
    (folder / "lr_0.01/attack.json").write_text(json.dumps(state))
    trained, plain = [], finetuning.AttackTrainer.train

    def spy(self, **given):
        trained.append(self.args.learning_rate)
        return plain(self, **given)

    monkeypatch.setattr(finetuning.AttackTrainer, "train", spy)
    flags = ["--sweep", "lr=1e-3,1e-2", "--max_steps", 3, "--resume_from_checkpoint", "auto"]
    record = attack(tiny_world, folder, *flags)
    assert trained == [1e-2], "what is finished is not repeated"
    whole = results(swept)
    assert record["curves"][1]["rows"][:1] == kept, "rows that were there are kept"
    for number in (0, 1):
        assert rows_of(record, number) == rows_of(whole, number)
    values = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert values == {name: metric["value"] for name, metric in whole["metrics"].items()}
    again = attack(tiny_world, folder, *flags)
    assert trained == [1e-2] and again["metrics"] == record["metrics"], "with nothing to do, the same is written"


@pytest.mark.usefixtures("one_cpu_process")
def test_repair_utility_lora_and_an_early_end(tiny_world, tmp_path):
    facts = [
        {"question": f"What is {n} and {n}?", "choices": ["one", "two", "three", "four"], "answer": n % 4}
        for n in range(8)
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, facts)))
    flags = ["--repair_steps", 2, "--repair_data", tiny_world["retain"], "--utility_data", path, "--lora_r", 2]
    flags += ["--max_eval_samples", 4, "--stop_at_recovery", 1e-6, "--eval_every", 1, "--lr", 2e-2]
    record = attack(tiny_world, tmp_path / "out", *flags)
    rows = rows_of(record)
    assert [row["step"] for row in rows[:3]] == [-2, -1, 0]
    assert [row.get("phase") for row in rows[:3]] == ["repair", "repair", None]
    assert "utility/choice_accuracy" in rows[0] and record["levels"]["utility/choice_accuracy"]["chance"] == 0.25
    assert record["plotted"] == {"forget": "forget/probability", "utility": "utility/choice_accuracy"}
    (curve,) = record["curves"]
    assert curve["settings"]["lora_r"] == 2
    assert rows[-1]["step"] < 4 and curve["ended"].startswith("forget/probability had recovered"), rows[-1]["step"]
    assert record["metrics"]["forget/probability/recovered"]["value"] > 0
    assert record["splits"]["utility"]["rows"] == 4


@pytest.mark.full
@pytest.mark.parametrize("lora", [0, 2])
def test_two_processes_attack_as_one(tiny_world, tmp_path, lora):
    from ranks import run

    for processes, batch in ((1, "4"), (2, "2")):
        words = words_on(tiny_world, tmp_path / str(processes), "--batch_size", batch, "--lora_r", lora)
        outcome = run(tamper.main, words, processes=processes)
        assert outcome.codes == [0] * processes, outcome
    one, two = (rows_of(results(tmp_path / name)) for name in ("1", "2"))
    for first, second in zip(one, two, strict=True):
        assert first["step"] == second["step"]
        for name in ("forget/probability", "retain/probability"):
            # Sums of gradients in another order.
            assert second[name] == pytest.approx(first[name], rel=1e-4)
