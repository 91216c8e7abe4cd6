"""Token selection in runs: what is trained equals what was masked by hand, is recorded, and is checked on a resume."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_world import command, terms

from llm_unlearn import UserError
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED, TokenizeOptions, tokenize_rows
from llm_unlearn.methods.gradient_ascent import GradientAscentTrainer
from llm_unlearn.methods.npo import NPOArguments, NPOTrainer
from llm_unlearn.methods.random_label import RandomLabelArguments, RandomLabelTrainer
from llm_unlearn.models import load_model, load_tokenizer
from llm_unlearn.training_arguments import UnlearnArguments

KEYWORDS = "born,kirrin,river"
BY_KEYWORDS = ["--token_selection", "keywords", "--keywords", KEYWORDS]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """The default cache is a folder here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return load_tokenizer(tiny_world["model"])


@pytest.fixture(scope="module")
def forget(tiny_world, tokenizer):
    """The tokenized forget set, nothing selected."""
    return tokenize_rows(read_rows(tiny_world["forget"]), tokenizer, TokenizeOptions())


def record(folder):
    return json.loads((Path(folder) / "unlearning.json").read_text())["token_selection"]


def trainer_of(world, tokenizer, rows, **flags):
    args = UnlearnArguments(
        output_dir="out", max_steps=1, per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, **flags
    )
    data = {"forget": rows} if isinstance(rows, list) else rows
    model = load_model(world["model"])
    return GradientAscentTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def counted(rows):
    """Return the set of (row, position) that count."""
    return {(n, t) for n, row in enumerate(rows) for t, label in enumerate(row["labels"]) if t and label != IGNORED}


def masked_by_hand(rows, tokenizer, keywords):
    """Count characters of decoded prefixes, which for this byte-level tokenizer give the text exactly."""
    masked = []
    for row in rows:
        ends = [len(tokenizer.decode(row["input_ids"][: n + 1])) for n in range(len(row["input_ids"]))]
        text = tokenizer.decode(row["input_ids"]).lower()
        inside = set()
        for word in keywords:
            place = text.find(word)
            while place >= 0:
                inside |= set(range(place, place + len(word)))
                place = text.find(word, place + 1)
        spans = [set(range(first, last)) for first, last in zip([0, *ends], ends, strict=False)]
        labels = [label if span & inside else IGNORED for label, span in zip(row["labels"], spans, strict=True)]
        if any(label != IGNORED for label in labels):
            masked.append({"input_ids": row["input_ids"], "labels": labels})
    return masked


# ---- Keywords ----


def test_npo_on_keywords_equals_a_run_masked_by_hand(tiny_world, tokenizer, forget, tmp_path, caplog):
    caplog.set_level(logging.INFO, "llm_unlearn")
    assert main(command(tiny_world, "npo", tmp_path / "out", *BY_KEYWORDS)) == 0
    masked = masked_by_hand(forget, tokenizer, KEYWORDS.split(","))
    kept, total = len(counted(masked)), len(counted(forget))
    assert 0 < kept < total and 0 < len(masked) < len(forget)
    assert record(tmp_path / "out") == {
        "kind": "keywords",
        "tokens": kept,
        "of": total,
        "share": kept / total,
        "rows_left_out": len(forget) - len(masked),
        "flags": {"keywords": KEYWORDS},
    }
    assert f"keeps {kept} of the {total} tokens of the forget set ({100 * kept / total:.2f}%)" in caplog.text
    assert f"leaves out {len(forget) - len(masked)} of 10 rows, which have none" in caplog.text
    streams = json.loads((tmp_path / "out/unlearning.json").read_text())["streams"]
    assert streams["forget"]["tokens"] == kept and streams["retain"]["rows"] == 13

    rows = tokenize_rows(read_rows(tiny_world["retain"]), tokenizer, TokenizeOptions())
    args = NPOArguments(
        output_dir="by_hand", per_device_train_batch_size=4, num_train_epochs=1, optim="sgd", learning_rate=0.01,
        lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data, model = UnlearnDataset({"forget": masked, "retain": rows}), load_model(tiny_world["model"])
    trainer = NPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    by_hand = [log for log in trainer.state.log_history if "loss/forget" in log]
    assert [log["loss/forget"] for log in by_hand] == [log["loss/forget"] for log in terms(tmp_path / "out")]
    assert [log["loss/retain"] for log in by_hand] == [log["loss/retain"] for log in terms(tmp_path / "out")]


def test_what_the_model_sees_stays_as_it_was(tiny_world, tokenizer, forget):
    """Tokens and attention masks are those of the whole rows; labels are a part of theirs; other streams are whole."""
    rows = {"forget": read_rows(tiny_world["forget"])}
    trainer = trainer_of(tiny_world, tokenizer, rows, token_selection="keywords", keywords="velra")
    chosen = trainer.train_dataset.streams["forget"]
    ids = {tuple(row["input_ids"]): number for number, row in enumerate(forget)}
    numbers = [ids[tuple(row["input_ids"])] for row in chosen]
    assert numbers == sorted(numbers) and set(chosen[0]) == {"input_ids", "labels"}
    whole = trainer.data_collator.pad([forget[number] for number in numbers])
    batch = trainer.data_collator.pad(chosen)
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["attention_mask"], whole["attention_mask"])
    is_kept = batch["labels"] != IGNORED
    assert (
        torch.equal(batch["labels"][is_kept], whole["labels"][is_kept])
        and is_kept.sum() < whole["labels"].ne(-100).sum()
    )


