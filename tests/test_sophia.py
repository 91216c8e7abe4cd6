"""Second-order steps: by hand, the published one to the letter, however a step is cut, on any backend, and resumed."""

import json
import shutil

import pytest
import torch
from backends import start, train
from ranks import ROOT
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from test_reference import llama, make_trainer, sets
from test_resume import BY_TWO, SAVING, assert_same_checkpoint, bit_equal, history
from tiny_world import command, terms, update_distance, weights
from transformers import TrainerCallback, TrainingArguments

from llm_unlearn import NPOTrainer
from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.influence import InfluenceStep
from llm_unlearn.addons.mask_files import write_mask
from llm_unlearn.addons.optimizers import stepping_optimizer
from llm_unlearn.addons.sophia import EPSILON, LegacySophia, Sophia
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.errors import UserError
from llm_unlearn.memory.optimizers import optimizer_memory
from llm_unlearn.models import model_fingerprint
from llm_unlearn.optimizer_flags import OPTIMIZERS, TAKES
from llm_unlearn.resuming import require_same_run

DEFAULT_OPTIM = TrainingArguments.__dataclass_fields__["optim"].default
OWN = ["--optim", DEFAULT_OPTIM, "--max_grad_norm", "1", "--learning_rate", "1e-4", "--unlearn_optimizer"]
# The curvature is large enough beside rho for some of the steps not to be clipped.
SOPHIA = [*OWN, "sophia", "--sophia_rho", "10", "--hessian_interval", "2"]
KINDS = {
    "gnb": SOPHIA,
    "hutchinson": [*SOPHIA, "--hessian_estimator", "hutchinson"],
    "empirical_fisher": [*SOPHIA, "--hessian_estimator", "empirical_fisher"],
    "soul_legacy": [*OWN, "soul_legacy"],
    "influence": [*OWN, "influence", "--influence_draws", "2", "--max_steps", "1"],
}
# A step of the sign's size where a gradient is nearly 0 depends on its rounding, and differences of gradients lose four
# digits: measured 1e-4 and 4e-4.
TOLERANCES = {"hutchinson": 10 * UPDATE_TOLERANCE}


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor(part, dtype=torch.float64)) for part in values]


def step(optimizer, gradients):
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()


# ---- By hand ----


def test_three_steps_of_the_published_code():
    """f = (x^2 + y^2) / 2 from (1, 0.01), lr 0.1, weight decay 0.5, betas (0.9, 0.95), rho 0.04: g = (x, y).

        m <- 0.81 m + 0.19 g,  h <- 0.95 h + 0.05 g^2,  theta <- 0.95 theta - 0.1 * sign(m) * min(1, |m| / 204.8 h)

    Step 1: g = (1, 0.01), m = (0.19, 0.0019), h = (0.05, 5e-6), ratios 0.0185546875 and 1.86, which is clipped.
    Step 2: g = (0.94814, -0.0905), m = (0.33405, -0.015656), h = (0.092449, 4.142625e-4), ratios 0.017643, -0.184534.
    Step 3: g = (0.89897, -0.067522), ratios 0.016807 and -0.200420.
    """
    (theta,) = parameters([1.0, 0.01])
    optimizer = LegacySophia([theta], lr=0.1, weight_decay=0.5)
    shares = []
    for expected in (
        [0.94814453125, -0.0905],
        [0.8989729883226067, -0.06752164916568623],
        [0.8523436687110095, -0.04410353152210772],
    ):
        optimizer.reset_clipped()
        step(optimizer, [theta.tolist()])
        assert theta.tolist() == pytest.approx(expected, rel=1e-12)
        shares.append(optimizer.clipped().tolist())
    assert shares == [[1, 2], [0, 2], [0, 2]]
    state = optimizer.state[theta]
    assert state["exp_avg"].tolist() == pytest.approx([0.4413833111406703, -0.025510473341480384], rel=1e-12)
    assert state["hessian"].tolist() == pytest.approx([0.1282340791632998, 0.0006215080303027008], rel=1e-12)


