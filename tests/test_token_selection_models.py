"""Selections that ask a model: against transformers' own states, asked once, and the same on several processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from backends import start
from safetensors.torch import load_file, save_file
from test_token_selection_runs import KEYWORDS, counted, forget, record, tokenizer, trainer_of
from test_token_selectors import write_sae
from tiny_world import command, terms

from llm_unlearn import UserError
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.selectors_model import Asker
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.models import load_model

__all__ = ["forget", "tokenizer"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """The default cache is a folder here."""
    monkeypatch.chdir(tmp_path)


def states_by_hand(world, rows, layer):
    """Return {(row, position): (D,)}: hidden states of counted tokens by transformers' own output, row by row."""
    model, found = load_model(world["model"]).eval(), {}
    for number, row in enumerate(rows):
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer + 1][0]
        found |= {(n, t): hidden[t] for n, t in counted(rows) if n == number}
    return found


def selected_by(trainer, forget):
    """Return the set of (row, position) of the whole forget set that a trainer's selection left."""
    numbers = {tuple(row["input_ids"]): number for number, row in enumerate(forget)}
    return {
        (numbers[tuple(row["input_ids"])], t)
        for row in trainer.train_dataset.streams["forget"]
        for t, label in enumerate(row["labels"])
        if label != IGNORED
    }


def test_activation_by_transformers_own_states(tiny_world, tokenizer, forget):
    flags = {"token_selection": "activation", "keywords": "born", "selection_threshold": 0.5, "selection_layer": 0}
    trainer = trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags)
    states = states_by_hand(tiny_world, forget, 0)
    # " born" is one token.
    marked = {(n, t) for n, t in states if tokenizer.decode(forget[n]["input_ids"][t : t + 1]) == " born"}
    direction = torch.stack([states[place] for place in sorted(marked)]).mean(0)
    wanted = {place for place, state in states.items() if torch.cosine_similarity(state, direction, 0) >= 0.5}
    assert marked and wanted >= marked and len(wanted) < len(states)
    assert selected_by(trainer, forget) == wanted
    assert trainer.token_selection["settings"]["layer"] == 0 and not trainer.token_selection["was_cached"]


def test_a_thousand_hits_make_the_prototype(tiny_world, tokenizer, monkeypatch):
    """Of more hits as many are taken, spread evenly; of fewer all."""
    asked = []
    original = Asker.of_policy

    def spy(self):
        asked.append(sum(label != IGNORED for row in self.dataset.streams["forget"] for label in row["labels"][1:]))
        return original(self)

    monkeypatch.setattr(Asker, "of_policy", spy)
    monkeypatch.setattr("llm_unlearn.data.selectors_model.MOST_HITS", 5)
    flags = {"token_selection": "activation", "keywords": "velra", "selection_threshold": 0.5}
    trainer = trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags)
    assert asked == [5, trainer.token_selection["of"]]


