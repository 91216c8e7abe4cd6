"""The loop of the fine-tuning attacks: which weights train and in which precision, what is evaluated when, resuming."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from eval_cases import make_adapter
from peft import PeftModel
from tamper_cases import attack, rows_of

from llm_unlearn.attacks.finetuning import AttackTrainer, FinetuningSettings, finetune_attack
from llm_unlearn.data.rows import read_rows
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.loading import Checkpoint
from llm_unlearn.evaluation.scores import Metric
from llm_unlearn.evaluation.suite import Outcome
from llm_unlearn.models import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_cpu_process")

SHORT = FinetuningSettings(
    learning_rate=1e-3, max_steps=4, batch_size=5, grad_accumulation=1, eval_every=2, use_cpu=True
)


class NormScorer:
    """A scorer of no cost: the metric is a function of the weights alone.

    Attributes:
        folders: what each call was told to look answers up in.
        dtypes: those of the weights and of a product at each call.
    """

    def __init__(self, fails_at=()):
        self.folders, self.dtypes, self.fails_at = [], [], fails_at

    def __call__(self, model, folder=None):
        self.folders.append(folder)
        if len(self.folders) in self.fails_at:
            raise KeyboardInterrupt
        weights = [parameter.detach() for parameter in model.parameters()]
        self.dtypes.append(({weight.dtype for weight in weights}, (torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        value = math.fsum(float(weight.double().square().sum()) for weight in weights)
        return Outcome({"forget/probability": Metric(value, 0.1, 1, "lower")}, {}, {})


def checkpoint_of(world, name="base", dtype="float32"):
    return Checkpoint(load_model(world[name], dtype), load_tokenizer(world["base"]), {"weights": name}, 512)


def run(world, folder, settings=SHORT, scorer=None, checkpoint=None, rows=None, **options):
    checkpoint = checkpoint or checkpoint_of(world)
    rows = rows or read_rows(world["forget"])
    return finetune_attack(checkpoint, rows, settings, scorer or NormScorer(), folder, **options)


def points(found):
    return [(row["step"], row["forget/probability"]) for row in found.rows]


def test_float32_weights_train_whatever_the_checkpoint_holds(tiny_world, tmp_path):
    """A bfloat16 checkpoint, loaded as the scripts do; steps of 2e-5 would not move most of its weights in bfloat16."""
    narrow = tmp_path / "narrow"
    load_model(tiny_world["model"], "bfloat16").save_pretrained(narrow)
    world = {**tiny_world, "narrow": str(narrow)}
    checkpoint = checkpoint_of(world, "narrow")
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    assert all(torch.equal(value, value.bfloat16().float()) for value in before.values()), "the file is bfloat16"
    settings = dataclasses.replace(SHORT, learning_rate=2e-5, max_steps=1, weight_decay=0.0)
    scorer = NormScorer()
    found = run(world, tmp_path / "out", settings, scorer, checkpoint)
    assert all(dtypes == {torch.float32} for dtypes, _ in scorer.dtypes)
    name = "model.layers.0.mlp.down_proj.weight"
    after, start = found.model.state_dict()[name], before[name]
    moved, would_move = (after != start).float().mean(), (after.bfloat16() != start.bfloat16()).float().mean()
    assert moved > 0.99 and would_move < 0.5, (moved, would_move)


def test_the_weights_of_an_adapter_on_its_base_train_too(tiny_world, tmp_path):
    """PEFT leaves merged weights frozen."""
    make_adapter(tiny_world["base"], tmp_path / "adapter")
    record = attack({**tiny_world, "base": str(tmp_path / "adapter")}, tmp_path / "attack")
    first, *_, last = rows_of(record)
    assert last["forget/probability"] > first["forget/probability"]


def test_a_narrow_model_is_refused(tiny_world, tmp_path):
    with pytest.raises(ValueError, match="load the checkpoint with dtype float32"):
        run(tiny_world, tmp_path, checkpoint=checkpoint_of(tiny_world, dtype="bfloat16"))


def test_autocast_computes_narrow_over_float32_weights(tiny_world, tmp_path):
    scorer = NormScorer()
    settings = dataclasses.replace(SHORT, autocast="bf16", max_steps=1)
    found = run(tiny_world, tmp_path, settings, scorer, statistics="kept")
    assert scorer.dtypes == [({torch.float32}, torch.bfloat16)] * 2
    assert scorer.folders == [None, None], "the evaluator's answers in float32 are of another precision"
    assert found.model.dtype == torch.float32
    seen = []
    found.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    found.model(torch.tensor([[1, 2]]))
    assert seen == [torch.float32], "nothing of the autocast is left on the model"


def test_when_it_is_evaluated(tiny_world, tmp_path):
    scorer = NormScorer()
    settings = dataclasses.replace(SHORT, max_steps=5)
    found = run(tiny_world, tmp_path / "every", settings, scorer, statistics="kept")
    assert [step for step, _ in points(found)] == [0, 2, 4, 5] and found.counters["optimizer_steps"] == 5
    assert scorer.folders == ["kept", None, None, None]
    assert len({value for _, value in points(found)}) == 4 and not found.model.training
    chosen = run(tiny_world, tmp_path / "chosen", settings, evaluate_at=[3])
    assert [step for step, _ in points(chosen)] == [0, 3, 5]
    assert points(chosen)[2] == points(found)[3], "evaluations change nothing of the training"
    # Ten rows, five in a step, one epoch.
    by_epoch = run(tiny_world, tmp_path / "epoch", dataclasses.replace(SHORT, max_steps=-1))
    assert [step for step, _ in points(by_epoch)] == [0, 2] and by_epoch.planned_steps == 2


def test_lora_leaves_the_weights_alone(tiny_world, tmp_path):
    checkpoint = checkpoint_of(tiny_world)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    settings = dataclasses.replace(SHORT, lora_r=3, lora_target=("q_proj", "down_proj"))
    found = run(tiny_world, tmp_path, settings, checkpoint=checkpoint)
    assert isinstance(found.model, PeftModel)
    (config,) = found.model.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 3, 0.0)
    trained = {name: value for name, value in found.model.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(bool(value.any()) for name, value in trained.items() if "lora_B" in name), "every adapter moved"
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "down_proj"}
    for name, value in found.model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        assert plain not in before or torch.equal(value, before[plain]), name
    with pytest.raises(UserError, match="LoRA cannot wrap this model"):
        run(tiny_world, tmp_path / "bad", dataclasses.replace(settings, lora_target=("nowhere",)))


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of a test, with the learning rate of each step in `rates`."""
    found, plain = [], AttackTrainer.training_step

    def spy(self, *given, **named):
        if self not in found:
            self.rates = []
            found.append(self)
        self.rates.append(self.lr_scheduler.get_last_lr()[0])
        return plain(self, *given, **named)

    monkeypatch.setattr(AttackTrainer, "training_step", spy)
    return found


