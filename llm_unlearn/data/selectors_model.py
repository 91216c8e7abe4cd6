"""Scores of forget tokens that a model is asked for before training, kept in files for later runs."""
# Shapes: N counted tokens of the forget set, row by row, H of them hits; B sequences, T tokens, D hidden size.

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.selectors_states import LinearProbe, SparseEncoder, latent_numbers, prototype
from llm_unlearn.data.selectors_text import SELECTED, counted, require_some
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions, own_states
from llm_unlearn.head_reading import HeadReader
from llm_unlearn.models import (
    LOADED_WITH,
    check_vocabulary,
    checked_layers,
    load_model,
    load_tokenizer,
    loaded_fingerprint,
)
from llm_unlearn.models import model_fingerprint as fingerprint_of
from llm_unlearn.reference import LOGPS, Reading, Reference, frozen_as_policy, states_at
from llm_unlearn.reference_cache import cache_key

MOST_HITS = 1000


class Asker(Reference):
    """Asks frozen models about the forget set before training: the model that will train, or another one.

    Batches hold the same rows however many processes there are, each of which takes a share of the batches: so a model
    that is whole on each process gives the same answers to the last bit.

    Args:
        trainer: UnlearnTrainer, whose model has not trained yet.
        rows: list of {"input_ids", "labels"}.
        reading: reference.Reading.
    """

    def __init__(self, trainer, rows, reading):
        self.trainer, self.readings = trainer, {"forget": reading}
        # Labels may have become others; a model is asked about the tokens themselves.
        labels = [[IGNORED if label == IGNORED else token for token, label in _pairs(row)] for row in rows]
        parts = [{"input_ids": row["input_ids"], "labels": own} for row, own in zip(rows, labels, strict=True)]
        self.dataset = UnlearnDataset({"forget": parts})

    def of_policy(self):
        """Return (N, ...) float32 on the CPU: what the model that will train says; all processes together."""
        with self._before_training() as source:
            return self._answers(source)

    def of_another(self, name):
        """Return (N, ...) float32 on the CPU: what the model of this name says; all processes together."""
        model = frozen_as_policy(self.trainer, _load_beside(self.trainer, name))
        reader = HeadReader(extract_model_from_parallel(model))
        try:
            return self._answers(lambda inputs, streams: self.read(reader, model, inputs, streams))
        finally:
            if hasattr(model, "destroy"):
                model.destroy()

    def _answers(self, source):
        """Ask in batches of rows of similar length, as many on every process: sharded weights are gathered together."""
        trainer, args, rows = self.trainer, self.trainer.args, self.dataset.streams["forget"]
        counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        size, flat = args.per_device_eval_batch_size, None
        for first in range(0, len(order), size * args.world_size):
            first += args.process_index * size
            mine = order[first : first + size] or [FILLER]
            batch = trainer.data_collator([self.dataset["forget", row] for row in mine])
            values = source(trainer._prepare_inputs(batch), ("forget",))["forget"].float()
            if flat is None:
                flat = values.new_zeros(starts[-1], *values.shape[1:])
            lengths = counted_positions(batch["forget"]).sum(-1).tolist()
            for row, part in zip(mine, values.split(lengths), strict=True):
                if row != FILLER:
                    flat[starts[row] : starts[row + 1]] = part
        # Each value stands on one process, and adding zeros changes none.
        return trainer.accelerator.reduce(flat, "sum").cpu()


