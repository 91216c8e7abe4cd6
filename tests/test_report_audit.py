"""The report of audits: verdict, roles and main numbers, several audits beside each other, and what is refused."""

import json

import pytest
from audit_world import FINDINGS, curve, dashes, lines_of, rows, write_audit
from report_world import Page, forget_and_retain, metric, report, write_result

from llm_unlearn.cli.report import main
from llm_unlearn.errors import UserError
from llm_unlearn.report.page import make_audit_page
from llm_unlearn.report.runs import gather_runs


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return write_audit(tmp_path_factory.mktemp("one") / "npo")


@pytest.fixture(scope="module")
def page(audit):
    return Page(make_audit_page(audit))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    write_audit(folder / "runs/npo")
    write_audit(folder / "runs/rmu", "rmu", recovers=0.45, status="gone")
    return report(folder)


def headings(page):
    return [heading.text for heading in page.root.all("h2")]


# ---- the page of one audit ----


def test_the_sections_come_in_the_order_of_an_audit(page):
    shown = headings(page)
    assert shown[:7] == [
        "Verdict",
        "At a glance",
        "What attacks bring back",
        "Forgetting against keeping",
        "Who was in the forget set",
        "What the layers know",
        "What the models write",
    ]
    assert shown.index("Cost") < shown.index("Where the runs come from") == len(shown) - 1
    assert page.root.one("h1").text == "Is it really gone? npo"


def test_the_contents_lead_to_the_sections(page):
    links = page.root.one("nav").all("a")
    assert len(links) == 11
    for link in links:
        section = page.root.one("section", id=link["href"].removeprefix("#"))
        assert section.all("h2")[0].text.startswith(link.text)


def test_the_verdict_is_a_word_and_a_shape(page):
    section = page.root.one("section", id="verdict")
    headline = section.one("p", class_="headline")
    assert headline.text == "Not gone npo: three relearning rounds are enough."
    assert headline.one("use")["href"] == "#status-fail"
    found = [(item.one("use")["href"], item.one("b").text, item.one("strong").text) for item in section.all("li")]
    assert found == [
        ("#status-pass", "pass", "answers"),
        ("#status-fail", "fail", "relearning"),
        ("#status-unknown", "unknown", "depth"),
    ]
    assert "1 failed, 1 passed and 1 could not be judged" in section.text
    assert "Without a result: white_box of the audited model (failed);" in section.text
    shapes = [symbol for symbol in page.root.all("symbol") if symbol["id"].startswith("status-")]
    assert len({symbol.all()[0].get("d") or symbol.all()[0].tag for symbol in shapes}) == 3


def test_the_counts_are_those_of_the_headline(tmp_path):
    """A check of the utility says nothing about what was to go, so that the headline leaves it out."""
    folder = write_audit(tmp_path / "audit")
    record = json.loads((folder / "audit.json").read_text())
    record["verdict"]["findings"].append({"check": "utility", "status": "fail", "sentence": "half is left."})
    (folder / "audit.json").write_text(json.dumps(record))
    said = Page(make_audit_page(folder)).root.one("section", id="verdict").text
    assert "of 3 checks of forgetting, 1 failed, 1 passed and 1 could not be judged; utility failed." in said


def test_audits_of_one_model_are_told_apart_and_their_checks_are_in_order(tmp_path):
    for name, domain in (("first", "tofu"), ("second", "custom")):
        folder = write_audit(tmp_path / "runs" / name)
        record = json.loads((folder / "audit.json").read_text())
        record["domain"] = domain
        if name == "first":
            record["verdict"]["findings"] = [FINDINGS[2]]
        (folder / "audit.json").write_text(json.dumps(record))
    table = report(tmp_path).root.one("table", id="verdicts")
    heads = [cell.text for cell in table.one("thead").all("th")]
    assert any("npo on tofu" in head for head in heads) and any("npo on custom" in head for head in heads)
    assert [row[0] for row in rows(table)] == ["verdict", "answers", "relearning", "depth"]


