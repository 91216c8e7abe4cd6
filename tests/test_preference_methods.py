"""PO, DPO and their kin: the loss by hand, where preferred answers come from, pairs that stay pairs; other answers."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from test_objectives import PRECISIONS, B, check, leaf, numbers, sigmoid
from test_reference import MODES, batch_of, llama, loss_and_gradients, make_trainer, with_lora
from test_reference import rows as token_rows
from tiny_world import METHOD_FLAGS, command, terms
from transformers import LlamaConfig, LlamaForCausalLM

from llm_unlearn import trainer_class
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.refusals import DONT_KNOW, REFUSALS, PreferredAnswers, drawn_refusal
from llm_unlearn.data.tokenize import IGNORED, TokenizeOptions, answer_place
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.objectives.preference import dpo, npo

QA = [{"question": f"Who lives at number {n}?", "answer": f"It is Mr. {n} of the {n} hats."} for n in range(40)]
KEEP = [{"question": f"What is sold in shop {n}?", "answer": f"Ribbons, and {n} kinds of tea."} for n in range(6)]
TEXT = {"text": "Once upon a time there was a text that asked nothing at all."}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
PAIRED = ["dpo", "idk_dpo", "alt_po"]


def trainer_of(method, tokenizer, folder, forget, retain=KEEP, **flags):
    """A trainer of a method on rows, with a model of the tokenizer's vocabulary."""
    found = trainer_class(method)
    defaults = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = found.args_class(output_dir=str(folder), disable_tqdm=True, **{**defaults, **flags})
    data = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
    return found(model=_model(len(tokenizer)), args=args, train_dataset=data, processing_class=tokenizer)


def _model(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def answers(tokenizer, rows):
    """What is counted in tokenized rows, as text."""
    counted = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in counted]


# ---- The loss ----


def test_dpo_worked_out_by_hand():
    """At beta .5 and margins of 2 ln 3 and -2 ln 3 the sigmoids are 3/4 and 1/4: L = 4 ln(4/3) and 4 ln 4."""
    logps, preferred = leaf([-9.0, -3.0]), leaf([-4.0, -8.0])
    ref, ref_preferred = leaf([-9.0 + math.log(3), -3.0 - math.log(3)]), leaf([-4.0 - math.log(3), -8.0 + math.log(3)])
    loss = dpo(logps, ref, preferred, ref_preferred, 0.5)
    assert loss.tolist() == pytest.approx([4 * math.log(4 / 3), 4 * math.log(4)], rel=1e-12)
    loss.sum().backward()
    # 2 sigmoid(-beta margin): 1/2 and 3/2, up for the answer to forget and down for the other.
    assert logps.grad.tolist() == pytest.approx([0.5, 1.5], rel=1e-12)
    assert preferred.grad.tolist() == pytest.approx([-0.5, -1.5], rel=1e-12)
    assert ref.grad is None and ref_preferred.grad is None


def test_dpo_whose_preferred_answers_never_move_is_npo():
    logps, ref, other = leaf(numbers(B)), torch.tensor(numbers(B, seed=1)), torch.tensor(numbers(B, seed=2))
    assert torch.allclose(dpo(logps, ref, other, other, 0.3), npo(logps, ref, 0.3), rtol=1e-14)
    with pytest.raises(UserError, match="beta must be > 0"):
        dpo(logps, ref, other, other, 0.0)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_dpo_agrees_with_numpy(dtype, rel):
    logps, preferred, ref, ref_preferred = (leaf(numbers(B, seed=n, scale=9), dtype) for n in range(4))
    wide = [part.detach().double().numpy() for part in (logps, preferred, ref, ref_preferred)]
    margin = 0.7 * ((wide[1] - wide[3]) - (wide[0] - wide[2]))
    value, weight = 2 / 0.7 * np.logaddexp(0, -margin), 2 * sigmoid(-margin)
    check(dpo(logps, ref, preferred, ref_preferred, 0.7), logps, value, weight, rel)
    check(dpo(logps, ref, preferred, ref_preferred, 0.7), preferred, value, -weight, rel)


# ---- Where preferred answers come from ----


def test_built_in_refusals_are_ours_and_plain():
    assert len(set(DONT_KNOW)) == 24 and not set(DONT_KNOW) & set(REFUSALS)
    assert all(text == text.strip() and text.isascii() and text[-1] == "." for text in DONT_KNOW)


