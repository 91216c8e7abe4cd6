"""Maximum entropy: the objectives by hand, its three forms in training, and random targets under a seed."""

import json
import math

import pytest
import torch
from backends import BACKENDS, distance, train
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree, runs
from tiny_world import command, terms, weights

from llm_unlearn.chunked_head import Projection
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.methods.max_entropy import MaxEntropyArguments, MaxEntropyTrainer
from llm_unlearn.objectives.entropy import max_entropy, random_target, uniform_cross_entropy

# Shapes: B sequences, T tokens, N positions, V vocabulary.

FORMS = {"exact": [], "random_target": ["--form", "random_target"], "top_k": ["--form", "top_k", "--top_k", "7"]}


# ---- The objectives ----


def test_terms_by_hand():
    """p = (1/4, 3/4): the exact form is (ln 4 - ln(3) / 2) / ln 2; a label of probability 1/4 costs ln 4 / ln 2."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    exact = max_entropy(uniform_cross_entropy(logits), 2)
    assert exact.item() == pytest.approx(2 - math.log(3) / (2 * math.log(2)), rel=1e-14)
    drawn = random_target(logits.log_softmax(-1), 2)
    assert drawn[0].tolist() == pytest.approx([2.0, 2.0 - math.log(3) / math.log(2)], rel=1e-14)


@pytest.mark.parametrize("size", [2, 3, 50])
def test_a_uniform_distribution_is_1_in_every_form(size):
    logits = torch.zeros(4, size)
    labels = logits.log_softmax(-1)[:, 0]
    found = [max_entropy(uniform_cross_entropy(logits), size), random_target(labels, size)]
    found.append(max_entropy(uniform_cross_entropy(logits, top_k=2), 2))
    torch.testing.assert_close(torch.stack(found), torch.ones(3, 4), rtol=3e-7, atol=0)


def test_the_exact_form_is_the_mean_over_all_random_targets_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 13, generator=generator, dtype=torch.float64).requires_grad_()
    mean = random_target(logits.log_softmax(-1), 13).mean(-1)
    exact = max_entropy(uniform_cross_entropy(logits), 13)
    torch.testing.assert_close(exact, mean)
    assert (exact > 1).all()
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (exact, mean)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], (logits.softmax(-1) - 1 / 13).detach() / math.log(13))


def test_a_sure_distribution_keeps_its_gradient_where_entropy_loses_it():
    """The likeliest token is pushed down by nearly 1 / ln V; the entropy's own gradient has all but vanished."""
    logits = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(max_entropy(uniform_cross_entropy(logits), 3).sum(), logits)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    (vanished,) = torch.autograd.grad(entropy, logits)
    assert found[0, 0].item() == pytest.approx((1 - 1 / 3) / math.log(3)) and vanished.abs().max() < 1e-10


def test_what_does_not_count_stays_0():
    assert max_entropy(torch.zeros(2, 3), 7).eq(0).all() and random_target(torch.zeros(2, 3), 7).eq(0).all()


# ---- Refusals ----


@pytest.mark.parametrize(
    "given, said",
    [
        ({"form": "topk"}, "--form must be exact, random_target or top_k, but is 'topk'"),
        ({"top_k": 5}, "--top_k has no effect with --form exact; pass --form top_k"),
        ({"form": "random_target", "top_k": 5}, "--top_k has no effect with --form random_target"),
        ({"form": "top_k", "top_k": 1}, "--top_k must be at least 2, but is 1"),
        ({"regularizer": ["max_entropy"]}, "--regularizer max_entropy is what max_entropy does by itself"),
    ],
)
def test_bad_flags_are_refused(given, said, one_cpu_process):
    with pytest.raises(UserError, match=said):
        MaxEntropyArguments(output_dir="out", **given)


def test_top_k_takes_the_published_number(one_cpu_process):
    assert MaxEntropyArguments(output_dir="out", form="top_k").top_k == 100
    assert MaxEntropyArguments(output_dir="out").top_k is None