@pytest.mark.parametrize(
    "scheduler, warmup, rates",
    [
        pytest.param("constant", 0, [1, 1, 1, 1], marks=pytest.mark.full),
        ("constant", 2, [0, 0.5, 1, 1]),
        pytest.param("linear", 0.5, [0, 0.5, 1, 0.5], marks=pytest.mark.full),
        ("cosine", 0, [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 + 0.5 * math.cos(3 * math.pi / 4)]),
    ],
)
def test_schedules(tiny_world, tmp_path, trainers, scheduler, warmup, rates):
    run(tiny_world, tmp_path, dataclasses.replace(SHORT, lr_scheduler=scheduler, warmup=warmup))
    assert trainers[0].rates == pytest.approx([1e-3 * rate for rate in rates])


def test_muon_and_the_weight_decay(tiny_world, tmp_path, trainers):
    from llm_unlearn.addons.muon import MuonWithAdamW
    from llm_unlearn.addons.optimizers import stepping_optimizer

    run(tiny_world, tmp_path / "muon", dataclasses.replace(SHORT, optimizer="muon", max_steps=1))
    run(tiny_world, tmp_path / "adamw", dataclasses.replace(SHORT, max_steps=1))
    muon, adamw = (stepping_optimizer(trainer.optimizer) for trainer in trainers)
    assert type(muon) is MuonWithAdamW and type(adamw) is torch.optim.AdamW
    for optimizer in (muon, adamw):
        assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.0, 0.01}
        assert any(group["weight_decay"] == 0.01 for group in optimizer.param_groups)


def test_a_repair_comes_first_and_counts_below_zero(tiny_world, tmp_path):
    kept, scorer = read_rows(tiny_world["retain"]), NormScorer()
    found = run(tiny_world, tmp_path / "out", scorer=scorer, repair_rows=kept, repair_steps=3, statistics="kept")
    assert [row["step"] for row in found.rows] == [-3, -1, 0, 2, 4]
    assert [row.get("phase") for row in found.rows] == ["repair", "repair", None, None, None]
    assert scorer.folders == ["kept", None, None, None, None], "only the first is of the checkpoint"
    # Step 0 is the model after the repair: the same as after an attack with those rows.
    alone = run(tiny_world, tmp_path / "alone", dataclasses.replace(SHORT, max_steps=3), rows=kept)
    assert points(found)[0][1] == points(alone)[0][1] and points(found)[2][1] == points(alone)[-1][1]
    assert found.counters["optimizer_steps"] == 4


