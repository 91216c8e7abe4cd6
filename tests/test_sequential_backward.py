"""One stream after the other: the same update with half the activations; and which forwards a step consists of."""

import json

import pytest
import torch
from backends import distance, train
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from test_reference import llama, make_trainer, rows, sets, with_lora
from tiny_world import METHOD_FLAGS, command, each_method, terms

from llm_unlearn import METHODS, trainer_class
from llm_unlearn.data.plan import FILLER, BatchPlan
from llm_unlearn.errors import UserError

SEQUENTIAL = {"sequential_backward": True}
FLAGS = {
    "random_label": {"top_k": 1, "rm_groundtruth": True},
    "ascent_plus_descent": {"positive_ratio": 2, "positive_factor": 0.5},
    "npo_kl": {"retain_loss": "kl"},
    "grad_diff_kl": {"retain_loss": "kl"},
    "rmu": {"layer": 1, "steering_coef": 2.0, "retain_weight": 5.0},
    "circuit_breakers": {"retain_loss": "kl", "regularizer": ["max_entropy"], "retain_schedule": "constant"},
    "tuned_lens": {"lens_path": "logit", "retain_schedule": "constant"},
    "pdu": {"retain_bound": 0.5},
    "l1_sparse": {"l1_coef": 1e-6},
    "sequential": {"end_layer": 0, "layer_step": 1, "retain_schedule": "constant"},
}
# They need a teacher, a probe, or columns that token rows do not have: their own tests ask the same of them.
ELSEWHERE = {"checkpoint_transfer", "probe_unlearn", "rewritten_transfer", "po", "dpo", "idk_dpo", "alt_po"}
# Likelihoods of the same forward as grad_diff's, weighed otherwise.
WEIGHTED = {"wga", "satimp", "ceu", "undial", "pdu", "kl"}
INSIDE = ["rmu", "circuit_breakers", "tuned_lens", "sequential", "max_entropy"]
"""Methods whose losses are read inside the network, or at all tokens' whole distributions."""
TWO_STREAMS = [
    "ascent_plus_descent",
    "ascent_plus_kl_divergence",
    "grad_diff",
    "grad_diff_kl",
    "npo",
    "npo_kl",
    "simnpo",
]


def trainer_of(case, folder, model=None, data=None, **flags):
    return make_trainer(case.removesuffix("_kl"), folder, model, data, **{**FLAGS.get(case, {}), **flags})


