"""The trainers from Python, without the script: rows in any form, evaluation, methods of one's own."""

import json
from dataclasses import dataclass

import pytest
import torch
from tiny_world import command, terms

from llm_unlearn import METHODS, NPOArguments, NPOTrainer, UnlearnTrainer, UserError
from llm_unlearn.arguments import flag
from llm_unlearn.cli.unlearn import main
from llm_unlearn.objectives.likelihood import ascent
from llm_unlearn.records import command_line
from llm_unlearn.training_arguments import UnlearnArguments

ROWS = [{"question": f"Who is number {n}?", "answer": f"Number {n} is a baker in Kestrin."} for n in range(6)]


@pytest.fixture
def parts(tiny_world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_world["model"])
    return model, AutoTokenizer.from_pretrained(tiny_world["model"])


def arguments(folder, **kwargs):
    return NPOArguments(output_dir=str(folder), max_steps=2, save_strategy="no", disable_tqdm=True, **kwargs)


def test_rows_in_every_form_train_alike(tiny_world, parts, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    logged = []
    for rows in (ROWS, Dataset.from_list(ROWS), str(tmp_path / "rows.jsonl")):
        model = AutoModelForCausalLM.from_pretrained(tiny_world["model"])
        data = {"forget": rows, "retain": ROWS}
        trainer = NPOTrainer(model=model, args=arguments(tmp_path), train_dataset=data, processing_class=parts[1])
        trainer.train()
        logged.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logged[0] == logged[1] == logged[2] and len(logged[0]) == 2


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"forget": [], "retain": ROWS}, "forget set has no rows"),
        ({"forget": ROWS}, "needs a retain set"),
        ({"forget": [{"question": "a" * 4000, "answer": "b"}] * 3, "retain": ROWS}, "no token left that counts"),
        ({"forget": [{"question": 3, "answer": "b"}], "retain": ROWS}, "row 1: 'question' must be text"),
    ],
)
def test_bad_data_is_refused_before_training(data, expected, parts, tmp_path):
    model, tokenizer = parts
    with pytest.raises(UserError, match=expected):
        NPOTrainer(model=model, args=arguments(tmp_path), train_dataset=data, processing_class=tokenizer)


def test_evaluation_reports_plain_nll_whatever_the_batch(parts, tmp_path):
    model, tokenizer = parts
    results = []
    for size in (1, 4):
        trainer = UnlearnTrainer(
            model=model,
            args=UnlearnArguments(output_dir=str(tmp_path), per_device_eval_batch_size=size),
            eval_dataset={"forget": ROWS, "retain": ROWS[:2]},
            processing_class=tokenizer,
        )
        results.append(trainer.evaluate())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    total = count = 0
    for row in trainer.eval_dataset.streams["forget"]:
        ids = torch.tensor([row["input_ids"]])
        logps = model(ids).logits[0].log_softmax(-1)
        for position in range(1, ids.shape[1]):
            if row["labels"][position] != -100:
                total -= logps[position - 1, row["labels"][position]].item()
                count += 1
    assert results[0]["eval_forget_nll"] == pytest.approx(total / count, rel=1e-5)
    assert results[0]["eval_loss"] == results[0]["eval_retain_nll"]


def test_evaluation_during_training(tiny_world, tmp_path):
    flags = [
        "--do_eval",
        "True",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--holdout_data",
        tiny_world["retain"],
    ]
    assert main(command(tiny_world, "npo", tmp_path / "out", *flags)) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    scored = [log for log in history if "eval_forget_nll" in log]
    assert [log["step"] for log in scored] == [2, 3]
    assert {"eval_retain_nll", "eval_holdout_nll", "eval_forget_probability"} <= set(scored[0])


@dataclass
class HalfAscentArguments(UnlearnArguments):
    share: float = flag(0.5, "Share of the ascent.")