def test_it_ends_where_that_is_enough(tiny_world, tmp_path):
    found = run(tiny_world, tmp_path / "out", stop_when=lambda rows: "enough" if rows[-1]["step"] >= 2 else None)
    assert [row["step"] for row in found.rows] == [0, 2]
    assert (found.ended, found.stopped, found.planned_steps) == ("enough", True, 4)
    assert found.counters["optimizer_steps"] == 2
    whole = run(tiny_world, tmp_path / "whole")
    assert points(found) == points(whole)[:2]
    at_once = run(tiny_world, tmp_path / "at_once", stop_when=lambda rows: "enough")
    assert points(at_once) == points(whole)[:1] and at_once.counters["optimizer_steps"] == 0


def test_a_divergence_ends_an_attack_and_keeps_its_rows(tiny_world, tmp_path):
    found = run(tiny_world, tmp_path, dataclasses.replace(SHORT, learning_rate=1e38, eval_every=1))
    assert "is not finite at step" in found.ended and not found.stopped
    assert found.rows[0]["step"] == 0 and found.counters["optimizer_steps"] < 4


@pytest.mark.parametrize("save_steps", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_killed_attack_goes_on(tiny_world, tmp_path, save_steps, trainers):
    """Killed in the evaluation of step 4, after the checkpoint of step 3, or with none."""
    settings = dataclasses.replace(SHORT, save_steps=save_steps, max_steps=6, lr_scheduler="linear")
    whole = run(tiny_world, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_world, tmp_path / "out", settings, NormScorer(fails_at=[3]))
    kept = json.loads((tmp_path / "out/attack.json").read_text())["rows"]
    assert [row["step"] for row in kept] == [0, 2]
    trainers.clear()
    scorer = NormScorer()
    found = run(tiny_world, tmp_path / "out", settings, scorer)
    assert len(trainers[0].rates) == (3 if save_steps else 6)
    assert points(found) == points(whole) and found.rows[:2] == kept, "rows that were there are kept"
    assert len(scorer.folders) == 2
    assert not list((tmp_path / "out").glob("checkpoint-*")), "nothing is left that nobody needs"
    again = run(tiny_world, tmp_path / "out", settings, NormScorer(fails_at=[1]))
    assert again.rows == found.rows and again.model is None and again.stamp == found.stamp
    anew = run(tiny_world, tmp_path / "out", settings, resume=False)
    assert points(anew) == points(whole) and anew.model is not None


@pytest.mark.full
def test_a_killed_repair_and_the_attack_behind_it_go_on(tiny_world, tmp_path, trainers):
    settings = dataclasses.replace(SHORT, save_steps=1)
    options = {"repair_rows": read_rows(tiny_world["retain"]), "repair_steps": 3}
    whole = run(tiny_world, tmp_path / "whole", settings, **options)
    for calls, steps in ((2, [2, 4]), (4, [3])):  # in the repair's step 2, then in the attack's step 2
        folder = tmp_path / f"out{calls}"
        with pytest.raises(KeyboardInterrupt):
            run(tiny_world, folder, settings, NormScorer(fails_at=[calls]), **options)
        trainers.clear()
        assert points(run(tiny_world, folder, settings, **options)) == points(whole)
        assert [len(trainer.rates) for trainer in trainers] == steps
        shutil.rmtree(folder)


def test_another_attack_is_not_continued(tiny_world, tmp_path):
    run(tiny_world, tmp_path, dataclasses.replace(SHORT, max_steps=1))
    with pytest.raises(UserError, match=r"differs: learning_rate was 0.001 and is 0.01; to start anew, leave --resume"):
        run(tiny_world, tmp_path, dataclasses.replace(SHORT, max_steps=1, learning_rate=1e-2))
    with pytest.raises(UserError, match="differs: rows are others"):
        run(tiny_world, tmp_path, dataclasses.replace(SHORT, max_steps=1), rows=read_rows(tiny_world["retain"]))


def test_what_more_processes_began_is_not_continued_by_one(tiny_world, tmp_path):
    """Each process adds a batch to every step, so that the points of both would lie on no one curve."""
    run(tiny_world, tmp_path, dataclasses.replace(SHORT, max_steps=1))
    path = tmp_path / "attack.json"
    left = json.loads(path.read_text())
    left["identity"]["processes"] = 2
    path.write_text(json.dumps(left))
    with pytest.raises(UserError, match="differs: processes was 2 and is None"):
        run(tiny_world, tmp_path, dataclasses.replace(SHORT, max_steps=1))