def test_three_steps_of_sophia_by_hand():
    """lr 0.1, betas (0.5, 0.5), rho 0.5, no decay, from (1, 1).

    Step 1, estimate (4, 0): h = (2, 0); g = (1, -3), m = (0.5, -1.5); ratios 0.5 / 1 and -1.5 / 1e-12, clipped.
    Step 2, no estimate:     h = (2, 0); g = (1, 1),  m = (0.75, -0.25); ratios 0.75 and -1 again.
    Step 3, estimate (0, -1): h = (1, -0.5); g = (0, 0.65), m = (0.375, 0.2); ratios 0.75 and 1: no positive curvature.
    """
    (theta,) = parameters([1.0, 1.0])
    optimizer = Sophia([theta], lr=0.1, betas=(0.5, 0.5), rho=0.5)
    optimizer.take_estimate(theta, torch.tensor([4.0, 0.0]))
    step(optimizer, [[1.0, -3.0]])
    assert theta.tolist() == pytest.approx([0.95, 1.1])
    step(optimizer, [[1.0, 1.0]])
    assert theta.tolist() == pytest.approx([0.875, 1.2])
    optimizer.take_estimate(theta, torch.tensor([0.0, -1.0]))
    step(optimizer, [[0.0, 0.65]])
    assert theta.tolist() == pytest.approx([0.8, 1.1])
    assert optimizer.clipped().tolist() == [3, 6]


def test_the_squared_gradient_is_taken_in_where_it_is_the_estimate():
    """B = 8, g = (0.5, 2): h = 0.5 * 8 * g^2 = (1, 16), from the very step on; the one after keeps it."""
    (theta,) = parameters([0.0, 0.0])
    optimizer = Sophia([theta], lr=0.1, betas=(0.0, 0.5), rho=1.0)
    optimizer.fisher_tokens = 8.0
    step(optimizer, [[0.5, 2.0]])
    assert theta.tolist() == pytest.approx([-0.05, -0.0125])
    optimizer.fisher_tokens = None
    step(optimizer, [[0.5, 2.0]])
    assert optimizer.state[theta]["hessian"].tolist() == [1, 16] and theta.tolist() == pytest.approx([-0.1, -0.025])


@pytest.mark.parametrize("kind", [Sophia, LegacySophia])
def test_only_what_has_a_gradient_moves_and_decays(kind):
    """A gradient of 0 leaves weight decay alone, theta * (1 - 0.1 * 0.5); none leaves everything."""
    first, second = parameters([2.0, -0.0], [2.0])
    optimizer = kind([first, second], lr=0.1, weight_decay=0.5)
    step(optimizer, [[0.0, 0.0], None])
    assert first.tolist() == [2 * 0.95, -0.0] and second.tolist() == [2.0] and second not in optimizer.state
    assert optimizer.decoupled_decay and optimizer.clipped().tolist() == [0, 2]


def test_the_largest_step_is_lr_and_the_smallest_curvature_divides_by_the_floor():
    (theta,) = parameters([0.0, 0.0, 0.0])
    optimizer = Sophia([theta], lr=0.25, betas=(0.0, 0.0), rho=1.0)
    step(optimizer, [[1e9, -EPSILON / 2, 0.0]])
    assert theta.tolist() == [-0.25, 0.125, 0.0]


def test_the_influence_step_by_hand():
    """h = (3, -2, 1), the mean of two estimates: mean of max(h, 0) = 4 / 3, damping 0.75 makes lambda 1; lr 2.

    theta = 1 - 2 * (4, 4, -6) / (3 + 1, 0 + 1, 1 + 1) = (-1, -7, 7).
    """
    (theta,) = parameters([1.0, 1.0, 1.0])
    optimizer = InfluenceStep([theta], lr=2.0, damping=0.75)
    for estimate in ([4.0, -4.0, 2.0], [2.0, 0.0, 0.0]):
        optimizer.take_estimate(theta, torch.tensor(estimate), share=0.5)
    total, count = optimizer.sums().tolist()
    assert (total, count) == (4.0, 3.0)
    optimizer.damping_mean = total / count
    step(optimizer, [[4.0, 4.0, -6.0]])
    assert theta.tolist() == pytest.approx([-1.0, -7.0, 7.0])


# ---- In a trainer ----