def test_more_tokens_than_the_model_has_are_refused(tiny_world, tmp_path, capsys):
    words = command(tiny_world, "max_entropy", tmp_path / "out", "--form", "top_k", "--top_k", 100_000)
    assert main(words) == 2
    assert "--top_k 100000 is more than the model's" in capsys.readouterr().err


# ---- In training ----


def forget_logits(tiny_world):
    """[(T, V) logits that predict the answer tokens of a forget row under the start model] by a plain loop, and V."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_world["model"]).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_world["model"]), []
    with open(tiny_world["forget"], encoding="utf-8") as file:
        for row in map(json.loads, file):
            prompt = f"Question: {row['question']}\nAnswer: "
            encoded = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
            ids = [*encoded["input_ids"], tokenizer.eos_token_id]
            counts = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1]
            found.append(logits[torch.tensor(counts[1:])])
    return torch.cat(found), model.config.vocab_size


@pytest.mark.parametrize("form", ["exact", "top_k"])
def test_the_first_term_is_that_of_the_start_model(form, tiny_world, tmp_path):
    """All forget rows are in the one step, so that the term is a mean over all answer tokens."""
    flags = [*FORMS[form], "--max_steps", 1, "--per_device_train_batch_size", 10]
    assert main(command(tiny_world, "max_entropy", tmp_path / "out", *flags)) == 0
    logits, vocabulary = forget_logits(tiny_world)
    chosen = logits if form == "exact" else logits.sort(-1, descending=True).values[:, :7]
    expected = -chosen.log_softmax(-1).mean() / math.log(vocabulary if form == "exact" else 7)
    # Rows of another padding: float32 sums in another order.
    assert terms(tmp_path / "out")[0]["loss/forget"] == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 1.2


@pytest.mark.parametrize("form", FORMS)
def test_every_form_flattens_the_forget_distributions_and_keeps_the_retain_set(form, tiny_world, tmp_path):
    """The forget term comes down toward 1; the retain NLL, 0.04 at the start, stays below 0.4 nats."""
    flags = [*FORMS[form], "--optim", "adamw_torch", "--learning_rate", "1e-3", "--num_train_epochs", "8"]
    flags += ["--retain_weight", "5", "--per_device_train_batch_size", "10"]
    assert main(command(tiny_world, "max_entropy", tmp_path / "out", *flags)) == 0
    logged = terms(tmp_path / "out")
    assert 1 < logged[-1]["loss/forget"] < 0.75 * logged[0]["loss/forget"]
    assert logged[0]["loss/retain"] < 0.1 and logged[-1]["loss/retain"] < 0.4


def test_the_exact_form_makes_each_logit_once(tiny_world, tmp_path, monkeypatch):
    """Its loss is one number times each token's value, which spares the backward the logits."""
    made, original = [], Projection.logits
    monkeypatch.setattr(
        Projection, "logits", lambda self, hidden, *rest: (made.append(len(hidden)), original(self, hidden, *rest))[1]
    )
    assert main(command(tiny_world, "max_entropy", tmp_path / "out", "--retain_loss", "none")) == 0
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert sum(made) == len(forget_logits(tiny_world)[0]) > 0 and record["streams"]["forget"]["rows"] == 10


@pytest.mark.parametrize("form", ["exact", "random_target"])
def test_one_stream_after_the_other_is_the_same(form, tiny_world, start_weights, tmp_path):
    found = {}
    for sequential in (False, True):
        folder = tmp_path / str(sequential)
        flags = [*FORMS[form], "--retain_loss", "kl", "--sequential_backward", str(sequential)]
        assert main(command(tiny_world, "max_entropy", folder, *flags)) == 0
        found[sequential] = folder
    assert_terms_agree(terms(found[True]), terms(found[False]), 1e-5)
    assert distance(found[True], found[False], start_weights) < UPDATE_TOLERANCE