class HalfAscentTrainer(UnlearnTrainer):
    """A method that lives outside the package."""

    args_class = HalfAscentArguments

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = self.forward(model, inputs)
        values = self.args.share * ascent(outputs["forget"].logps)
        return self.total_loss({"forget": values}, outputs, return_outputs, num_items_in_batch)


def test_a_method_of_ones_own(tiny_world, tmp_path, capsys):
    words = command(tiny_world, "gradient_ascent", tmp_path / "out", "--share", "0.25", "--max_steps", "1")
    words[1] = "test_trainer:HalfAscentTrainer"
    assert main(words) == 0
    assert main(command(tiny_world, "gradient_ascent", tmp_path / "whole", "--max_steps", "1")) == 0
    half, whole = terms(tmp_path / "out")[0], terms(tmp_path / "whole")[0]
    assert half["loss/forget"] == pytest.approx(0.25 * whole["loss/forget"], rel=1e-6)
    words[1] = "test_trainer:NoTrainer"
    assert main(words) == 2 and "cannot be imported" in capsys.readouterr().err


def test_a_zero_weight_loads_no_retain_set(tiny_world, tmp_path):
    words = command(tiny_world, "grad_diff", tmp_path / "out", "--retain_weight", "0", "--retain_loss", "nll")
    assert main(words) == 0
    assert set(json.loads((tmp_path / "out/unlearning.json").read_text())["streams"]) == {"forget"}


def test_access_tokens_are_never_written(tiny_world, tmp_path):
    words = command(
        tiny_world, "npo", tmp_path / "out", "--max_steps", "1", "--hub_token", "hf_sesame", "--token=hf_open"
    )
    assert main(words) == 0
    for path in (tmp_path / "out").glob("*.*"):
        assert b"hf_sesame" not in path.read_bytes() and b"hf_open" not in path.read_bytes(), path
    assert command_line(["--hub_token", "x", "--beta", "1"]) == "python run_unlearn.py --hub_token '***' --beta 1"


def test_every_method_has_a_trainer_with_a_short_compute_loss():
    import inspect

    from llm_unlearn import trainer_class

    for method in METHODS:
        found = trainer_class(method)
        assert issubclass(found, UnlearnTrainer) and "compute_loss" in vars(found) | vars(found.__mro__[1])
        assert len(inspect.getsource(found.compute_loss).splitlines()) <= 15


def test_fewer_retain_rows_by_the_seed(tiny_world, tmp_path, capsys):
    """5 of 13 rows, which repeat where ten are needed; the same ones under the same --data_seed, whatever else runs."""
    retained, drawn = [], []
    for number, seed in enumerate((7, 7, 8)):
        flags = ["--max_retain_rows", 5, "--data_seed", seed, "--max_steps", 1]
        assert main(command(tiny_world, ("npo", "grad_diff", "npo")[number], tmp_path / str(number), *flags)) == 0
        streams = json.loads((tmp_path / str(number) / "unlearning.json").read_text())["streams"]
        retained.append(streams["retain"]["rows"])
        drawn.append(streams["retain"]["sha256"])
        assert streams["forget"]["rows"] == 10
    assert retained == [5, 5, 5] and drawn[0] == drawn[1] != drawn[2]
    assert main(command(tiny_world, "npo", tmp_path / "all", "--max_retain_rows", 99, "--max_steps", 1)) == 0
    streams = json.loads((tmp_path / "all/unlearning.json").read_text())["streams"]
    assert streams["retain"]["rows"] == 13
    capsys.readouterr()
    for method, flags in {"gradient_ascent": [], "grad_diff": ["--retain_loss", "none"]}.items():
        assert main(command(tiny_world, method, tmp_path / method, "--max_retain_rows", 5, *flags)) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith("has no effect: this run reads no retain set")
    assert main(command(tiny_world, "npo", tmp_path / "none", "--max_retain_rows", 0)) == 2
    assert "--max_retain_rows must be at least 1, but is 0" in capsys.readouterr().err.splitlines()[-1]