def test_finetune_learns_the_selected_tokens_and_retrain_has_none(tiny_world, tmp_path, capsys):
    """The forget rows are masked before a method joins them with others."""
    assert main(command(tiny_world, "finetune", tmp_path / "out", *BY_KEYWORDS)) == 0
    found = json.loads((tmp_path / "out/unlearning.json").read_text())
    rows, left_out = found["streams"]["train"]["rows"], found["token_selection"]["rows_left_out"]
    assert rows == 23 - left_out and found["token_selection"]["tokens"] < found["streams"]["train"]["tokens"]
    assert main(command(tiny_world, "retrain", tmp_path / "no", *BY_KEYWORDS)) == 2
    assert "--token_selection has no effect: RetrainTrainer reads no forget set" in capsys.readouterr().err


def test_random_labels_stand_at_selected_tokens_alone(tiny_world, tokenizer, forget):
    """A method that draws labels of its own draws them for what was selected."""
    args = RandomLabelArguments(
        output_dir="out", completely_random=True, token_selection="keywords", keywords=KEYWORDS, max_steps=1
    )
    data, model = read_rows(tiny_world["forget"]), load_model(tiny_world["model"])
    trainer = RandomLabelTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    chosen, masked = trainer.train_dataset.streams["forget"], masked_by_hand(forget, tokenizer, KEYWORDS.split(","))
    assert counted(chosen) == counted(masked) and [row["labels"] for row in chosen] != [row["labels"] for row in masked]


def test_keywords_pass_over_tokenized_sets_on_disk(tiny_world, tmp_path, monkeypatch):
    """They hold no text."""
    monkeypatch.setattr("llm_unlearn.data.training_sets.find_cached", lambda *_: pytest.fail("it was looked for"))
    assert main(command(tiny_world, "gradient_ascent", tmp_path / "out", *BY_KEYWORDS)) == 0
    with pytest.raises(pytest.fail.Exception, match="it was looked for"):
        main(command(tiny_world, "gradient_ascent", tmp_path / "other"))


def test_lists_that_select_none_or_all(tiny_world, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("xylophone\n")
    for flags, message in (
        (["--keywords", tmp_path / "list.txt"], f"--keywords '{tmp_path / 'list.txt'}' selects none of the"),
        # The end of sequence has no characters, so that no list ever selects it.
        (["--keyword_regex", "who"], "--keyword_regex 'who' selects none of the"),
        (
            ["--keywords", "xylophone", "--keyword_regex", "zz"],
            "--keywords 'xylophone' with --keyword_regex 'zz' selects",
        ),
    ):
        assert main(command(tiny_world, "npo", tmp_path / "out", "--token_selection", "keywords", *flags)) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in said and said.endswith("pass another, or leave out --token_selection")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"All of this is text number {n}."}) for n in range(5)))
    words = command(tiny_world, "gradient_ascent", tmp_path / "out", "--forget_data", texts)
    assert main([*words, "--token_selection", "keywords", "--keyword_regex", "(?s).+"]) == 2
    assert "--keyword_regex '(?s).+' selects all, and so changes nothing, of the" in capsys.readouterr().err


def test_tokenized_rows_need_text_for_keywords(tiny_world, tokenizer, forget):
    data = UnlearnDataset({"forget": forget})
    with pytest.raises(UserError, match="row 1 of the forget set came as tokens without text"):
        trainer_of(tiny_world, tokenizer, data, token_selection="keywords", keywords="born")


# ---- Weights ----


