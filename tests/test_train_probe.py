"""Training probes: which states, which positions, by hand and against baselines; one process is two; refusals."""

import json
import shutil

import pytest
import ranks
import torch
from probe_world import probe_command, probe_script
from safetensors.torch import load_file
from tiny_architectures import DEPTH, make_batch, make_model

from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.probe import load_probes
from llm_unlearn.probe_training import Errors, FitOptions, StatePairs, fit, make_probes, measure, split_rows

CPU = torch.device("cpu")


def run(words):
    """Be utils/train_probe.py; ranks are forked with it."""
    return run_cli(lambda: probe_script().main(words))


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """Probes of both layers of the tiny world's model, of 40 epochs; returns (folder, config)."""
    folder = tmp_path_factory.mktemp("probes") / "out"
    assert run(probe_command(tiny_world, folder, "--num_train_epochs", 40)) == 0
    return folder, json.loads((folder / "config.json").read_text())


class OneBatch:
    """A stream as `probe_training.Batches` yields it, the same in every epoch."""

    def __init__(self, stream):
        self.stream = stream

    def __len__(self):
        return 1

    def epoch(self, number):
        yield self.stream


@pytest.fixture
def pairs():
    """Two random models of five layers, and a stream of three rows of which some tokens count."""
    early, final = make_model(), make_model()
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    batch = make_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    batch["labels"][:, 1:4] = IGNORED
    return early, final, batch


def test_layer_l_is_what_decoder_layer_l_hands_on_to_the_next(pairs):
    early, final, batch = pairs
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = [model.eval()(**inputs, output_hidden_states=True).hidden_states for model in (early, final)]
        norms = [model.model.norm for model in (early, final)]
    found = StatePairs(early, final, [1, DEPTH - 1], CPU)(batch)
    for states, hidden, norm in zip(found[:2], expected, norms, strict=True):
        assert torch.equal(states[1], hidden[2][:, 1:])
        # The last entry of transformers' list is normed, and what the last layer hands on is not.
        assert torch.equal(norm(states[DEPTH - 1]), hidden[DEPTH][:, 1:])
        assert not torch.equal(states[DEPTH - 1], hidden[DEPTH][:, 1:])
    tokens, counted = found[2:]
    assert tokens.sum(-1).tolist() == [12, 8, 4] and counted.sum(-1).tolist() == [9, 5, 1]


def test_one_step_descends_on_the_mean_over_counted_tokens_alone(pairs):
    """AdamW's first step is lr * sign(gradient) and decay, so that its signs show which gradient it got."""
    early, final, batch = pairs
    states = StatePairs(early, final, [2], CPU)
    (probe,) = make_probes(states, 0).values()
    before, _, tokens, counted = states(batch)
    target = states(batch)[1][2]
    said = probe(before[2], tokens)
    total, count = 0.0, 0
    for row, position in counted.nonzero().tolist():
        total = total + (said[row, position] - target[row, position]).square().sum()
        count += 1
    assert count == 15
    (total / (count * 32)).backward()
    expected = {
        name: (1 - 1e-3 * 0.01) * parameter.detach() - 1e-3 * parameter.grad.sign()
        for name, parameter in probe.named_parameters()
    }
    clear = {name: parameter.grad.abs() > 1e-5 for name, parameter in probe.named_parameters()}
    made = make_probes(states, 0)
    steps, constants = fit(made, states, OneBatch(batch), FitOptions(epochs=1))
    assert steps == 1
    torch.testing.assert_close(constants[2], target[counted].double().mean(0), rtol=1e-6, atol=1e-7)
    for name, parameter in made[2].named_parameters():
        assert clear[name].any()
        torch.testing.assert_close(parameter[clear[name]], expected[name][clear[name]], rtol=0, atol=2e-6)


