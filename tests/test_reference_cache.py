"""The cached reference: asked once, only about rows that will be visited, and refused where it is another's."""

import json
from pathlib import Path

import pytest
import torch
from backends import train
from test_reference import batch_of, llama, make_trainer, sets, with_lora
from tiny_world import command, weights

from llm_unlearn import reference_cache
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.reference import Reference
from llm_unlearn.reference_cache import FOLDER, KEY, ReferenceCache

KL = {"retain_loss": "kl"}


@pytest.fixture
def asked(monkeypatch):
    """List of (stream, row) about which any reference was asked, fillers included."""
    found, original = [], Reference.read

    def watched(self, reader, model, inputs, streams):
        found.extend((name, row) for name in streams for row in inputs[name]["index"].tolist())
        return original(self, reader, model, inputs, streams)

    monkeypatch.setattr(Reference, "read", watched)
    return found


def prepared(folder, method="npo", cache=None, data=None, model=None, tokenizer=None, **flags):
    """A trainer whose reference has been asked."""
    flags = {"per_device_train_batch_size": 2, "reference_cache": cache and str(cache), **flags}
    trainer = make_trainer(method, folder, model, data, **flags)
    trainer.processing_class = tokenizer
    trainer._frozen_reference.prepare()
    return trainer


def contents(folder):
    """{(stream, row): values} of a cache, from its files."""
    cache = ReferenceCache(folder, {}, torch.device("cpu"), 0)
    return {key: cache.files[path][first:last] for key, (path, first, last) in cache.places.items()}


# ---- What is asked ----


def test_only_rows_that_the_plan_visits_are_asked_about_and_each_once(asked, tmp_path):
    """Three steps of two rows, of 10 forget and 40 retain rows."""
    trainer = prepared(tmp_path, data=sets(10, 40), max_steps=3, **KL)
    visited = trainer.visited_rows()
    assert {name: len(rows) for name, rows in visited.items()} == {"forget": 6, "retain": 6}
    assert sorted(asked) == sorted((name, row) for name, rows in visited.items() for row in rows)
    trainer.train()
    assert len(asked) == 12 and trainer.state.global_step == 3
    assert set(contents(tmp_path / FOLDER)) == set(asked)


