"""Methods whose losses end below the last layer: only the layers below run, only what is named trains, all is saved."""

import json
import shutil
import sys
from pathlib import Path

import backends
import pytest
import torch
from tiny_world import command, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main

TRAINED = "model.layers.0.mlp.down_proj.weight"
METHOD = "layer_method:ShrinkTrainer"
SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--optim", "adamw_torch", "--learning_rate", "1e-2"]


@pytest.fixture(autouse=True)
def this_folder_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def changed(folder, start):
    """Return the names of the tensors that a run moved; the saved ones have to be all of the start's."""
    found = weights(folder)
    assert found.keys() == start.keys()
    return [name for name in start if not torch.equal(found[name], start[name])]


def test_only_the_named_matrix_moves_and_the_whole_model_is_saved(tiny_world, start_weights, tmp_path):
    flags = ["--do_eval", "True", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2", *SAVING]
    assert main(command(tiny_world, METHOD, tmp_path / "out", *flags)) == 0
    assert changed(tmp_path / "out", start_weights) == [TRAINED]
    assert changed(tmp_path / "out/checkpoint-1", start_weights) == [TRAINED]
    # The evaluation in mid-training asks the whole model, whose likelihoods the first step has moved.
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    nlls = [log["eval_forget_nll"] for log in history if "eval_forget_nll" in log]
    assert len(nlls) == 2 and nlls[0] != nlls[1]


def test_no_layer_above_runs_and_nothing_else_has_gradients_or_states(tiny_world, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    calls, seen = {"layers": 0, "forwards": 0}, []
    for counted, name in ((LlamaDecoderLayer, "layers"), (LlamaModel, "forwards")):
        original = counted.forward

        def forward(self, *args, _original=original, _name=name, **kwargs):
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(counted, "forward", forward)
    from llm_unlearn.trainer import UnlearnTrainer

    original_step = UnlearnTrainer.training_step

    def step(self, model, inputs, num_items_in_batch=None):
        loss = original_step(self, model, inputs, num_items_in_batch)
        with_gradients = [name for name, value in self.model.named_parameters() if value.grad is not None]
        seen.append((with_gradients, sum(len(group["params"]) for group in self.optimizer.param_groups)))
        return loss

    monkeypatch.setattr(UnlearnTrainer, "training_step", step)
    assert main(command(tiny_world, METHOD, tmp_path / "out")) == 0
    # The model has two layers; three steps of one forward each run the lower one alone.
    assert calls == {"layers": 3, "forwards": 3}
    assert seen == [([TRAINED], 1)] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_equals_the_unbroken_one(checkpointing, tiny_world, tmp_path):
    flags = [*SAVING, "--gradient_checkpointing", str(checkpointing)]
    words = command(tiny_world, METHOD, tmp_path / "whole", *flags)
    assert main(words) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-3")
    words = command(tiny_world, METHOD, tmp_path / "part", *flags, "--resume_from_checkpoint", "auto")
    assert main(words) == 0
    whole, part = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert terms(tmp_path / "part") == terms(tmp_path / "whole")


def test_gradient_checkpointing_leaves_the_frozen_layers_without_a_backward(tiny_world, tmp_path, monkeypatch):
    """transformers lets the embedding's output require gradients then, which would take the backward through all."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    required, original = [], LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        required.append(hidden_states.requires_grad)
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert main(command(tiny_world, METHOD, tmp_path / "out", "--gradient_checkpointing", "True")) == 0
    assert required and not any(required)


@pytest.mark.distributed
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_two_processes_equal_one_on_every_backend(backend, tiny_world, start_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    one = backends.train(command(tiny_world, METHOD, tmp_path / "one"))
    words = command(tiny_world, METHOD, tmp_path / "two", "--per_device_train_batch_size", "2")
    two = backends.train(words, backend, 2)
    assert changed(two, start_weights) == [TRAINED]
    assert update_distance(weights(two), weights(one), start_weights) <= 2e-4
    for first, second in zip(terms(two), terms(one), strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-5)


def test_a_layer_that_is_not_there_is_refused(tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, METHOD, tmp_path / "out", "--layer", "7")) == 2
    assert "7" in capsys.readouterr().err.splitlines()[-1]
    assert "layer_method" in sys.modules