def test_padding_changes_nothing(pairs):
    early, final, batch = pairs
    states = StatePairs(early, final, [1], CPU)
    wide = {
        name: torch.nn.functional.pad(batch[name], (0, 3), value=value)
        for name, value in (("input_ids", 7), ("attention_mask", 0), ("labels", IGNORED))
    }
    found = []
    for stream in (batch, wide):
        probes = make_probes(states, 0)
        _, constants = fit(probes, states, OneBatch(stream), FitOptions(epochs=3))
        found.append((measure(probes, states, OneBatch(stream), constants)[1], probes[1].up.weight))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


def test_a_layer_trains_as_if_it_were_alone(pairs):
    early, final, batch = pairs
    both = StatePairs(early, final, [1, 3], CPU)
    together, alone = make_probes(both, 5), make_probes(both, 5)
    fit(together, both, OneBatch(batch), FitOptions(epochs=2))
    fit({3: alone[3]}, both, OneBatch(batch), FitOptions(epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(together[3].parameters(), alone[3].parameters(), strict=True))
    assert not torch.equal(make_probes(both, 6)[3].up.weight, make_probes(both, 5)[3].up.weight)


def test_errors_worked_out_by_hand():
    """Targets (1, 3) and (3, 5), early states (1, 1) and (3, 1), said (1, 2) and (3, 5); the constant is (2, 2).

    Identity: (0 + 4 + 0 + 16) / 4 = 5; probe: 1 / 4; constant: (1 + 1 + 1 + 9) / 4 = 3; mean target (2, 4).
    """
    errors = Errors(2, CPU)
    errors.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]]))
    errors.add(torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 5.0]]))
    found = errors.means(torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert found == {"tokens": 2, "probe": 0.25, "identity": 5.0, "mean": 3.0}
    assert errors.mean_target().tolist() == [2.0, 4.0]


def test_every_tenth_row_is_held_out():
    rows = list(range(37))
    kept, held_out = split_rows(rows, 3)
    assert len(held_out) == 4 and sorted(kept + held_out) == rows and kept == sorted(kept)
    assert split_rows(rows, 3)[1] == held_out != split_rows(rows, 4)[1]
    assert [len(part) for part in split_rows([1, 2], 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2 rows"):
        split_rows([1], 0)


def test_probes_learn_what_the_baselines_cannot(trained):
    """After 40 epochs on nine rows the probes are below both baselines on rows of training, far above chance."""
    folder, config = trained
    assert config["steps"] == 40 * 3 and config["mean_squared_error"].keys() == {"train", "held_out"}
    for layer in ("0", "1"):
        train = config["mean_squared_error"]["train"][layer]
        assert train["probe"] < 0.95 * min(train["mean"], train["identity"])
        assert config["mean_squared_error"]["held_out"][layer]["tokens"] > 0
    assert list(load_probes(folder)) == [0, 1]


def test_the_folder_says_what_the_probes_are_of(trained, tiny_world):
    from llm_unlearn.checkpoints import incompleteness
    from llm_unlearn.models import model_fingerprint

    folder, config = trained
    for key, name in (("model", "model"), ("early_model", "base")):
        assert config[key]["name"] == tiny_world[name]
        assert config[key]["fingerprint"] == model_fingerprint(tiny_world[name])
    assert config["options"] == {
        "learning_rate": 1e-3, "epochs": 40, "batch_size": 4, "max_steps": None, "seed": 42
    }  # fmt: skip
    assert config["max_length"] == 512 and config["data"][0]["rows"] == 10
    assert incompleteness(folder) is None


@pytest.mark.distributed
def test_two_processes_train_what_one_does(tiny_world, tmp_path):
    flags = ["--max_steps", 4, "--learning_rate", "1e-3"]
    assert run(probe_command(tiny_world, tmp_path / "one", *flags)) == 0
    words = probe_command(tiny_world, tmp_path / "two", *flags, "--per_device_train_batch_size", 2)
    outcome = ranks.run(run, words, processes=2)
    assert outcome.codes == [0, 0], outcome
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and one["processes"] == 1
    for part in ("train", "held_out"):
        for layer in ("0", "1"):
            # Sums of float32 in another order; four steps of Adam, whose first ones see signs alone.
            found, expected = (config["mean_squared_error"][part][layer] for config in (two, one))
            assert found == pytest.approx(expected, rel=1e-4)
    moved, off = 0.0, 0.0
    first = load_probe_weights(tmp_path / "one"), load_probe_weights(tmp_path / "two")
    for name, expected in first[0].items():
        moved += float(expected.square().sum())
        off += float((first[1][name] - expected).square().sum())
    assert (off / moved) ** 0.5 < 1e-3


def load_probe_weights(folder):
    return load_file(folder / "layer_1.safetensors")


@pytest.mark.usefixtures("one_cpu_process")
class TestRefusals:
    def refusal(self, words, capsys):
        assert run(words) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    def test_two_models_that_are_none_of_one_family(self, tiny_world, tmp_path, capsys):
        out = tmp_path / "out"
        same = {**tiny_world, "base": tiny_world["model"]}
        assert "is the final model itself" in self.refusal(probe_command(same, out), capsys)
        shutil.copytree(tiny_world["base"], tmp_path / "other")
        path = tmp_path / "other/tokenizer.json"
        told = json.loads(path.read_text())
        told["model"]["merges"] = told["model"]["merges"][:200]
        path.write_text(json.dumps(told))
        other = {**tiny_world, "base": str(tmp_path / "other")}
        assert "have different tokenizers" in self.refusal(probe_command(other, out), capsys)
        assert not out.exists()

    def test_flags_that_cannot_be(self, tiny_world, tmp_path, capsys):
        words = probe_command(tiny_world, tmp_path / "out")
        for flags, expected in (
            (["--layers", "1", "2"], "--layers 1 2: the models have layers 0 to 1"),
            (["--max_steps", "0"], "--max_steps must be at least 1"),
            (["--learning_rate", "0"], "--learning_rate must be above 0"),
            (["--seed", "-1"], "--seed must not be negative"),
            (["--dtype", "bfloat"], "did you mean 'bfloat16'"),
            (["--hub_model_id", "me/it"], "--hub_model_id has no effect without --push_to_hub"),
            (["--layer", "1"], "did you mean '--layers'"),
            (["--forget_data", "absent.jsonl"], "data file 'absent.jsonl' does not exist"),
            (["--domain", "demos"], "did you mean 'demo'"),
        ):
            assert expected in self.refusal([*words, *flags], capsys)
        assert "--early_model_name_or_path is missing" in self.refusal(words[:2], capsys)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
        assert "is not empty; pass --overwrite_output_dir" in self.refusal(words, capsys)

    def test_models_of_other_shapes(self):
        deep = make_model(num_hidden_layers=6)
        with pytest.raises(UserError, match="5 layers of size 32, the final one 6 of size 32"):
            StatePairs(make_model(), deep, [0], CPU)


def test_a_config_file_and_push(tiny_world, tmp_path, monkeypatch, one_cpu_process):
    from llm_unlearn import hub

    pushed = []
    monkeypatch.setattr(hub, "push_checkpoint", lambda *given: pushed.append(given))
    (tmp_path / "probe.yaml").write_text("layers: [1]\nmax_steps: 1\npush_to_hub: true\nhub_model_id: me/probes\n")
    out = tmp_path / "out"
    assert run(["--config", str(tmp_path / "probe.yaml"), *probe_command(tiny_world, out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "layer_1.safetensors", "manifest.json"]
    assert pushed == [(str(out), "me/probes", None, None)]


def test_help_names_every_flag(capsys):
    assert probe_script().main(["--help"]) is None
    said = capsys.readouterr().out
    assert all(
        f"--{name}" in said for name in ("early_revision", "layers", "forget_data", "max_length", "hub_model_id")
    )