@pytest.mark.parametrize("epochs", [1, 2.5, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_rows_that_training_reads_are_the_visited_ones(accumulation, epochs, tmp_path, monkeypatch):
    """A cache that lacks one would stop the run in its middle; one that has more was asked in vain."""
    read = set()
    flags = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}
    trainer = prepared(tmp_path, data=sets(7, 30), **flags, **KL)
    step = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        read.update((name, row) for name in inputs for row in inputs[name]["index"].tolist() if row >= 0)
        return step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert read == {(name, row) for name, rows in trainer.visited_rows().items() for row in rows}
    assert read == set(contents(tmp_path / FOLDER))


def test_a_second_run_asks_nothing_and_ends_the_same(asked, tmp_path):
    ends = []
    for number in range(2):
        trainer = prepared(tmp_path / str(number), cache=tmp_path / "cache", **KL)
        forwards = []
        trainer.model.register_forward_hook(lambda *_, f=forwards: f.append(torch.is_grad_enabled()))
        trainer.train()
        ends.append((len(asked), trainer.model.state_dict()))
        # Three steps, and a short forward without gradients that looks at the head, once.
        assert forwards.count(True) == 3 and forwards.count(False) == 1
    assert ends[0][0] == ends[1][0] == 12
    assert all(torch.equal(ends[0][1][name], value) for name, value in ends[1][1].items())


def test_more_epochs_ask_only_about_what_is_missing(asked, tmp_path):
    prepared(tmp_path, cache=tmp_path / "cache", data=sets(4, 20), num_train_epochs=1, **KL)
    first = set(asked)
    asked.clear()
    trainer = prepared(tmp_path, cache=tmp_path / "cache", data=sets(4, 20), num_train_epochs=3, **KL)
    visited = {(name, row) for name, rows in trainer.visited_rows().items() for row in rows}
    assert set(asked) == visited - first and len(asked) == 8 and {name for name, _ in asked} == {"retain"}
    assert set(contents(tmp_path / "cache")) == visited
    trainer.train()


def test_a_row_that_was_not_foreseen_is_refused_by_number(tmp_path):
    trainer = prepared(tmp_path, data=sets(4, 20), **KL)
    (unseen, *_) = sorted(set(range(20)) - set(trainer.visited_rows()["retain"]))
    with pytest.raises(UserError, match=f"no row {unseen} of the retain set; pass --reference live"):
        trainer.compute_loss(trainer.model, batch_of(trainer, [unseen % 4, unseen]))


def test_values_come_in_the_order_of_the_batch_and_skip_fillers(tmp_path):
    trainer = prepared(tmp_path, data=sets(6, 6), **KL)
    cache, dataset = trainer._frozen_reference.cache, trainer.train_dataset
    alone = contents(tmp_path / FOLDER)
    for numbers in ([3, -1, 0], [5], [-1, 2, 2]):
        batch = trainer.data_collator([dataset[("retain", number)] for number in numbers])
        expected = [alone["retain", number] for number in numbers if number >= 0]
        assert torch.equal(cache.values("retain", batch["retain"]), torch.cat(expected))
    filler = trainer.data_collator([dataset[(name, -1)] for name in dataset.streams])
    assert cache.values("retain", filler["retain"]).shape == (0, 32)
    assert cache.values("forget", filler["forget"]).shape == (0,)


# ---- Whose it is ----


class Tokenizer:
    """What a cache asks of a tokenizer."""

    def __init__(self, template=None, words=("a", "b")):
        self.chat_template, self.words = template, words
        self.pad_token_id = self.eos_token_id = 0

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


CHANGES = {
    "weights": lambda: {"model": llama(seed=9)},
    "precision": lambda: {"bf16": True},
    "tokenizer": lambda: {"tokenizer": Tokenizer("x", ("a", "c"))},
    "template": lambda: {"tokenizer": Tokenizer("y")},
    "data": lambda: {"data": {**sets(), "forget": sets(7)["forget"]}},
    "readings": lambda: {"method": "random_label", "top_k": 1, "rm_groundtruth": True},
    "precision and template": lambda: {"bf16": True, "question_template": "{question} {answer}"},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_stale_cache_is_refused_by_what_has_changed_and_stays(changed, tmp_path):
    cache = tmp_path / "cache"
    prepared(tmp_path, cache=cache, tokenizer=Tokenizer("x"))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    given = {"tokenizer": Tokenizer("x"), **CHANGES[changed]()}
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path, cache=cache, **given)
    assert f"'{cache}' is stale: it was made with other {changed}; delete it, or pass" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_the_labels_of_random_label_belong_to_the_seed_and_the_flags(tmp_path):
    flags = {"method": "random_label", "cache": tmp_path / "cache", "top_k": 5, "rm_groundtruth": True}
    prepared(tmp_path, **flags)
    prepared(tmp_path, **flags)
    for change in ({"seed": 7}, {"top_k": 6}, {"top_p": 0.5}, {"legacy_shift": True}):
        with pytest.raises(UserError, match="made with other readings"):
            prepared(tmp_path, **{**flags, **change})


def test_adapters_are_no_part_of_the_reference(asked, tmp_path):
    """A run with LoRA and one without it start from the same model, and share its answers."""
    prepared(tmp_path, cache=tmp_path / "cache")
    count = len(asked)
    prepared(tmp_path, cache=tmp_path / "cache", model=with_lora(llama()), reference="cached")
    assert len(asked) == count > 0
    # Adapters that have trained before are part of the model before unlearning, which no cache without them knows.
    with pytest.raises(UserError, match="made with other weights"):
        prepared(tmp_path, cache=tmp_path / "cache", model=with_lora(llama(), init_lora_weights=False))


def test_overwriting_the_output_directory_renews_a_stale_cache_in_it(asked, tmp_path):
    prepared(tmp_path)
    count = len(asked)
    with pytest.raises(UserError, match="is stale"):
        prepared(tmp_path, model=llama(seed=9))
    trainer = prepared(tmp_path, model=llama(seed=9), overwrite_output_dir=True)
    assert len(asked) == 2 * count
    trainer.train()


def test_a_cache_that_was_asked_for_by_name_is_not_overwritten_with_the_output_directory(tmp_path):
    """It may belong to other runs, which overwriting this one's output has nothing to do with."""
    prepared(tmp_path, cache=tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(UserError, match="is stale"):
        prepared(tmp_path, cache=tmp_path / "cache", model=llama(seed=9), overwrite_output_dir=True)
    assert contents(tmp_path / "cache").keys() == before.keys()


def test_a_folder_that_is_no_cache_is_refused_and_loses_nothing(tmp_path):
    """The folder of a model, for example, whose weights end in .safetensors too."""
    (tmp_path / "model").mkdir()
    weights_file = tmp_path / "model/model.safetensors"
    weights_file.write_bytes(b"precious")
    with pytest.raises(UserError):
        prepared(tmp_path, cache=tmp_path / "model")
    assert weights_file.read_bytes() == b"precious"


# ---- Damage ----


def damaged_key(cache):
    (cache / KEY).write_text((cache / KEY).read_text()[:40])


def truncated(cache):
    (path,) = cache.glob("forget.*.safetensors")
    path.write_bytes(path.read_bytes()[:-16])


def emptied(cache):
    (path,) = cache.glob("forget.*.safetensors")
    path.write_bytes(b"")


def of_another_kind(cache):
    from safetensors.torch import save_file

    (path,) = cache.glob("forget.*.safetensors")
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncated, emptied, of_another_kind, damaged_key])
def test_a_damaged_cache_is_refused_in_one_sentence(damage, tmp_path):
    cache = tmp_path / "cache"
    prepared(tmp_path, cache=cache)
    damage(cache)
    with pytest.raises(UserError, match=r"cache.*delete") as refusal:
        prepared(tmp_path, cache=cache)
    assert "\n" not in str(refusal.value) and str(cache) in str(refusal.value)


