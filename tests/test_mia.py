"""Membership inference: golden numbers, oracles, and run_mia.py on models whose members are known."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from llm_unlearn.cli.mia import main
from llm_unlearn.data.rows import read_rows
from llm_unlearn.evaluation.membership import attack_scores, roc_of, separation, verdict
from llm_unlearn.evaluation.mia_results import MAX_ROC_POINTS, thinned_roc
from llm_unlearn.evaluation.statistics import SequenceStatistics


def two_normals():
    """The synthetic case of the published code's own defects: members are more likely."""
    generator = np.random.default_rng(0)
    return generator.normal(-1, 0.3, 1000), generator.normal(-1.3, 0.3, 1000)


def test_separation_of_two_normal_distributions():
    members, others = two_normals()
    found = separation(members, others)
    assert found.values["auc"] == pytest.approx(0.751, abs=5e-4)
    assert found.values["balanced_accuracy"] == pytest.approx(0.688, abs=6e-4)
    assert found.values["tpr_at_5pct_fpr"] == pytest.approx(0.237, abs=5e-4)
    swapped = separation(others, members)
    assert swapped.values["auc"] == pytest.approx(0.249, abs=5e-4), "signed, never folded"


def test_a_short_roc_curve_is_kept_whole():
    """Members score 3 and 1, others 2 and 0: up, right, up, right."""
    kept = thinned_roc(*roc_of(np.array([3.0, 1.0]), np.array([2.0, 0.0])))
    assert kept == {"fpr": [0, 0, 0.5, 0.5, 1], "tpr": [0, 0.5, 0.5, 1, 1]}


def test_a_long_roc_curve_is_thinned_to_points_of_its_own():
    members, others = two_normals()
    rates, found = roc_of(members, others)
    kept = thinned_roc(rates, found)
    assert len(rates) == 2001 and 150 < len(kept["fpr"]) == len(kept["tpr"]) <= MAX_ROC_POINTS
    points = list(zip(kept["fpr"], kept["tpr"], strict=True))
    assert set(points) <= set(zip(rates.tolist(), found.tolist(), strict=True))
    assert points[0] == (0, 0) and points[-1] == (1, 1) and points == sorted(points)
    # The rate that the table reports can be read off: fewer than 50 of the 1000 others are accused.
    assert dict(points)[0.049] == pytest.approx(separation(members, others).values["tpr_at_5pct_fpr"])
    area = np.trapezoid(kept["tpr"], kept["fpr"])
    assert area == pytest.approx(separation(members, others).values["auc"], abs=5e-3)


def test_the_area_is_scikit_learns_with_ties_too():
    generator = np.random.default_rng(1)
    members, others = generator.integers(0, 9, 57).astype(float), generator.integers(2, 12, 83).astype(float)
    labels = [1] * len(members) + [0] * len(others)
    expected = roc_auc_score(labels, np.concatenate([members, others]))
    assert separation(members, others).values["auc"] == pytest.approx(expected, abs=1e-12)


def test_intervals_cover_and_too_few_non_members_give_no_rate():
    members, others = two_normals()
    found = separation(members, others)
    low, high = found.intervals["auc"]
    assert low < 0.751 < high and high - low == pytest.approx(4 * found.stderrs["auc"], rel=0.15)
    few = separation(members[:50], others[:50])
    assert few.values["tpr_at_1pct_fpr"] is None and "needs 100 non-members" in few.reasons["tpr_at_1pct_fpr"]
    assert few.values["tpr_at_5pct_fpr"] is not None


@pytest.mark.parametrize(
    ("auc", "interval", "expected"),
    [(0.9, (0.8, 1.0), "memorized"), (0.1, (0.0, 0.2), "over-unlearned"), (0.55, (0.45, 0.65), "indistinguishable")],
)
def test_verdicts(auc, interval, expected):
    assert verdict(auc, interval) == expected
    assert verdict(0.9, (0.85, 0.95), 0.9, (0.8, 0.99)) == "indistinguishable", "as the retrained model does"