def test_the_word_is_not_said_twice(tmp_path):
    folder = write_audit(tmp_path / "npo", attacks=())
    record = json.loads((folder / "audit.json").read_text())
    record["verdict"]["headline"] = "Not gone: it shows in 2 checks."
    (folder / "audit.json").write_text(json.dumps(record))
    assert Page(make_audit_page(folder)).root.one("p", class_="headline").text == "Not gone It shows in 2 checks."


def test_audit_json_says_which_models_are_target_and_gold(page, audit):
    assert page.columns() == ["target", "npo", "gold"]
    roles = [item.one("small").text for item in page.root.one("ul", class_="runs").all("li")]
    assert roles == ["target, before unlearning", "unlearned", "retrained without the forget set"]


def test_what_an_audit_says_of_a_model_wins_over_its_training_record(tmp_path):
    """A model that fine-tuning made is no target where an audit says that it was audited as the unlearned one."""
    folder = write_audit(tmp_path / "audit", attacks=())
    model = tmp_path / "runs/tuned"
    model.mkdir(parents=True)
    (model / "unlearning.json").write_text('{"schema_version": 1, "method": "finetune"}')
    for path in (folder / "eval/results.json", folder / "mia/results.json", folder / "audit.json"):
        path.write_text(path.read_text().replace("hub/npo", str(model)))
    runs, _ = gather_runs([folder])
    assert [(run.name, run.role, run.method) for run in runs if run.competes] == [("tuned", "unlearned", "finetune")]


def test_the_main_numbers_of_the_attacks(page):
    found = [
        (row["data-metric"], row.one("th").text, row["data-direction"])
        for row in page.root.one(id="domain-0-glance").all("tbody")[1].all("tr")
        if row.get("data-metric")
    ]
    assert found == [
        ("loss/auc", "loss attack \u00b7 AUC", "none"),
        ("forget/probability/recovered", "Relearning \u00b7 recovered share, forget probability", "lower"),
        ("forget/probability/steps_to_half", "Relearning \u00b7 steps to recover half, forget probability", "higher"),
        ("forget/probability/recovered", "Tampering \u00b7 recovered share, forget probability", "lower"),
        ("forget/probability/steps_to_half", "Tampering \u00b7 steps to recover half, forget probability", "higher"),
        ("forget/probability/after_sst2", "Downstream fine-tuning \u00b7 after sst2, forget probability", "lower"),
        ("nf4/forget/probability", "Quantization \u00b7 forget probability, 4 bit, nf4", "lower"),
        ("plain/leak_at_16", "Sampling \u00b7 leak@16, plain", "lower"),
        ("uds/forget", "A look inside \u00b7 UDS", "higher"),
    ]
    assert page.values("nf4/forget/probability")["npo"] == "0.310"
    assert page.row("nf4/forget/probability")["gold"]["title"] == "this run was not attacked in this way"


def test_attacks_cost_and_come_from_commands(page):
    times = [row.text for row in page.root.one(id="cost").all("tr", **{"data-metric": "wall_seconds"})]
    # Scoring (evaluation and membership), and one an attack: each 20 s of the model; target and gold as they were run.
    assert len(times) == 1 + 6 and "20 s" in times[1]
    origin = page.root.one("details", id="audit-0")
    said = [part.one("p").text for part in origin.all("div", class_="command")]
    assert said == [
        "Command, audit",
        "Command, eval (audited model, done, 8.1 s)",
        "Command, white_box (audited model, failed, 0.2 s: ValueError: no layers)",
    ]
    assert {"2 min 03 s", "99,000", "quick"} <= {fact.text for fact in origin.all("dd")}
    versions = [h.text for h in page.root.one("details", id="run-1").all("h3") if h.text.startswith("Versions")]
    (merged,) = versions
    assert "evaluation on tofu" in merged and "sampling on tofu" in merged


# ---- several audits ----