class Watch(TrainerCallback):
    """Keeps what an optimizer that is ours held and did at each step."""

    def __init__(self, trainer):
        self.trainer, self.curvatures, self.gradients, self.weights = trainer, [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.weights.append([p.detach().clone() for p in self.trainer.model.parameters()])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append([p.grad.clone() for p in self.trainer.model.parameters()])

    def on_optimizer_step(self, args, state, control, **kwargs):
        state = stepping_optimizer(self.trainer.optimizer).state
        self.curvatures.append([state[p]["hessian"].clone() for p in self.trainer.model.parameters()])


def watched(method, folder, **flags):
    flags = {"optim": DEFAULT_OPTIM, "learning_rate": 1e-4, **flags}
    trainer = make_trainer(method, folder, **flags)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    watch.weights.append([p.detach().clone() for p in trainer.model.parameters()])
    return trainer, watch


def test_the_curvature_changes_every_so_many_steps(tmp_path):
    flags = {"unlearn_optimizer": "sophia", "hessian_interval": 3, "num_train_epochs": 4}
    _, watch = watched("grad_diff", tmp_path, **flags)
    changes = [
        any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
        for old, new in zip(watch.curvatures, watch.curvatures[1:], strict=False)
    ]
    assert changes == [False, False, True, False, False, True, False]
    assert any(part.any() for part in watch.curvatures[0])


def test_the_trainers_step_is_sophias(tmp_path):
    """m = 0.035 g after the first step; a share of its steps is clipped, which the log says."""
    trainer, watch = watched("grad_diff", tmp_path, unlearn_optimizer="sophia", sophia_rho=5.0, max_steps=1)
    clipped = count = 0
    for before, after, gradient, curvature in zip(
        watch.weights[0], watch.weights[-1], watch.gradients[0], watch.curvatures[0], strict=True
    ):
        ratio = 0.035 * gradient / (5.0 * curvature).clamp(min=EPSILON)
        torch.testing.assert_close(after, before - 1e-4 * ratio.clamp(-1, 1), rtol=0, atol=2e-8)
        clipped, count = clipped + int((ratio.abs() >= 1).sum()), count + ratio.numel()
    (line,) = [log for log in trainer.state.log_history if "loss" in log]
    assert 0.05 < clipped / count < 0.95 and line["optimizer/clipped_share"] == pytest.approx(clipped / count, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["gnb", "empirical_fisher", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("hutchinson", "influence"))],
)
def test_accumulation_changes_nothing(name, tiny_world, start_weights, tmp_path):
    flags, found = KINDS[name], {}
    for shape in ((4, 1), (1, 4)):
        cut = ["--per_device_train_batch_size", shape[0], "--gradient_accumulation_steps", shape[1]]
        assert main(command(tiny_world, "grad_diff", tmp_path / str(shape), *flags, *cut)) == 0
        found[shape] = tmp_path / str(shape)
    assert_terms_agree(terms(found[1, 4]), terms(found[4, 1]), 1e-4)
    assert update_distance(weights(found[1, 4]), weights(found[4, 1]), start_weights) <= TOLERANCES.get(
        name, UPDATE_TOLERANCE
    )


def shares(folder):
    return [log["optimizer/clipped_share"] for log in history(folder) if "loss" in log]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, backend",
    [
        ("gnb", "fsdp2"),
        *(
            pytest.param(name, backend, marks=pytest.mark.full)
            for name, backend in [
                ("gnb", "ddp"), ("hutchinson", "fsdp2"), ("hutchinson", "ddp"), ("empirical_fisher", "fsdp2"),
                ("empirical_fisher", "zero2"), ("empirical_fisher", "zero3"), ("soul_legacy", "zero3"),
                ("soul_legacy", "fsdp2"), ("influence", "fsdp2"), ("influence", "ddp"),
            ]
        ),
    ],
)  # fmt: skip
def test_two_processes_equal_one(name, backend, tiny_world, start_weights, tmp_path):
    expected = train(command(tiny_world, "grad_diff", tmp_path / "one", *KINDS[name]))
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    found = train(command(tiny_world, "grad_diff", tmp_path / "two", *KINDS[name], *cut), backend, processes=2)
    assert_terms_agree(terms(found), terms(expected), 1e-4)
    if name != "influence":
        assert shares(found) == pytest.approx(shares(expected), abs=1e-4)
    tolerance = TOLERANCES.get(name, UPDATE_TOLERANCE)
    assert update_distance(weights(found), weights(expected), start_weights) <= tolerance


def resumed(whole, part, words, last, backend="ddp", processes=1):
    """Resume a copy of a finished run from before its last step; returns where."""
    shutil.copytree(whole, part)
    shutil.rmtree(part / f"checkpoint-{last}")
    return train([*words, "--resume_from_checkpoint", "auto"], backend, processes)


# Two steps between log lines, so that the clipped share of a line was measured on both sides of the cut.
EVERY_TWO = [*SAVING, "--logging_steps", "2", "--num_train_epochs", "2"]


