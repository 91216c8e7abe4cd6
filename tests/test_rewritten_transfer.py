"""Rewritten transfer: its objective by hand, pairs that meet in every batch, the loss of a step by a plain loop."""

import json

import pytest
import torch
from backends import BACKENDS, distance, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from test_reference import llama, make_trainer, rows
from tiny_architectures import ARCHITECTURES, DEPTH, make_batch, make_model
from tiny_world import command, terms

from llm_unlearn.activations import capture
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.plan import FILLER, BatchPlan
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.methods.rewritten_transfer import PUBLISHED_LAYERS, PUBLISHED_MLP_LAYERS, at_depth, mlp_outputs
from llm_unlearn.objectives.transfer_rewritten import aligned_transfer

METHOD = "rewritten_transfer"


# ---- The objective ----


def test_the_distance_worked_out_by_hand():
    """Two modules, D = 2, two tokens aligned with tokens 1 and 0 of three.

    Module 1: (1, 2) - (3, 4) has the mean square 4, (0, 0) - (1, 1) has 1. Module 2: (2, 0) - (0, 0) has 2, (1, 1) -
    (1, 3) has 2. The means are 3 and 1.5; the gradient of a state is (h - g) / 2 for two modules of size 2.
    """
    hidden = [torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])]
    others = [
        torch.tensor([[[1.0, 1.0], [3.0, 4.0], [9.0, 9.0]]]),
        torch.tensor([[[1.0, 3.0], [0.0, 0.0], [9.0, 9.0]]]),
    ]
    for states in (*hidden, *others):
        states.requires_grad_()
    loss = aligned_transfer(hidden, others, torch.tensor([[1, 0]]))
    assert loss.tolist() == [[3.0, 1.5]]
    loss.sum().backward()
    assert hidden[0].grad.tolist() == [[[-1.0, -1.0], [-0.5, -0.5]]]
    assert hidden[1].grad.tolist() == [[[1.0, 0.0], [0.0, -1.0]]]
    assert all(states.grad is None for states in others)


def test_equal_states_are_at_distance_zero_and_narrow_ones_are_compared_in_float32():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    alignment = torch.arange(3).expand(2, 3)
    loss = aligned_transfer([hidden], [hidden.clone()], alignment)
    assert loss.dtype == torch.float32 and (loss == 0).all()
    assert (aligned_transfer([hidden], [hidden + 2], alignment) - 4).abs().max() < 0.1


def test_default_layers_stand_at_the_published_shares_of_the_depth():
    assert at_depth(PUBLISHED_LAYERS, 32) == list(PUBLISHED_LAYERS)
    assert at_depth(PUBLISHED_MLP_LAYERS, 32) == list(PUBLISHED_MLP_LAYERS)
    # (l + 1) / 32 of 16 outputs: 1.5, 2.5, 6.5, 10.5, 11.5, 13.5, 14.5, 15.5, rounded up, counted from 0.
    assert at_depth(PUBLISHED_LAYERS, 16) == [1, 2, 6, 10, 11, 13, 14, 15]
    assert at_depth(PUBLISHED_MLP_LAYERS, 16) == [0, 4, 8, 12, 15]
    assert at_depth(PUBLISHED_LAYERS, 2) == [0, 1]


# Falcon adds the attention's result in place, which is then in what was captured.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("mixtral", "mpt", "falcon")])
def test_the_mlp_result_is_what_is_added_to_the_residual_stream(name):
    """With the matrix and its bias zero, nothing of the captured module is left, and it has the size of a state."""
    model = make_model(name).eval()
    (module,) = mlp_outputs(model, [DEPTH - 1])
    assert module in decoder_layers(model)[DEPTH - 1].modules()
    with torch.no_grad(), capture(module) as found:
        model(**make_batch(), use_cache=False)
        assert found[0].numel() == 3 * 13 * 32 and found[0].abs().max() > 0
        for parameter in module.parameters():
            parameter.zero_()
        model(**make_batch(), use_cache=False)
        assert found[0].abs().max() == 0


def test_a_layer_without_one_mlp_result_is_refused():
    with pytest.raises(UserError, match="layer 1 of this model has no MLP output of a known name"):
        mlp_outputs(make_model("mixtral"), [1])
    with pytest.raises(UserError, match="layer 5 does not exist: the model has layers 0 to 4"):
        mlp_outputs(make_model(), [5])


