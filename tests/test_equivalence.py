"""1 x 4 = 2 x 2 = 4 x 1: how a step is cut into micro-batches changes neither the update nor a logged term."""

import pytest
from tiny_world import command, each_method, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main

# float32 sums in another order: measured 1e-7 to 4e-5 over the methods. Means per micro-batch are off by 0.03 and more.
UPDATE_TOLERANCE = 2e-4
SHAPES = {"1x4": (4, 1), "2x2": (2, 2), "4x1": (1, 4)}


def runs(world, method, folder, *flags, shapes=SHAPES):
    """Run a method in each shape; returns {shape: (terms, weights)}."""
    found = {}
    for name, (batch_size, accumulation) in shapes.items():
        cut = ["--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        assert main(command(world, method, folder / name, *flags, *cut)) == 0
        found[name] = (terms(folder / name), weights(folder / name))
    return found


def assert_terms_agree(first, second, tolerance):
    """Compare every term of every step; relative, with an absolute floor for terms near zero."""
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("method", each_method())
def test_accumulation_changes_nothing_with_sgd(method, tiny_world, start_weights, tmp_path):
    found = runs(tiny_world, method, tmp_path)
    start = base_weights(tiny_world) if method in ("finetune", "retrain") else start_weights
    for shape in ("2x2", "4x1"):
        assert_terms_agree(found[shape][0], found["1x4"][0], 1e-5)
        assert update_distance(found[shape][1], found["1x4"][1], start) <= UPDATE_TOLERANCE


def test_accumulation_changes_nothing_with_adamw(tiny_world, tmp_path):
    flags = ["--optim", "adamw_torch", "--learning_rate", "1e-4"]
    found = runs(tiny_world, "npo", tmp_path, *flags, shapes={"1x4": (4, 1), "4x1": (1, 4)})
    assert_terms_agree(found["4x1"][0], found["1x4"][0], 1e-4)


def test_a_mean_per_micro_batch_would_be_seen(tiny_world, start_weights, tmp_path, monkeypatch):
    """The mutation that the tests above must catch: each micro-batch divided by its own counts, then averaged."""
    from llm_unlearn.trainer import UnlearnTrainer

    def local_means(self, epoch_iterator, num_batches, device):
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.micro_batches = len(batches)
        return batches, None

    def averaged(self, terms, outputs, return_outputs=False, num_items_in_batch=None):
        loss = original(self, terms, outputs, return_outputs, None)
        return loss / self.micro_batches

    original = UnlearnTrainer.total_loss
    flags = ["--max_steps", "2"]
    right = runs(tiny_world, "grad_diff", tmp_path / "right", *flags, shapes={"1x4": (4, 1)})["1x4"]
    monkeypatch.setattr(UnlearnTrainer, "get_batch_samples", local_means)
    monkeypatch.setattr(UnlearnTrainer, "total_loss", averaged)
    wrong = runs(tiny_world, "grad_diff", tmp_path / "wrong", *flags, shapes={"4x1": (1, 4)})["4x1"]
    assert update_distance(wrong[1], right[1], start_weights) > 100 * UPDATE_TOLERANCE


def test_padding_changes_nothing(tiny_world, start_weights, tmp_path, monkeypatch):
    from llm_unlearn.data.streams import UnlearnCollator

    original = UnlearnCollator.__init__

    def padding_more(self, pad_token_id=0, multiple=1):
        original(self, pad_token_id, 64)

    shapes = {"1x4": (4, 1)}
    for method in ("npo", "ascent_plus_kl_divergence", "random_label"):
        plain = runs(tiny_world, method, tmp_path / method / "plain", shapes=shapes)["1x4"]
        with monkeypatch.context() as patch:
            patch.setattr(UnlearnCollator, "__init__", padding_more)
            padded = runs(tiny_world, method, tmp_path / method / "padded", shapes=shapes)["1x4"]
        assert_terms_agree(padded[0], plain[0], 1e-5)
        assert update_distance(padded[1], plain[1], start_weights) <= UPDATE_TOLERANCE


def test_worker_processes_change_nothing(tiny_world, tmp_path):
    """Two epochs, because the epoch is set on the plan in this process and the workers are started anew."""
    shapes, epochs = {"1x4": (4, 1)}, ["--num_train_epochs", "2"]
    plain = runs(tiny_world, "npo", tmp_path / "plain", *epochs, shapes=shapes)["1x4"]
    workers = [*epochs, "--dataloader_num_workers", "2"]
    worked = runs(tiny_world, "npo", tmp_path / "workers", *workers, shapes=shapes)["1x4"]
    assert worked[0] == plain[0]


def base_weights(world):
    """The untrained tensors from which finetune and retrain start."""
    return weights(world["base"])
