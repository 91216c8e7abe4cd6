"""What a method's terms must be at the first step, by a plain loop over rows with transformers' own hidden states."""

import json

import torch


def rows_of(folder, path):
    """Yield (hidden_states of transformers, (T-1,) bool: tokens after the first that count) of every row of a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_unlearn.data.tokenize import IGNORED, TokenizeOptions, tokenize_rows

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in tokenize_rows(rows, tokenizer, TokenizeOptions()):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        yield [state[0] for state in states], torch.tensor(row["labels"])[1:] != IGNORED


def first_step(world, output_dir, method, *flags):
    """Run one step over all forget rows; returns its log line."""
    from tiny_world import command

    from llm_unlearn.cli.unlearn import main

    words = command(world, method, output_dir, *flags, "--per_device_train_batch_size", "10", "--max_steps", "1")
    assert main(words) == 0
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"][0]