def test_min_k_pp_by_vocabulary_moments_is_the_two_pass_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 37, generator=generator, dtype=torch.float64)
    labels = torch.randint(37, (11,), generator=generator)
    logps = logits.log_softmax(-1)
    own = logps.gather(1, labels[:, None])[:, 0]
    means = (logps.exp() * logps).sum(-1)
    variances = (logps.exp() * logps.square()).sum(-1) - means.square()
    statistics = SequenceStatistics(own.numpy(), np.zeros(11, bool), means.numpy(), variances.numpy())
    scores = attack_scores(statistics, "some text")
    standardized = ((own - means) / variances.sqrt()).sort().values
    assert scores["min_k_pp_20"] == pytest.approx(float(standardized[:2].mean()), rel=1e-9)
    assert scores["min_k_100"] == pytest.approx(scores["loss"]) == pytest.approx(float(own.mean()))


def attack(capsys, *words):
    assert main([*map(str, words), "--use_cpu"]) == 0
    return capsys.readouterr().out


def values(folder):
    record = json.loads((folder / "results.json").read_text())
    assert record["kind"] == "mia"
    return {name: metric["value"] for name, metric in record["metrics"].items()}, record


@pytest.fixture
def small(shared_data):
    data = shared_data / "tofu_small"
    return ["--domain", "custom", "--forget_data", data / "forget.jsonl", "--holdout_data", data / "holdout.jsonl"]


def test_the_tuned_model_gives_its_members_away(shared_data, small, tmp_path, capsys):
    models = shared_data / "models"
    tuned, untuned = models / "stories260K-tofu-hf", models / "stories260K-hf"
    words = ["--model_name_or_path", tuned, *small, "--output_dir", tmp_path / "tuned", "--reference_model", untuned]
    shown = attack(capsys, *words)
    found, record = values(tmp_path / "tuned")
    assert found["loss/auc"] > 0.99 and found["reference/auc"] > 0.99
    curve = record["roc"]["loss"]
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(found["loss/auc"])
    assert "loss: memorized" in shown and "the sets differ before any training" in shown
    distinct = record["counters"]["sequences_scored"]
    assert distinct == 2 * record["counters"]["reference_sequences_scored"] == 200, "the lowercase copy costs one more"
    for name in ("roc.png", "auc.txt", "per_example.jsonl"):
        assert (tmp_path / "tuned" / name).stat().st_size > 0
    assert "TPR@5%FPR of" in (tmp_path / "tuned/auc.txt").read_text()


def test_the_untuned_model_shows_that_the_sets_differ(shared_data, small, tmp_path, capsys):
    untuned = shared_data / "models/stories260K-hf"
    words = ["--model_name_or_path", untuned, *small, "--output_dir", tmp_path / "out", "--lowercase", "False"]
    shown = attack(capsys, *words)
    found, _ = values(tmp_path / "out")
    assert found["loss/auc"] == pytest.approx(0.386, abs=5e-3)
    assert "can also mean that the sets differ before any training" in shown
    shown = attack(capsys, *words, "--reference_model", untuned)
    found, record = values(tmp_path / "out")
    assert found["reference/auc"] == 0.5 and record["intervals"]["reference"] == [0.5, 0.5]
    assert "reference: indistinguishable" in shown