def test_ascent_with_weights_equals_the_weighted_loss_by_hand(tiny_world, tokenizer, forget, tmp_path):
    """L = sum_t w_t log p_t / sum_t w_t over the step; a token of weight 0 does not count, and scale is nothing."""
    generator = torch.Generator().manual_seed(3)
    rows = read_rows(tiny_world["forget"])[:4]
    weights = [torch.rand(len(row["input_ids"]), generator=generator).mul(1e-3).tolist() for row in forget[:4]]
    weights[1][-1] = 0
    path = tmp_path / "weighted.jsonl"
    path.write_text(
        "\n".join(json.dumps({**row, "token_weights": own}) for row, own in zip(rows, weights, strict=True))
    )
    flags = ["--forget_data", path, "--token_selection", "column"]
    # The untrained model, whose log-probabilities are far from 0.
    world = {**tiny_world, "model": tiny_world["base"]}
    assert main(command(world, "gradient_ascent", tmp_path / "out", *flags)) == 0
    model, total, mass = load_model(tiny_world["base"]), 0.0, 0.0
    for row, own in zip(forget, weights, strict=False):
        with torch.no_grad():
            logps = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t in range(1, len(own)):
            if row["labels"][t] != IGNORED:
                total += own[t] * logps[t - 1, row["input_ids"][t]].item()
                mass += own[t]
    assert terms(tmp_path / "out")[0]["loss/forget"] == pytest.approx(total / mass, rel=1e-5)
    found = record(tmp_path / "out")
    assert found["tokens"] == found["of"] - 1 and found["flags"] == {"token_weights_use": "weight"}


@pytest.mark.parametrize(("use", "sign"), [("sign_positive", 1), ("sign_negative", -1)])
def test_signs_of_weights(use, sign, tiny_world, tokenizer, forget):
    """Scores of attribution: tokens of one sign count, each the same."""
    rows = [
        {**row, "token_weights": [(-1) ** t * (t % 3) * 0.1 for t in range(len(example["input_ids"]))]}
        for row, example in zip(read_rows(tiny_world["forget"]), forget, strict=True)
    ]
    trainer = trainer_of(tiny_world, tokenizer, rows, token_selection="column", token_weights_use=use)
    chosen = trainer.train_dataset.streams["forget"]
    assert not any("weights" in row for row in chosen)
    wanted = {(n, t) for n, t in counted(forget) if sign * (-1) ** t * (t % 3) > 0}
    assert counted(chosen) == wanted and trainer.token_selection["tokens"] == len(wanted)


def test_weights_are_scaled_to_a_mean_of_one(tiny_world, tokenizer, forget):
    """Weights 2 and 6 on two tokens of a row become 0.5 and 1.5; all tokens may have one."""
    rows = [{**row, "token_weights": [1] * len(row["input_ids"])} for row in forget[:2]]
    rows[0]["token_weights"] = [0] * (len(forget[0]["input_ids"]) - 2) + [2, 6]
    rows[1]["token_weights"] = [0] * len(forget[1]["input_ids"])
    trainer = trainer_of(tiny_world, tokenizer, UnlearnDataset({"forget": rows}), token_selection="column")
    (chosen,) = trainer.train_dataset.streams["forget"]
    assert chosen["weights"][-2:] == [0.5, 1.5] and set(chosen["weights"][:-2]) == {0}
    assert trainer.token_selection["rows_left_out"] == 1
    ones = [{**row, "token_weights": [3] * len(row["input_ids"])} for row in forget]
    trainer = trainer_of(tiny_world, tokenizer, UnlearnDataset({"forget": ones}), token_selection="column")
    assert trainer.token_selection["share"] == 1
    with pytest.raises(UserError, match="--token_weights_use 'sign_positive' selects all, and so changes nothing"):
        flags = {"token_selection": "column", "token_weights_use": "sign_positive"}
        trainer_of(tiny_world, tokenizer, UnlearnDataset({"forget": ones}), **flags)


def test_another_selection_is_no_resume_and_no_cached_reference(tiny_world, tmp_path, capsys):
    saving, cache = ["--save_strategy", "steps", "--max_steps", "1"], ["--reference_cache", tmp_path / "cache"]
    assert main(command(tiny_world, "npo", tmp_path / "out", *saving, *cache, *BY_KEYWORDS)) == 0
    capsys.readouterr()
    other = ["--token_selection", "keywords", "--keywords", "born,kirrin"]
    words = command(tiny_world, "npo", tmp_path / "out", *saving, *other, "--resume_from_checkpoint", "True")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "cannot resume from" in said and "keywords (was born,kirrin,river and is born,kirrin)" in said
    assert main(command(tiny_world, "npo", tmp_path / "new", *saving, *cache, *other)) == 2
    assert "is stale: it was made with other data" in capsys.readouterr().err