def activation_scores(trainer, rows):
    """Return ((N,) cosine of each token's state with the keywords' prototype, record).

    The prototype is the mean state of at most MOST_HITS tokens that overlap a keyword, spread evenly over all of them.

    Args:
        trainer: UnlearnTrainer.
        rows: tokenized forget rows with the column `selected`.
    Raises:
        UserError: the keywords mark no token that counts, or all of them; a layer that does not exist.
    Source: EleutherAI/unlearn, its activation masks. Differs from the authors' code: nothing is known to.
    """
    given = trainer.args.selection_layer
    (layer,) = checked_layers([trainer.depth // 2 if given is None else given], trainer.depth)
    marks = counted(rows, SELECTED)
    require_some(sum(marks), len(marks), trainer.args, ("keywords", "keyword_regex"))
    hits = [place for place, is_marked in enumerate(marks) if is_marked]
    number = min(len(hits), MOST_HITS)
    chosen = [hits[n * len(hits) // number] for n in range(number)]

    def compute():
        states = Asker(trainer, _only(rows, set(chosen)), states_at((layer,))).of_policy()
        direction = prototype(states[:, 0]).to(trainer.args.device)

        def read(states, stream):
            return torch.cosine_similarity(own_states(states[layer])[counted_positions(stream)].float(), direction, -1)

        return Asker(trainer, rows, Reading("cosine", read, (), (layer,))).of_policy()

    return cached(trainer, "activation", {"layer": layer, "hits": _digest(chosen)}, compute)


def probe_scores(trainer, rows):
    """Return ((N,) logit of each token under a linear probe of its state, record).

    Args:
        trainer: UnlearnTrainer.
        rows: tokenized forget rows.
    Raises:
        UserError: no probe there, or one of another model.
    """
    probe = LinearProbe.load(trainer.args.selection_probe)
    model = trainer.reader.language_model
    probe.require_model(trainer.on_first_rank(lambda: loaded_fingerprint(model)), _hidden_size(model))
    (layer,) = checked_layers([probe.layer], trainer.depth)
    probe = probe.to(trainer.args.device)

    def read(states, stream):
        return probe(own_states(states[layer])[counted_positions(stream)])

    reading = Reading("probe", read, (), (layer,))
    settings = {"layer": layer, "probe": probe.sha256}
    return cached(trainer, "probe", settings, lambda: Asker(trainer, rows, reading).of_policy())


def sae_scores(trainer, rows):
    """Return ((N,) how many of the listed latents are among each token's k largest, record).

    Args:
        trainer: UnlearnTrainer.
        rows: tokenized forget rows.
    Raises:
        UserError: no autoencoder there, or none for this model or of these latents.
    """
    args, model = trainer.args, trainer.reader.language_model
    encoder = SparseEncoder.load(args.selection_sae, args.selection_layer)
    encoder.require_size(_hidden_size(model))
    (layer,) = checked_layers([encoder.layer], trainer.depth)
    latents = latent_numbers(args.selection_latents, encoder.num_latents)
    encoder = encoder.to(args.device)

    def read(states, stream):
        return encoder.counts(own_states(states[layer])[counted_positions(stream)], latents)

    reading = Reading("sae", read, (), (layer,))
    settings = {"layer": layer, "sae": encoder.sha256, "k": encoder.k, "latents": latents}
    return cached(trainer, "sae", settings, lambda: Asker(trainer, rows, reading).of_policy())


def loss_delta_scores(trainer, rows):
    """Return ((N,) NLL under the reference model minus NLL under the model that will train, nats, record).

    Args:
        trainer: UnlearnTrainer.
        rows: tokenized forget rows.
    Raises:
        UserError: no such reference model, or one with another tokenizer.
    """
    name = trainer.args.selection_reference_model
    asker = Asker(trainer, rows, LOGPS)
    where = _hub(trainer)
    settings = {"reference": trainer.on_first_rank(lambda: fingerprint_of(name, **where))}
    return cached(trainer, "loss_delta", settings, lambda: asker.of_policy() - asker.of_another(name))


SCORES = {
    "activation": activation_scores,
    "probe": probe_scores,
    "sae": sae_scores,
    "loss_delta": loss_delta_scores,
}
"""{kind of selection: function (trainer, rows) -> ((N,) float32 on the CPU, record)}"""


def cached(trainer, kind, settings, compute):
    """Return scores from the file of this very question, or ask and write it; all processes together.

    The name of the file holds a digest of model, precision, tokenizer, data, kind and settings, so that none is ever
    stale; it appears when it is complete. The first process alone looks, reads and writes.

    Args:
        trainer: UnlearnTrainer.
        kind: of the selection.
        settings: whatever else the scores depend on, as JSON can hold it.
        compute: function that returns (N,) scores, the same on every process.
    Returns:
        ((N,) float32 on the CPU, {"settings", "cache": path, "was_cached"}).
    Raises:
        UserError: the folder cannot be written, or a file in it cannot be read.
    """
    count = trainer.train_dataset.num_tokens()["forget"]
    folder, kept = Path(trainer.args.selection_cache), []

    def look():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--selection_cache '{folder}' cannot be made: {error.strerror}") from error
        # Adapters that are about to train are part of the model; another seed draws others.
        key = json.dumps(cache_key(trainer, {"forget": Reading(kind, None, tuple(settings.items()))}, True))
        path = folder / f"{kind}-{_digest(key)[:32]}.safetensors"
        if path.is_file():
            kept.append(_read(path, key, count))
        return str(path), key, path.is_file()

    path, key, is_there = trainer.on_first_rank(look)
    if is_there:
        mine = kept[0] if kept else torch.zeros(count)
        scores = trainer.accelerator.reduce(mine.to(trainer.args.device), "sum").cpu()
    else:
        scores = compute()
        trainer.on_first_rank(lambda: _write(Path(path), key, scores))
    return scores, {"settings": settings, "cache": path, "was_cached": is_there}


def _pairs(row):
    return zip(row["input_ids"], row["labels"], strict=True)


def _only(rows, chosen):
    """Return rows whose labels stand at these counted tokens alone, numbered through all rows; others are left out."""
    found, place = [], 0
    for row in rows:
        labels = [IGNORED] * len(row["labels"])
        for position, label in enumerate(row["labels"]):
            if position > 0 and label != IGNORED:
                labels[position] = label if place in chosen else IGNORED
                place += 1
        if any(label != IGNORED for label in labels):
            found.append({"input_ids": row["input_ids"], "labels": labels})
    return found


def _load_beside(trainer, name):
    """Load another model in the precision of the policy, after looking at its tokenizer."""
    policy, tokenizer, where = trainer.reader.language_model, trainer.processing_class, _hub(trainer)
    if tokenizer is not None and load_tokenizer(name, **where).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--selection_reference_model '{name}' has another tokenizer than the model; pass one of its family"
        )
    model = load_model(name, getattr(policy, LOADED_WITH, {}).get("dtype", policy.dtype), **where)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    return model


def _hub(trainer):
    loaded_with = getattr(trainer.reader.language_model, LOADED_WITH, {})
    return {key: loaded_with[key] for key in ("cache_dir", "token") if key in loaded_with}


def _hidden_size(model):
    return model.config.get_text_config(decoder=True).hidden_size


def _digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(path, key, count):
    try:
        with safe_open(path, framework="pt") as file:
            scores, made_from = file.get_tensor("scores"), (file.metadata() or {}).get("key")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the scores '{path}' cannot be read ({str(error).splitlines()[0]}); delete the file"
        ) from error
    if made_from != key or scores.shape != (count,):
        raise UserError(f"the scores '{path}' are not those that their name says; delete the file")
    return scores


def _write(path, key, scores):
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({"scores": scores.contiguous()}, partial, metadata={"key": key})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"--selection_cache '{path.parent}' cannot be written: {error}") from error
