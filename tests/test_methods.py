"""Conformance: every method trains, logs its terms, moves the forget set the right way, saves and reloads."""

import json

import pytest
import torch
from tiny_world import METHOD_FLAGS, command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.methods import METHODS

EXPECTED_TERMS = {
    "gradient_ascent": {"forget"},
    "random_label": {"forget"},
    "retrain": {"train"},
    "finetune": {"train"},
    "circuit_breakers": {"forget", "retain", "max_entropy"},
    "max_update": {"retain", "update"},
    "rewritten_transfer": {"forget", "rewritten", "retain"},
    "l1_sparse": {"retain", "l1"},
}
# Where a term is no stream's.
EXPECTED_STREAMS = {"max_update": {"retain"}, "circuit_breakers": {"forget", "retain"}, "l1_sparse": {"retain"}}
EXPECTED_STREAMS |= {method: {"forget", "preferred", "retain"} for method in ("dpo", "idk_dpo", "alt_po")}
# What they do to adapters would say nothing about the model.
WITHOUT_LORA = {"l1_sparse"}
# Whether the NLL of the forget answers rises; retraining on other rows of the same kind lowers it.
RAISES_FORGET_NLL = {method: method not in ("retrain", "finetune") for method in METHODS}


def answer_nll(folder, world, name):
    """Mean NLL of the answers by a plain loop over rows, from a checkpoint reloaded with AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = count = 0
    with open(world[name], encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = f"Question: {row['question']}\nAnswer: "
            encoded = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
            ids = [*encoded["input_ids"], tokenizer.eos_token_id]
            starts = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for position in range(1, len(ids)):
                if starts[position]:
                    total -= logps[position - 1, ids[position]].item()
                    count += 1
    return total / count


def cases():
    """Every method, whole and with LoRA; of the latter a few in `make test`."""
    for method in METHODS:
        yield pytest.param(method, False, id=f"{method}-full")
        marks = [] if method in ("npo", "random_label", "rmu", "sequential") else [pytest.mark.full]
        yield pytest.param(method, True, id=f"{method}-lora", marks=marks)


@pytest.mark.parametrize("method, lora", cases())
def test_every_method_trains_saves_and_reloads(method, lora, tiny_world, tmp_path):
    flags = ["--use_peft", "True", "--lora_dropout", "0", "--lora_r", "8"] if lora else []
    rate = ["--learning_rate", "0.02", "--optim", "adamw_torch", "--gradient_accumulation_steps", "2"]
    words = command(tiny_world, method, tmp_path / "out", *rate, *flags, "--per_device_train_batch_size", "2")
    if lora and method in WITHOUT_LORA:
        assert main(words) == 2
        return
    assert main(words) == 0

    logged = terms(tmp_path / "out")
    expected = EXPECTED_TERMS.get(method, {"forget", "retain"})
    # A term whose schedule begins at 0 is not there in the first step.
    assert logged and set().union(*logged) == {f"loss/{name}" for name in expected} == set(logged[-1])
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["method"] == method and record["optimizer_steps"] == len(logged)
    assert set(record["streams"]) == EXPECTED_STREAMS.get(method, expected)
    assert all(part["tokens"] > 0 for part in record["streams"].values())
    assert (tmp_path / "out/README.md").read_text().startswith("---\n")
    assert not list((tmp_path / "out").rglob("*.bin")), "a pickle was left behind"

    start = tiny_world["model" if RAISES_FORGET_NLL[method] else "base"]
    if not lora:
        before = weights(start)
        assert not all(torch.equal(before[key], value) for key, value in weights(tmp_path / "out").items())
    moved = answer_nll(tmp_path / "out", tiny_world, "forget") - answer_nll(start, tiny_world, "forget")
    assert (moved > 0.01) if RAISES_FORGET_NLL[method] else (moved < -0.01), moved


@pytest.mark.parametrize("mode", ["live", "cached", "adapter_off"])
def test_the_reference_is_the_start_model_and_stays_so(mode, tiny_world, tmp_path, monkeypatch):
    """The reference's log-probabilities of a batch are the start model's, before step 1 and after the last step."""
    from llm_unlearn.cli import unlearn

    seen = []
    original = unlearn._train_and_save

    def spy(parsed, trainer, sources):
        batch = trainer.data_collator([trainer.train_dataset[("forget", row)] for row in (0, 3)])
        seen.append(trainer.reference(batch)["forget"].logps)
        seen.append(trainer.forward(trainer.model.eval(), batch)["forget"].logps.detach())
        original(parsed, trainer, sources)
        seen.append(trainer.reference(batch)["forget"].logps)
        seen.append(trainer.forward(trainer.model.eval(), batch)["forget"].logps.detach())

    monkeypatch.setattr(unlearn, "_train_and_save", spy)
    flags = {"live": [], "cached": ["--reference_cache", tmp_path / "cache"], "adapter_off": ["--use_peft", "True"]}
    assert main(command(tiny_world, "npo", tmp_path / "out", "--reference", mode, *flags[mode])) == 0
    reference_before, policy_before, reference_after, policy_after = seen
    if mode == "cached":
        # Its batch was padded differently, which float32 sums notice in the last bits.
        assert torch.allclose(reference_before, policy_before, atol=1e-6)
    else:
        assert torch.equal(reference_before, policy_before)
    assert torch.equal(reference_before, reference_after)
    assert not torch.equal(policy_before, policy_after)


def test_kl_term_starts_at_zero_and_npo_at_two_over_beta_log_two(tiny_world, tmp_path):
    words = command(tiny_world, "npo", tmp_path / "out", "--retain_loss", "kl", "--beta", "0.5", "--max_steps", "1")
    assert main(words) == 0
    first = terms(tmp_path / "out")[0]
    assert first["loss/forget"] == pytest.approx(2 / 0.5 * 0.6931471805599453, rel=1e-6)
    # float32 rounding of two forwards that are padded differently; a cross-entropy would be about 7 nats.
    assert abs(first["loss/retain"]) < 1e-6


def test_ascent_and_descent_on_the_same_row_cancel(tiny_world, tmp_path, start_weights):
    """Published sanity check: one negative and one equal positive copy give no loss and no update."""
    world = {**tiny_world, "retain": tiny_world["forget"]}
    flags = ["--max_train_samples", "1", "--positive_ratio", "1", "--positive_factor", "1"]
    words = command(world, "ascent_plus_descent", tmp_path / "out", *flags)
    assert main(words) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert abs(history[0]["loss"]) < 1e-6
    for key, value in weights(tmp_path / "out").items():
        assert torch.allclose(value, start_weights[key], atol=1e-6)


def test_pooled_weights_follow_the_published_mean_over_all_rows(tiny_world, tmp_path):
    """L = mean over all rows of f_i * nll_i; with ratio 2 and factor .5 the sides weigh N and 2N * .5."""
    words = command(tiny_world, "ascent_plus_descent", tmp_path / "out", "--max_steps", "1")
    assert main(words) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    forget, retain = history[0]["loss/forget"], history[0]["loss/retain"]
    assert forget < 0 < retain
    assert history[0]["loss"] == pytest.approx((4 * forget + 8 * 0.5 * retain) / 12, abs=1e-4)


def test_completely_random_labels_are_drawn_once_and_kept_by_a_seed(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(METHOD_FLAGS, "random_label", ["--completely_random", "True"])
    runs = []
    for number, seed in enumerate((7, 7, 8)):
        assert (
            main(command(tiny_world, "random_label", tmp_path / str(number), "--seed", seed, "--max_steps", "1")) == 0
        )
        runs.append(terms(tmp_path / str(number))[0]["loss/forget"])
    assert runs[0] == runs[1] != runs[2]
