"""Training a lens: the gradient by an independent computation, what it reaches, one process is two, the script."""

import importlib.util
import json
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from tiny_architectures import DEPTH, make_batch, make_model

from llm_unlearn import lens_training
from llm_unlearn.data.plan import FILLER
from llm_unlearn.errors import NonFiniteError, run_cli
from llm_unlearn.lens import TunedLens
from llm_unlearn.lens_files import base_model_identity
from llm_unlearn.lens_training import LEARNING_RATES, DepthStates, LensOptions, fit, make_optimizers, measure
from llm_unlearn.models import load_model, model_fingerprint

SCRIPT = Path(__file__).parents[1] / "utils/train_tuned_lens.py"


def script():
    """Return utils/train_tuned_lens.py as a module; it is not importable."""
    spec = importlib.util.spec_from_file_location("train_tuned_lens", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(words):
    """Be utils/train_tuned_lens.py; ranks are forked with it."""
    return run_cli(lambda: script().main([str(word) for word in words]))


def command(world, folder, *flags):
    """Return the words that train a lens of the tiny world's model."""
    words = ["--model_name_or_path", world["model"], "--use_cpu", "True", "--domain", "custom"]
    return [*words, "--forget_data", world["forget"], "--output_dir", str(folder), *map(str, flags)]


class OneBatch:
    """A stream as `probe_training.Batches` yields it, the same in every epoch."""

    def __init__(self, stream):
        self.stream = stream

    def epoch(self, number):
        yield self.stream


def make_sharp_model():
    """Return a random model whose logits are 20 times as large, so that there is something to learn."""
    model = make_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def make_stream():
    """Return three rows padded to 13 tokens, the last of them a filler."""
    return {**make_batch(), "index": torch.tensor([0, 1, FILLER])}


def plain_divergence(model, stream, index, weight, bias):
    """KL(p || lens) of each token of the two real rows, from logits made one row at a time, without padding."""
    found = []
    for ids, mask in list(zip(stream["input_ids"], stream["attention_mask"], strict=True))[:2]:
        output = model(ids[None, : int(mask.sum())], output_hidden_states=True)
        states, own = output.hidden_states[index][0].detach(), output.logits[0].detach().log_softmax(-1)
        logps = model.lm_head(model.model.norm(states + states @ weight.T + bias)).log_softmax(-1)
        found.append((own.exp() * (own - logps)).sum(-1))
    return torch.cat(found)


def test_one_step_descends_on_the_mean_over_tokens_and_depths():
    """A step of SGD from the logit lens is the learning rate times the plain gradient, cut to length 1."""
    model, stream = make_sharp_model(), make_stream()
    lens = TunedLens.of(model, [1, 3])
    rate = 0.1
    (loss,) = fit(lens, DepthStates(model, lens), OneBatch(stream), LensOptions("sgd", rate, 1))
    parts = {index: (torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)) for index in (1, 3)}
    values = {index: plain_divergence(model, stream, index, *pair) for index, pair in parts.items()}
    assert len(values[1]) == 13 + 9
    expected = sum(value.mean() for value in values.values()) / 2
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.cat([part.grad.flatten() for pair in parts.values() for part in pair])
    clip = min(1.0, 1.0 / (gradients.norm().item() + 1e-6))
    for index, (weight, bias) in parts.items():
        # Nesterov's first step is 1 + 0.9 times the gradient.
        translator = lens.translators[str(index)]
        torch.testing.assert_close(translator.weight, -rate * 1.9 * clip * weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(translator.bias, -rate * 1.9 * clip * bias.grad, rtol=1e-4, atol=1e-7)
        assert translator.weight.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_padding_and_fillers_change_nothing_and_the_start_is_the_logit_lens():
    model, stream = make_model().eval(), make_stream()
    lens = TunedLens.of(model, range(DEPTH))
    found = measure(lens, DepthStates(model, lens), OneBatch(stream))
    zero = torch.zeros(32, 32), torch.zeros(32)
    for index in range(DEPTH):
        with torch.no_grad():
            expected = plain_divergence(model, stream, index, *zero).mean().item()
        assert found[index] == pytest.approx(expected, rel=1e-4)
    stream["input_ids"][1, 9:], stream["input_ids"][2] = 7, 7
    assert measure(lens, DepthStates(model, lens), OneBatch(stream)) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_every_optimizer_takes_the_lens_below_half_of_the_logit_lens(optimizer):
    model = make_sharp_model()
    lens = TunedLens.of(model, range(DEPTH))
    states, batch = DepthStates(model, lens), OneBatch(make_stream())
    before = measure(lens, states, batch)
    rate = {"adam": 0.01, "sgd": 0.1, "muon": 0.05}[optimizer]
    losses = fit(lens, states, batch, LensOptions(optimizer, rate, 60))
    after = measure(lens, states, batch)
    assert all(after[index] < 0.5 * before[index] for index in range(1, DEPTH)), (before, after)
    assert len(losses) == 60 and losses[0] == pytest.approx(sum(before.values()) / DEPTH, rel=1e-5)


def test_the_rate_falls_linearly_to_nothing(monkeypatch):
    rates, model = [], make_sharp_model()

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def recorded(lens, options):
        return [Recording(lens.translators.parameters(), lr=options.learning_rate)]

    monkeypatch.setattr(lens_training, "make_optimizers", recorded)
    lens = TunedLens.of(model, [1])
    fit(lens, DepthStates(model, lens), OneBatch(make_stream()), LensOptions("sgd", 0.1, 4))
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_optimizers_are_the_published_ones():
    lens = TunedLens.of(make_model(), [1])
    (adam,) = make_optimizers(lens, LensOptions())
    assert adam.defaults["amsgrad"] and adam.defaults["lr"] == 1e-3 and not adam.defaults["weight_decay"]
    (sgd,) = make_optimizers(lens, LensOptions("sgd", LEARNING_RATES["sgd"]))
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.1, 0.9, 1e-3)
    muon, adamw = make_optimizers(lens, LensOptions("muon", LEARNING_RATES["muon"]))
    assert [p.dim() for group in muon.param_groups for p in group["params"]] == [2]
    assert [p.dim() for group in adamw.param_groups for p in group["params"]] == [1]