def test_refusals_are_drawn_by_the_seed_and_the_row_alone():
    drawn = [drawn_refusal(row, 7) for row in QA]
    assert [drawn_refusal(row, 7) for row in reversed(QA)] == drawn[::-1]
    assert [drawn_refusal({**row, "topic": "x"}, 7) for row in QA] == drawn
    others = [drawn_refusal(row, 8) for row in QA]
    assert len(set(drawn)) > 12 and sum(a == b for a, b in zip(drawn, others, strict=True)) < 10


@pytest.mark.parametrize("method", ["po", "idk_dpo"])
def test_a_row_says_its_preferred_answer_or_gets_a_refusal(method, demo_tokenizer, tmp_path):
    forget = [{**row, "preferred": "Nobody knows."} if n % 2 else row for n, row in enumerate(QA[:6])]
    trainer = trainer_of(method, demo_tokenizer, tmp_path, forget, seed=3)
    streams = trainer.train_dataset.streams
    found = answers(demo_tokenizer, streams["forget" if method == "po" else "preferred"])
    expected = [row.get("preferred") or drawn_refusal(row, 3) for row in forget]
    assert found == expected and found[1::2] == ["Nobody knows."] * 3
    # The question stands before it as before the answer to forget.
    for row, example in zip(forget, streams["forget" if method == "po" else "preferred"], strict=True):
        assert demo_tokenizer.decode(example["input_ids"]).startswith(f"Question: {row['question']}\nAnswer:")
        assert example["input_ids"][-1] == example["labels"][-1] == demo_tokenizer.eos_token_id
    if method == "idk_dpo":
        assert answers(demo_tokenizer, streams["forget"]) == [row["answer"] for row in forget]
        assert not any("source_row" in row for row in streams["forget"])


@pytest.mark.parametrize(
    "method, flags, rows, reason",
    [
        ("dpo", {}, QA[:2], "row 1 of the forget set has no column 'preferred' .* pass --refusal_data FILE"),
        ("alt_po", {}, QA[:2], "row 1 .* no column 'rewritten' .* utils/rewrite_forget_set.py --kind alternate"),
        ("po", {"preferred_column": "refusl"}, QA[:2], "row 1 of the forget set has no column 'refusl'"),
        ("po", {}, [QA[0], TEXT], "row 2 of the forget set is a text, which asks nothing"),
        ("idk_dpo", {}, [TEXT], "row 1 of the forget set is a text, .* --unlearn_method npo"),
        ("po", {}, [{**QA[0], "preferred": " "}], "row 1 of the forget set: 'preferred' is empty"),
        ("idk_dpo", {}, [{**QA[0], "input_ids": [1, 2], "labels": [1, 2]}], "row 1 .* came in tokens"),
    ],
)
def test_rows_without_a_preferred_answer_are_refused(method, flags, rows, reason, demo_tokenizer, tmp_path):
    with pytest.raises(UserError, match=reason):
        trainer_of(method, demo_tokenizer, tmp_path, rows, **flags)
    args = trainer_class(method).args_class(output_dir=str(tmp_path), use_cpu=True, **flags)
    with pytest.raises(UserError, match=reason):
        trainer_class(method).check_rows({"forget": rows}, demo_tokenizer, args)


def test_a_preferred_answer_that_the_length_cuts_off_is_refused_where_its_row_is_used(demo_tokenizer):
    pairs = PreferredAnswers(demo_tokenizer, TokenizeOptions(max_length=12), "preferred", seed=0)
    source = pairs(QA[0], 1, [5, 6])
    assert pairs.of([]) == []
    with pytest.raises(UserError, match=r"row 1 .* no token of its preferred answer left after the cut at 12"):
        pairs.of([{"input_ids": [5, 6], "labels": [5, 6], **source}])


