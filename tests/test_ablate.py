"""The retain-term ablation: the grid, what is chosen, what is left out, what it says, and one run of it all."""

import json

import pytest
from eval_cases import results
from tiny_world import METHOD_FLAGS

from llm_unlearn.attacks.ablation import Criterion, chance_of, finding, is_at_chance, metric_named
from llm_unlearn.attacks.ablation_runs import Candidate, drop_retain_term, make_candidates, read_grid, without_retain
from llm_unlearn.cli.ablate import main, split_words
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.questions import Part
from llm_unlearn.evaluation.scores import HIGHER, LOWER, NONE, Metric
from llm_unlearn.methods import METHODS, trainer_class
from llm_unlearn.parsing import parse

# ---- The grid ----


def test_the_grid_holds_every_combination():
    assert read_grid([]) == [{}]
    assert read_grid(["learning_rate=1e-4, 3e-4", "--retain-weight=1,5"]) == [
        {"learning_rate": "1e-4", "retain_weight": "1"},
        {"learning_rate": "1e-4", "retain_weight": "5"},
        {"learning_rate": "3e-4", "retain_weight": "1"},
        {"learning_rate": "3e-4", "retain_weight": "5"},
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["learning_rate"], "--tune takes NAME=VALUE,VALUE .* but was given 'learning_rate'"),
        (["learning_rate= ,"], "--tune takes NAME=VALUE,VALUE"),
        (["beta=1", "beta=2"], "--tune names beta twice"),
    ],
)
def test_words_that_are_no_grid(words, said):
    with pytest.raises(UserError, match=said):
        read_grid(words)


def test_each_candidate_has_its_command_and_its_folder(tmp_path):
    words = ["--unlearn_method", "npo", "--retain_weight", "3", "--learning_rate", "1"]
    one, two = make_candidates(words, read_grid(["learning_rate=1e-4,3e-4"]), tmp_path)
    assert one.name == "learning_rate=1e-4" and one.folder == str(tmp_path / "retain_learning_rate=1e-4")
    assert parse(one.words).args.learning_rate == 1e-4 and parse(two.words).args.learning_rate == 3e-4
    assert one.words[-4:] == ["--output_dir", one.folder, "--overwrite_output_dir", "True"]
    dropped = drop_retain_term(two, tmp_path)
    assert dropped.folder == str(tmp_path / "no_retain_learning_rate=3e-4") != two.folder
    before, after = (parse(found.words).args.to_dict() for found in (two, dropped))
    differing = {name for name in before if before[name] != after[name] and name not in ("output_dir", "logging_dir")}
    assert differing == {"retain_weight"} and after["retain_weight"] == 0


# ---- What is chosen ----


def criterion(**changes):
    return Criterion(**{"forget": "f", "utility": "u", "target_forget": 0.9, "target_utility": 0.8, **changes})


def candidates(*values):
    return [Candidate(f"c{n}", {}, [], "", *pair) for n, pair in enumerate(values)]


def test_the_lowest_that_keeps_enough_is_chosen():
    # The bound is .9 * .8 = .72: the second forgets most but keeps .71, the third lies on the bound.
    found = candidates((0.5, 0.79), (0.0, 0.71), (0.2, 0.72), (0.2, 0.8), (None, 0.8))
    assert criterion().bound == pytest.approx(0.72)
    assert criterion().choose(found).name == "c2"
    assert criterion(min_retained=0.95).choose(found).name == "c3"
    assert criterion(min_retained=0.5).choose(found).name == "c1"
    assert criterion().sentence() == "the lowest f of those that keep 90% of the target model's u (0.72 of 0.8)"


def test_nothing_to_choose_is_said():
    with pytest.raises(UserError, match=r"no run keeps 90% of the target model's u of 0\.8; the best, c1, keeps 0\.6;"):
        criterion().choose(candidates((0.1, 0.5), (0.3, 0.6)))
    with pytest.raises(UserError, match=r"forgets anything: the lowest f is 0\.9, and the target model's 0\.9"):
        criterion().choose(candidates((0.9, 0.8), (0.95, 0.8)))
    with pytest.raises(UserError, match="each of them diverged"):
        criterion().choose(candidates((None, None)))


def test_metrics_by_name_or_by_default():
    metrics = {
        "forget/probability": Metric(0.9, direction=LOWER), "retain/probability": Metric(0.8, direction=HIGHER),
        "holdout/probability": Metric(0.1, direction=NONE), "mcq/choice_accuracy": Metric(None, direction=HIGHER),
    }  # fmt: skip
    assert metric_named(metrics, None, "--x", ["mcq/choice_accuracy", "retain/probability"]) == "retain/probability"
    assert metric_named(metrics, "forget/probability", "--x", []) == "forget/probability"
    with pytest.raises(UserError, match="unknown --x 'retain/probabilty'; did you mean 'retain/probability'"):
        metric_named(metrics, "retain/probabilty", "--x", [])
    with pytest.raises(UserError, match="pass --x with one of the metrics of this domain: forget/probability"):
        metric_named(metrics, None, "--x", ["mcq/choice_accuracy"])
    with pytest.raises(UserError, match="has no direction"):
        metric_named(metrics, "holdout/probability", "--x", [])