# ---- Pairs meet ----

COUNTS, CUT = st.integers(1, 23), st.integers(1, 4)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(COUNTS, COUNTS, st.integers(0, 99), st.integers(0, 2), CUT, CUT, CUT, st.booleans())
def test_a_paired_stream_has_the_rows_of_its_leader(forget, retain, seed, epoch, batch, world, accumulation, sorts):
    sizes = {"forget": forget, "rewritten": forget, "retain": retain}
    lengths = {name: [(7 * n * (seed + 1)) % 31 for n in range(size)] for name, size in sizes.items()}
    settings_ = dict(world_size=world, accumulation=accumulation, lengths=lengths if sorts else None, window_steps=2)
    plan = BatchPlan(sizes, seed, batch, paired={"rewritten": "forget"}, **settings_)
    without = BatchPlan({"forget": forget, "retain": retain}, seed, batch, **settings_)
    for number in range(len(plan)):
        for rank in range(world):
            found = plan.batch(epoch, number, rank)
            parts = {name: [row for stream, row in found if stream == name] for name in sizes}
            assert parts["forget"] == parts["rewritten"] and len(found) == 3 * batch
            # The streams beside it are what they would be without it.
            rest = without.batch(epoch, number, rank)
            assert [pair for pair in found if pair[0] != "rewritten"] == rest
    visited = plan.visited(len(plan))
    assert visited["forget"] == visited["rewritten"] == list(range(forget))


def test_a_stream_that_pairs_with_nothing_is_ours_to_prevent():
    with pytest.raises(AssertionError):
        BatchPlan({"forget": 3, "rewritten": 4}, 0, 1, paired={"rewritten": "forget"})
    assert BatchPlan({"forget": 3}, 0, 2, paired={"rewritten": "forget"}).batch(0, 1, 0)[-1] == ("forget", FILLER)


# ---- A step ----


