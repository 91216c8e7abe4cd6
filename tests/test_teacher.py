"""The frozen teacher: what it says, what it holds, and which teachers are refused."""

import pytest
import torch
from test_reference import batch_of, llama, make_trainer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from llm_unlearn.affine import AffineMaps, identity
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.models import load_model
from llm_unlearn.teacher import FrozenTeacher, require_same_tokenizer

METHOD = "checkpoint_transfer"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "early"
    llama(seed=7).save_pretrained(folder)
    return str(folder)


def make(folder, teacher, model=None, **flags):
    return make_trainer(METHOD, folder, model, teacher_model_name_or_path=teacher, retain_loss="none", **flags)


def states_of(model, stream, layer):
    """What a Llama's or GPT-NeoX's layer hands on at each token but the first."""
    seen = []
    hook = model.base_model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    asked = {name: stream[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model.eval()(**asked, output_hidden_states=True).hidden_states
    hook.remove()
    # For the last layer transformers gives what the final norm makes of it.
    assert layer + 2 == len(found) or torch.equal(found[layer + 1], seen[0])
    return seen[0][:, 1:]


def test_it_says_what_its_layers_hand_on_and_stays_as_it_was(teacher_folder, tmp_path):
    trainer = make(tmp_path, teacher_folder, layers=[0], num_train_epochs=2)
    batch, whole = batch_of(trainer)["forget"], llama(seed=7)
    before = trainer.teacher.states(batch)
    assert list(before) == [0] and not before[0].requires_grad
    # Padded columns stand in both; only the counted ones are compared by the loss.
    assert torch.equal(before[0], states_of(whole, batch, 0))
    trainer.train()
    assert trainer.state.global_step > 0
    assert torch.equal(trainer.teacher.states(batch)[0], before[0])
    parameters = dict(trainer.teacher.model.named_parameters())
    assert not any(p.requires_grad for p in parameters.values()) and not trainer.teacher.model.training
    assert all(torch.equal(p, whole.state_dict()[name]) for name, p in parameters.items())


def test_nothing_above_the_highest_layer_is_held(teacher_folder, tmp_path):
    trainer = make(tmp_path, teacher_folder, layers=[0])
    model = trainer.teacher.model
    assert len(decoder_layers(model)) == 1
    assert not any(name.startswith(("lm_head", "model.norm", "model.layers.1")) for name, _ in model.named_parameters())
    facts = trainer.teacher.facts
    assert facts["name"] == teacher_folder and facts["layers"] == [0] and facts["affine_map"] is None


def test_no_teacher_is_loaded_where_the_forget_term_weighs_nothing(teacher_folder, tmp_path):
    flags = {"teacher_model_name_or_path": teacher_folder, "forget_weight": 0.0, "retain_schedule": "constant"}
    assert make_trainer(METHOD, tmp_path, **flags).teacher is None


def test_a_map_leads_between_models_of_different_size(tmp_path):
    """Another architecture, narrower: each state times the map, plus its offset."""
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    narrow = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **shape))
    narrow.save_pretrained(tmp_path / "narrow")
    place = str(tmp_path / "narrow")
    with pytest.raises(UserError, match="have size 16, those of the model 32; pass --affine_map FOLDER"):
        make(tmp_path / "out", place)
    llama().save_pretrained(tmp_path / "target")
    weight, bias = torch.randn(32, 16), torch.randn(32)
    metadata = {"layer_indices": [1], "teacher": identity(place), "target": identity(str(tmp_path / "target"))}
    AffineMaps({1: (weight, bias)}, metadata).save(tmp_path / "map")
    flags = {"affine_map": str(tmp_path / "map"), "layers": [1]}
    trainer = make(tmp_path / "out", place, load_model(str(tmp_path / "target")), **flags)
    batch = batch_of(trainer)["forget"]
    expected = states_of(narrow, batch, 1) @ weight.T + bias
    torch.testing.assert_close(trainer.teacher.states(batch)[1], expected, rtol=1e-5, atol=1e-5)
    # The same map in a run of another model, and one for other sizes.
    llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"fitted to the target '.*target' .*this run's target is '.*other'"):
        make(tmp_path / "out", place, load_model(str(tmp_path / "other")), **flags)
    AffineMaps({1: (weight[:8], bias[:8])}, {"layer_indices": [1]}).save(tmp_path / "map")
    with pytest.raises(UserError, match="has none for layer 1"):
        make(tmp_path / "out", place, **flags)
    with pytest.raises(UserError, match="leads from size 16 to 8, but the teacher's states have size 16 and the mod"):
        make(tmp_path / "out", place, affine_map=str(tmp_path / "map"), layers=[0])


def test_a_model_without_a_name_is_not_checked_but_warned_about(teacher_folder, tmp_path, caplog):
    metadata = {"layer_indices": [0], "teacher": identity(teacher_folder), "target": identity(teacher_folder)}
    AffineMaps({0: (torch.eye(32), torch.zeros(32))}, metadata).save(tmp_path / "map")
    trainer = make(tmp_path / "out", teacher_folder, affine_map=str(tmp_path / "map"), layers=[0])
    assert "cannot be checked: the model was not loaded by name" in caplog.text
    batch = batch_of(trainer)["forget"]
    torch.testing.assert_close(trainer.teacher.states(batch)[0], states_of(llama(seed=7), batch, 0))


def test_a_shallower_teacher_is_refused(tmp_path):
    shallow = llama(seed=1)
    del shallow.model.layers[1]
    shallow.config.num_hidden_layers = 1
    shallow.save_pretrained(tmp_path / "shallow")
    with pytest.raises(UserError, match=r"--layers reads layer 1, but the teacher '.*shallow' has layers 0 to 0"):
        make(tmp_path / "out", str(tmp_path / "shallow"))


def test_the_teachers_own_code_needs_a_pinned_revision(teacher_folder, tmp_path):
    model = llama()
    model._loaded_with = {"trust_remote_code": True, "dtype": torch.float32}
    with pytest.raises(UserError, match="pin it with --teacher_revision COMMIT"):
        make(tmp_path, teacher_folder, model)


def test_another_tokenizer_is_refused_naming_a_token(demo_tokenizer):
    import copy

    other = copy.deepcopy(demo_tokenizer)
    require_same_tokenizer(other, demo_tokenizer, "early")
    other.add_tokens(["<new>"])
    message = f"'<new>' is token {len(demo_tokenizer)} there and no token in the model's"
    with pytest.raises(UserError, match=message):
        require_same_tokenizer(other, demo_tokenizer, "early")


def test_bfloat16_is_computed_like_the_policys_forward(teacher_folder, tmp_path):
    """A teacher that is the model itself leaves no loss, in bfloat16 too, to the bit."""
    trainer = make(tmp_path, teacher_folder, llama(seed=7), bf16=True)
    batch = batch_of(trainer)
    with trainer.accelerator.autocast():
        outputs = trainer.forward(trainer.model.eval(), batch, layers=[0, 1], scored=("retain",))
    taught = trainer.teacher.states(batch["forget"])
    assert all(torch.equal(taught[layer], outputs["forget"].hidden[layer].detach()) for layer in (0, 1))
    exact = states_of(llama(seed=7), batch["forget"], 0)
    assert 0 < (taught[0] - exact).abs().max() < 0.02 * exact.abs().max()
    assert isinstance(trainer.teacher, FrozenTeacher)