def test_a_forget_weight_of_0_leaves_the_retain_term(tiny_world, tmp_path):
    assert main(command(tiny_world, "max_entropy", tmp_path / "out", "--forget_weight", 0, "--max_steps", 1)) == 0
    assert set(terms(tmp_path / "out")[0]) == {"loss/retain"}


# ---- Random targets ----


@pytest.fixture
def drawing():
    """Function of (row numbers, step, seed) that returns the labels drawn for rows of 3 and of 5 tokens."""

    def draw(numbers, step=0, seed=7):
        lengths = {0: 3, 1: 5, 2: 5}
        rows = [
            {"input_ids": [4] * lengths[n], "labels": [IGNORED, *[4] * (lengths[n] - 1)], "index": n} for n in numbers
        ]
        trainer = MaxEntropyTrainer.__new__(MaxEntropyTrainer)
        trainer.args, trainer.vocabulary = MaxEntropyArguments.__new__(MaxEntropyArguments), 1000
        trainer.args.seed = seed
        trainer.state = type("State", (), {"global_step": step})
        stream = UnlearnCollator().pad(rows)
        found = trainer._with_random_targets(stream)
        assert torch.equal(found["labels"] == IGNORED, stream["labels"] == IGNORED)
        assert torch.equal(stream["labels"], UnlearnCollator().pad(rows)["labels"])
        return {n: labels[labels != IGNORED].tolist() for n, labels in zip(numbers, found["labels"], strict=True)}

    return draw


def test_targets_depend_on_the_seed_the_row_and_the_step_alone(drawing):
    first = drawing([0, 1, 2])
    assert drawing([1, 0]) == {n: first[n] for n in (1, 0)} and drawing([0]) == {0: first[0]}
    assert len(first[0]) == 2 and len(first[1]) == 4 and first[1] != first[2]
    assert drawing([1], step=1) != {1: first[1]} and drawing([1], seed=8) != {1: first[1]}
    assert all(0 <= label < 1000 for labels in first.values() for label in labels)


def test_random_targets_are_the_same_however_a_step_is_cut(tiny_world, start_weights, tmp_path):
    found = runs(tiny_world, "max_entropy", tmp_path, *FORMS["random_target"], shapes={"1x4": (4, 1), "4x1": (1, 4)})
    assert_terms_agree(found["4x1"][0], found["1x4"][0], 1e-5)
    forget = [log["loss/forget"] for log in found["1x4"][0]]
    assert len(set(forget)) == len(forget)


def test_random_targets_are_drawn_again_in_a_resumed_run(tiny_world, tmp_path):
    import shutil

    flags = [*FORMS["random_target"], "--save_strategy", "steps", "--save_steps", "1"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(command(tiny_world, "max_entropy", whole, *flags)) == 0
    shutil.copytree(whole, part)
    for number in (2, 3):
        shutil.rmtree(part / f"checkpoint-{number}")
    assert main(command(tiny_world, "max_entropy", part, *flags, "--resume_from_checkpoint", "auto")) == 0
    assert terms(part) == terms(whole) and len(terms(whole)) == 3
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(part).items())


# ---- On shards ----


def cells():
    """(form, backend): one unmarked run under ZeRO-3."""
    for form in FORMS:
        for backend in BACKENDS:
            marks = [] if (form, backend) == ("top_k", "zero3") else [pytest.mark.full]
            yield pytest.param(form, backend, marks=[pytest.mark.distributed, *marks], id=f"{form}-{backend}")


@pytest.mark.parametrize("form, backend", cells())
def test_two_processes_equal_one(form, backend, tiny_world, start_weights, tmp_path):
    one = tmp_path / "one"
    assert main(command(tiny_world, "max_entropy", one, *FORMS[form])) == 0
    cut = [*FORMS[form], "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    two = train(command(tiny_world, "max_entropy", tmp_path / "two", *cut), backend, 2)
    assert_terms_agree(terms(two), terms(one), 1e-5)
    assert distance(two, one, start_weights) < UPDATE_TOLERANCE