def trained(case, folder, model=None, **flags):
    """Train; returns (logged terms by step, {name: update})."""
    trainer = trainer_of(case, folder, model, **flags)
    start = {name: part.detach().clone() for name, part in trainer.model.named_parameters()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logged = [{name: log[name] for name in log if name.startswith("loss") or name == "grad_norm"} for log in logs]
    return logged, {name: part.detach() - start[name] for name, part in trainer.model.named_parameters()}


def assert_same_update(found, expected):
    norm = torch.stack([part.norm() for part in expected.values()]).norm()
    difference = torch.stack([(found[name] - part).norm() for name, part in expected.items()]).norm()
    # float32 sums in another order, as in test_equivalence.
    assert norm > 1e-3 and difference <= UPDATE_TOLERANCE * norm


@pytest.mark.parametrize("clipping", [0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", TWO_STREAMS)
def test_the_update_is_that_of_the_joint_backward(case, accumulation, clipping, tmp_path):
    """Six rows in steps of four: the last step is short, and its second micro-batch has fillers."""
    flags = {
        "per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation,
        "max_grad_norm": clipping, "num_train_epochs": 2,
    }  # fmt: skip
    joint_terms, joint = trained(case, tmp_path / "joint", **flags)
    found_terms, found = trained(case, tmp_path / "sequential", **SEQUENTIAL, **flags)
    assert_terms_agree(found_terms, joint_terms, 1e-5)
    assert len(joint_terms) == 4 and {"loss", "loss/forget", "loss/retain", "grad_norm"} <= set(joint_terms[0])
    # The clipped steps are clipped: a norm that was taken after one stream alone would be another.
    assert all(log["grad_norm"] > 0.5 for log in joint_terms)
    assert_same_update(found, joint)


@pytest.mark.parametrize("case", INSIDE)
def test_inside_the_network_too(case, tmp_path):
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    joint_terms, joint = trained(case, tmp_path / "joint", **flags)
    found_terms, found = trained(case, tmp_path / "sequential", **SEQUENTIAL, **flags)
    assert_terms_agree(found_terms, joint_terms, 1e-5)
    assert_same_update(found, joint)


@pytest.mark.parametrize("case", ["npo_kl", "ascent_plus_descent"])
def test_with_adapters(case, tmp_path):
    joint_terms, joint = trained(case, tmp_path / "joint", with_lora(llama()))
    found_terms, found = trained(case, tmp_path / "sequential", with_lora(llama()), **SEQUENTIAL)
    assert_terms_agree(found_terms, joint_terms, 1e-5)
    assert_same_update(found, joint)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend, method, accumulation",
    [("ddp", "npo", 2), ("fsdp2", "grad_diff", 2), ("zero2", "npo", 2), ("zero3", "grad_diff", 1)],
)
def test_on_two_processes(backend, method, accumulation, tiny_world, start_weights, tmp_path):
    """Against the joint backward on one process; DDP reduces once a step, DeepSpeed steps once."""
    extra = ["--retain_loss", "kl", "--num_train_epochs", "2"]
    expected = train(command(tiny_world, method, tmp_path / "one", *extra))
    shape = ["--per_device_train_batch_size", 2 // accumulation, "--gradient_accumulation_steps", accumulation]
    words = command(tiny_world, method, tmp_path / "two", *extra, *shape, "--sequential_backward", "True")
    found = train(words, backend, processes=2)
    assert_terms_agree(terms(found), terms(expected), 1e-5)
    assert distance(found, expected, start_weights) <= UPDATE_TOLERANCE
    assert json.loads((found / "unlearning.json").read_text())["flags"]["sequential_backward"] is True


def saved_bytes(trainer):
    """Return the most bytes of tensors that were saved for a backward at any one time of a step."""
    live, peak, model = {}, 0, trainer.model
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    class Saved:
        def __init__(self, tensor):
            self.tensor, self.place = tensor, tensor.untyped_storage().data_ptr()
            count, size = live.get(self.place, (0, tensor.untyped_storage().nbytes()))
            live[self.place] = count + 1, size

        def __del__(self):
            count, size = live.pop(self.place)
            if count > 1:
                live[self.place] = count - 1, size

    def pack(tensor):
        nonlocal peak
        if tensor.untyped_storage().data_ptr() in known:
            return tensor
        saved = Saved(tensor)
        peak = max(peak, sum(size for _, size in live.values()))
        return saved

    original = trainer.compute_loss

    def watched(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: getattr(kept, "tensor", kept)):
            return original(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    return peak


@pytest.mark.parametrize("case", TWO_STREAMS)
def test_the_activations_are_those_of_one_stream(case, tmp_path):
    """Forget and retain rows of one length: half of them are alive at once (positive_ratio 2: two thirds).

    What is saved besides, rotary angles and masks for example, does not depend on the rows: 5% are allowed for it.
    """
    data = {name: [{**row, "input_ids": [5] * 30, "labels": [5] * 30} for row in part] for name, part in sets().items()}
    joint = saved_bytes(trainer_of(case, tmp_path / "joint", data=data, max_steps=1))
    found = saved_bytes(trainer_of(case, tmp_path / "sequential", data=data, max_steps=1, **SEQUENTIAL))
    share = 2 / 3 if case == "ascent_plus_descent" else 1 / 2
    assert share * 0.95 < found / joint < share * 1.05 and joint > 1e5


# ---- Which forwards ----


def forwards_of(trainer):
    """Return the list that a training run fills with (has gradients, input ids) of each forward of the model."""
    found = []

    def watch(_module, _args, kwargs):
        found.append((torch.is_grad_enabled(), kwargs["input_ids"]))

    trainer.reader.language_model.register_forward_pre_hook(watch, with_kwargs=True)
    return found


def all_cases():
    found = [case for case in each_method() if case.values[0] not in ELSEWHERE]
    return [*found, pytest.param("npo_kl"), pytest.param("grad_diff_kl")]


def probes(trainer):
    """Whether the head is looked at once: where it is there."""
    return trainer.last_layer_for(trainer.args) is None


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", all_cases())
def test_a_micro_batch_is_one_forward_of_the_policy(case, lora, tmp_path):
    """Once at the start a short one looks at the head; a reference that is the policy costs one more a step."""
    if lora and case == "l1_sparse":
        pytest.skip("l1_sparse refuses adapters")
    model = with_lora(llama()) if lora else None
    trainer = trainer_of(case, tmp_path, model, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    if trainer._frozen_reference is not None:
        trainer._frozen_reference.prepare()
    forwards = forwards_of(trainer)
    trainer.train()
    batches = len(trainer.plan)
    assert [has_gradients for has_gradients, _ in forwards].count(True) == batches >= 6
    asks = trainer._frozen_reference is not None and trainer._frozen_reference.mode == "adapter_off"
    assert len(forwards) == batches + probes(trainer) + (batches if asks else 0)


@pytest.mark.parametrize("case", all_cases())
def test_a_rank_of_fillers_alone_runs_the_same_forwards(case, tmp_path):
    """Four forget rows over two ranks of four: the second rank has nothing but fillers.

    The collectives of a sharded model come with its forwards and its gradients: one more or fewer would hang.
    """
    found, kinds, data = [], [], {"forget": rows(4, 2), "retain": rows(4, 3)}
    for rank in range(2):
        trainer = trainer_of(case, tmp_path, data=data)
        dataset, ratio = trainer.train_dataset, trainer.rows_per_anchor()
        batch = BatchPlan(dataset.sizes, 42, 4, 2, rank, ratio).batch(0, 0, rank)
        kinds.append({row == FILLER for _, row in batch})
        if trainer._frozen_reference is not None:
            trainer._frozen_reference.prepare()
        forwards = forwards_of(trainer)
        for _ in range(2):
            inputs = trainer.data_collator([dataset[key] for key in batch])
            trainer.compute_loss(trainer.model.train(), inputs).backward()
            trained = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
            found.append(([has_gradients for has_gradients, _ in forwards], trained))
            forwards.clear()
    assert kinds == [{False}, {True}]
    assert found[0] == found[2] and found[1] == found[3]
    # Outside `train` the model is whole, and its head is read.
    assert found[0][0] == [False, True] and found[1][0] == [True]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    "case, weight",
    [(case, weight) for case in ("grad_diff", "grad_diff_kl", "simnpo", "npo") for weight in ("forget", "retain")]
    + [("ascent_plus_kl_divergence", "retain"), ("ascent_plus_kl_divergence", "forget")],
)
def test_a_term_of_weight_zero_is_not_read(case, weight, sequential, tmp_path):
    """Counted by the tokens that go through the model: those of the other stream, and no row of this one."""
    flags = {f"{weight}_weight": 0.0, "max_steps": 1, "sequential_backward": sequential}
    # Token 1 marks rows of the forget set, token 2 of the retain set.
    data = sets()
    for mark, part in zip((1, 2), data.values(), strict=True):
        for row in part:
            row["input_ids"] = [mark, *row["input_ids"][1:]]
    trainer = trainer_of(case, tmp_path, data=data, **flags)
    if trainer._frozen_reference is not None:
        trainer._frozen_reference.prepare()
    forwards = forwards_of(trainer)
    trainer.train()
    ids = [ids for has_gradients, ids in forwards if has_gradients]
    assert len(ids) == 1 and {row[0].item() for row in ids[0]} == {2 if weight == "forget" else 1}
    assert [set(log) & {"loss/forget", "loss/retain"} for log in trainer.state.log_history if "loss" in log] == [
        {"loss/retain" if weight == "forget" else "loss/forget"}
    ]


@pytest.mark.parametrize("case", ["grad_diff", "npo", "simnpo", "ascent_plus_descent", "ascent_plus_kl_divergence"])
def test_two_weights_of_zero_are_refused(case, tmp_path):
    with pytest.raises(UserError, match="--forget_weight and --retain_weight are 0, so that nothing would be trained"):
        trainer_class(case).args_class(output_dir=str(tmp_path), forget_weight=0.0, retain_weight=0.0, use_cpu=True)


@pytest.mark.parametrize("case", ["grad_diff", "npo", "simnpo"])
def test_a_forget_weight_of_zero_without_a_retain_term_is_refused(case, tmp_path):
    """Nothing would be trained here either."""
    with pytest.raises(UserError, match="nothing would be trained"):
        trainer_of(case, tmp_path, forget_weight=0.0, retain_loss="none").train()


def test_every_method_with_two_streams_is_tested():
    cases = {case.removesuffix("_kl") for case in TWO_STREAMS}
    two = {name for name in METHODS if len(trainer_class(name).streams) == 2 and name not in ELSEWHERE}
    assert two - set(INSIDE) - WEIGHTED == cases
    assert set(METHOD_FLAGS) == set(METHODS)