def test_a_file_where_the_folder_should_be_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("something else")
    with pytest.raises(UserError):
        prepared(tmp_path, cache=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "something else"


@pytest.mark.parametrize("moment", ["in the file", "before its name"])
def test_a_fill_that_is_killed_leaves_nothing_half_read(moment, asked, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    whole = prepared(tmp_path, cache=tmp_path / "whole", **KL)
    original = reference_cache.save_file

    def killed(tensors, path):
        original(tensors, path)
        if "retain" in Path(path).name:
            Path(path).write_bytes(Path(path).read_bytes()[: 99 if moment == "in the file" else None])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path, cache=cache, **KL)
    assert [path.name for path in cache.glob("*.partial")] == ["retain.0.0.partial"]
    asked.clear()
    prepared(tmp_path, cache=cache, **KL)
    assert {name for name, _ in asked} == {"retain"}
    found, expected = contents(cache), contents(tmp_path / "whole")
    assert whole.visited_rows() and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_row_that_counts_other_tokens_is_refused(tmp_path):
    trainer = prepared(tmp_path)
    batch = batch_of(trainer, [0, 1])
    batch["forget"]["labels"][0, 2] = -100
    with pytest.raises(UserError, match="counts other tokens in row 0 of the forget set"):
        trainer.reference(batch)


# ---- Where it is, and for how long ----


def test_the_default_folder_goes_with_the_finished_run_and_a_given_one_stays(tiny_world, tmp_path, asked):
    assert main(command(tiny_world, "npo", tmp_path / "default")) == 0
    assert not list((tmp_path / "default").glob("reference_cache*")) and len(asked) == 10
    given = ["--reference_cache", tmp_path / "kept"]
    for number in range(2):
        assert main(command(tiny_world, "npo", tmp_path / str(number), *given)) == 0
        assert len(asked) == 20 and not (tmp_path / str(number) / FOLDER).exists()
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {KEY, "forget.0.0.safetensors"}
    first, second, other = (weights(tmp_path / name) for name in ("0", "1", "default"))
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], other[key]) for key in first)


def test_a_run_that_breaks_off_keeps_its_cache_and_resumes_bit_for_bit(tiny_world, tmp_path, asked, monkeypatch):
    """Also where the model's weights have moved since: they are asked before the checkpoint is loaded."""
    flags = ["--retain_loss", "kl", "--optim", "adamw_torch", "--learning_rate", "1e-3", "--num_train_epochs", "2"]
    words = [*flags, "--save_strategy", "steps", "--save_steps", "1"]
    assert main(command(tiny_world, "npo", tmp_path / "whole", *words)) == 0
    count = len(asked)
    found = command(tiny_world, "npo", tmp_path / "part", *words)
    from llm_unlearn.methods.npo import NPOTrainer

    original = NPOTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NPOTrainer, "compute_loss", broken)
        assert main(found) == 130
    assert (tmp_path / "part" / FOLDER / KEY).is_file() and len(asked) == 2 * count
    assert main([*found, "--resume_from_checkpoint", "auto"]) == 0
    assert len(asked) == 2 * count and not (tmp_path / "part" / FOLDER).exists()
    whole, part = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(whole[key], part[key]) for key in whole)


@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_two_processes_make_the_cache_of_one(backend, tiny_world, tmp_path):
    """Each makes a share of it, in batches of other rows: float32 sums in another order."""
    flags = ["--retain_loss", "kl", "--max_steps", "2", "--per_device_train_batch_size"]
    found, expected = tmp_path / "two", tmp_path / "one"
    assert main(command(tiny_world, "npo", tmp_path / "b", *flags, 4, "--reference_cache", expected)) == 0
    train(command(tiny_world, "npo", tmp_path / "a", *flags, 2, "--reference_cache", found), backend, 2)
    ours, theirs = contents(found), contents(expected)
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5)
    assert {path.name.split(".")[1] for path in found.glob("*.safetensors")} == {"0", "1"}
    keys = [json.loads((folder / KEY).read_text()) for folder in (found, expected)]
    # ZeRO-3 partitions the weights while it loads them, and knows their files instead.
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == (
        {"weights"} if backend == "zero3" else set()
    )