def test_a_loss_that_is_not_finite_makes_no_update():
    model = make_model().eval()
    lens = TunedLens.of(model, [1])
    with torch.no_grad():
        lens.translators["1"].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite at step 1"):
        fit(lens, DepthStates(model, lens), OneBatch(make_stream()), LensOptions(max_steps=1))


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """A lens of the tiny world's model after 40 steps; returns (folder, config)."""
    folder = tmp_path_factory.mktemp("lens") / "out"
    flags = ["--max_steps", 40, "--learning_rate", 0.01]
    assert run(command(tiny_world, folder, *flags)) == 0
    return folder, json.loads((folder / "lens.json").read_text())


def test_a_trained_lens_is_nearer_to_the_model_than_the_logit_lens(trained):
    """At both depths below 0.7 of its divergence, on the ten rows that it learned from."""
    _, config = trained
    before, after = config["training"]["kl_before"], config["training"]["kl_after"]
    assert before.keys() == after.keys() == {"0", "1"}
    assert all(after[index] < 0.7 * before[index] for index in before), (before, after)
    assert config["training"]["loss"][-1] < 0.5 * config["training"]["loss"][0]


def test_the_folder_says_whose_lens_it_is_and_how_it_was_made(trained, tiny_world):
    from llm_unlearn.checkpoints import incompleteness

    folder, config = trained
    identity = base_model_identity(load_model(tiny_world["model"]))
    assert config["base_model"]["weights_sha256"] == identity["weights_sha256"]
    assert config["base_model"]["files"] == model_fingerprint(tiny_world["model"])
    assert config["base_model"]["name"] == tiny_world["model"] and config["translators"] == [0, 1]
    training = config["training"]
    assert (training["rows"], training["max_steps"], training["optimizer"]) == (10, 40, "adam")
    assert training["scored_on"] == "the rows that it learned from" and training["data"][0]["rows"] == 10
    assert training["command"].startswith("python utils/train_tuned_lens.py --model_name_or_path")
    assert incompleteness(folder) is None


@pytest.mark.distributed
def test_two_processes_train_what_one_does(tiny_world, tmp_path):
    flags = ["--max_steps", 4, "--learning_rate", 0.01]
    assert run(command(tiny_world, tmp_path / "one", *flags, "--per_device_train_batch_size", 4)) == 0
    words = command(tiny_world, tmp_path / "two", *flags, "--per_device_train_batch_size", 2)
    outcome = ranks.run(run, words, processes=2)
    assert outcome.codes == [0, 0], outcome
    one, two = (json.loads((tmp_path / name / "lens.json").read_text())["training"] for name in ("one", "two"))
    assert two["processes"] == 2 and one["processes"] == 1
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=1e-5)
    first, second = (load_file(tmp_path / name / "lens.safetensors") for name in ("one", "two"))
    moved = sum(float(tensor.square().sum()) for tensor in first.values())
    off = sum(float((second[name] - tensor).square().sum()) for name, tensor in first.items())
    # Sums of float32 in another order, through four steps of Adam.
    assert moved > 0 and (off / moved) ** 0.5 < 1e-5