# ---- What is left out ----

REFUSED = {
    "gradient_ascent": "no retain term that could be left out",
    "random_label": "no retain term that could be left out",
    "finetune": "no retain term that could be left out",
    "retrain": "no retain term that could be left out",
    "max_update": "trains on its retain term alone",
    "l1_sparse": "trains on its retain term alone",
    "pdu": "does not run without its retain term: pdu bounds a retain term",
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_loses_its_retain_term_or_is_refused_by_name(method):
    paths = dict.fromkeys(("base", "probes", "rewritten"), "somewhere")
    words = ["--unlearn_method", method, *[word.format_map(paths) for word in METHOD_FLAGS[method]]]
    if method in REFUSED:
        with pytest.raises(UserError, match=f"^{method} .*{REFUSED[method]}|^{method} {REFUSED[method]}"):
            without_retain(words)
        return
    before, after = parse(words), parse(without_retain(words))
    trainer = trainer_class(method)
    assert "retain" in trainer.streams_for(before.args) and "retain" not in trainer.streams_for(after.args)
    assert set(trainer.streams_for(after.args)) == set(trainer.streams_for(before.args)) - {"retain"}
    differing = {k for k, v in after.args.to_dict().items() if before.args.to_dict()[k] != v}
    assert differing <= {"retain_weight", "retain_schedule", "positive_factor", "output_dir", "logging_dir"}


def test_a_recipe_that_has_none_is_refused():
    for method in ("undial", "ceu"):
        with pytest.raises(UserError, match=f"this recipe of {method} has no retain term already"):
            without_retain(["--unlearn_method", method])
    with pytest.raises(UserError, match="this recipe of npo has no retain term already"):
        without_retain(["--unlearn_method", "npo", "--retain_loss", "none"])


def test_the_weight_goes_under_whichever_name_it_has(tmp_path):
    (tmp_path / "r.yaml").write_text("unlearn_method: ascent_plus_descent\npositive_factor: 0.5\n")
    dropped = without_retain(["--config", str(tmp_path / "r.yaml")])
    assert parse(dropped).args.retain_weight == 0
    words = ["--unlearn_method", "npo", "--retain-weight=5", "--retain_weight", "7", "--beta", "0.5"]
    assert without_retain(words) == [
        "--unlearn_method", "npo", "--beta", "0.5", "--retain_weight", "0", "--retain_schedule", "constant"
    ]  # fmt: skip


def test_words_of_both_scripts():
    own, recipe = split_words(
        ["--target_model", "T", "--config", "r.yaml", "--lr", "1", "--", "--lr_scheduler_type", "x"]
    )
    assert own == ["--target_model", "T", "--lr", "1", "--model_name_or_path", "T"]
    assert recipe == ["--config", "r.yaml", "--lr_scheduler_type", "x"]
    own, recipe = split_words(["--target_model=T", "--model_name", "M", "--config=r.yaml"])
    assert own == ["--target_model=T", "--model_name", "M"] and recipe == ["--config=r.yaml"]
    with pytest.raises(UserError, match="--config needs a file"):
        split_words(["--config"])


# ---- What it says ----


def test_the_finding():
    def said(with_, without, gold=None, utility=0.02, at_chance=True):
        recovered = {"with": with_, "without": without, **({} if gold is None else {"gold": gold})}
        return finding("npo", {"with": 0.95, "without": utility}, recovered, at_chance)

    broken = said(0.9, 0.1, gold=0.3)
    assert "brings back 10% without its retain term and 90% with it (gold model: 30%)" in broken
    assert "2% of the utility is left, which is chance: what resists is a broken model" in broken
    assert "the retain term costs resistance" in said(0.9, 0.1, utility=0.7, at_chance=False)
    assert "makes no difference to resistance" in said(0.9, 0.85) and "although that is a broken model" in said(
        0.9, 0.85
    )
    assert "does not make the method easier to undo" in said(0.3, 0.9)
    assert said(None, 0.3) == "Whether npo resists tampering without its retain term could not be computed."


def test_chance():
    rows = [{"choices": ["a", "b"]}, {"choices": ["a", "b", "c", "d"]}]
    parts = [Part("mcq", rows), Part("retain", [{"question": "q", "answer": "a"}])]
    assert chance_of("mcq/choice_accuracy", parts) == 0.375  # (1/2 + 1/4) / 2
    assert chance_of("retain/probability", parts) == 0 and chance_of("mcq/cloze_accuracy", parts) == 0
    # A tenth of the way from .25 to .65 is .29.
    assert is_at_chance(0.29, 0.65, 0.25) and not is_at_chance(0.3, 0.65, 0.25) and is_at_chance(None, 1, 0)


# ---- The command ----


def words(world, folder, *more, tune=("--tune", "learning_rate=1e-6,3e-3")):
    return [
        "--target_model", world["model"], "--domain", "custom", "--forget_data", world["forget"],
        "--retain_data", world["retain"], "--output_dir", str(folder), "--use_cpu", "--lr", "1e-3", "--max_steps", "4",
        "--eval_every", "2", "--batch_size", "4", "--grad_accumulation", "1", "--min_retained", "0.1", *tune, *more,
    ]  # fmt: skip


RECIPE = ["--", "--unlearn_method", "grad_diff", "--max_steps", "3", "--save_strategy", "no", "--optim", "adamw_torch"]
RECIPE += ["--disable_tqdm", "True", "--retain_weight", "0.5"]


@pytest.mark.full
def test_from_the_grid_to_the_finding(tiny_world, tmp_path, one_cpu_process, capsys):
    gold = ["--gold", tiny_world["base"]]
    assert main(words(tiny_world, tmp_path / "out", *gold, *RECIPE)) == 0
    record = results(tmp_path / "out")
    one, two = record["candidates"]
    metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert (
        record["kind"] == "ablate"
        and record["method"] == "grad_diff"
        and record["finding"].startswith("With grad_diff")
    )
    assert one["forget"] > two["forget"] and (one["chosen"], two["chosen"]) == (False, True)
    assert metrics["with/forget/probability"] == pytest.approx(two["forget"], rel=1e-5)
    assert metrics["without/forget/probability"] == pytest.approx(record["without_retain"]["forget"], rel=1e-5)
    assert "--retain_weight 0" in record["without_retain"]["command"]
    assert [curve["name"] for curve in record["curves"]] == ["with", "without", "gold"]
    assert all([row["step"] for row in curve["rows"]] == [0, 2, 4] for curve in record["curves"])
    assert metrics["gold/forget/probability"] < 0.01 < metrics["target/forget/probability"]
    assert record["levels"]["forget/probability"]["target"] == metrics["target/forget/probability"]
    assert record["finding"] in capsys.readouterr().out
    # Finished runs are kept, and a command that changed runs again.
    assert main(words(tiny_world, tmp_path / "out", *gold, *RECIPE)) == 0
    assert results(tmp_path / "out")["counters"]["runs_kept"] == 3
    more = words(tiny_world, tmp_path / "out", *gold, *RECIPE, tune=("--tune", "learning_rate=1e-6,3e-3,1e-3"))
    assert main(more) == 0 and results(tmp_path / "out")["counters"]["runs_kept"] >= 2


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "there is no recipe; pass --config recipe.yaml, or the flags of run_unlearn.py after --"),
        (["--", "--unlearn_method", "gradient_ascent"], "gradient_ascent has no retain term that could be left out"),
        (["--", "--unlearn_method", "npoo"], "unknown --unlearn_method 'npoo'; did you mean 'npo'"),
        (["--tune", "betta=1", "--", "--unlearn_method", "npo"], "'--betta'"),
        (["--min_retained", "2", *RECIPE], "--min_retained must lie in (0, 1], but is 2.0"),
        (["--gold", "./nowhere", *RECIPE], "the model folder './nowhere' does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_runs(tiny_world, tmp_path, one_cpu_process, capfd, more, said):
    assert main(words(tiny_world, tmp_path / "out", *more, tune=())) == 2
    assert said in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


def test_without_a_place_for_its_runs(tiny_world, one_cpu_process, capfd):
    flags = ["--target_model", tiny_world["model"], "--domain", "demo", *RECIPE]
    assert main(flags) == 2 and "--output_dir is missing" in capfd.readouterr().err


def test_a_run_made_from_another_target_is_not_kept(tmp_path, monkeypatch):
    from llm_unlearn.attacks import ablation_runs
    from llm_unlearn.cli import unlearn

    ran = []

    def run(given):
        ran.append(given)
        (tmp_path / "retain/unlearning.json").write_text("{}")
        return 0

    monkeypatch.setattr(unlearn, "main", run)
    (tmp_path / "retain").mkdir()
    (candidate,) = make_candidates(["--unlearn_method", "npo"], [{}], tmp_path)
    for basis, kept in (({"target": "a"}, False), ({"target": "a"}, True), ({"target": "b"}, False)):
        ablation_runs.run_unlearning(candidate, basis)
        assert candidate.kept is kept
    assert len(ran) == 2 and json.loads((tmp_path / "retain/ablation.json").read_text())["target"] == "b"
    monkeypatch.setattr(unlearn, "main", lambda given: 1)
    with pytest.raises(UserError, match=r"ended with status 1: python run_unlearn\.py --unlearn_method npo"):
        ablation_runs.run_unlearning(candidate, {"target": "c"})