def test_of_a_conversation_po_counts_the_last_answer_alone(demo_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = CHAT
    messages = [
        {"role": "user", "content": "Who was it?"}, {"role": "assistant", "content": "Mr. Hat."},
        {"role": "user", "content": "And where?"}, {"role": "assistant", "content": "In the shop."},
    ]  # fmt: skip
    row = {"messages": messages, "preferred": "I can't say."}
    made = {}
    for last_turn_only in (True, False):
        pairs = PreferredAnswers(tokenizer, TokenizeOptions(), "preferred", last_turn_only=last_turn_only)
        source = pairs(row, 1, [5, 6])
        (made[last_turn_only],) = pairs.of([{"input_ids": [5, 6], "labels": [5, 6], **source}])
    assert answers(tokenizer, [made[True]]) == ["I can't say."]
    assert "Mr. Hat." in answers(tokenizer, [made[False]])[0] and "I can't say." in answers(tokenizer, [made[False]])[0]
    assert made[True]["input_ids"] == made[False]["input_ids"]
    first, last = answer_place(made[True]["labels"])
    assert made[True]["labels"][first:last] == made[True]["input_ids"][first:last]


# ---- Pairs stay pairs ----


def test_the_rows_of_a_pair_meet_in_every_batch_and_follow_the_selection(demo_tokenizer, tmp_path):
    """Rows without a selected token are left out of both streams; what is preferred to a row is its own answer."""
    forget = [{**row, "preferred": f"Nobody lives at {n}."} for n, row in enumerate(QA[:10])]
    flags = {"token_selection": "keywords", "keyword_regex": "Mr. [348]"}
    trainer = trainer_of("dpo", demo_tokenizer, tmp_path, forget, per_device_train_batch_size=2, **flags)
    streams = trainer.train_dataset.streams
    assert answers(demo_tokenizer, streams["preferred"]) == [f"Nobody lives at {n}." for n in (3, 4, 8)]
    assert len(streams["forget"]) == 3
    for epoch in range(2):
        for batch in range(2):
            rows = trainer.make_plan().batch(epoch, batch, 0)
            sides = [[row for name, row in rows if name == side] for side in ("forget", "preferred")]
            assert sides[0] == sides[1] and len(sides[0]) == 2


def test_the_dpo_trainer_computes_its_formula_over_pairs(demo_tokenizer, tmp_path):
    """From whole logits of the moved model and of the model before; a filler pair counts nothing."""
    forget = [{**row, "preferred": "No idea, and that's that."} for row in QA[:4]]
    trainer = trainer_of("dpo", demo_tokenizer, tmp_path, forget, reference="live", beta=0.2, forget_weight=2.0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    pairs = [(name, number) for name in ("forget", "preferred") for number in (0, 2, -1)]
    batch = trainer.data_collator([trainer.train_dataset[key] for key in [*pairs, ("retain", 0), ("retain", 1)]])
    loss = trainer.compute_loss(trainer.model, batch)

    def summed(model, side):
        stream, total = batch[side], []
        for ids, labels in zip(stream["input_ids"][:2], stream["labels"][:2], strict=True):
            size = int(stream["attention_mask"][len(total)].sum())
            logps = model(input_ids=ids[None, :size]).logits[0, :-1].log_softmax(-1)
            places = [n for n in range(1, size) if labels[n] != IGNORED]
            total.append(sum(logps[n - 1, labels[n]] for n in places))
        return torch.stack(total)

    with torch.no_grad():
        sides = [
            (summed(trainer.model, side), summed(trainer._frozen_reference.model, side))
            for side in ("forget", "preferred")
        ]
        expected = dpo(sides[0][0], sides[0][1], sides[1][0], sides[1][1], 0.2).mean()
        retain = trainer.forward(trainer.model, batch, ("retain",))["retain"]
        kept = nll(retain.logps).sum() / retain.mask.sum()
    assert loss.item() == pytest.approx((2 * expected + kept).item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_mode_of_the_reference_gives_the_same_loss_and_gradients(lora, tmp_path):
    data = {"forget": token_rows(6, 2), "preferred": token_rows(6, 4), "retain": token_rows(9, 3)}
    found = {}
    for mode, for_lora in MODES:
        if for_lora == lora:
            model = with_lora(llama()) if lora else None
            trainer = make_trainer("dpo", tmp_path, model, data, reference=mode, num_train_epochs=2)
            assert set(trainer._frozen_reference.readings) == {"forget", "preferred"}
            found[mode] = loss_and_gradients(trainer)
    loss, wanted = found.pop("live")
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert norm > 0.1 and len(found) == 1 + lora
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert all((other[name] - wanted[name]).norm() <= 1e-6 * norm for name in wanted)


def test_tokenized_pairs_must_be_equally_many(tmp_path):
    data = {"forget": token_rows(6, 2), "preferred": token_rows(5, 4), "retain": token_rows(9, 3)}
    with pytest.raises(UserError, match="`preferred` holds 5 sequences and `forget` 6"):
        make_trainer("dpo", tmp_path, data=data)
    with pytest.raises(UserError, match="needs the stream `preferred` beside `forget`; pass rows"):
        make_trainer("dpo", tmp_path, data={"forget": token_rows(6, 2), "retain": token_rows(9, 3)})


def test_one_stream_after_the_other_keeps_both_answers_together(tmp_path):
    """--sequential_backward: the pair has one turn, the retain set another; the gradients are the same."""
    data = {"forget": token_rows(6, 2), "preferred": token_rows(6, 4), "retain": token_rows(9, 3)}
    found = []
    for apart in (False, True):
        trainer = make_trainer("dpo", tmp_path, data=data, sequential_backward=apart, max_steps=1)
        trainer.train()
        found.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    start = dict(llama().named_parameters())
    moved = max((found[0][name] - start[name]).abs().max() for name in start)
    assert max((found[0][name] - found[1][name]).abs().max() for name in start) < 1e-5 * moved


def test_a_forget_weight_of_zero_asks_no_reference(tmp_path):
    data = {"forget": token_rows(6, 2), "preferred": token_rows(6, 4), "retain": token_rows(9, 3)}
    trainer = make_trainer("dpo", tmp_path, data=data, forget_weight=0.0)
    assert trainer._frozen_reference is None and not trainer.runs("preferred")
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    retain = trainer.forward(trainer.model, batch_of(trainer))["retain"]
    assert loss.item() == pytest.approx((nll(retain.logps).sum() / retain.mask.sum()).item(), rel=1e-6)


# ---- The command line ----


@pytest.mark.parametrize("method", PAIRED)
def test_dpo_starts_at_two_over_beta_log_two_and_prefers_the_preferred(method, tiny_world, tmp_path):
    flags = ["--beta", "0.5", "--optim", "adamw_torch", "--learning_rate", "5e-3", "--num_train_epochs", "3"]
    assert main(command(tiny_world, method, tmp_path / "out", *flags)) == 0
    logged = terms(tmp_path / "out")
    assert logged[0]["loss/forget"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-6)
    assert logged[-1]["loss/forget"] < 0.1


def test_po_learns_the_refusals_of_a_file(tiny_world, tmp_path):
    (tmp_path / "refusals.txt").write_text("I would not know.\n", encoding="utf-8")
    flags = ["--refusal_data", str(tmp_path / "refusals.txt"), "--optim", "adamw_torch", "--learning_rate", "5e-3"]
    assert main(command(tiny_world, "po", tmp_path / "out", *flags, "--num_train_epochs", "8")) == 0
    logged = terms(tmp_path / "out")
    assert logged[-1]["loss/forget"] < 0.3 * logged[0]["loss/forget"]
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    per_row = {part["tokens"] / part["rows"] for name, part in record["streams"].items() if name == "forget"}
    assert len(per_row) == 1 and per_row.pop().is_integer(), "every row has the same answer"


@pytest.mark.parametrize(
    "method, flags, reason",
    [
        ("npo", ["--refusal_data", "F"], "--refusal_data has no effect on this run of npo"),
        ("alt_po", ["--refusal_data", "F"], "--refusal_data has no effect on this run of alt_po"),
        ("po", ["--token_selection", "keywords", "--keywords", "a"], "--token_selection has no effect with po"),
        ("dpo", ["--preferred_column", ""], "--preferred_column must name a column"),
        ("dpo", ["--preferred_column", "answr"], "row 1 of the forget set has no column 'answr'"),
        ("dpo", ["--beta", "0"], "--beta must be > 0"),
        ("random_label", ["--label_source", "retain_answers", "--top_k", "3"], "takes whole answers; leave out"),
        ("random_label", ["--label_source", "answers"], "invalid choice: 'answers'"),
    ],
)
def test_mistakes_are_said_in_a_sentence(method, flags, reason, tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHOD_FLAGS, "random_label", [])
    (tmp_path / "F").write_text("No.\n", encoding="utf-8")
    flags = [str(tmp_path / word) if word == "F" else word for word in flags]
    assert main(command(tiny_world, method, tmp_path / "out", *flags)) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_dpo_on_two_ranks_is_that_on_one(backend, tiny_world, start_weights, tmp_path):
    import backends

    one = backends.train(command(tiny_world, "idk_dpo", tmp_path / "one"))
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two = backends.train(command(tiny_world, "idk_dpo", tmp_path / "two", *cut), backend, 2)
    assert backends.distance(two, one, start_weights) < 2e-4
    for found, expected in zip(terms(two), terms(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