@pytest.mark.usefixtures("one_cpu_process")
class TestScript:
    def refusal(self, words, capsys, code=2):
        assert run(words) == code
        return capsys.readouterr().err.strip().splitlines()[-1]

    def test_flags_that_cannot_be(self, tiny_world, tmp_path, capsys):
        words = command(tiny_world, tmp_path / "out")
        for flags, expected in (
            (["--layers", "2"], "layer 2 does not exist: the model has layers 0 to 1"),
            (["--layers", "1"], "--layers 1 is the last layer, whose output needs no translator"),
            (["--max_steps", "0"], "--max_steps must be at least 1"),
            (["--learning_rate", "0"], "--learning_rate must be above 0"),
            (["--dtype", "floats32"], "did you mean 'float32'"),
            (["--optimizer", "adamw"], "invalid choice: 'adamw'"),
            (["--hf_repo_id", "me/it"], "--hub_model_id has no effect without --push_to_hub"),
            (["--retain_data", "x.jsonl"], "unknown flag '--retain_data'"),
            (["--forget_data", "absent.jsonl"], "data file 'absent.jsonl' does not exist"),
            (["--holdout_data", "absent.jsonl"], "data file 'absent.jsonl' does not exist"),
            (["--domain", "demos"], "did you mean 'demo'"),
            (["--domain", "custom", "--model_name_or_path", "./absent"], "folder './absent' does not exist"),
            (["--overwrite_output_dir", "True", "--output_dir", tiny_world["model"]], "is the model's own folder"),
        ):
            assert expected in self.refusal([*words, *flags], capsys), flags
        assert "--output_dir is missing" in self.refusal(words[:2], capsys)
        no_data = [word for word in words if word not in ("--forget_data", tiny_world["forget"])]
        assert "a lens needs a forget set" in self.refusal(no_data, capsys)
        assert not (tmp_path / "out").exists()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
        assert "is not empty; pass --overwrite_output_dir" in self.refusal(words, capsys)

    def test_published_flags_push_what_is_on_disk(self, tiny_world, tmp_path, monkeypatch):
        import huggingface_hub

        calls = []

        class Api:
            def __init__(self, token=None):
                pass

            def create_repo(self, name, **_):
                return type("Repo", (), {"repo_id": name})

            def upload_folder(self, repo_id, folder_path, allow_patterns, **_):
                calls.append((repo_id, {path for path in allow_patterns if (Path(folder_path) / path).is_file()}))
                return "url"

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        flags = ["--layers", "0", "--max_steps", 1, "--upload_to_hf", "True", "--hf_repo_id", "me/lens"]
        flags += ["--holdout_data", tiny_world["retain"], "--max_eval_samples", 2]
        assert run(command(tiny_world, tmp_path / "out", *flags)) == 0
        assert calls == [("me/lens", {"manifest.json", "lens.json", "lens.safetensors", "README.md"})]
        config = json.loads((tmp_path / "out/lens.json").read_text())
        assert config["translators"] == [1] and config["training"]["scored_on"][0]["source"] == tiny_world["retain"]

    def test_a_failed_push_keeps_the_lens_and_says_how_to_retry(self, tiny_world, tmp_path, monkeypatch, capsys):
        import huggingface_hub

        def broken(token=None):
            raise OSError("no network")

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: type("Api", (), {"create_repo": broken})())
        flags = ["--max_steps", 1, "--push_to_hub", "True", "--hub_model_id", "me/lens"]
        said = self.refusal(command(tiny_world, tmp_path / "out", *flags), capsys, code=3)
        assert "retry with: python utils/push_checkpoint.py" in said and "me/lens" in said
        assert (tmp_path / "out/lens.safetensors").is_file()

    def test_help_names_every_flag(self, capsys):
        assert run(["--help"]) == 0
        said = capsys.readouterr().out
        names = ("model_revision", "layers", "forget_data", "holdout_data", "max_length", "hub_model_id", "optimizer")
        assert all(f"--{name}" in said for name in names)


@pytest.mark.full
def test_a_real_model_learns_a_lens_that_holds_on_unseen_rows(shared_data, tmp_path):
    """stories260K, 100 steps on 80 rows: at every depth at most 0.6 of the logit lens's KL on 60 unseen rows."""
    world = {
        "model": str(shared_data / "models/stories260K-hf"),
        "forget": str(shared_data / "tofu_small/retain.jsonl"),
    }
    flags = ["--holdout_data", shared_data / "tofu_small/holdout.jsonl", "--max_steps", 100, "--learning_rate", 0.01]
    assert run(command(world, tmp_path / "out", *flags, "--max_length", 128)) == 0
    training = json.loads((tmp_path / "out/lens.json").read_text())["training"]
    ratios = {index: training["kl_after"][index] / training["kl_before"][index] for index in training["kl_before"]}
    assert len(ratios) == 5 and max(ratios.values()) < 0.6, ratios
