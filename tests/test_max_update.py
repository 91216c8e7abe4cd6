"""Max-update: what it reads, what it logs, and that its weights go far while the retain set holds them."""

import json

import pytest
import torch
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.methods.max_update import MaxUpdateArguments, MaxUpdateTrainer

ADAMW = ["--optim", "adamw_torch", "--learning_rate", "4e-4", "--num_train_epochs", "3"]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"retain_weight": 0.0}, "--retain_weight 0 would train nothing: the size of the update has no gradient where"),
        ({"retain_weight": -1.0}, "--retain_weight must be at least 0, and finite, but is -1"),
        ({"update_weight": 0.0}, "--update_weight must be above 0, and finite, but is 0"),
        ({"update_weight": float("inf")}, "--update_weight must be above 0, and finite, but is inf"),
        ({"update_norm": "linf"}, "--update_norm must be element_norm or l2, but is 'linf'"),
    ],
)
def test_bad_flags_are_refused(given, said, one_cpu_process):
    with pytest.raises(UserError, match=said):
        MaxUpdateArguments(output_dir="out", **given)


def test_published_defaults(one_cpu_process):
    args = MaxUpdateArguments(output_dir="out")
    assert (args.retain_weight, args.update_weight, args.update_norm) == (1.0, 10.0, "element_norm")
    assert MaxUpdateTrainer.streams_for(args) == ("retain",) and MaxUpdateTrainer.retain_loss_for(args) == "nll"


def distance(folder, start):
    """||theta - theta0|| of a finished run."""
    found = weights(folder)
    return sum((found[key] - start[key]).double().square().sum() for key in found).sqrt().item()


def test_it_reads_the_retain_set_alone_and_starts_at_no_update(tiny_world, start_weights, tmp_path):
    """Without an update each element counts the floor's root, 1e-4; with `l2` nothing."""
    for norm, floor in (("element_norm", 1e-4), ("l2", 0.0)):
        words = command(tiny_world, "max_update", tmp_path / norm, "--update_norm", norm, "--max_steps", 2)
        assert main(words) == 0
        assert set(json.loads((tmp_path / norm / "unlearning.json").read_text())["streams"]) == {"retain"}
        first, second = terms(tmp_path / norm)
        assert set(first) == {"loss/retain", "loss/update"}
        count = sum(value.numel() for value in start_weights.values())
        assert first["loss/update"] == pytest.approx(floor * count, rel=1e-5) and second["loss/update"] > 0


def test_no_forget_set_is_needed(tiny_world, tmp_path):
    words = command(tiny_world, "max_update", tmp_path / "out", "--max_steps", 1)
    place = words.index("--forget_data")
    assert main([*words[:place], *words[place + 2 :]]) == 0


def test_the_logged_size_is_that_of_the_update_before_the_step(tiny_world, start_weights, tmp_path):
    """Steps 2 and 1 of two runs: what one logs first in its second step, the other has at its end."""
    for steps in (1, 2):
        words = command(tiny_world, "max_update", tmp_path / str(steps), *ADAMW, "--max_steps", steps)
        assert main([*words, "--lr_scheduler_type", "constant"]) == 0
    found, total = weights(tmp_path / "1"), 0.0
    for key, value in found.items():
        total += value.numel() * ((value - start_weights[key]).square().mean() + 1e-8).sqrt().item()
    assert terms(tmp_path / "2")[1]["loss/update"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("norm, update_weight", [("element_norm", 1e-4), ("l2", 1e-1)])
def test_the_weights_go_further_than_the_retain_set_alone_takes_them(
    norm, update_weight, tiny_world, start_weights, tmp_path
):
    """Twice as far and more, at a retain NLL that stays below 0.3 nats (0.04 at the start)."""
    far = []
    for name, weight in (("pushed", update_weight), ("held", 1e-12)):
        flags = [*ADAMW, "--update_norm", norm, "--update_weight", weight]
        assert main(command(tiny_world, "max_update", tmp_path / name, *flags)) == 0
        far.append(distance(tmp_path / name, start_weights))
    assert terms(tmp_path / "pushed")[-1]["loss/retain"] < 0.3
    assert far[0] > 2 * far[1], far


def test_adapters_are_pushed_from_where_they_start(tiny_world, tmp_path):
    """A starts at random and B at 0: the size of no update is the floor's, whatever A is."""
    flags = ["--use_peft", "True", "--lora_r", "4", "--lora_dropout", "0", "--max_steps", 2]
    assert main(command(tiny_world, "max_update", tmp_path / "out", *flags)) == 0
    count = sum(value.numel() for value in weights(tmp_path / "out").values())
    assert terms(tmp_path / "out")[0]["loss/update"] == pytest.approx(1e-4 * count, rel=1e-5)
    assert any(value.abs().max() > 0 for key, value in weights(tmp_path / "out").items() if "lora_B" in key)


def test_a_second_training_is_pushed_from_what_the_first_one_left(tiny_world, tmp_path):
    from test_trainer import ROWS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_world["model"])
    args = MaxUpdateArguments(output_dir=str(tmp_path), max_steps=2, save_strategy="no", disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_world["model"])
    trainer = MaxUpdateTrainer(model, args, {"retain": ROWS}, processing_class=tokenizer)
    original = trainer.accelerator.prepare
    for _ in range(2):
        trainer.train()
        logged = [log["loss/update"] for log in trainer.state.log_history if "loss/update" in log]
        assert logged[0] == pytest.approx(1e-4 * model.num_parameters(), rel=1e-5) and logged[1] > logged[0]
    assert trainer.accelerator.prepare == original and torch.isfinite(next(model.parameters())).all()
