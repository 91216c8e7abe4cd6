"""The report: what the page claims follows from the records, it needs nothing but itself, and mistakes are named."""

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from report_world import NASTY, SPLITS, forget_and_retain, metric, report, split, write_result, write_training

from llm_unlearn.cli.report import main
from llm_unlearn.report import formatting
from llm_unlearn.report.label_placement import place_labels
from llm_unlearn.report.results import Metric
from llm_unlearn.report.tables import standings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(tmp_path):
    """A target, two unlearned runs and a retrained model, trained and evaluated."""
    runs = tmp_path / "runs"
    for name, method, scores in (
        ("gold", "retrain", (0.02, 0.99)),
        ("npo", "npo", (0.04, 0.90)),
        ("simnpo", "simnpo", (0.30, 0.95)),
        ("target", "finetune", (0.99, 0.99)),
    ):
        write_training(runs / name, method, runs / "target", **({"beta": 0.1} if method == "npo" else {}))
        write_result(runs / name / "eval", runs / name, forget_and_retain(*scores))
    return tmp_path


# ---- which value is best ----


CASES = {
    "lower": ([(0.1, 0.01), (0.5, 0.01)], "lower", ["best", ""]),
    "higher": ([(0.1, 0.01), (0.5, 0.01)], "higher", ["", "best"]),
    "none": ([(0.1, 0.01), (0.5, 0.01)], "none", ["", ""]),
    "all within standard error": ([(0.50, 0.03), (0.54, 0.03)], "lower", ["", ""]),
    "at the standard error of the difference": ([(0.0, 0.3), (0.5, 0.4)], "lower", ["", ""]),
    "beyond it": ([(0.0, 0.3), (0.51, 0.4)], "lower", ["best", ""]),
    "two tied, one behind": ([(0.50, 0.03), (0.54, 0.03), (0.9, 0.03)], "lower", ["tied", "tied", ""]),
    "without standard error": ([(0.50, None), (0.54, None)], "higher", ["", "best"]),
    "equal": ([(0.5, None), (0.5, None)], "higher", ["", ""]),
    "missing": ([(None, None), (0.5, None), (0.4, None)], "higher", ["", "best", ""]),
    "alone": ([(None, None), (0.5, None)], "higher", ["", ""]),
    "not finite": ([(math.inf, None), (0.5, None), (0.4, None)], "higher", ["", "best", ""]),
}


@pytest.mark.parametrize("case", CASES)
def test_standings(case):
    values, direction, expected = CASES[case]
    assert standings([Metric(*value) for value in values], direction) == expected


def test_best_is_marked_by_direction_among_the_runs_that_compete(study):
    page = report(study)
    assert page.columns() == ["target", "npo", "simnpo", "gold"]
    # gold is lower and target is higher still, but they are what the others are measured against.
    assert page.marks("forget/probability") == {"npo": "best"}
    assert page.marks("retain/probability") == {"simnpo": "best"}
    assert page.marks("holdout/probability") == {}
    cell = page.row("forget/probability")["npo"]
    assert "best" in cell.one("span", class_="sr").text and cell.one("span", class_="value").text == "0.040"
    assert cell.one("span", class_="error").text == "± 0.010"
    assert cell["title"] == "0.04 ± 0.01, n = 400"
    text = page.root.one("header").text
    assert "Lowest on forget · probability: npo (0.040); the target model has 0.990." in text
    assert "Highest on retain · probability: simnpo (0.950)" in text


def test_no_winner_within_standard_error(tmp_path):
    for name, forget in (("a", 0.50), ("b", 0.51), ("c", 0.90)):
        write_result(tmp_path / "runs" / name, f"hub/{name}", forget_and_retain(forget, 0.9))
    page = report(tmp_path)
    assert page.marks("forget/probability") == {"a": "tied", "b": "tied"}
    assert page.marks("retain/probability") == {}
    assert "a (0.500) and b (0.510), within standard error" in page.root.one("header").text
    assert "On retain · probability, the models are within standard error of each other." in page.root.text


# ---- the tables ----


