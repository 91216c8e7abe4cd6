"""What an attack trains on: named sets, files, mixtures, and how many sequences of them."""

import dataclasses
import json
from collections import Counter

import pytest

from llm_unlearn.arguments import DataFlags
from llm_unlearn.attacks.attack_data import load_attack_data, load_named
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError

DEMO = DataFlags(domain="demo")
OPTIONS = TokenizeOptions(model_length=64)


def texts(source):
    return {row.get("question") or row.get("text") for row in source.rows}


def counts(data):
    """Return how often each sequence stands in the rows."""
    return sorted(Counter(tuple(row["input_ids"]) for row in data.rows).values())


@pytest.fixture
def custom(tmp_path):
    """DataFlags with a forget set of 4 rows, a holdout set that shares one of them, and no retain set."""
    names = {"forget": range(4), "holdout": range(3, 8)}
    for name, numbers in names.items():
        rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataFlags(domain="custom", **{f"{name}_data": str(tmp_path / f"{name}.jsonl") for name in names})


def test_the_named_sets_of_the_demo_world():
    world = make_world(0)
    for name, split in (("forget", "forget"), ("related", "holdout"), ("benign", "general_retain")):
        expected = {row.get("question") or row.get("text") for row in world[split]}
        assert texts(load_named(name, DEMO)) == expected, name


def test_related_rows_are_none_of_the_forget_set(custom):
    assert texts(load_named("related", custom)) == {f"What is {n}?" for n in range(4, 8)}
    overlap = dataclasses.replace(custom, holdout_data=custom.forget_data)
    with pytest.raises(UserError, match="every row of it stands in the forget set too"):
        load_named("related", overlap)


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("related", {"holdout_data": None}, "domain 'custom' has no rows on the topic .* pass --holdout_data FILE, or"),
        ("related", {"domain": "detox"}, "domain 'detox' has no rows on the topic .* pass --tamper_data FILE"),
        ("forget", {"forget_data": None}, "domain 'custom' has no forget set; pass --forget_data FILE, or"),
        ("retain", {}, "domain 'custom' has no retain set; pass --retain_data FILE, or --tamper_data FILE"),
        ("forget", {"domain": "wmdp"}, "name the subset: wmdp_bio"),
        ("benign", {"data_dir": "nowhere"}, "--tamper_data benign: .*; or pass --benign_data FILE"),
        ("nowhere.jsonl", {}, "data file 'nowhere.jsonl' does not exist"),
    ],
)
def test_a_set_that_is_not_there(custom, name, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_named(name, dataclasses.replace(custom, **changes))


def test_a_file_of_the_users_is_benign(custom):
    assert texts(load_named("benign", custom, custom.holdout_data)) == {f"What is {n}?" for n in range(3, 8)}


def test_documents_are_chunked_whole_and_chunks_are_counted(demo_tokenizer, tmp_path):
    text = " ".join(row["text"] for row in make_world(0)["general_retain"][:3])
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}))
    tokens = len(demo_tokenizer(text)["input_ids"])
    whole = load_attack_data(str(path), DEMO, demo_tokenizer, OPTIONS)
    assert sum(len(row["input_ids"]) for row in whole.rows) >= tokens - 4
    assert len(whole.rows) == whole.distinct == whole.origins[0]["sequences"] == -(-tokens // 64)
    few = load_attack_data(str(path), DEMO, demo_tokenizer, OPTIONS, count=3)
    assert len(few.rows) == few.distinct == 3
    assert few.rows == load_attack_data(str(path), DEMO, demo_tokenizer, OPTIONS, count=3).rows


def test_more_than_there_are_go_round_again(custom, demo_tokenizer):
    found = load_attack_data("forget", custom, demo_tokenizer, OPTIONS, count=10)
    assert (len(found.rows), found.distinct, counts(found)) == (10, 4, [2, 2, 3, 3])
    assert counts(load_attack_data("forget", custom, demo_tokenizer, OPTIONS)) == [1] * 4


def test_a_mixture_holds_its_shares_of_sequences(custom, demo_tokenizer):
    mixture = f"forget=0.25,{custom.holdout_data}=0.75"
    found = load_attack_data(mixture, custom, demo_tokenizer, OPTIONS, count=8)
    assert [(origin["share"], origin["sequences"]) for origin in found.origins] == [(0.25, 4), (0.75, 5)]
    # 2 of the 4 and 6 of the 5, one of which stands in both files.
    assert (len(found.rows), found.distinct) == (8, 7)
    # As many as hold the shares without repetition: 5 / .75 = 6, of which 1.5 and 4.5 make 2 and 4.
    assert len(load_attack_data(mixture, custom, demo_tokenizer, OPTIONS).rows) == 6
    with pytest.raises(UserError, match="leaves no sequence of 'forget' among 1"):
        load_attack_data(mixture, custom, demo_tokenizer, OPTIONS, count=1)
    with pytest.raises(UserError, match="must be above 0 and add up to 1"):
        load_attack_data("forget=0.5,benign=0.6", custom, demo_tokenizer, OPTIONS)
