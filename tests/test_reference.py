"""The frozen reference: one loss and one gradient whether it is cached, live or the adapters off; what it holds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_world import command
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_unlearn import trainer_class
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError

V = 64
CASES = {
    "npo": ("npo", {}),
    "npo_kl": ("npo", {"retain_loss": "kl"}),
    "grad_diff_kl": ("grad_diff", {"retain_loss": "kl"}),
    "ascent_plus_kl_divergence": ("ascent_plus_kl_divergence", {}),
    "random_label": ("random_label", {"top_k": 5, "rm_groundtruth": True}),
}
MODES = [("live", False), ("cached", False), ("live", True), ("cached", True), ("adapter_off", True)]


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
    return LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.3, max_position_embeddings=64, **changes))


def with_lora(model, **changes):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **changes))


def rows(count, seed, shortest=4):
    """Token rows of lengths that all differ, prompts that do not count; made without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [shortest + number for number in torch.randperm(count, generator=generator).tolist()]
    drawn = [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]} for ids in drawn]


def sets(forget=6, retain=9):
    return {"forget": rows(forget, 2), "retain": rows(retain, 3)}


def make_trainer(method, folder, model=None, data=None, **flags):
    """A trainer of a method, four rows a step with plain SGD, on token rows."""
    found = trainer_class(method)
    defaults = dict(
        per_device_train_batch_size=4, num_train_epochs=1, optim="sgd", lr_scheduler_type="constant",
        learning_rate=0.05, max_grad_norm=0, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    args = found.args_class(output_dir=str(folder), **{**defaults, **flags})
    data = data or sets()
    names = found.streams_for(args)
    dataset = UnlearnDataset({name: part for name, part in data.items() if name in names})
    return found(model=model or llama(), args=args, train_dataset=dataset)


def batch_of(trainer, numbers=(0, 3, 4)):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[(name, number)] for name in dataset.streams for number in numbers])


def move(model):
    """Change whatever trains, as training would; equally in every model of the same kind."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def loss_and_gradients(trainer):
    """Ask the reference of the model as it is, move the model away, and return (loss, {name: gradient})."""
    trainer._frozen_reference.prepare()
    move(trainer.model)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_mode_gives_the_same_loss_and_gradients(lora, case, tmp_path):
    """Float32 forwards in other batches differ in the last bits; a reference that moved along would be off by 1."""
    method, flags = CASES[case]
    found = {}
    for mode, for_lora in MODES:
        if for_lora != lora:
            continue
        model = with_lora(llama()) if lora else None
        # Two epochs visit every retain row; others a cache does not know.
        trainer = make_trainer(method, tmp_path, model, reference=mode, num_train_epochs=2, **flags)
        assert trainer._frozen_reference.mode == mode
        found[mode] = loss_and_gradients(trainer)
    loss, gradients = found.pop("live")
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm > 0.1 and len(found) == 1 + lora
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6) and other.keys() == gradients.keys()
        assert all((other[name] - gradients[name]).norm() <= 1e-6 * norm for name in gradients)


@pytest.mark.parametrize(
    "method, flags",
    [
        ("npo", {"retain_loss": "none"}),
        ("grad_diff", {"retain_loss": "kl"}),
        ("random_label", CASES["random_label"][1]),
    ],
)
def test_cached_equals_live_to_the_bit_where_the_batches_are_the_same(method, flags, tmp_path):
    """A step that holds all rows, asked in one batch of them: the plan and the cache order rows by length alike."""
    found, data = [], {"forget": rows(4, 2), "retain": rows(4, 3)}
    for mode in ("live", "cached"):
        folder = tmp_path / mode
        shape = {"per_device_eval_batch_size": 4, "num_train_epochs": 3, "reference": mode}
        trainer = make_trainer(method, folder, data=data, **shape, **flags)
        trainer.train()
        assert trainer.state.global_step == 3
        logs = [{key: log[key] for key in log if key.startswith("loss")} for log in trainer.state.log_history]
        found.append(([log for log in logs if log], trainer.model.state_dict()))
    (live_logs, live), (cached_logs, cached) = found
    assert live_logs == cached_logs and len(live_logs) == 3
    assert all(torch.equal(live[name], cached[name]) for name in live)


def gpt2():
    torch.manual_seed(0)
    config = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(**config, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))


@pytest.mark.parametrize("mode, lora", MODES)
def test_the_reference_has_no_dropout_and_never_moves(mode, lora, tmp_path):
    """The policy has dropout and trains; the reference's answers stay those of the start model without dropout."""
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.5)) if lora else gpt2()
    flags = {"retain_loss": "kl", "reference": mode, "num_train_epochs": 2}
    trainer = make_trainer("npo", tmp_path, model, sets(6, 6), **flags)
    reference, batch = trainer._frozen_reference, batch_of(trainer)
    reference.prepare()
    start = trainer.reader.language_model.eval()
    with torch.no_grad(), model.disable_adapter() if lora else torch.no_grad():
        expected = {
            name: start.transformer(
                input_ids=part["input_ids"], attention_mask=part["attention_mask"]
            ).last_hidden_state[:, :-1][part["labels"][:, 1:] != IGNORED]
            for name, part in batch.items()
        }
        head = start.lm_head.weight.detach().clone()
        labels = batch["forget"]["labels"][:, 1:]
        logps = (expected["forget"] @ head.T).log_softmax(-1)
        logps = logps.gather(-1, labels[labels != IGNORED].unsqueeze(-1)).squeeze(-1)
    model.train()
    seen = []
    for _ in range(2):
        seen.append(reference.values(batch, ("forget", "retain")))
        assert model.training and all(part.training for part in model.modules())
    trainer.train()
    assert trainer.state.global_step == 4
    model.train()
    seen.append(reference.values(batch, ("forget", "retain")))
    for found in seen:
        # Another batch than the one asked here: float32 rounding.
        torch.testing.assert_close(found["forget"], logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["retain"], expected["retain"], rtol=1e-5, atol=1e-5)
        assert all(torch.equal(found[name], seen[0][name]) for name in found)
    if lora:
        assert reference.projection is None
    else:
        assert torch.equal(reference.projection.weight, head) and not torch.equal(start.lm_head.weight, head)


