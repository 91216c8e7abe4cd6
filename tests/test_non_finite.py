"""A NaN or an infinity stops the run before it reaches the weights, and says where the last good checkpoint is (F3)."""

import pytest
import torch
from tiny_world import command

from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import NonFiniteError


def test_a_diverging_ascent_stops_and_saves_nothing(tiny_world, tmp_path):
    flags = ["--learning_rate", "1e30", "--num_train_epochs", "5"]
    with pytest.raises(NonFiniteError, match=r"is not finite at step 2.*Last good checkpoint: none"):
        main(command(tiny_world, "gradient_ascent", tmp_path / "out", *flags))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_message_names_the_last_good_checkpoint(tiny_world, tmp_path, monkeypatch):
    from llm_unlearn.methods import gradient_ascent
    from llm_unlearn.objectives import likelihood

    calls = []

    def poisoned(logps):
        calls.append(1)
        return likelihood.ascent(logps) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(gradient_ascent, "ascent", poisoned)
    flags = ["--save_strategy", "steps", "--save_steps", "1"]
    with pytest.raises(NonFiniteError, match=r"step 3.*checkpoint-1\."):
        main(command(tiny_world, "gradient_ascent", tmp_path / "out", *flags))
    # Checkpoint 2 holds the very weights that gave the NaN.
    assert (tmp_path / "out/checkpoint-2/manifest.json").is_file()
    assert not (tmp_path / "out/checkpoint-3").exists()


@pytest.mark.parametrize("clip", ["0", "1.0"])
def test_an_infinite_gradient_stops_before_the_step(clip, tiny_world, tmp_path, monkeypatch):
    from llm_unlearn.trainer import UnlearnTrainer

    before, after = {}, {}
    original = UnlearnTrainer.training_step

    def poisoned(self, model, inputs, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch)
        weight = next(iter(model.parameters()))
        if self.state.global_step == 1:
            weight.grad.view(-1)[5] = float("inf")
            before.update({key: value.clone() for key, value in model.state_dict().items()})
            after["model"] = model
        return loss

    monkeypatch.setattr(UnlearnTrainer, "training_step", poisoned)
    with pytest.raises(NonFiniteError, match="a gradient is not finite at step 2; the update was not applied"):
        main(command(tiny_world, "npo", tmp_path / "out", "--max_grad_norm", clip))
    assert all(torch.equal(value, before[key]) for key, value in after["model"].state_dict().items())


def test_weights_that_are_not_finite_are_never_saved(tiny_world, tmp_path, monkeypatch):
    from llm_unlearn.trainer import UnlearnTrainer

    original = UnlearnTrainer.train

    def ruined(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        with torch.no_grad():
            next(iter(self.model.parameters())).view(-1)[3] = float("nan")
        return result

    monkeypatch.setattr(UnlearnTrainer, "train", ruined)
    with pytest.raises(NonFiniteError, match="a weight is not finite"):
        main(command(tiny_world, "npo", tmp_path / "out", "--max_steps", "1"))
    found = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.parent.name != "reference_cache"]
    assert not found
