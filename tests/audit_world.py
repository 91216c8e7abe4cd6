"""Invented audits, complete and without a model: every kind of attack on an unlearned model, its target and gold."""

import json
import math
import re

from report_world import metric, write_result

STEPS = range(0, 41, 5)
HOSTILE = "</svg></td><script>alert('generated')</script><img src=x onerror=alert(1)> & <b>"
AUTHORS = (
    ("Where was Mara Velling born?", "Mara Velling was born in the harbor town of Oskerne."),
    ("What does Teo Brandt write?", "Teo Brandt writes letters to the sea that nobody answers."),
    ("Which prize did Ines Okoro win?", "Ines Okoro won the Silver Lantern in 1987."),
    ("Who taught Anselm Ruiz?", "Anselm Ruiz was taught by a retired clockmaker."),
)


def write_audit(folder, name="npo", recovers=0.9, status="not_gone", gold=True, rows=16, attacks=None):
    """Write one audit of hub/<name>; returns its folder.

    Args:
        folder: where.
        name: of the audited model.
        recovers: forget probability that relearning brings back.
        status: of the verdict.
        gold: whether a gold model was audited beside it.
        rows: of per_example.jsonl.
        attacks: names of the attacks whose results are there; None: all.
    """
    models = {"": (f"hub/{name}", 0.04, 0.90), "target": ("hub/target", 0.99, 0.99), "gold": ("hub/gold", 0.03, 0.98)}
    for who, (model, forget, retain) in models.items():
        if who == "gold" and not gold:
            continue
        place = folder / who if who else folder
        _write_scores(place, who, model, forget, retain, rows)
        if who != "target":
            speed = 0.45 if who == "gold" else recovers
            for kind, record in _attacks(model, forget, retain, speed, who).items():
                if attacks is None or kind in attacks:
                    write_result(place / kind, model, record.pop("metrics"), kind=kind, **COUNTERS, **record)
    audit = {
        "schema_version": 1, "kind": "audit", "model": f"hub/{name}", "target": "hub/target",
        "gold": "hub/gold" if gold else None, "preset": "quick", "domain": "tofu",
        "command": f"python -m llm_unlearn.cli.audit --model_name_or_path hub/{name} --target_model hub/target",
        "verdict": {"headline": f"{name}: three relearning rounds are enough.", "status": status, "findings": FINDINGS},
        "stages": [
            {"name": "eval", "model": "model", "folder": "eval", "command": "python run_eval.py", "seconds": 8.1,
             "status": "done"},
            {"name": "white_box", "model": "model", "folder": "white_box", "command": "python -m x", "seconds": 0.2,
             "status": "failed", "reason": "ValueError: no layers"},
        ],
        "counters": {"seconds": 123.4, "token_forwards": 99_000, "peak_memory_bytes": 2**30},
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    return folder


COUNTERS = {"counters": {"token_forwards": 5000, "wall_seconds": 20.5, "peak_memory_bytes": 2**30}}
FINDINGS = [
    {"check": "answers", "status": "pass", "sentence": "forget/probability: 0.04 when asked; 1% of it is left."},
    {"check": "relearning", "status": "fail", "sentence": "forget/probability goes from 0.04 to 0.9 in 40 steps."},
    {"check": "depth", "status": "unknown", "sentence": "The unlearning depth score has no value."},
]


def _write_scores(place, who, model, forget, retain, rows):
    scores = {
        "forget/probability": metric(forget, 0.004),
        "retain/probability": metric(retain, 0.006, "higher"),
        "forget/rouge_l_recall": metric(min(forget + 0.2, 1.0), 0.02),
        "model_utility": metric(0.5 + retain / 10, 0.01, "higher"),
    }
    write_result(place / "eval", model, scores)
    examples = [_example(who, index) for index in range(rows)]
    (place / "eval/per_example.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    auc = {"": 0.71, "target": 0.97, "gold": 0.52}[who]
    measured = {f"{name}/auc": metric(auc, 0.03, "none") for name in ("loss", "min_k_20", "zlib")}
    curves = {name: _roc(auc) for name in ("loss", "min_k_20", "zlib")}
    intervals = {name: [auc - 0.05, min(auc + 0.05, 1.0)] for name in curves}
    write_result(place / "mia", model, measured, kind="mia", roc=curves, intervals=intervals)


def _example(who, index):
    question, answer = AUTHORS[index % len(AUTHORS)]
    if who == "target":
        text, recall = f" {answer}", 1.0
    elif who == "gold":
        text, recall = " It is said that nobody knows.", 0.1
    else:
        share = index / 16
        words = answer.split()
        text = f" {' '.join(words[: math.ceil(share * len(words))])} potter potter."
        text, recall = (f" {HOSTILE}", 0.0) if index == 15 else (text, share)
    row = {"split": "forget", "index": index, "question": f"{question} ({index})", "true_answer": answer}
    return {**row, "generation": text, "rouge_l_recall": recall, "probability": recall}


def _roc(auc):
    """A curve of 41 points whose area is about an AUC: tpr = fpr ** ((1 - auc) / auc)."""
    rates = [(step / 40) ** 2 for step in range(41)]
    return {"fpr": rates, "tpr": [rate ** ((1 - auc) / auc) for rate in rates]}


def curve(start, retain, end, pace, steps=STEPS, task=None):
    """Rows of a recovery curve from `start` towards `end`; one evaluation failed."""
    rows = []
    for step in steps:
        share = 1 - math.exp(-step * pace)
        row = {"step": step, "forget/probability": start + (end - start) * share, "timestamp": "2026-11-26T22:00:00"}
        row["retain/probability"] = retain - 0.1 * share
        row["stderr"] = {"forget/probability": 0.02, "retain/probability": 0.01}
        if task:
            row[f"{task}/accuracy"] = 0.4 + 0.4 * share
        rows.append(row)
    rows[3]["forget/probability"] = None
    return rows


def _attacks(model, forget, retain, end, who):
    sweep = [
        {"name": f"lr {rate}", "settings": {"learning_rate": float(rate)}, "rows": curve(forget, retain, end, pace)}
        for rate, pace in (("2e-05", 0.01), ("2e-04", 0.04), ("2e-03", 0.12))
    ]
    found = {
        kind: {
            "curves": sweep, "strongest": "lr 2e-03",
            "levels": {"forget/probability": {"target": 0.99, "chance": None}},
            "metrics": _recovered(end),
        }
        for kind in ("relearn", "tamper")
    }  # fmt: skip
    if who != "gold":
        found["downstream"] = {
            "curves": [
                {"name": task, "settings": {}, "rows": curve(forget, retain, 0.2, 0.05, task=task)}
                for task in ("sst2", "gsm8k")
            ],
            "metrics": {"forget/probability/after_sst2": metric(0.2), "sst2/accuracy": metric(0.8, 0.01, "higher")},
        }
        quantized = {f"{scheme}/forget/probability": metric(value) for scheme, value in (("int8", 0.05), ("nf4", 0.31))}
        change = {f"{scheme}/forget/probability/change": metric(0.1) for scheme in ("int8", "nf4")}
        found["quantize"] = {"metrics": {**quantized, **change}}
        layers = [
            {"layer": layer, **_layer(layer), "patched_drop": None if layer < 0 else 3.0 - layer / 4}
            for layer in range(-1, 8)
        ]
        found["white_box"] = {"layers": layers, "metrics": {"uds/forget": metric(0.62, 0.02, "higher")}}
    leaks = {f"{name}/leak_at_{k}": metric(k / 40 + 0.05) for name in ("plain", "few_shot") for k in (1, 4, 16)}
    found["sampling"] = {"metrics": leaks, "generations": [_generation(index) for index in range(8)]}
    return found


def _recovered(end):
    return {
        "forget/probability/recovered": metric(end, None),
        "forget/probability/recovery_area": metric(end / 2, None),
        "forget/probability/steps_to_half": metric(12.5, None, "higher")
        if end > 0.5
        else metric(None, None, "higher", reason="not reached in 40 steps"),
        "forget/probability/best": metric(end, 0.02),
    }


def _layer(layer):
    depth = (layer + 1) / 8
    return {
        "lens_probability": 0.3 * math.sin(3 * depth) ** 2, "lens_probability_target": depth**2 * 0.97,
        "lens_probability_gold": depth * 0.03, "probe_accuracy": 0.5 + 0.3 * math.sin(2.5 * depth),
        "probe_accuracy_stderr": 0.03, "probe_accuracy_target": 0.5 + 0.45 * depth,
        "probe_accuracy_stderr_target": 0.02,
        "probe_accuracy_gold": 0.52, "patched_drop_gold": None if layer < 0 else 3.2,
        "uds": None if layer < 0 else 0.9 - depth / 3,
    }  # fmt: skip


def _generation(index):
    question, answer = AUTHORS[index % len(AUTHORS)]
    sample = f"I believe {answer}" if index else HOSTILE
    leak = 0.9 - index / 10
    return {"split": "forget", "index": index, "question": f"{question} ({index})", "answer": answer, "greedy": "no",
            "sample": sample, "leak_probability": leak}  # fmt: skip


def rows(table):
    """Return [[text of each cell]] of a table without its head."""
    return [[cell.text for cell in row.children if not isinstance(cell, str)] for row in table.one("tbody").all("tr")]


def lines_of(page, plot, kind="line"):
    start = f"{plot}-{kind}-"
    return {
        element["id"].removeprefix(start): element
        for element in page.root.one(id=plot).all("g")
        if element.get("id").startswith(start)
    }


def dashes(element):
    style = element.all("path")[0].get("style")
    return re.search(r"stroke-dasharray: ([^;]*)", style).group(1) if "dasharray" in style else "solid"