def paired_sets(forget=6, retain=9):
    """Token rows with rewrites of other lengths and an alignment that wanders."""
    originals, rewrites = rows(forget, 2), rows(forget, 5, shortest=6)
    for number, (row, rewrite) in enumerate(zip(originals, rewrites, strict=True)):
        length, size = len(row["input_ids"]), len(rewrite["input_ids"])
        row["alignment"] = [max(1, (n * size // length + number) % size) for n in range(length)]
        row["labels"] = [IGNORED, *row["input_ids"][1:]]
    return {"forget": originals, "rewritten": rewrites, "retain": rows(retain, 3)}


def paired_trainer(folder, model=None, data=None, **flags):
    return make_trainer(METHOD, folder, model, data or paired_sets(), **flags)


def expected_terms(model, trainer, numbers):
    """Terms of one step by a loop over rows, alone and unpadded; with the gradient where the loss has one."""
    layers, mlps = trainer.layers_for(trainer.args), at_depth(PUBLISHED_MLP_LAYERS, trainer.depth)
    own = decoder_layers(model)
    modules = [*(own[layer] for layer in layers), *(own[layer].mlp.down_proj for layer in mlps)]
    streams, sums, counts = trainer.train_dataset.streams, dict.fromkeys(("forget", "rewritten"), 0.0), {}

    def run(row):
        with capture(*modules) as found:
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        return [states[0] for states in found], logits

    for number in numbers:
        row, rewrite = streams["forget"][number], streams["rewritten"][number]
        (states, _), (others, logits) = run(row), run(rewrite)
        for t, label in list(enumerate(row["labels"]))[1:]:
            if label != IGNORED:
                target = row["alignment"][t]
                squares = [(h[t] - g[target].detach()).square().mean() for h, g in zip(states, others, strict=True)]
                sums["forget"] = sums["forget"] + sum(squares) / len(squares)
                counts["forget"] = counts.get("forget", 0) + 1
        for t, label in list(enumerate(rewrite["labels"]))[1:]:
            if label != IGNORED:
                sums["rewritten"] = sums["rewritten"] - logits.log_softmax(-1)[t - 1, label]
                counts["rewritten"] = counts.get("rewritten", 0) + 1
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_the_published_loss(accumulation, tmp_path):
    """w = .25 and forget weight 2: the update of SGD is that of 2 * (.25 * transfer + .75 * nll) of a plain loop."""
    flags = {"transfer_weight": 0.25, "forget_weight": 2.0, "retain_loss": "none", "max_steps": 1}
    cut = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = paired_trainer(tmp_path, **flags, **cut)
    plan = trainer.make_plan()
    numbers = [row for n in range(accumulation) for stream, row in plan.batch(0, n, 0) if stream == "forget"]
    model = llama()
    expected = expected_terms(model, trainer, numbers)
    (2 * (0.25 * expected["forget"] + 0.75 * expected["rewritten"])).backward()
    trainer.train()
    log = trainer.state.log_history[0]
    # float32 sums in another order and with padding.
    assert log["loss/forget"] == pytest.approx(expected["forget"].item(), rel=1e-5)
    assert log["loss/rewritten"] == pytest.approx(expected["rewritten"].item(), rel=1e-5)
    assert [name for name in log if name.startswith("loss/")] == ["loss/forget", "loss/rewritten"]
    trained = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter - 0.05 * parameter.grad, trained[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("flag", ["sequential_backward", "gradient_checkpointing"])
def test_what_saves_memory_gives_the_same_update(flag, tmp_path):
    found = []
    for switched in (False, True):
        trainer = paired_trainer(tmp_path / str(switched), **{flag: switched}, retain_loss="kl")
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        logged = [{name: log[name] for name in log if name.startswith("loss/")} for log in logs]
        found.append((logged, dict(trainer.model.named_parameters())))
    assert set(found[0][0][0]) == {"loss/forget", "loss/rewritten", "loss/retain"}
    assert_terms_agree(found[1][0], found[0][0], 1e-5)
    for name, parameter in found[0][1].items():
        # float32 sums in another order; the steps are of 1e-2.
        torch.testing.assert_close(found[1][1][name], parameter, rtol=0, atol=2e-5)


def test_a_schedule_of_the_forget_weight_ramps_both_terms(tmp_path):
    trainer = paired_trainer(tmp_path, forget_schedule="1:0.5", transfer_weight=0.25, forget_weight=4.0)
    trainer.state.global_step, trainer.state.max_steps = 1, 2
    assert [trainer.weight_of(name) for name in ("forget", "rewritten", "retain")] == [0.75, 2.25, 1.0]
    assert trainer.weight_of("rewritten", trainer.args) == 3.0


def test_chosen_layers_are_read(tmp_path):
    assert paired_trainer(tmp_path).layers_for(paired_trainer(tmp_path).args) == (0, 1)
    chosen = paired_trainer(tmp_path, layers=[1], mlp_layers=[0])
    assert chosen.layers_for(chosen.args) == (1,) and chosen.last_layer_for(chosen.args) is None
    with pytest.raises(UserError, match="layer 2 does not exist: the model has layers 0 to 1"):
        paired_trainer(tmp_path, layers=[2]).train()


def test_what_a_regularizer_reads_is_not_compared(tmp_path):
    found = []
    for more in ({}, {"regularizer": ["orthogonality"], "orth_layers": [0]}):
        trainer = paired_trainer(tmp_path / str(len(more)), layers=[1], max_steps=1, **more)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss/forget"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"transfer_weight": 0.0}, "--transfer_weight must lie in"),
        ({"transfer_weight": 1.0}, "--transfer_weight must lie in"),
        ({"forget_weight": 0.0}, "--forget_weight must be above 0"),
        ({"layers": [0, 0]}, "--layers must name at least one layer, and each once"),
        ({"mlp_layers": []}, "--mlp_layers must name at least one layer"),
        ({"retain_loss": "l2"}, "--retain_loss must be nll, kl or none"),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        paired_trainer(tmp_path, **flags)


def test_tokenized_data_without_pairs_are_refused(tmp_path):
    data = paired_sets()
    del data["rewritten"]
    with pytest.raises(UserError, match="needs the column `alignment` and the stream `rewritten`"):
        paired_trainer(tmp_path, data=data)
    data = {**paired_sets(), "forget": rows(6, 2)}
    with pytest.raises(UserError, match="needs the column `alignment`"):
        paired_trainer(tmp_path, data=data)


# ---- The command line ----


def test_rows_without_rewrites_are_refused_before_the_model_is_loaded(tiny_world, tmp_path, capsys, monkeypatch):
    from llm_unlearn import models

    monkeypatch.setattr(models, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    words = command(tiny_world, METHOD, tmp_path / "out", "--forget_data", tiny_world["forget"])
    assert main(words) == 2
    assert "row 1 of the forget set has no column 'rewritten'" in capsys.readouterr().err.strip().split("\n")[-1]
    assert main(command(tiny_world, METHOD, tmp_path / "out", "--question_template", "{question} {answer}")) == 2
    assert "was aligned for another template" in capsys.readouterr().err


def test_a_run_learns_the_rewrites_and_records_the_stream(tiny_world, tmp_path):
    flags = ["--optim", "adamw_torch", "--learning_rate", "2e-3", "--num_train_epochs", "6"]
    assert main(command(tiny_world, METHOD, tmp_path / "out", *flags)) == 0
    logged = terms(tmp_path / "out")
    assert set(logged[0]) == {"loss/forget", "loss/rewritten", "loss/retain"}
    assert logged[-1]["loss/rewritten"] < 0.5 * logged[0]["loss/rewritten"]
    assert logged[-1]["loss/forget"] < 0.7 * logged[0]["loss/forget"]
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["streams"]["rewritten"]["rows"] == record["streams"]["forget"]["rows"] == 10
    assert record["read"]["rows"]["rewritten"] == 10 and list(record["sources"]) == ["forget", "retain"]


def test_memory_is_estimated_with_the_rewrites(tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, METHOD, tmp_path / "out", "--estimate_memory", "24")) == 0
    assert "4 forget + 4 rewritten + 4 retain rows of" in capsys.readouterr().out


def test_tokens_can_be_selected_beside_the_pairs(tiny_world, tmp_path):
    """Only the words of one forget row count: it alone is left, with its rewrite."""
    row = json.loads(open(tiny_world["rewritten"], encoding="utf-8").readline())
    flags = ["--token_selection", "keywords", "--keywords", row["answer"].split(" is ")[0], "--max_steps", "1"]
    assert main(command(tiny_world, METHOD, tmp_path / "out", *flags)) == 0
    streams = json.loads((tmp_path / "out/unlearning.json").read_text())["streams"]
    assert streams["forget"]["rows"] == streams["rewritten"]["rows"] < 10
    assert streams["forget"]["tokens"] < 207 and streams["rewritten"]["tokens"] > 0


def test_an_api_user_passes_rows(tiny_world, demo_tokenizer, tmp_path):
    from llm_unlearn import trainer_class
    from llm_unlearn.data.rows import read_rows
    from llm_unlearn.models import load_model, load_tokenizer

    found = trainer_class(METHOD)
    args = found.args_class(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    data = {name: read_rows(tiny_world[path]) for name, path in (("forget", "rewritten"), ("retain", "retain"))}
    trainer = found(load_model(tiny_world["base"]), args, data, processing_class=load_tokenizer(tiny_world["base"]))
    assert list(trainer.train_dataset.sizes.items()) == [("forget", 10), ("rewritten", 10), ("retain", 13)]
    assert isinstance(trainer.train_dataset, UnlearnDataset)
    with pytest.raises(UserError, match="was aligned for another tokenizer"):
        found(load_model(tiny_world["base"]), args, data, processing_class=demo_tokenizer)


@pytest.fixture(scope="module")
def one_process(tiny_world, tmp_path_factory):
    return train(command(tiny_world, METHOD, tmp_path_factory.mktemp("one") / "out"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend", [name if name == "ddp" else pytest.param(name, marks=pytest.mark.full) for name in BACKENDS]
)
def test_two_processes_with_accumulation_equal_one(backend, tiny_world, one_process, start_weights, tmp_path):
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two = train(command(tiny_world, METHOD, tmp_path / "two", *cut), backend, 2)
    assert_terms_agree(terms(two), terms(one_process), 1e-5)
    assert distance(two, one_process, start_weights) <= UPDATE_TOLERANCE