def test_each_score_is_a_naive_loops(shared_data, small, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models/stories260K-tofu-hf"
    attack(capsys, "--model_name_or_path", folder, *small, "--output_dir", tmp_path, "--grad_norm", "True")
    rows = [json.loads(line) for line in (tmp_path / "per_example.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    first = read_rows(shared_data / "tofu_small/forget.jsonl")[0]
    prompt = f"Question: {first['question']}\nAnswer: "
    encoded = tokenizer(prompt + first["answer"], return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    scored = [n for n, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)] + [len(ids) - 1]
    logits = model(torch.tensor([ids])).logits[0]
    logps = logits.log_softmax(-1)[torch.tensor(scored) - 1, torch.tensor(ids)[scored]]
    (-logps.mean()).backward()
    norm = torch.sqrt(sum(weight.grad.square().sum() for weight in model.parameters()))
    assert rows[0]["loss"] == pytest.approx(logps.mean().item(), rel=1e-5, abs=1e-6)
    lowest = logps.detach().sort().values[: int(0.2 * len(scored))]
    assert rows[0]["min_k_20"] == pytest.approx(lowest.mean().item(), rel=1e-5, abs=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(-norm.item(), rel=1e-4)
    assert rows[0]["zlib"] == pytest.approx(rows[0]["loss"] / len(zlib.compress(first["answer"].encode())), rel=1e-9)
    every = logits.detach().log_softmax(-1)[torch.tensor(scored) - 1].double()
    means = (every.exp() * every).sum(-1)
    deviations = ((every.exp() * every.square()).sum(-1) - means.square()).sqrt()
    standardized = ((logps.detach().double() - means) / deviations).sort().values[: len(lowest)]
    assert rows[0]["min_k_pp_20"] == pytest.approx(standardized.mean().item(), rel=1e-4)
    lowered = tokenizer(prompt + first["answer"].lower(), return_offsets_mapping=True)
    copy = [*lowered["input_ids"], tokenizer.eos_token_id]
    places = [n for n, (_, end) in enumerate(lowered["offset_mapping"]) if end > len(prompt)] + [len(copy) - 1]
    other = model(torch.tensor([copy])).logits[0].log_softmax(-1)[torch.tensor(places) - 1, torch.tensor(copy)[places]]
    assert rows[0]["lowercase"] == pytest.approx((logps.mean() - other.mean()).item(), rel=1e-4)


def test_both_scripts_together_ask_once(tiny_world, tmp_path, capsys):
    from llm_unlearn.cli.evaluate import main as evaluate

    words = ["--model_name_or_path", tiny_world["base"], "--domain", "demo", "--max_eval_samples", "3", "--use_cpu"]
    kept = ["--statistics_dir", str(tmp_path / "kept")]
    assert evaluate([*words, *kept, "--max_new_tokens", "2", "--output_dir", str(tmp_path / "eval")]) == 0
    attack(capsys, *words, *kept, "--lowercase", "False", "--output_dir", tmp_path / "mia")
    _, record = values(tmp_path / "mia")
    assert record["counters"]["model_calls"] == 0 and record["counters"]["sequences_reused"] == 6


BAD = {
    "overlap": (lambda d: ["--holdout_data", d / "forget.jsonl"], "are members too (member 1 = non-member 1"),
    "no_non_members": (lambda d: [], "pass --holdout_data FILE"),
    "reference": (
        lambda d: ["--holdout_data", d / "retain.jsonl", "--retain_reference", d / "forget.jsonl"],
        "cannot be",
    ),
    "umbrella": (lambda d: ["--domain", "wmdp"], "is several data sets; name one of wmdp_bio"),
    "domain": (lambda d: ["--domain", "general"], "has no members and non-members"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_end_in_one_sentence(case, tiny_world, tmp_path, capsys):
    make, expected = BAD[case]
    data = Path(tiny_world["forget"]).parent
    words = ["--model_name_or_path", tiny_world["base"], "--domain", "custom", "--forget_data", tiny_world["forget"]]
    assert main([*words, *map(str, make(data)), "--use_cpu", "--output_dir", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_reference_with_another_vocabulary_is_refused(tiny_world, shared_data, tmp_path, capsys):
    other = shared_data / "models/stories260K-hf"
    words = ["--model_name_or_path", tiny_world["base"], "--domain", "custom", "--forget_data", tiny_world["forget"]]
    words += ["--holdout_data", tiny_world["retain"], "--reference_model", str(other), "--use_cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "has another vocabulary" in capsys.readouterr().err


def test_a_gradient_ascent_checkpoint_is_over_unlearned(tiny_world, tmp_path, capsys):
    """Members far less likely than rows that the model never saw."""
    from tiny_world import command

    from llm_unlearn.cli.unlearn import main as unlearn
    from llm_unlearn.data.synthetic import make_world

    flags = ["--optim", "adamw_torch", "--learning_rate", "4e-3", "--num_train_epochs", "12", "--max_grad_norm", "1"]
    assert unlearn(command(tiny_world, "gradient_ascent", tmp_path / "ascent", *flags)) == 0
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(json.dumps(row) + "\n" for row in make_world(0)["holdout"][:30]))
    words = ["--model_name_or_path", tmp_path / "ascent", "--domain", "custom", "--forget_data", tiny_world["forget"]]
    shown = attack(capsys, *words, "--holdout_data", unseen, "--output_dir", tmp_path / "out")
    found, _ = values(tmp_path / "out")
    assert found["loss/auc"] < 0.2 and "loss: over-unlearned" in shown


def test_the_three_published_commands_one_after_the_other(tiny_world, tmp_path, monkeypatch, capsys):
    """As in the ACL 2024 README, but for the model, --data_dir and the number of processes."""
    from llm_unlearn.cli.evaluate import main as evaluate
    from llm_unlearn.cli.unlearn import main as unlearn
    from llm_unlearn.data.synthetic import write_world

    monkeypatch.chdir(tmp_path)
    write_world(tmp_path / "data")
    data = ["--domain", "github", "--data_dir", str(tmp_path / "data")]
    published = "--per_device_train_batch_size 1 --do_unlearn --output_dir ./output --overwrite_output_dir "
    published += "--num_train_epochs 1 --logging_steps 1 --learning_rate 2e-5 --warmup_ratio 0.03 --overwrite_cache "
    published += "--fsdp full_shard --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer "
    published += "--save_total_limit 1 --bf16 True --tf32 True --weight_decay 0. --lr_scheduler_type cosine "
    published += "--gradient_accumulation_steps 85 --unlearn_method gradient_ascent"
    assert unlearn(["--target_model_name_or_path", tiny_world["base"], *published.split(), *data]) == 0
    (checkpoint,) = [path.parent for path in Path("output").rglob("unlearning.json")]
    words = ["--model_name_or_path", str(checkpoint), "--per_device_eval_batch_size", "1", "--do_eval"]
    words += ["--overwrite_output_dir", "--overwrite_cache", "--tf32", "True", *data]
    assert evaluate([*words, "--output_dir", "./output/eval"]) == 0
    assert main([*words, "--output_dir", "./output/mia"]) == 0
    assert (tmp_path / "output/eval/forget_eval_results.json").is_file()
    text = (tmp_path / "output/mia/auc.txt").read_text()
    assert {"Attack min_k_30", "Attack min_k_100"} <= {line.split(",")[0] for line in text.splitlines()}
    record = json.loads((tmp_path / "output/mia/results.json").read_text())
    assert record["splits"]["members"]["rows"] == 12 and "loss: " in capsys.readouterr().out


def test_a_retrained_models_results_are_the_measure(tiny_world, tmp_path, capsys):
    words = ["--model_name_or_path", tiny_world["base"], "--domain", "demo", "--lowercase", "False"]
    attack(capsys, *words, "--output_dir", tmp_path / "retrained")
    shown = attack(capsys, *words, "--retain_reference", tmp_path / "retrained", "--output_dir", tmp_path / "same")
    found, _ = values(tmp_path / "same")
    assert found["privleak"] == 0.0 and found["loss/auc_distance_to_retrained"] == 0.0 and found["zlib/privacy"] == 1.0
    assert "loss: indistinguishable" in shown and "length alone" in shown
    words = [*words, "--max_eval_samples", "9", "--retain_reference", str(tmp_path / "retrained"), "--use_cpu"]
    assert main([*words, "--output_dir", str(tmp_path / "other")]) == 2
    assert "compares other members" in capsys.readouterr().err


def test_corpora_on_other_topics_are_said_to_compare_topics(tiny_world, tmp_path, capsys):
    for topic, word in (("forget", "cells"), ("retain", "stars")):
        rows = [{"text": f"{word} number {n} and some more words about {word}"} for n in range(12)]
        path = tmp_path / f"bio-{topic}-corpus.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", tiny_world["base"], "--domain", "wmdp_bio", "--data_dir", tmp_path]
    shown = attack(capsys, *words, "--output_dir", tmp_path / "out")
    _, record = values(tmp_path / "out")
    assert "compare topics and not membership" in shown and record["notes"]
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text(
        "".join(json.dumps({"text": f"cells never seen, number {n}, and words"}) + "\n" for n in range(8))
    )
    shown = attack(capsys, *words, "--holdout_data", unseen, "--output_dir", tmp_path / "own")
    assert "compare topics" not in shown
