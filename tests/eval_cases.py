"""Command lines of run_eval.py and what they leave behind, for the tests."""

import json
import math
from pathlib import Path

from llm_unlearn.cli.evaluate import main

FEW = ["--max_eval_samples", "3", "--max_new_tokens", "4", "--use_cpu"]
"""What makes a run on the demo world take a second."""


def evaluate(*words):
    """Run run_eval.py in this process; returns its exit code."""
    return main([str(word) for word in words])


def on_demo(model, output_dir):
    """Return the words that score a model on a few rows of the demo world; later flags override them."""
    return ["--model_name_or_path", str(model), "--domain", "demo", *FEW, "--output_dir", str(output_dir)]


def results(folder, name="results.json"):
    """Return a JSON file of a folder, which may hold no NaN and no Infinity."""

    def refuse(token):
        raise AssertionError(f"{folder}/{name} holds {token}")

    return json.loads((Path(folder) / name).read_text(encoding="utf-8"), parse_constant=refuse)


def values(folder):
    """Return {metric: value} of a folder."""
    return {name: metric["value"] for name, metric in results(folder)["metrics"].items()}


def examples(folder):
    """Return the rows of per_example.jsonl in order."""
    return [json.loads(line) for line in (Path(folder) / "per_example.jsonl").read_text().splitlines()]


def records(folder, kind="statistics"):
    """Return the keys of the results by example that lie below a folder, and skip what a kill cut short."""
    found = []
    for path in sorted(Path(folder).rglob(f"{kind}-*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                found.append(json.loads(line)["key"])
            except ValueError:
                continue
    return found


def differences(first, second, rtol=1e-5, atol=1e-6, where=""):
    """Return where two values differ: numbers beyond the tolerance, and anything else that is not equal."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [line for key in first for line in differences(first[key], second[key], rtol, atol, f"{where}/{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [line for n, pair in pairs for line in differences(*pair, rtol, atol, f"{where}[{n}]")]
    if isinstance(first, float) and isinstance(second, float):
        return [] if math.isclose(first, second, rel_tol=rtol, abs_tol=atol) else [f"{where}: {first} {second}"]
    return [] if first == second else [f"{where}: {first!r} {second!r}"]


def write_rows(path, rows):
    """Write rows as JSON lines; returns the path as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_small_tofu(shared_data, folder, forget=10, retain=20, others=4):
    """Write TOFU's files for forget01 with a few rows each: of retain_perturbed every 20th, most of them unknown."""
    kept = {
        "forget01": slice(forget),
        "forget01_perturbed": slice(forget),
        "retain_perturbed": slice(0, 20 * retain, 20),
        "real_authors_perturbed": slice(others),
        "world_facts_perturbed": slice(others),
    }
    for name, chosen in kept.items():
        lines = (shared_data / f"tofu/{name}.json").read_text(encoding="utf-8").splitlines()
        write_rows(folder / f"{name}.json", [json.loads(line) for line in lines[chosen]])
    lines = (shared_data / "tofu_small/holdout.jsonl").read_text(encoding="utf-8").splitlines()
    write_rows(folder / "holdout01.json", [json.loads(line) for line in lines[:forget]])
    return ["--domain", "tofu", "--data_dir", str(folder), "--forget_split", "forget01"]


def edit(path, **values):
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def plain_nlls(model_folder, rows):
    """Return the mean NLL of each answer, one row at a time: the template of interfaces.md, offsets, plain logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer: "
        encoded = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        counts = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nlls = [-float(logps[n - 1, ids[n]]) for n in range(1, len(ids)) if counts[n]]
        found.append(sum(nlls) / len(nlls))
    return found


def make_adapter(base, folder):
    """Write a LoRA adapter with random weights and nothing beside it; returns the model with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(folder)
    return adapted