@pytest.mark.parametrize("name", ["gnb", pytest.param("empirical_fisher", marks=pytest.mark.full)])
def test_a_resumed_run_is_the_unbroken_one(name, tiny_world, tmp_path):
    flags = [*KINDS[name], *EVERY_TWO, *BY_TWO, "--hessian_interval", "3"]
    whole = train(command(tiny_world, "grad_diff", tmp_path / "whole", *flags))
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for number in (4, 5, 6):
        shutil.rmtree(part / f"checkpoint-{number}")
    words = command(tiny_world, "grad_diff", part, *flags, "--resume_from_checkpoint", "auto")
    assert main(words) == 0
    assert bit_equal(weights(part), weights(whole)) and history(part) == history(whole)
    assert_same_checkpoint(part / "checkpoint-6", whole / "checkpoint-6")


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, backend", [("gnb", "fsdp2"), ("gnb", "ddp"), ("empirical_fisher", "zero2"), ("empirical_fisher", "zero3")]
)
def test_a_resumed_run_on_two_processes_is_the_unbroken_one(name, backend, tiny_world, tmp_path):
    flags = [*KINDS[name], *SAVING, "--per_device_train_batch_size", "2"]
    whole = train(command(tiny_world, "grad_diff", tmp_path / "whole", *flags), backend, processes=2)
    words = command(tiny_world, "grad_diff", tmp_path / "part", *flags)
    part = resumed(whole, tmp_path / "part", words, 3, backend, processes=2)
    assert bit_equal(weights(part), weights(whole)) and history(part) == history(whole)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    before = {"backend": "one process or DDP", "settings": {"unlearn_optimizer": "sophia", "sophia_rho": 0.04}}
    (tmp_path / "unlearning_state.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"settings differ in sophia_rho \(was 0.04 and is 0.08\)"):
        require_same_run(tmp_path, {**before, "settings": {"unlearn_optimizer": "sophia", "sophia_rho": 0.08}})


def test_the_settings_of_a_checkpoint_hold_the_flags(tmp_path):
    trainer = make_trainer("npo", tmp_path, optim=DEFAULT_OPTIM, unlearn_optimizer="sophia", sophia_rho=0.05)
    settings = trainer.run_state()["settings"]
    assert settings["unlearn_optimizer"] == "sophia" and settings["sophia_rho"] == 0.05
    assert settings["hessian_interval"] == 10 and settings["hessian_data"] == "both"


def test_masked_weights_have_no_curvature_and_stay(tiny_world, start_weights, tmp_path):
    """Under weight decay, with a mask that leaves out four of ten weights."""
    generator = torch.Generator().manual_seed(0)
    mask = {name: torch.rand(value.shape, generator=generator) < 0.6 for name, value in start_weights.items()}
    packed = {name: packed_bits.pack(bits.reshape(-1)) for name, bits in mask.items()}
    shapes = {name: tuple(bits.shape) for name, bits in mask.items()}
    file = str(tmp_path / "mask.safetensors")
    write_mask(file, packed, shapes, {"model_hash": model_fingerprint(tiny_world["model"])})
    flags = [*SOPHIA, "--weight_mask", file, "--weight_decay", "0.1", *SAVING]
    folder = train(command(tiny_world, "grad_diff", tmp_path / "out", *flags))
    found = weights(folder)
    assert all(torch.equal(found[name][~mask[name]], start_weights[name][~mask[name]]) for name in found)
    state = torch.load(folder / "checkpoint-3/optimizer.pt", weights_only=True)["state"]
    moved = sum(int((part["hessian"] != 0).sum()) for part in state.values())
    left_out = sum(int((part["hessian"] == 0).sum()) for part in state.values())
    assert left_out >= sum(int((~bits).sum()) for bits in mask.values()) > 0 and moved > 0


@pytest.mark.parametrize("estimator", ["gnb", "empirical_fisher"])
def test_each_phase_has_a_curvature_of_its_own(estimator, tiny_world, tmp_path):
    """`sequential` begins anew with each layer: there is an estimate at its first step, whatever the interval."""
    flags = [*OWN, "sophia", "--hessian_estimator", estimator, "--hessian_interval", "100", "--retain_loss", "nll"]
    flags += SAVING
    folder = train(command(tiny_world, "sequential", tmp_path / "out", "--layer_step", "1", *flags))
    for number in (1, 3):
        state = torch.load(folder / f"checkpoint-{number}/optimizer.pt", weights_only=True)["state"]
        assert state and all(part["hessian"].any() for part in state.values())


def test_a_run_of_the_influence_step_moves_along_the_damped_gradient(tmp_path):
    flags = {"unlearn_optimizer": "influence", "influence_draws": 3, "learning_rate": 0.01, "max_steps": 1}
    trainer, watch = watched("gradient_ascent", tmp_path, **flags)
    curvature = [part.clamp(min=0) for part in watch.curvatures[0]]
    damping = 0.1 * (sum(float(c.sum()) for c in curvature) / sum(c.numel() for c in curvature))
    for before, after, gradient, h in zip(
        watch.weights[0], watch.weights[-1], watch.gradients[0], curvature, strict=True
    ):
        torch.testing.assert_close(after, before - 0.01 * gradient / (h + damping), rtol=1e-5, atol=1e-6)
    assert trainer.args.max_grad_norm == 0


def test_draws_are_averaged(tmp_path):
    """The curvature of three draws is the mean of what each of them alone would be."""
    flags = {"unlearn_optimizer": "influence", "learning_rate": 1e-3, "max_steps": 1}
    _, one = watched("gradient_ascent", tmp_path, influence_draws=1, **flags)
    _, three = watched("gradient_ascent", tmp_path, influence_draws=3, **flags)
    single, mean = (torch.cat([part.flatten() for part in found.curvatures[0]]) for found in (one, three))
    # All are squares, of which the first is a third of the mean.
    assert (mean - single / 3 >= -1e-9).all() and not torch.equal(mean, single)


# ---- What it takes ----


@pytest.mark.parametrize(
    "kind, estimator, copies",
    [("sophia", "gnb", 3), ("sophia", "hutchinson", 5), ("sophia", "empirical_fisher", 2), ("soul_legacy", None, 2)],
)
def test_memory_is_estimated(kind, estimator, copies, tmp_path):
    """m and h, and beside them what the passes of an estimate hold: the step's gradient, weights, one more gradient."""
    flags = {"hessian_estimator": estimator} if estimator else {}
    args = NPOTrainer.args_class(output_dir=str(tmp_path), use_cpu=True, unlearn_optimizer=kind, **flags)
    shapes = (((512, 64), torch.float32, True), ((100, 64), torch.float32, False))
    found = optimizer_memory(kind, args, shapes, "cpu")
    assert found.is_known and found.state == pytest.approx(copies * 4 * (512 * 64 + 6400))
    # The divisor, and for a moment what is compared with 1.
    assert 4 <= found.step / (512 * 64) <= 10


@pytest.mark.full
def test_the_benchmark_counts_one_more_pass_in_ten(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import optimizers

    kept = {
        name: flags for name, flags in optimizers.VARIANTS.items() if name in ("AdamW", "Sophia, gnb", "soul_legacy")
    }
    monkeypatch.setattr(optimizers, "VARIANTS", kept)
    assert optimizers.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    counted = {row["job"].split(";")[0]: row["ours"] for row in rows if "FLOPs" in row["metric"]}
    # The batch of the first step is not quite as wide as the others on average.
    assert counted["Sophia, gnb"] == pytest.approx(1.1, abs=0.02) and counted["soul_legacy"] == pytest.approx(
        1, abs=1e-3
    )


# ---- Refused ----


REFUSED = {
    "unknown": ({"unlearn_optimizer": "sofia"}, "did you mean 'sophia'"),
    "optim": ({"unlearn_optimizer": "sophia", "optim": "sgd"}, "--optim has no effect with --unlearn_optimizer sophia"),
    "beta": ({"unlearn_optimizer": "sophia", "adam_beta1": 0.8}, "--adam_beta1 has no effect.*pass --sophia_betas"),
    "muon_beta": ({"unlearn_optimizer": "muon", "adam_beta2": 0.9}, "--adam_beta2 has no effect with .*muon$"),
    "alone": ({"sophia_rho": 0.1}, "--sophia_rho has no effect without --unlearn_optimizer sophia or soul_legacy"),
    "legacy": ({"unlearn_optimizer": "soul_legacy", "hessian_interval": 5}, "--hessian_interval has no effect without"),
    "fisher": (
        {"unlearn_optimizer": "sophia", "hessian_estimator": "empirical_fisher", "hessian_data": "forget"},
        "squares the gradient of the whole objective",
    ),
    "rho": ({"unlearn_optimizer": "sophia", "sophia_rho": 0.0}, "--sophia_rho must be above 0"),
    "betas": ({"unlearn_optimizer": "sophia", "sophia_betas": [0.9]}, "--sophia_betas must be two numbers"),
    "interval": ({"unlearn_optimizer": "sophia", "hessian_interval": 0}, "--hessian_interval must be at least 1"),
    "estimator": ({"unlearn_optimizer": "sophia", "hessian_estimator": "exact"}, "--hessian_estimator must be gnb"),
    "clip": ({"unlearn_optimizer": "influence", "max_grad_norm": 0.5}, "--max_grad_norm has no effect"),
    "decay": ({"unlearn_optimizer": "influence", "weight_decay": 0.1}, "--weight_decay has no effect"),
    "draws": (
        {"unlearn_optimizer": "influence", "hessian_estimator": "empirical_fisher", "influence_draws": 2},
        "--influence_draws has no effect",
    ),
    "fp16": (
        {"unlearn_optimizer": "sophia", "fp16": True},
        "pass --bf16 True, or --hessian_estimator empirical_fisher",
    ),
    "bf16": (
        {"unlearn_optimizer": "sophia", "bf16": True, "hessian_estimator": "hutchinson"},
        "differences gradients.*pass --hessian_estimator gnb",
    ),
    "retain": (
        {"unlearn_optimizer": "sophia", "hessian_data": "retain", "retain_loss": "none"},
        "--hessian_data retain asks for rows that this run does not read; it reads forget",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_take_effect_is_refused(name, tmp_path, monkeypatch):
    flags, message = REFUSED[name]
    if name == "fp16":  # accelerate refuses it on a CPU before us
        monkeypatch.setattr("accelerate.Accelerator._get_grad_scaler", lambda self: None, raising=False)
    with pytest.raises(UserError, match=message):
        make_trainer("grad_diff", tmp_path, **{"optim": DEFAULT_OPTIM, **flags})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_was_filled_in_can_be_given(kind, tmp_path):
    """As in a run that is repeated with all its flags."""
    for estimator in (None, "empirical_fisher") if kind in ("sophia", "influence") else (None,):
        flags = {"output_dir": str(tmp_path), "use_cpu": True, "unlearn_optimizer": kind}
        first = NPOTrainer.args_class(**flags, hessian_estimator=estimator)
        own = {name: getattr(first, name) for names in TAKES.values() for name in names}
        again = NPOTrainer.args_class(**flags, **own, max_grad_norm=first.max_grad_norm)
        assert own == {name: getattr(again, name) for name in own}
        left_out = {"hessian_data", "influence_draws"} if estimator else set()
        assert {name for name, value in own.items() if value is not None} == set(TAKES[kind]) - left_out


def test_labels_of_a_model_without_a_head_are_refused(tmp_path):
    flags = {"optim": DEFAULT_OPTIM, "unlearn_optimizer": "sophia"}
    with pytest.raises(UserError, match="draws labels from the output, but this run's losses end at layer 1"):
        make_trainer("rmu", tmp_path, layer=1, steering_coef=2.0, **flags)
    make_trainer("rmu", tmp_path, layer=1, steering_coef=2.0, hessian_estimator="hutchinson", **flags)


def test_filtered_gradients_are_no_ones_derivative(tmp_path):
    flags = {"optim": DEFAULT_OPTIM, "unlearn_optimizer": "sophia", "hessian_estimator": "hutchinson"}
    trainer = make_trainer("sequential", tmp_path, retain_loss="nll", same_sign_grads=True, layer_step=1, **flags)
    with pytest.raises(UserError, match="which filtered gradients are not"):
        trainer.train()


def test_the_influence_step_is_one(tmp_path):
    flags = {"optim": DEFAULT_OPTIM, "unlearn_optimizer": "influence"}
    with pytest.raises(UserError, match="this run has 2; pass --max_steps 1 --gradient_accumulation_steps 2"):
        make_trainer("gradient_ascent", tmp_path, **flags).train()


def test_an_optimizer_that_was_given_is_not_replaced(tmp_path):
    model = llama()
    args = NPOTrainer.args_class(output_dir=str(tmp_path), use_cpu=True, unlearn_optimizer="sophia")
    given = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(UserError, match="the trainer was given an optimizer"):
        NPOTrainer(model=model, args=args, train_dataset=UnlearnDataset(sets()), optimizers=given)


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("name", ["gnb", "hutchinson", "influence"])
def test_deepspeed_is_refused_by_name(name, tiny_world, tmp_path):
    outcome = start(command(tiny_world, "grad_diff", tmp_path / "out", *KINDS[name]), "zero2")
    assert outcome.codes == [2]
    assert "which DeepSpeed does not part; pass" in outcome.said[0].splitlines()[-1]
