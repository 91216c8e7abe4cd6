"""benchmarks/audits.py: what a row is made of, and the table, from invented audits."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


def scored(**metrics):
    return {"metrics": {name.replace("__", "/"): {"value": value} for name, value in metrics.items()}}


def curves(**points):
    """Return results with one curve a rate, a point every five steps."""
    made = [
        {"name": name, "rows": [{"step": 5 * n, "forget/probability": value} for n, value in enumerate(values)]}
        for name, values in points.items()
    ]
    return {"metrics": {}, "curves": made}


@pytest.fixture
def place(tmp_path):
    """The folder of an audit in which the gentle rate tells model and gold model apart."""
    write(tmp_path / "eval/results.json", scored(forget__probability=0.1, model_utility=0.5))
    write(tmp_path / "target/eval/results.json", scored(forget__probability=0.9, model_utility=0.6))
    write(tmp_path / "gold/eval/results.json", scored(forget__probability=0.05))
    leaks = scored(plain__leak_at_16=0.2, few_shot__leak_at_16=0.3, few_shot__leak_at_4=0.9)
    write(tmp_path / "sampling/results.json", leaks)
    write(tmp_path / "relearn/results.json", curves(gentle=(0.1, 0.5, 0.7), strong=(0.1, 0.9, 0.9)))
    write(tmp_path / "gold/relearn/results.json", curves(gentle=(0.1, 0.1, 0.1), strong=(0.1, 0.9, 0.9)))
    found = [{"check": "answers", "status": "pass"}, {"check": "relearning", "status": "fail"}]
    write(tmp_path / "audit.json", {"verdict": {"status": "not_gone", "findings": found}})
    return tmp_path


def test_a_row(place):
    from audits import row_of

    row = row_of(place)
    assert row["forget prob."] == 0.1 and row["utility"] == 0.5 and row["UDS"] is None
    assert row["leak@16"] == 0.3  # the prompting that leaks most, at that k
    assert row["failed"] == ["relearning"] and row["rate"] == "gentle"
    # (.1 + 2 * .5 + .7) / 4 = .45, the gold model's .1; .45, half of the target's .9, is reached at 5 * .35 / .4.
    assert row["relearn, mean"] == pytest.approx(0.45) and row["lead of gold"] == pytest.approx(0.35)
    assert row["steps to half"] == pytest.approx(4.375)
    assert row["gold"]["relearn, mean"] == pytest.approx(0.1) and row["gold"]["steps to half"] is None
    assert row["target"]["forget prob."] == 0.9 and row["target"].get("relearn, mean") is None


def test_the_table(place):
    from audits import row_of, to_markdown

    lines = to_markdown({"npo": [row_of(place), row_of(place)]}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["target", "gold (retrained)", "npo"]
    npo = [cell.strip() for cell in lines[-1].split("|")]
    assert npo[2] == "0.10 \u00b1 0.00" and npo[-2] == "relearning 2/2"
    gold = [cell.strip() for cell in lines[3].split("|")]
    assert gold[2] == "0.05 \u00b1 0.00" and gold[9] == "-"


def test_values_that_are_missing_are_counted():
    from audits import summary

    assert summary([None, None]) == "-"
    assert summary([5, None, None]) == "5.00, 2 of 3 never"