def many_metrics(forget, retain):
    """Metrics as run_eval.py names them."""
    names = ("probability", "rouge_l_recall", "truth_ratio", "extraction_strength", "exact_memorization")
    metrics = {f"retain/{name}": metric(retain, 0.01, "higher") for name in names}
    metrics |= {f"forget/{name}": metric(forget) for name in names}
    metrics |= {f"world_facts/{name}": metric(retain, 0.01, "higher") for name in names}
    metrics |= {"loss/auc": metric(0.5, direction="none"), "min_k_40/auc": metric(0.5, direction="none")}
    return {**metrics, "model_utility": metric(retain, 0.01, "higher"), "overall/privacy": metric(0.5)}


def test_a_long_table_is_grouped_by_split_and_has_a_headline(tmp_path):
    for name in ("a", "b"):
        write_result(tmp_path / "runs" / name, f"hub/{name}", many_metrics(0.1, 0.9))
    attacks = {f"{attack}/auc": metric(0.5) for attack in ("loss", "zlib", "min_k_pp_20")}
    write_result(tmp_path / "runs/a/mia", "hub/a", attacks, kind="mia")
    page = report(tmp_path)
    full = page.root.one(id="domain-0-eval")
    titles = [row.one("th") for row in full.all("tr", class_="group")]
    assert [title.children[0].split()[0] for title in titles] == [
        "aggregates",
        "forget",
        "retain",
        "world",
        "membership",
    ]
    assert titles[1].text == "forget 400 rows"
    assert titles[4].text == "membership inference, AUC"
    assert [row.one("th").text for row in full.all("tbody")[0].all("tr")[1:]] == ["model utility", "overall, privacy"]
    assert len(full.all("tr", **{"data-direction": "lower"})) == 5 + 1
    way = full.one("tr", **{"data-metric": "model_utility"}).one("td", class_="way")
    assert way.text == "↑ higher"
    assert len(page.root.one(id="domain-0-glance").all("tr")) == 1 + 8
    assert page.columns("domain-0-mia") == ["a"]
    labels = [row.one("th").text for row in page.root.one(id="domain-0-mia").all("tr") if row.get("data-metric")]
    assert labels == ["loss", "zlib", "Min-K%++, K = 20"]


def test_missing_values_show_their_reason(tmp_path):
    metrics = forget_and_retain(0.1, 0.9)
    unknown = {"value": None, "stderr": None, "n": 0, "direction": "higher"}
    metrics["forget_quality"] = {**unknown, "reason": "no --retain_reference <was> given"}
    metrics["model_utility"] = unknown
    write_result(tmp_path / "runs/a", "hub/a", metrics)
    write_result(tmp_path / "runs/b", "hub/b", {**forget_and_retain(0.2, 0.9), "perplexity": metric(math.inf, None)})
    page = report(tmp_path)
    for name, run, reason in (
        ("forget_quality", "a", "no --retain_reference <was> given"),
        ("model_utility", "a", "no reason was recorded"),
        ("forget_quality", "b", "not in this run's results.json"),
    ):
        cell = page.row(name)[run]
        assert cell["title"] == reason and cell.one("span", class_="value").text == formatting.DASH
        link = cell.one("a")
        assert page.root.one(id=link["href"].removeprefix("#")).text == reason
    assert page.row("perplexity")["b"].one("span", class_="value").text == "∞"
    assert [note.text for note in page.root.one("ol").all("li")].count("not in this run's results.json") == 1


def test_costs_add_up_over_the_results_of_a_run(study):
    write_result(study / "runs/npo/mia", study / "runs/npo", {"loss/auc": metric(0.5)}, kind="mia")
    page = report(study)
    assert page.values("model_calls", "cost") == {"target": "21", "npo": "42", "simnpo": "21", "gold": "21"}
    assert page.values("token_forwards", "cost")["npo"] == "6,600"
    assert page.values("forwards_per_token", "cost")["npo"] == "1.10"
    assert page.values("optimizer_steps", "cost")["gold"] == "50"
    assert page.values("peak_memory_bytes", "cost")["npo"] == "3.0 GiB"
    times = [row for row in page.root.one(id="cost").all("tr", **{"data-metric": "wall_seconds"})]
    assert "25 s" in times[0].text and "75 s" in times[1].text
    assert not page.root.one(id="cost").all("tr", **{"data-metric": "decode_steps"}), "no run counted them"