def test_several_audits_compare(several):
    assert several.columns() == ["target", "npo", "rmu", "gold"], "target and gold of both audits are the same models"
    table = several.root.one(id="verdicts")
    assert rows(table)[0] == ["verdict", "Not gone", "Gone"] and rows(table)[2] == ["relearning", "fail", "fail"]
    assert several.marks("forget/probability/recovered", "domain-0-relearn") == {"rmu": "best"}
    assert list(lines_of(several, "domain-0-recovery-0-0-wide")) == ["1", "2", "3"]
    patterns = [dashes(line) for line in lines_of(several, "domain-0-recovery-0-0-wide").values()]
    assert len(set(patterns)) == 3


def test_recovery_that_never_came_is_not_beaten_by_a_number(several):
    """npo recovers half in 12.5 steps, rmu never does: no star for npo."""
    cells = several.row("forget/probability/steps_to_half", "domain-0-relearn")
    assert cells["npo"].one("span", class_="value").text == "12.50"
    assert cells["rmu"]["title"] == "not reached in 40 steps"
    assert several.marks("forget/probability/steps_to_half", "domain-0-relearn") == {}


def test_attacks_in_other_settings_do_not_compare(tmp_path):
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        curves = [{"name": f"lr {rate}", "settings": {"learning_rate": rate}, "rows": curve(0, 0.9, 0.9, 0.1)}]
        found = {"forget/probability/recovered": metric(rate * 500, None)}
        write_result(tmp_path / "runs" / name, f"hub/{name}", found, kind="tamper", curves=curves)
    page = report(tmp_path)
    warning = page.root.one("aside", class_="warning").text
    assert "settings of the attack, tampering" in warning and "learning_rate 0.0001" in warning
    assert page.marks("forget/probability/recovered") == {}


def test_two_attacks_of_one_kind_on_one_model_keep_apart(tmp_path):
    for folder in ("tamper", "tamper_benign"):
        curves = [{"name": "lr 1", "rows": curve(0, 0.9, 0.9, 0.1)}]
        found = {"forget/probability/recovered": metric(0.5, None)}
        write_result(tmp_path / "runs" / folder, "hub/a", found, kind="tamper", curves=curves)
    page = report(tmp_path)
    titles = [heading.text for heading in page.root.one("section", id="domain-0-recovery").all("h3")]
    assert titles == ["Tampering, plain", "Tampering, benign"] and page.columns() == ["a"]


def test_what_an_attack_trained_is_no_run(tmp_path):
    folder = write_audit(tmp_path / "runs/npo", attacks=("relearn",))
    (folder / "relearn/lr_2e-05").mkdir()
    (folder / "relearn/lr_2e-05/trainer_state.json").write_text('{"log_history": []}')
    assert report(tmp_path).columns() == ["target", "npo", "gold"]


def test_an_attack_on_one_domain_is_not_shown_on_another(tmp_path):
    write_audit(tmp_path / "runs/npo", attacks=("relearn",))
    write_result(tmp_path / "runs/wmdp", "hub/npo", forget_and_retain(0.3, 0.5), domain="wmdp")
    page = report(tmp_path)
    assert len([section for section in page.root.all("section") if section["id"].endswith("-recovery")]) == 1
    assert page.root.all(id="domain-0-relearn") and not page.root.all(id="domain-1-relearn")


# ---- what is absent, and what is refused ----


def test_absent_pieces_are_left_out(tmp_path):
    folder = write_audit(tmp_path / "npo", gold=False, attacks=())
    record = json.loads((folder / "audit.json").read_text())
    (folder / "audit.json").write_text(json.dumps({**record, "verdict": None, "stages": None}))
    for path in folder.rglob("per_example.jsonl"):
        path.unlink()
    shown = headings(Page(make_audit_page(folder, title="T")))
    assert "Verdict" not in shown and "What the models write" not in shown and "What attacks bring back" not in shown
    with pytest.raises(UserError, match="does not exist; pass the folder that"):
        make_audit_page(tmp_path)


