"""The attacks on the page of an audit: each one's plot with its numbers, and what the models wrote."""

import json
import re

import pytest
from audit_world import AUTHORS, HOSTILE, curve, dashes, lines_of, rows, write_audit
from report_world import Page, metric, report, write_result

from llm_unlearn.report.charts import Chart, Line, numbers_of
from llm_unlearn.report.generations import segments
from llm_unlearn.report.page import make_audit_page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(make_audit_page(write_audit(tmp_path_factory.mktemp("one") / "npo")))


# ---- the plots ----


def test_recovery_curves(page):
    plot = "domain-0-recovery-0-0-wide"
    strong, thin = lines_of(page, plot), lines_of(page, plot, "thin")
    assert set(strong) == {"1", "2"} and len(thin) == 4, "two of the three rates of each of the two models"
    assert strong["1"].one("title").text == "npo: 0.04 to 0.893"
    level = page.root.one(id=plot).one("g", id=f"{plot}-level-0")
    assert level.one("title").text == "target model: 0.99"
    assert len({*(dashes(line) for line in strong.values()), dashes(level)}) == 3
    bands = [g for g in page.root.one(id=plot).all("g") if "mark-band" in g.get("id")]
    assert len(bands) == 2
    label = page.root.one(id=plot)["aria-label"]
    assert label.startswith("forget \u00b7 probability by step of the attack.") and "npo: 0.04 to 0.893" in label
    utility = lines_of(page, "domain-0-recovery-0-1-wide")
    assert utility["2"].one("title").text == "gold: 0.98 to 0.881"


def test_the_numbers_of_the_recovery_curves(page):
    section = page.root.one("section", id="domain-0-recovery")
    details = section.all("details")[0]
    assert "open" not in details.attributes
    tables = details.all("table")
    assert [table.one("caption").text for table in tables] == [
        "Relearning: forget \u00b7 probability",
        "Relearning: retain \u00b7 probability",
        "Relearning: highest forget \u00b7 probability by configuration, * the strongest",
    ]
    assert [head.text for head in tables[0].one("thead").all("th")] == ["step", "npo", "gold"]
    found = rows(tables[0])
    assert found[0] == ["0", "0.040 \u00b1 0.020", "0.030 \u00b1 0.020"]
    # The evaluation at step 15 failed, so there is no such row.
    assert [row[0] for row in found] == ["0", "5", "10", "20", "25", "30", "35", "40"]
    assert rows(tables[2])[2] == ["lr 2e-03", "0.893 *", "0.447 *"]


def test_each_downstream_task_has_its_accuracy(page):
    titles = [heading.text for heading in page.root.one("section", id="domain-0-recovery").all("h3")]
    assert titles == [
        "Relearning",
        "Tampering",
        "Downstream fine-tuning: sst2",
        "Downstream fine-tuning: gsm8k",
    ]
    captions = [c.text for c in page.root.one("section", id="domain-0-recovery").all("figcaption")]
    assert captions[4:] == ["forget \u00b7 probability", "sst2 \u00b7 accuracy", "forget \u00b7 probability",
                            "gsm8k \u00b7 accuracy"]  # fmt: skip


def test_an_ablation_draws_its_variants(tmp_path):
    curves = [{"name": name, "rows": curve(0.01, 0.9, end, 0.1)} for name, end in (("with", 0.9), ("without", 0.1))]
    write_result(tmp_path / "runs/ablate", "hub/t", {"with/forget/probability/recovered": metric(0.9)}, kind="ablate",
                 curves=curves)  # fmt: skip
    page = report(tmp_path)
    legend = page.root.one("section", id="domain-0-recovery").one("ul", class_="legend")
    assert [item.text for item in legend.all("li")] == ["with the retain term", "without the retain term"]
    keys = {symbol["id"] for symbol in page.root.all("symbol")}
    assert {use["href"][1:] for use in legend.all("use")} <= keys
    assert list(lines_of(page, "domain-0-recovery-0-0-wide")) == ["ablate-0-0", "ablate-0-1"]
    assert "recovered share with the retain term" in page.root.one(id="domain-0-glance").text


def test_roc_curves_and_their_numbers(tmp_path):
    """Of 4 others the first is accused after 2 of 4 members: 50% are found below 25%, and below 10% as well."""
    roc = {"loss": {"fpr": [0, 0, 0.25, 0.5, 1], "tpr": [0, 0.5, 0.5, 1, 1]}}
    write_result(tmp_path / "runs/a", "hub/a", {"loss/auc": metric(0.875, None, "none")}, kind="mia", roc=roc,
                 intervals={"loss": [0.6, 1.0]})  # fmt: skip
    page = report(tmp_path)
    (row,) = rows(page.root.one("section", id="domain-0-roc").one("table"))
    assert row == ["a", "0.875", "0.600 to 1.000", "50.0%", "50.0%", "50.0%", "50.0%"]
    assert list(lines_of(page, "domain-0-roc-0")) == ["0"]
    assert page.row("loss/auc")["a"]["title"] == "0.875, 95% 0.6 to 1, n = 400"