def test_settings_that_differ(study):
    page = report(study)
    settings = page.root.one(id="settings")
    assert [row["data-metric"] for row in settings.all("tr") if row.get("data-metric")] == ["beta"]
    cells = page.row("beta", "settings")
    assert cells["npo"].one("span", class_="value").text == "0.1"
    assert cells["simnpo"]["title"] == "not a flag of this run's method"
    assert "secret" not in page.html


def test_provenance_is_folded_and_complete(study):
    page = report(study)
    details = page.root.one("details", id="run-1")
    assert "open" not in details.attributes and details.one("strong").text == "npo"
    commands = [pre.one("code").raw for pre in details.all("pre")]
    path = study / "runs/npo"
    assert commands == ["python run_unlearn.py --unlearn_method npo", f"python run_eval.py --model_name_or_path {path}"]
    assert len(details.all("button", type="button")) == 2
    assert (
        "400 rows, from hub:tofu, sha256 " + "ab" * 32 in details.text
        and "40 rows, 384 tokens" in details.text
        and "2.13.0" in details.text
    )


# ---- what does not compare ----


OTHER_SPLIT = {"splits": {**SPLITS, "forget": split(40, "ef")}, "fingerprints": {"questions": "other"}}
MISMATCHES = {
    "split": (
        OTHER_SPLIT,
        "split 'forget'",
        {"forget/probability": {}, "loss/auc": {}, "retain/probability": {"b": "best"}},
    ),
    "definitions": ({"definitions": {"version": 2, "legacy": False}}, "metric definitions", {"retain/probability": {}}),
    "legacy": ({"definitions": {"version": 1, "legacy": True}}, "version 1, legacy", {"retain/probability": {}}),
    "other key": ({"fingerprints": {"more": {"data": "u"}}}, None, {"retain/probability": {"b": "best"}}),
    "tokenizer": ({"fingerprints": {"tokenizer": "u"}}, "fingerprint 'tokenizer'", {"retain/probability": {}}),
    "questions": ({"fingerprints": {"questions": "u"}}, "fingerprint 'questions'", {"retain/probability": {}}),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_runs_that_were_scored_differently(case, tmp_path):
    changed, words, expected = MISMATCHES[case]
    write_result(tmp_path / "runs/a", "hub/a", forget_and_retain(0.1, 0.8) | {"loss/auc": metric(0.5)})
    write_result(tmp_path / "runs/b", "hub/b", forget_and_retain(0.5, 0.9) | {"loss/auc": metric(0.9)}, **changed)
    page = report(tmp_path)
    warnings = page.root.all("aside", class_="warning")
    if words:
        assert words in warnings[0].text and warnings[0].all("b")[0].text in ("a", "b")
        assert page.root.one(id="domain-0-glance").all("small", class_="alert")
    else:
        assert not warnings, "fingerprints that only one run has, and those of the model, do not count"
    assert {name: page.marks(name) for name in expected} == expected
    assert len(warnings) <= 1 and page.root.text.count("fingerprint 'questions'") == (case == "questions")


def test_a_long_list_of_alike_runs_is_summed_up(tmp_path):
    for number in range(5):
        write_result(tmp_path / "runs" / str(number), f"hub/{number}", forget_and_retain(0.1, 0.9))
    write_result(tmp_path / "runs/odd", "hub/odd", forget_and_retain(0.1, 0.9), **OTHER_SPLIT)
    sides = [side.text for side in report(tmp_path).root.one("aside").all("dd")]
    assert sides == ["40 rows, sha256 efefefefefef…: odd", "400 rows, sha256 abababababab…: the other 5 runs"]


# ---- the plots ----


def test_scatter_has_a_point_for_each_run_with_both_numbers(study):
    write_result(study / "runs/simnpo/eval", study / "runs/simnpo", {"forget/probability": metric(0.3)})
    page = report(study)
    for size in ("wide", "narrow"):
        assert page.points(f"domain-0-scatter-{size}") == [f"domain-0-scatter-{size}-point-{i}" for i in (0, 1, 3)]
        plot = page.root.one(id=f"domain-0-scatter-{size}")
        hint = plot.one("g", id=f"domain-0-scatter-{size}-point-1").one("title")
        assert hint.text == "npo: forget · probability 0.04 ± 0.01; retain · probability 0.9 ± 0.01"
        assert hint.text in plot["aria-label"] and plot["role"] == "img"
        assert {"npo", "gold", "target", "↖ better"} <= {text.text for text in plot.all("text")}
    assert "for want of one of the two: simnpo." in page.root.one("figure", class_="scatter").text


def test_scatter_prefers_the_pair_that_most_runs_have(tmp_path):
    utility = {"model_utility": metric(0.6, 0.01, "higher")}
    write_result(tmp_path / "runs/a", "hub/a", {**forget_and_retain(0.1, 0.9), **utility})
    write_result(tmp_path / "runs/b", "hub/b", {**forget_and_retain(0.2, 0.9), **utility})
    assert "forget · probability against model utility" in report(tmp_path).root.one("figcaption").text
    write_result(tmp_path / "runs/c", "hub/c", forget_and_retain(0.2, 0.9))
    assert "against retain · probability" in report(tmp_path).root.one("figcaption").text


def test_training_curves(study):
    row = {"step": 6, "loss": math.nan, "eval_forget_probability": 0.5, "eval_forget_nll": 1.0, "eval_runtime": 3.0}
    state = study / "runs/npo/trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    state.write_text(json.dumps({"log_history": [*history, row, {"step": 6, "train_loss": 4.0}]}))
    page = report(study)
    panels = [figure for figure in page.root.one("div", class_="panels").all("figure")]
    labels = [panel.one("figcaption").text for panel in panels]
    assert labels == ["loss", "loss, forget term", "loss, retain term", "forget · probability"]
    for number in range(3):
        assert page.lines(f"curve-{number}") == [f"curve-{number}-line-1", f"curve-{number}-line-2"]
    assert page.lines("curve-3") == ["curve-3-line-1"]
    assert page.root.one("g", id="curve-0-line-1").one("title").text == "npo: 2 to 0.4"
    section = panels[0].parent.parent.text
    assert "not finite are left out: 1." in section and "target and gold is left out" in section


def test_labels_keep_clear_of_each_other():
    """Eight runs within twenty pixels, as unlearned models lie in the good corner."""
    points = [(60 + 7 * (i % 3), 200 + 6 * (i // 3)) for i in range(8)]
    markers = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    frame = (40, 20, 400, 380)
    boxes = place_labels(points, [(90, 14)] * 8, markers, frame)
    for a, b in [*combinations(boxes, 2), *((box, marker) for box in boxes for marker in markers)]:
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(b[0] >= 40 and b[1] >= 20 and b[2] <= 400 and b[3] <= 380 for b in boxes)


# ---- which results belong to which run ----


def test_copied_runs_find_their_training_again(tmp_path):
    runs = tmp_path / "runs"
    write_training(runs / "npo", output_dir="/cluster/out/npo")
    write_result(tmp_path / "scores/npo", "/cluster/out/npo", forget_and_retain(0.1, 0.9))
    write_training(runs / "deep/simnpo", "simnpo", output_dir="elsewhere")
    write_result(tmp_path / "scores/simnpo", "deep/simnpo", forget_and_retain(0.2, 0.9))
    write_training(runs / "grad_diff", "grad_diff", output_dir="x")
    write_result(runs / "grad_diff/eval", "/gone/grad_diff", forget_and_retain(0.3, 0.9))
    write_result(tmp_path / "scores/other", "/cluster/elsewhere/npo", forget_and_retain(0.4, 0.9))
    page = report(tmp_path, runs, tmp_path / "scores")
    # The namesake from elsewhere stays by itself.
    assert sorted(page.columns()) == ["elsewhere/npo", "grad_diff", "runs/npo", "simnpo"]
    roles = {item.one("strong").text: item.one("small").text for item in page.root.one("ul", class_="runs").all("li")}
    assert roles.pop("elsewhere/npo") == "no training record"
    assert all(role.endswith("unlearned") for role in roles.values()) and len(roles) == 3


def test_checkpoints_trainings_and_strangers(tmp_path):
    runs = tmp_path / "runs"
    write_training(runs / "npo", start="hub/start")
    (runs / "npo/checkpoint-2").mkdir()
    (runs / "npo/checkpoint-2/trainer_state.json").write_text('{"log_history": []}')
    write_result(runs / "npo/checkpoint-2/eval", runs / "npo/checkpoint-2", forget_and_retain(0.5, 0.9))
    write_result(runs / "npo/eval", runs / "npo", forget_and_retain(0.1, 0.9))
    write_result(runs / "npo/eval_again", runs / "npo", forget_and_retain(0.12, 0.9))
    write_result(runs / "start", "hub/start", forget_and_retain(0.9, 0.9))
    write_training(runs / "unscored", "simnpo")
    page = report(tmp_path)
    assert page.columns() == ["start", "npo/checkpoint-2", "npo", "npo (eval_again)"]
    assert page.row("optimizer_steps", "cost")["npo/checkpoint-2"].get("title").startswith("the record is of the whole")
    assert "No results were found for unscored" in page.root.one("header").text
    assert "start target, before unlearning" in page.root.one("ul", class_="runs").text
    # One line a training: neither its checkpoint nor a second score of it draws it again.
    hints = [page.root.one(id=line).one("title").text for line in page.lines("curve-0")]
    assert [hint.split(":")[0] for hint in hints] == ["npo", "unscored"]


def test_demo_json_is_read_until_an_evaluation_says_it_better(tmp_path):
    demo = tmp_path / "runs"
    write_training(demo / "target", "finetune", "base")
    write_training(demo / "unlearned", "npo", demo / "target")
    values = {"before": {"forget/probability": 0.99}, "after": {"forget/probability": 0.01}, "seconds": 30.0}
    (demo / "demo.json").write_text(json.dumps(values))
    page = report(tmp_path)
    assert page.values("forget/probability") == {"target": "0.990", "unlearned": "0.010"}
    write_result(demo / "eval", demo / "unlearned", forget_and_retain(0.012, 0.9), domain="demo")
    assert report(tmp_path).values("forget/probability")["unlearned"] == "0.012"


def test_each_domain_has_its_own_tables(study):
    choices = {"forget/choice_accuracy": metric(0.26), "retain/choice_accuracy": metric(0.5, 0.01, "higher")}
    write_result(study / "runs/npo/wmdp", study / "runs/npo", choices, domain="wmdp")
    page = report(study)
    assert page.root.one("h1").text == "Unlearning on tofu and wmdp"
    assert page.columns("domain-0-glance") == ["target", "npo", "simnpo", "gold"]
    assert page.columns("domain-1-glance") == ["npo"]
    assert not page.root.all("svg", id="domain-1-scatter-wide"), "one point is no comparison"


def test_pages_without_evaluation(tmp_path):
    write_training(tmp_path / "trained/npo")
    page = report(tmp_path, tmp_path / "trained")
    assert page.root.one("h1").text == "Unlearning runs" and page.lines("curve-0") == ["curve-0-line-0"]
    assert "No results.json was found" in page.root.one("header").text and not page.root.all(id="domain-0-glance")
    write_result(tmp_path / "attacked", "hub/a", {"loss/auc": metric(0.5)}, kind="mia", domain="muse_news")
    assert report(tmp_path, tmp_path / "attacked").values("loss/auc") == {"a": "0.500"}
    write_result(tmp_path / "lm_eval", "hub/a", {"lm_eval/piqa/acc": metric(0.7, 0.01, "higher")}, domain=None)
    page = report(tmp_path, tmp_path / "lm_eval")
    assert page.root.one("h1").text == "Unlearning on lm_eval" and page.values("lm_eval/piqa/acc") == {"a": "0.700"}


# ---- the page as a file ----


@pytest.mark.parametrize("count", [1, 2, 8, 14])
def test_the_page_is_sound_for_any_number_of_runs(count, tmp_path):
    for number in range(count):
        name = NASTY.replace("/", "_") if number == 1 else f"run{number}"
        write_result(tmp_path / "runs" / str(number), f"hub/{name}", many_metrics(0.1 * number % 1, 0.9))
    page = report(tmp_path)
    ids = [element["id"] for element in page.root.all() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in page.root.all():
        if element.get("href").startswith("#"):
            assert element["href"][1:] in ids
        assert element.tag != "th" or element["scope"] in ("col", "row", "rowgroup")
        assert element.tag != "table" or element.one("caption").text
    assert page.root.one("html")["lang"] == "en"
    assert len(page.columns()) == len(set(page.columns())) == count


def test_what_users_wrote_is_shown_and_never_run(tmp_path):
    metrics = forget_and_retain(0.1, 0.9) | {f"{NASTY}/probability": metric(None, reason=NASTY)}
    others = {"command": NASTY, "versions": {NASTY: NASTY}, "domain": NASTY}
    for name in (NASTY.replace("/", "_"), "plain"):
        folder = tmp_path / "runs" / name
        write_training(
            folder, NASTY, history=[{"step": 1, "loss": 1.0, f"loss/{NASTY}": 2.0}, {"step": 2, "loss": 0.5}]
        )
        write_result(folder / "eval", folder, metrics, **others)
    page = report(tmp_path, title=NASTY)
    assert page.root.one("h1").text == page.root.one("head").one("title").text == NASTY
    assert [script.parent.tag for script in page.root.all("script")] == ["body"]
    assert "alert(" not in page.root.one("script").raw
    assert [code.raw for code in page.root.all("code")].count(NASTY) == 2
    assert page.row(f"{NASTY}/probability")["plain"]["title"] == NASTY
    assert any(NASTY in figure.text for figure in page.root.one("div", class_="panels").all("figcaption"))
    assert not [name for element in page.root.all() for name in element.attributes if name.startswith("on")]


def test_the_page_needs_nothing_but_itself(study):
    page = report(study)
    for element in page.root.all():
        for name, value in element.attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                assert value.startswith(("#", "data:")), f"<{element.tag} {name}={value}>"
            assert not name.startswith("xmlns")
    style = page.root.one("style").raw
    assert "url(" not in style and "@import" not in style and "//" not in style
    assert "http://" not in page.html and "https://" not in page.html
    (policy,) = [meta["content"] for meta in page.root.all("meta") if meta.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.root.one("script").raw.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    for word in ("prefers-color-scheme: dark", "@media print", "max-width: 45rem"):
        assert word in style


def test_plots_take_their_colors_from_the_page(study):
    page = report(study)
    style = page.root.one("style").raw
    plots = [svg for svg in page.root.all("svg") if "plot" in svg.get("class")]
    assert len(plots) == 2 + 3
    used = [element.get("style") for plot in plots for element in plot.all()]
    assert not [text for text in used if "#" in text or "font-family" in text]
    names = {part.split(")")[0] for text in used for part in text.split("var(")[1:]}
    assert {"--run-0", "--run-1", "--reference", "--muted"} <= names
    for name in names:
        assert style.count(f"{name}:") == 2, f"{name} must be defined for the light and for the dark scheme"


def test_equal_records_give_equal_bytes(study):
    report(study)
    first = (study / "page/report.html").read_bytes()
    again = study / "again.html"
    words = [sys.executable, "-m", "llm_unlearn.cli.report", str(study / "runs"), "--output", str(again)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo"}
    done = subprocess.run(words, env=environment, cwd=study, capture_output=True, text=True, check=True)
    assert again.read_bytes() == first
    assert done.stdout.splitlines()[-1] == f"4 runs compared; the page is {again}"


def test_help_imports_neither_torch_nor_matplotlib():
    code = "import sys, llm_unlearn.cli.report as r\ntry: r.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--output" in done.stdout and done.stdout.splitlines()[-1] == "[]"


# ---- mistakes ----


def broken(**changes):
    return {"schema_version": 1, "kind": "eval", "domain": "tofu", "model": "m", "metrics": {}, **changes}


MISTAKES = {
    "json": ('{"schema_version": 1,', "cannot be read as JSON"),
    "list": ([], "must hold a JSON object"),
    "newer": (broken(schema_version=2), "schema_version 2, and this program reads up to 1; update llm_unlearn"),
    "no_version": (broken(schema_version=None), "schema_version is None"),
    "kind": (broken(kind="train"), "its kind is 'train', known: eval, mia"),
    "model": (broken(model=""), "'model' must be text"),
    "metrics": (broken(metrics=[]), "'metrics' must be an object"),
    "metric": (broken(metrics={"a": 1}), "metric 'a' must be an object with a 'value'"),
    "value": (broken(metrics={"a": {"value": "high"}}), "'value' of metric 'a' is 'high', neither number nor null"),
    "direction": (broken(metrics={"a": {"value": 1, "direction": "up"}}), "direction 'up', known: lower, higher, none"),
    "splits": (broken(splits={"forget": 3}), "the split 'forget' must be an object"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_malformed_results(case, tmp_path, capsys):
    content, expected = MISTAKES[case]
    (tmp_path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    output = tmp_path / "report.html"
    assert main([str(tmp_path), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and str(tmp_path / "results.json") in line
    assert not output.exists()


def test_mistakes_on_the_command_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_result(tmp_path / "run", "hub/a", forget_and_retain(0.1, 0.9))
    for words, expected in (
        ([str(tmp_path / "gone")], "does not exist"),
        ([str(tmp_path / "empty")], "nothing to report in"),
        ([str(tmp_path / "file")], "is a file; pass the folder"),
        ([str(tmp_path / "run"), "--output", str(tmp_path / "empty")], "is a folder; name a file in it"),
        ([str(tmp_path / "run"), "--output", str(tmp_path / "file/report.html")], "cannot be written"),
        ([str(tmp_path / "run"), "--outptu", "x"], "unrecognized arguments: --outptu"),
        ([], "DIR"),
    ):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert expected in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_a_malformed_trainer_state_is_named(study, capsys):
    (study / "runs/npo/trainer_state.json").write_text('{"log_history": {}}')
    assert main([str(study / "runs"), "--output", str(study / "x.html")]) == 2
    assert "trainer_state.json is malformed: 'log_history' must be a list" in capsys.readouterr().err


# ---- numbers and names ----


def test_numbers_are_written_to_fit_their_error():
    assert formatting.decimals_of([0.5], [0.0123]) == 3 and formatting.decimals_of([0.5], [0.0323]) == 2
    assert formatting.decimals_of([47.3], [1.4]) == 1 and formatting.decimals_of([1200.0], [35.0]) == 0
    assert formatting.decimals_of([0.5, 3.0], [None, None]) == 3 and formatting.decimals_of([2000.0], []) == 0
    assert formatting.number(-0.25, 2) == "\u22120.25" and formatting.number(-0.0, 1) == "0.0"
    assert (
        formatting.number(3.2e-12, 3) == "3.2\u00d710\u207b\u00b9\u00b2" and formatting.number(12345.6, 0) == "12,346"
    )
    assert formatting.number(math.nan, 2) == "not a number" and formatting.number(-math.inf, 2) == "\u2212\u221e"
    tiny = formatting.decimals_of([8.8e-5, 2.1e-6], [8e-6, None])
    assert tiny == formatting.SCIENTIFIC and formatting.number(8.8e-5, tiny) == "8.8\u00d710\u207b\u2075"
    assert formatting.error(8e-6, tiny) == "\u00b1 8.0\u00d710\u207b\u2076" and formatting.number(0.0, tiny) == "0"
    assert formatting.error(0.004, 1) == "± <0.1" and formatting.error(0.04, 2) == "± 0.04"
    assert [formatting.seconds(value) for value in (0.84, 75, 200, 7500)] == [
        "0.8 s",
        "75 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert formatting.size(559 * 2**20) == "559 MiB" and formatting.size(12.4 * 2**30) == "12.4 GiB"
    assert formatting.listed(["a"]) == "a" and formatting.listed("abc") == "a, b and c"


def test_labels_of_a_sweep_keep_what_differs():
    names = [f"npo_beta{beta}_retain5_lr1e-5_seed{seed}" for beta in (0.1, 0.5) for seed in (0, 1)]
    labels = formatting.short_labels([*names, "simnpo"], 20)
    assert labels == ["npo_beta0.1…seed0", "npo_beta0.1…seed1", "npo_beta0.5…seed0", "npo_beta0.5…seed1", "simnpo"]
    (label,) = formatting.short_labels(["a" * 30 + "z"], 17)
    assert len(label) == 17 and label.endswith("z")