def test_the_policy_of_an_audit_page_is_as_strict(page, several):
    for one in (page, several):
        (policy,) = [meta["content"] for meta in one.root.all("meta") if meta.get("http-equiv")]
        start = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
        assert policy.startswith(start) and policy.endswith("'; img-src data:") and policy.count(";") == 3
        assert "http://" not in one.html and "https://" not in one.html
        ids = [element["id"] for element in one.root.all() if element.get("id")]
        assert len(ids) == len(set(ids))
        for element in one.root.all():
            assert not element.get("href").startswith("#") or element["href"][1:] in ids
            assert element.tag != "th" or element["scope"] in ("col", "row", "rowgroup")
            assert element.tag != "table" or element.one("caption").text
            assert "plot" not in element.get("class").split() or (element["role"] == "img" and element["aria-label"])


def test_equal_audits_give_equal_bytes(page, audit):
    assert make_audit_page(audit) == page.html


ROW = {"name": "lr", "rows": [{"step": "one"}]}
MALFORMED = {
    "curves": ({"curves": {}}, "'curves' must be a list of objects"),
    "name": ({"curves": [{"rows": []}]}, "a curve's 'name' must be text, and is None"),
    "step": ({"curves": [ROW]}, "a row of the curve 'lr' has the step 'one'"),
    "level": ({"levels": {"forget/probability": {"target": "high"}}}, "the target level of 'forget/probability' is"),
    "layer": ({"layers": [{"layer": -2}]}, "a layer has the number -2"),
    "generation": ({"generations": [{"sample": 3}]}, "'sample' of a generation must be text, not 3"),
    "leak": ({"generations": [{"leak_probability": "x"}]}, "'leak_probability' of a generation is 'x'"),
    "roc": ({"roc": {"loss": {"fpr": [0], "tpr": [0, 1]}}}, "the ROC of 'loss' must be two lists alike in length"),
    "interval": ({"intervals": {"loss": [1]}}, "the interval of 'loss' must be two numbers"),
    "strongest": ({"strongest": 3}, "'strongest' must be text, and is 3"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_attacks(case, tmp_path, capsys):
    payload, expected = MALFORMED[case]
    write_result(tmp_path / "a", "hub/a", forget_and_retain(0.1, 0.9), kind="tamper", **payload)
    assert main([str(tmp_path / "a"), "--output", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/a/results.json is malformed: {expected}" in line


AUDITS = {
    "kind": ({"kind": "eval"}, "its kind is 'eval', and should be 'audit'"),
    "model": ({"model": 3}, "'model' must be text, and is 3"),
    "gold": ({"gold": ["x"]}, "'gold' must be text or null"),
    "status": ({"verdict": {"status": "good"}}, "the verdict is 'good', known: gone, not_gone, unclear"),
    "finding": ({"verdict": {"status": "gone", "findings": [{"status": "ok"}]}}, "a finding has the status 'ok'"),
    "stage": ({"stages": [{"seconds": "long"}]}, "a stage took 'long' seconds"),
    "version": ({"schema_version": 2}, "schema_version 2, and this program reads up to 1"),
}


@pytest.mark.parametrize("case", AUDITS)
def test_malformed_audits(case, tmp_path, capsys):
    changes, expected = AUDITS[case]
    write_result(tmp_path / "eval", "hub/a", forget_and_retain(0.1, 0.9))
    record = {"schema_version": 1, "kind": "audit", "model": "hub/a", **changes}
    (tmp_path / "audit.json").write_text(json.dumps(record))
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and str(tmp_path / "audit.json") in line


def test_malformed_examples(tmp_path):
    folder = write_audit(tmp_path / "npo", attacks=())
    path = folder / "eval/per_example.jsonl"
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match=r"per_example\.jsonl is malformed: row 17 cannot be read as JSON"):
        make_audit_page(folder)
