"""Command lines of the fine-tuning attacks on the tiny world, and what they leave behind, for the tests."""

import json
from pathlib import Path

from llm_unlearn.cli import relearn, tamper


def words_on(world, output_dir, *flags):
    """Return the words of a short attack on the untrained model, which the trained one is the target of."""
    words = ["--model_name", world["base"], "--target_model", world["model"], "--domain", "custom", "--use_cpu"]
    words += ["--forget_data", world["forget"], "--retain_data", world["retain"], "--max_eval_samples", "4"]
    words += ["--batch_size", "5", "--grad_accumulation", "1", "--lr", "5e-3", "--max_steps", "4", "--eval_every", "2"]
    return [*words, "--output_dir", str(output_dir), *map(str, flags)]


def without_target(words):
    """Return a command line without its --target_model."""
    place = words.index("--target_model")
    return words[:place] + words[place + 2 :]


def attack(world, output_dir, *flags, script=tamper):
    """Attack in this process; returns the contents of results.json."""
    assert script.main(words_on(world, output_dir, *flags)) == 0
    return results(output_dir)


def results(folder):
    """Return the results.json of a folder, which may hold no NaN."""

    def refuse(token):
        raise AssertionError(f"results.json holds {token}")

    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


def rows_of(record, number=0):
    """Return the rows of one curve without their timestamps."""
    return [
        {key: value for key, value in row.items() if key != "timestamp"} for row in record["curves"][number]["rows"]
    ]


def said(capsys, words, script=tamper):
    """Return the last line of stderr of an attack that the user got wrong."""
    assert script.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


__all__ = ["attack", "relearn", "results", "rows_of", "said", "tamper", "without_target", "words_on"]