def test_a_probe_is_trained_and_selects(tiny_world, tokenizer, forget, tmp_path, capsys):
    """The tokens of the highest logits by transformers' own states; the probe of another model is refused."""
    script = load_script("train_token_probe")
    words = ["--model_name_or_path", tiny_world["model"], "--domain", "custom", "--output_dir", str(tmp_path / "p")]
    words += ["--forget_data", tiny_world["forget"], "--retain_data", tiny_world["retain"], "--use_cpu", "True"]
    script.main([*words, "--layers", "1", "0", "--num_train_epochs", "30"])
    config = json.loads((tmp_path / "p/layer_0/config.json").read_text())
    assert config["layer"] == 0 and config["held_out"]["tokens"] > 20 and config["steps"] == 90
    # A coin is right half the time.
    assert config["held_out"]["accuracy"] > 0.6 and config["held_out"]["f1"] > 0.6

    flags = {"token_selection": "probe", "selection_probe": str(tmp_path / "p/layer_0"), "selection_fraction": 0.3}
    trainer = trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags)
    tensors = load_file(tmp_path / "p/layer_0/probe.safetensors")
    logits = {
        place: float(state @ tensors["weight"] + tensors["bias"])
        for place, state in states_by_hand(tiny_world, forget, 0).items()
    }
    count = -(-3 * len(logits) // 10)
    assert selected_by(trainer, forget) == set(sorted(logits, key=logits.get, reverse=True)[:count])

    other = command({**tiny_world, "model": tiny_world["base"]}, "npo", tmp_path / "out", "--token_selection", "probe")
    assert main([*other, "--selection_probe", str(tmp_path / "p/layer_0")]) == 2
    assert "and this model is another" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--output_dir .* is there already"):
        script.main(words)
    with pytest.raises(UserError, match=r"layer 2 does not exist: the model has layers 0 to 1"):
        script.main([*words, "--layers", "2", "--overwrite_output_dir", "True"])


def load_script(name):
    import importlib.util

    path = Path(__file__).parents[1] / "utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latents_of_an_autoencoder(tiny_world, tokenizer, forget, tmp_path):
    """The counts of two listed latents among the four largest; tokens without any are never kept."""
    size = load_model(tiny_world["model"]).config.hidden_size
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, size, generator=generator), torch.zeros(24)
    folder = write_sae(tmp_path / "sae", {"k": 4}, **{"encoder.weight": weight, "encoder.bias": bias})
    flags = {"token_selection": "sae", "selection_sae": str(folder), "selection_latents": "3,7", "selection_layer": 1}
    trainer = trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), selection_fraction=0.9, **flags)
    model, wanted = load_model(tiny_world["model"]).eval(), set()
    found = []
    # The last layer's output is before the final norm, where transformers' own states are behind it.
    hook = model.model.layers[1].register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    for number, row in enumerate(forget):
        with torch.no_grad():
            model(torch.tensor([row["input_ids"]]))
        hidden = found[-1].reshape(-1, size)
        top = torch.relu(hidden @ weight.T).topk(4).indices
        wanted |= {(n, t) for n, t in counted(forget) if n == number and {3, 7} & set(top[t].tolist())}
    hook.remove()
    assert 0 < len(wanted) < 0.9 * len(counted(forget)) and selected_by(trainer, forget) == wanted
    with pytest.raises(UserError, match=r"--selection_latents '5' selects none"):
        save_file({"encoder.weight": -weight * 0, "encoder.bias": bias - 1}, folder / "sae.safetensors")
        trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **{**flags, "selection_latents": "5"})
    with pytest.raises(UserError, match="layer 9 does not exist"):
        trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **{**flags, "selection_layer": 9})