# ---- Which mode, and at what cost ----


@pytest.mark.parametrize("lora, expected", [(False, "cached"), (True, "adapter_off")])
def test_the_default_needs_no_second_model(lora, expected, tmp_path):
    trainer = make_trainer("npo", tmp_path, with_lora(llama()) if lora else None)
    assert trainer._frozen_reference.mode == expected and trainer._frozen_reference.model is None


def held_bytes(trainer):
    """Bytes of the tensors that the reference can reach and the policy has not, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    found, todo, seen = {}, [trainer._frozen_reference], {id(trainer), id(trainer.reader), id(trainer.model)}
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, torch.nn.Module):
            todo += [*item.parameters(), *item.buffers()]
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif type(item).__module__.startswith("llm_unlearn"):
            todo += vars(item).values()
    return sum(size for place, size in found.items() if place not in own)


@pytest.mark.parametrize(
    "case, tied, lora, mode, expected",
    [
        ("npo", False, False, None, lambda model: 0),
        ("random_label", False, False, None, lambda model: 0),
        ("npo_kl", False, False, None, lambda model: model.lm_head.weight.nbytes),
        ("grad_diff_kl", True, False, None, lambda model: model.lm_head.weight.nbytes),
        ("npo_kl", False, True, None, lambda model: 0),
        ("npo_kl", False, True, "cached", lambda model: 0),
        ("npo_kl", False, False, "live", lambda model: sum(p.nbytes for p in model.parameters())),
    ],
)
def test_what_the_reference_holds_in_memory(case, tied, lora, mode, expected, tmp_path):
    """Nothing; or the head, where distributions are wanted and it trains; or a model, where one was asked for.

    The answers are in files, mapped into memory.
    """
    method, flags = CASES[case]
    model = llama(tie_word_embeddings=tied)
    size = expected(model)
    trainer = make_trainer(method, tmp_path, with_lora(model) if lora else model, reference=mode, **flags)
    trainer._frozen_reference.prepare()
    # Rotary frequencies are buffers of the copy: eight numbers.
    assert size <= held_bytes(trainer) <= size + (128 if mode == "live" else 0)
    trainer.train()
    assert size <= held_bytes(trainer) <= size + (128 if mode == "live" else 0)
    assert trainer._asked == (None, None)


def test_a_frozen_head_is_not_kept_a_second_time(tmp_path):
    model = llama()
    model.lm_head.requires_grad_(False)
    trainer = make_trainer("grad_diff", tmp_path, model, retain_loss="kl")
    trainer._frozen_reference.prepare()
    assert trainer._frozen_reference.projection is None and held_bytes(trainer) == 0


# ---- Refusals ----


def test_adapters_off_without_adapters_is_refused(tmp_path):
    with pytest.raises(UserError, match="--reference adapter_off needs adapters to switch off; pass --use_peft True"):
        make_trainer("npo", tmp_path, reference="adapter_off")


@pytest.mark.parametrize(
    "method, flags",
    [
        ("gradient_ascent", {}),
        ("simnpo", {}),
        ("grad_diff", {"retain_loss": "nll"}),
        ("grad_diff", {"retain_loss": "kl", "retain_weight": 0.0}),
        ("ascent_plus_descent", {}),
        ("npo", {"forget_weight": 0.0}),
    ],
)
@pytest.mark.parametrize("flag", ["reference", "reference_cache"])
def test_a_method_that_compares_with_nothing_refuses_a_reference(flag, method, flags, tmp_path):
    given = {"reference": "live"} if flag == "reference" else {"reference_cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"--reference has no effect: \w+Trainer compares with none in this run"):
        make_trainer(method, tmp_path, **given, **flags)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["live", "adapter_off"])
def test_a_cache_folder_without_a_cache_is_refused(mode, tmp_path):
    with pytest.raises(UserError, match=f"--reference_cache has no effect with --reference {mode}"):
        make_trainer("npo", tmp_path, reference=mode, reference_cache=str(tmp_path / "cache"))


def test_refusals_on_the_command_line_are_one_sentence(tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, "npo", tmp_path / "out", "--reference", "adapter_off")) == 2
    assert "needs adapters to switch off" in capsys.readouterr().err.splitlines()[-1]
    assert main(command(tiny_world, "simnpo", tmp_path / "out", "--reference", "cached")) == 2
    assert "SimNPOTrainer compares with none" in capsys.readouterr().err.splitlines()[-1]
    assert main(command(tiny_world, "npo", tmp_path / "out", "--reference", "copied")) == 2
    assert "copied" in capsys.readouterr().err.splitlines()[-1]


def test_asking_for_what_no_reading_was_declared_is_a_mistake_of_ours(tmp_path):
    trainer = make_trainer("grad_diff", tmp_path, retain_loss="kl")
    with pytest.raises(
        ValueError, match="reference_readings of GradDiffTrainer does not give forget the reading LOGPS"
    ):
        trainer.reference(batch_of(trainer))


def test_npo_without_a_forget_term_asks_about_no_forget_row(tmp_path):
    """With --forget_weight 0 the run is plain training on the retain set; its reference costs nothing."""
    trainer = make_trainer("npo", tmp_path, forget_weight=0.0)
    trainer.train()
    assert trainer._frozen_reference is None and trainer.state.global_step == 2


def test_a_trained_adapter_is_part_of_the_model_before_unlearning(tmp_path):
    """Switching it off would compare with another model: NPO's first loss is then not 2/beta log 2."""
    trained = with_lora(llama(), init_lora_weights=False)
    with pytest.raises(UserError, match="they have trained before"):
        make_trainer("npo", tmp_path / "off", trained, reference="adapter_off")
    for mode in (None, "live"):
        trainer = make_trainer("npo", tmp_path / str(mode), with_lora(llama(), init_lora_weights=False), reference=mode)
        assert trainer._frozen_reference.mode == (mode or "cached")
        trainer.train()
        first = next(log for log in trainer.state.log_history if "loss/forget" in log)
        assert first["loss/forget"] == pytest.approx(2 / 0.1 * 0.6931471805599453, abs=1e-4)


@pytest.mark.parametrize("mode", ["adapter_off", "cached"])
def test_what_was_frozen_stays_frozen_when_the_reference_is_asked(mode, tmp_path):
    """PEFT lets all of an adapter train when it is switched on again."""
    model = with_lora(llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    trainer = make_trainer("npo", tmp_path, model, reference=mode)
    trainer.train()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


def test_biases_that_train_beside_the_adapters_rule_switching_them_off_out(tmp_path):
    model = with_lora(llama())
    next(p for name, p in model.named_parameters() if "norm" in name).requires_grad_(True)
    assert make_trainer("npo", tmp_path, model)._frozen_reference.mode == "cached"
