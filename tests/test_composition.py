"""benchmarks/composition.py: intervals, the choice of a learning rate, tables, and that no run is repeated."""

import json
import math
from pathlib import Path

import pytest

from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.errors import UserError
from llm_unlearn.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# ---- Numbers ----


def test_an_interval_by_hand():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, s = sqrt(7); t(2, .975) = 4.302653 (any table)."""
    from composition_report import interval, shown

    mean, half = interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-6)
    assert shown([1.0, 2.0, 6.0]) == "3.00 \u00b1 6.57"


def test_an_interval_of_two_and_of_another_level():
    """For n = 2, t has one degree of freedom, a Cauchy: its quantile at .75 is tan(pi / 4) = 1; s = sqrt(2) here."""
    from composition_report import interval

    assert interval([1.0, 3.0], level=0.5) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))


def test_one_seed_has_no_interval_and_equal_seeds_a_short_one():
    from composition_report import interval, shown

    assert interval([0.5]) == (0.5, None)
    assert shown([0.5]) == "0.50"
    assert shown([-0.001]) == "0.00"
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.0)


BEFORE = {"forget nll": 0.01, "retain nll": 0.02}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # The largest forget NLL within .3 of the retain NLL before: not 5.0, which costs .4.
        ({"1e-4": (1.0, 0.05), "2e-4": (3.0, 0.31), "5e-4": (5.0, 0.42)}, "2e-4"),
        # The bound itself still counts.
        ({"1e-4": (1.0, 0.05), "2e-4": (3.0, 0.32)}, "2e-4"),
        # None keeps the retain set: the one that keeps most of it.
        ({"1e-4": (9.0, 0.9), "2e-4": (1.0, 0.5)}, "2e-4"),
        # Forgetting is not monotone in the rate.
        ({"1e-4": (3.0, 0.05), "2e-4": (2.0, 0.05)}, "1e-4"),
    ],
)
def test_the_rate_that_forgets_most_within_the_bound_is_chosen(found, expected):
    from composition_report import chosen_rate

    after = {rate: {"forget nll": forget, "retain nll": retain} for rate, (forget, retain) in found.items()}
    assert chosen_rate(after, BEFORE, 0.30 + 1e-12) == expected


# ---- Tables ----


def scores(**changes):
    names = [f"{part} {name}" for part in ("forget", "retain", "gsm8k") for name in ("nll", "probability", "accuracy")]
    return (
        dict.fromkeys(names, 0.25) | {"moved": 0.2} | {key.replace("_", " "): value for key, value in changes.items()}
    )


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_masks_are_told_apart_and_seeds_averaged():
    from composition_report import masks_table

    made = [("wagle", 1.0), ("wagle", 2.0), ("wagle", 6.0), ("random", 4.0)]
    shared = {"world": "demo", "method": "npo", "ratio": "0.2", "stage": "equal"}
    runs = [{**shared, "mask": mask, "scores": {"": scores(forget_nll=nll)}} for mask, nll in made]
    runs = [{**run, "seed": seed} for run, seed in zip(runs, (0, 1, 2, 1), strict=True)]
    made, pairs = masks_table(runs, {"demo": scores(forget_nll=0.01)}).split("\n\n")
    heads, _, before, wagle, random = rows_of(made)
    assert heads[:6] == ["world", "method", "mask", "ratio", "share of weights that moved", "forget NLL"]
    assert before[2] == "before unlearning"
    assert before[5] == "0.01"
    assert wagle[2:6] == ["wagle", "0.2", "0.200", "3.00 \u00b1 6.57"]
    assert random[2:6] == ["random", "0.2", "0.200", "4.00"]
    # The one seed that both have: 2 - 4.
    assert [row[2:5] for row in rows_of(pairs)[2:]] == [["0.2", "wagle minus random", "-2.00"]]


def test_the_grid_is_apart_from_the_seeds_and_its_choice_marked():
    from composition_report import optimizers_table

    shared = {"world": "demo", "method": "npo", "optimizer": "AdamW"}
    grid = [("1e-4", 1.0, False), ("1e-3", 7.0, True)]
    runs = [{**shared, "stage": "grid", "rate": rate, "is_chosen": is_chosen, "scores": {"": scores(forget_nll=nll)}}
            for rate, nll, is_chosen in grid]  # fmt: skip
    runs += [
        {
            **shared,
            "optimizer": name,
            "stage": "seeds",
            "rate": "1e-3",
            "seed": seed,
            "scores": {"": scores(forget_nll=nll)},
        }
        for name, nlls in (("AdamW", (7.0, 9.0)), ("Sophia", (8.0, 12.0)))
        for seed, nll in enumerate(nlls)
    ]
    over, tried = optimizers_table(runs, {"demo": scores()}).split("\n\n")
    assert rows_of(over)[3][2:5] == ["AdamW", "1e-3", "8.00 \u00b1 12.71"]  # t(1, .975) = 12.706, s / sqrt(2) = 1
    # 8 - 7 and 12 - 9, and not the difference of two intervals.
    assert rows_of(over)[5][2:5] == ["Sophia minus AdamW", "", "2.00 \u00b1 12.71"]
    assert [row[3:5] + row[-1:] for row in rows_of(tried)[2:]] == [["1e-4", "1.00", ""], ["1e-3", "7.00", "yes"]]


def test_fine_tuning_has_a_row_for_each_checkpoint_with_and_without_ilu():
    from composition_report import invariance_table

    runs = []
    for ilu, last in (("none", 0.5), ("0.1", 0.6)):
        shared = {"world": "demo", "method": "npo", "ilu": ilu, "seed": 0}
        runs.append({**shared, "task": None, "scores": {"": scores()}})
        places = {"checkpoint-10": 0.3, "checkpoint-30": 0.4, "": last}
        after = {place: scores(forget_accuracy=value) for place, value in places.items()}
        runs.append({**shared, "task": "gsm8k", "scores": after})
    made, changes = invariance_table(runs, {"demo": scores(gsm8k_nll=9.0)}).split("\n\n")
    rows = rows_of(made)[2:]
    assert rows[0][4] == "before unlearning"
    assert rows[0][-1] == "9.00"
    assert [(row[2], row[4], row[5]) for row in rows[1:]] == [
        ("none", "0", "0.25"), ("0.1", "0", "0.25"), ("none", "10", "0.30"), ("0.1", "10", "0.30"),
        ("none", "30", "0.40"), ("0.1", "30", "0.40"), ("none", "100", "0.50"), ("0.1", "100", "0.60"),
    ]  # fmt: skip
    # From .25 to .5 without, to .6 with: .25, .35, and .1 more.
    assert rows_of(changes)[4][2:7] == ["gsm8k", "100", "0.25", "0.35", "0.10"]


# ---- Runs ----


@pytest.fixture
def study(monkeypatch):
    """Return (Study whose runs train nothing, the words of the runs it started)."""
    import composition_runs

    started, made = [], composition_runs.Study()
    monkeypatch.setattr(composition_runs, "_run", lambda command, name, words: started.append(words))
    monkeypatch.setattr(made, "measure", lambda folder, world, sets: {"forget nll": float(len(started))})
    return made, started


def test_a_finished_run_is_read_and_one_with_another_command_repeated(study, tmp_path):
    import composition
    from unlearning_tiny import World

    made, started = study
    world = World("demo", "model", "early", "forget", "retain", tmp_path)
    (tmp_path / "study").mkdir()
    first = made.train(world, "x", ["--seed", "0"], {"forget": "f"}, part="a")
    again = made.train(world, "x", ["--seed", "0"], {"forget": "f"}, part="a")
    assert first == again
    assert first["command"] == f"python run_unlearn.py --seed 0 --output_dir {tmp_path}/study/x"
    assert len(started) == 1
    other = made.train(world, "x", ["--seed", "1"], {"forget": "f"}, part="a")
    assert other["scores"] == {"": {"forget nll": 2.0}}
    made.train(world, "x", ["--seed", "1"], {"forget": "f"}, after=["--seed", "7"], part="a")
    assert len(started) == 3
    assert [run["part"] for run in made.runs] == ["a"] * 4
    assert composition.Study().runs == []


def test_part_b_trains_the_grid_once_and_the_choice_on_each_seed(study, tmp_path):
    """The forget NLL counts up, and there is no retain NLL to lose: the last rate of the grid is the choice."""
    from types import SimpleNamespace

    import composition
    from unlearning_tiny import World

    made, started = study
    made.measure = lambda folder, world, sets: {"forget nll": float(len(started)), "retain nll": 0.0}
    made.before["demo"] = BEFORE
    world = World("demo", "model", "early", "forget", "retain", tmp_path)
    (tmp_path / "study").mkdir()
    composition.optimizers(made, world, SimpleNamespace(seeds=[3, 4]))
    assert len(started) == 2 * (len(composition.RATES) + 1)
    chosen = [run for run in made.runs if run.get("is_chosen")]
    assert [(run["optimizer"], run["rate"]) for run in chosen] == [("AdamW", "5e-3"), ("Sophia", "5e-3")]
    over = [(run["optimizer"], run["seed"]) for run in made.runs if run["stage"] == "seeds"]
    assert over == [("AdamW", 3), ("AdamW", 4), ("Sophia", 3), ("Sophia", 4)]
    assert all("sophia" in words for words in started[8:])


def test_unrelated_rows_of_gsm8k_fit_and_do_not_overlap(tmp_path):
    import composition
    from unlearning_tiny import World

    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, count in (("train", 410), ("test", 50)):
        rows = [
            {"question": f"{split} {number}", "answer": "a" * (400 if number % 10 == 9 else 4)}
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    world = World("demo", "model", "early", "forget", "retain", tmp_path)
    ilu, tasks = composition.unrelated(world, tmp_path)
    (tuning, measured) = tasks["gsm8k"]
    read = {name: [json.loads(line)["question"] for line in open(path, encoding="utf-8")]
            for name, path in (("ilu", ilu), ("tuning", tuning), ("measured", measured))}  # fmt: skip
    assert read["ilu"][:10] == [f"train {number}" for number in (*range(9), 10)]
    assert not set(read["ilu"]) & set(read["tuning"])
    assert len(read["measured"]) == composition.NUM_MEASURED


def test_without_gsm8k_prose_stands_in_and_the_other_world_is_refused(tmp_path):
    import composition
    from unlearning_tiny import World

    world = World("demo", "model", "early", "forget", "retain", tmp_path)
    assert list(composition.unrelated(world, None)[1]) == ["prose", "other authors"]
    assert composition.parse([]).worlds == ["demo"]
    with pytest.raises(UserError, match="--worlds tofu needs --data_dir"):
        composition.parse(["--worlds", "tofu"])
    with pytest.raises(UserError, match=r"no .*gsm8k/train"):
        composition.unrelated(world, tmp_path)


def test_scores_are_those_of_the_distributions(tmp_path):
    """Logits of 0 everywhere: NLL log V of each token, 1 / V of each row, and of the weights only a norm has moved."""
    import composition
    import unlearning_tiny

    target = str(tmp_path / "target")
    make_base_model(target, 0)
    model, rows = load_model(target), tmp_path / "rows.jsonl"
    made = [{"question": "Who?", "answer": "Nobody" * count} for count in (1, 7)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    world = unlearning_tiny.World("demo", target, "early", str(rows), str(rows), tmp_path)
    known = composition.Study().measure(target, world, {"forget": world.forget})
    assert known["forget nll"] == pytest.approx(unlearning_tiny.measure(target, world)["forget_nll"], rel=1e-6)
    assert known["moved"] == 0
    size, norm = sum(weight.numel() for weight in model.parameters()), model.model.norm.weight
    norm.data.zero_()
    flat = tmp_path / "flat"
    model.save_pretrained(flat)
    load_tokenizer(target).save_pretrained(flat)
    found = composition.Study().measure(flat, world, {"forget": world.forget})
    assert found["forget nll"] == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
    assert found["forget probability"] == pytest.approx(1 / model.config.vocab_size, rel=1e-6)
    assert found["forget accuracy"] == 0
    assert found["moved"] == norm.numel() / size