def test_layers_have_lines_of_the_models_that_were_compared_with(page):
    assert [len(lines_of(page, f"domain-0-layers-{number}")) for number in range(3)] == [3, 3, 1]
    section = page.root.one("section", id="domain-0-layers")
    assert [caption.text.split("  ")[0] for caption in section.all("figcaption")][2].startswith("Unlearning depth")
    lens = section.all("table")[0]
    assert [head.text for head in lens.one("thead").all("th")] == ["layer", "target", "npo", "gold"]
    assert rows(lens)[0][0] == "emb." and rows(lens)[-1][:2] == ["7", "0.970"]


def test_long_curves_are_thinned_in_their_tables():
    line = Line("0", "a", None, tuple((step, step / 100, None) for step in range(101)))
    numbers = numbers_of(Chart("t", "x", (line,)), "Curve", "step")
    assert numbers.caption == "Curve, every 5th row" and len(numbers.rows) == 21
    assert numbers.rows[0] == ("0", ("0.000",)) and numbers.rows[-1] == ("100", ("1.000",))


# ---- what the models wrote ----


def test_words_of_the_true_answer_are_marked():
    found = segments(" Mara lives in Oskerne, the town.", "Mara was born in the town of Oskerne.")
    assert found == [("Mara", True), (" lives ", False), ("in", True), (" Oskerne, ", False), ("the town.", True)]
    assert segments("", "a") == [] and segments("x y", "") == [("x y", False)]


def test_answers_side_by_side(page):
    table = page.root.one(id="domain-0-answers")
    assert [head.text for head in table.one("thead").all("th")][1:] == ["target", "npo", "gold"]
    questions = [head.text.split(")")[0].split("(")[1] for head in table.all("th", scope="row")]
    # Row 15 is the hostile one, whose recall is 0 as is that of row 0.
    assert questions == ["14", "13", "12", "11", "10", "9", "4", "3", "2", "1", "0", "15"]
    text = page.root.one("section", id="domain-0-texts").text
    assert "Of 16 questions of the forget set, the six where the unlearned model's answer has most" in text
    cells = table.all("tr")[1].all("td")
    assert [mark.text for mark in cells[1].all("mark")] == ["Ines Okoro won the Silver Lantern in"]
    assert "88% of the words" in cells[1].text


def test_few_answers_are_all_shown(tmp_path):
    page = Page(make_audit_page(write_audit(tmp_path / "npo", rows=5, attacks=())))
    assert "All 5 questions of the forget set" in page.root.text
    assert len(page.root.one(id="domain-0-answers").all("tr")) == 1 + 5


def test_questions_come_from_sampling_where_the_answers_do_not_tell_them(tmp_path):
    folder = write_audit(tmp_path / "npo", rows=2, attacks=("sampling",))
    for path in folder.rglob("per_example.jsonl"):
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        rewritten = [{k: v for k, v in row.items() if k not in ("question", "true_answer")} for row in kept]
        path.write_text("".join(json.dumps(row) + "\n" for row in rewritten))
    head = Page(make_audit_page(folder)).root.one(id="domain-0-answers").all("th", scope="row")[1]
    assert head.text == f"{AUTHORS[0][0]} (0) {AUTHORS[0][1]}"


def test_continuations_of_texts_are_answers_too(tmp_path):
    folder = write_audit(tmp_path / "npo", rows=0, attacks=())
    row = {"split": "forget", "index": 3, "generations": {"continuation_100": "one two"}, "rouge_l_recall_100": 0.5}
    row["expected"] = {"continuation_100": "one two three four"}
    (folder / "eval/per_example.jsonl").write_text(json.dumps(row) + "\n")
    table = Page(make_audit_page(folder)).root.one(id="domain-0-answers")
    assert table.all("th", scope="row")[0].text == "row 3, continuation 100 tokens one two three four"
    assert table.one("td").one("mark").text == "one two" and table.one("td").one("small").text == "50% of the words"


def test_samples_that_leak_most_come_first(page):
    table = page.root.one(id="domain-0-samples")
    assert len(table.all("tr")) == 1 + 6
    shares = [row.all("td")[0].one("small").text for row in table.all("tr")[1:]]
    assert shares[:2] == ["the answer is in 90% of samples", "the answer is in 80% of samples"]


def test_what_models_write_is_shown_and_never_run(page):
    shown = [span.text for span in page.root.all("span", class_="text")]
    assert shown.count(HOSTILE) == 3, "one answer, and a sample of both models"
    assert [script.parent.tag for script in page.root.all("script")] == ["body"]
    assert not page.root.all("img") and "alert(" not in page.root.one("script").raw
    assert "<script>alert" not in page.html and not re.search(r"<[^>]*onerror", page.html)