def test_loss_delta_by_hand(tiny_world, tokenizer, forget, tmp_path, capsys):
    """What the model knows better than the one before it: log p of the one minus log p of the other."""
    flags = {"token_selection": "loss_delta", "selection_reference_model": tiny_world["base"]}
    trainer = trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), selection_fraction=0.25, **flags)
    delta = {}
    models = [load_model(tiny_world[name]).eval() for name in ("model", "base")]
    for number, row in enumerate(forget):
        with torch.no_grad():
            logps = [model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1) for model in models]
        own = [t for n, t in counted(forget) if n == number]
        delta |= {(number, t): float((logps[0] - logps[1])[t - 1, row["input_ids"][t]]) for t in own}
    wanted = set(sorted(delta, key=delta.get, reverse=True)[: -(-len(delta) // 4)])
    assert selected_by(trainer, forget) == wanted
    words = command(tiny_world, "npo", tmp_path / "out", "--token_selection", "loss_delta")
    assert main([*words, "--selection_reference_model", "./nothing"]) == 2
    assert "'./nothing' does not exist" in capsys.readouterr().err


def test_a_reference_model_with_another_tokenizer(tiny_world, tokenizer, tmp_path):
    shutil.copytree(tiny_world["base"], tmp_path / "other")
    told = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocab = told["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(told))
    flags = {"token_selection": "loss_delta", "selection_reference_model": str(tmp_path / "other")}
    with pytest.raises(UserError, match="has another tokenizer than the model"):
        trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags)


# ---- The cache ----


def test_scores_are_asked_once(tiny_world, tokenizer, tmp_path, monkeypatch):
    """The same question at another threshold reads the file; another layer, model or list asks anew."""

    def run(world=tiny_world, threshold=0.6, **changed):
        flags = {"token_selection": "activation", "keywords": "born", "selection_threshold": threshold, **changed}
        return trainer_of(world, tokenizer, read_rows(world["forget"]), **flags).token_selection

    first = run()
    assert not first["was_cached"] and Path(first["cache"]).parent == Path("token_selection")
    assert [path.name for path in Path("token_selection").iterdir()] == [Path(first["cache"]).name]
    for changed in (
        {"selection_layer": 0},
        {"keywords": "kirrin"},
        {"world": {**tiny_world, "model": tiny_world["base"]}},
    ):
        assert not run(**changed)["was_cached"]
    assert len(list(Path("token_selection").iterdir())) == 4
    monkeypatch.setattr(Asker, "of_policy", lambda self: pytest.fail("the model was asked again"))
    again = run()
    assert again == {**first, "was_cached": True}
    assert run(threshold=0.9)["tokens"] < first["tokens"] and run(threshold=0.9)["cache"] == first["cache"]
    # Elsewhere there is nothing yet.
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        run(selection_cache=str(tmp_path / "new"))


def test_broken_caches_are_refused(tiny_world, tokenizer, tmp_path):
    def run():
        flags = {"token_selection": "activation", "keywords": "born", "selection_threshold": 0.6}
        flags["selection_cache"] = str(tmp_path / "cache")
        return trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags).token_selection

    path = Path(run()["cache"])
    scores = load_file(path)["scores"]
    for tensors, key in (({"scores": scores[1:]}, None), ({"scores": scores}, "another question")):
        save_file(tensors, path, metadata={"key": key} if key else None)
        with pytest.raises(UserError, match="are not those that their name says; delete the file"):
            run()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"cannot be read .*; delete the file"):
        run()
    path.unlink()
    assert not run()["was_cached"] and not list((tmp_path / "cache").glob("*.partial"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--selection_cache '.*file' cannot be made: File exists"):
        flags = {"token_selection": "activation", "keywords": "born", "selection_cache": str(tmp_path / "file")}
        trainer_of(tiny_world, tokenizer, read_rows(tiny_world["forget"]), **flags)


# ---- Several processes ----


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend", ["ddp", *(pytest.param(name, marks=pytest.mark.full) for name in ("fsdp2", "zero3"))]
)
@pytest.mark.parametrize("kind", ["activation", pytest.param("loss_delta", marks=pytest.mark.full)])
def test_two_processes_choose_what_one_does(backend, kind, tiny_world, tmp_path):
    """The scores are equal to the last bit, whole models; sharded ones are as near as float32 is."""
    kinds = {
        "activation": ["--keywords", KEYWORDS, "--selection_threshold", "0.5"],
        "loss_delta": ["--selection_reference_model", tiny_world["base"]],
    }
    found = []
    for number, processes in enumerate((1, 2)):
        flags = ["--token_selection", kind, *kinds[kind], "--selection_cache", tmp_path / f"cache{number}"]
        # Batches of three leave the second process without any in the last round.
        flags += ["--per_device_eval_batch_size", "3", "--per_device_train_batch_size", 4 // processes]
        words = command(tiny_world, "grad_diff", tmp_path / str(number), "--max_steps", "2", *flags)
        outcome = start(words, backend if processes > 1 else "ddp", processes)
        assert outcome.codes == [0] * processes, outcome
        (path,) = (tmp_path / f"cache{number}").iterdir()
        found.append((record(tmp_path / str(number)), terms(tmp_path / str(number)), load_file(path)["scores"]))
    (one, one_terms, scores), (two, two_terms, other) = found
    if backend == "ddp":
        assert torch.equal(scores, other) and Path(one["cache"]).name == Path(two["cache"]).name
    else:
        assert torch.allclose(scores, other, atol=1e-5)
    assert {key: value for key, value in one.items() if key != "cache"} == {
        key: value for key, value in two.items() if key != "cache"
    }
    for first, second in zip(one_terms, two_terms, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
