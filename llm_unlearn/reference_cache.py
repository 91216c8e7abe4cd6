"""What the frozen reference says about the rows that training will visit, kept in files instead of a second model."""
# Shapes: B sequences, N counted positions of a batch, n of a row.

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions
from llm_unlearn.models import loaded_fingerprint

logger = logging.getLogger(__name__)

FOLDER, KEY = "reference_cache", "key.json"
_FLUSH_BYTES, _FLUSH_ROWS = 2**28, 2**12


class ReferenceCache:
    """Values of rows in safetensors files, mapped into memory and not loaded; every process reads every file.

    Args:
        folder: pathlib.Path, shared by all processes.
        key: dict that says what the values were made from.
        device: where values are wanted.
        rank: of this process; part of its files' names.
    """

    def __init__(self, folder, key, device, rank):
        self.folder, self.key, self.device, self.rank = Path(folder), key, device, rank
        self.places, self.files = {}, {}
        self.reload()

    @classmethod
    def open(cls, trainer, readings, with_adapters=False):
        """Open the cache of a run, or begin it; all processes together.

        Args:
            trainer: UnlearnTrainer.
            readings: {stream: Reading}.
            with_adapters: whether the adapters are part of the model before training.
        Returns:
            ReferenceCache.
        Raises:
            UserError: it is there, but was made from something else.
        """
        folder = Path(trainer.args.reference_cache or Path(trainer.args.output_dir) / FOLDER)
        may_replace = trainer.args.overwrite_output_dir and not trainer.args.reference_cache
        key = trainer.on_first_rank(lambda: _claim(folder, cache_key(trainer, readings, with_adapters), may_replace))
        return cls(folder, key, trainer.args.device, trainer.args.process_index)

    def reload(self):
        """Look at the files anew."""
        self.places, self.files = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                rows, lengths = file.get_tensor("rows").tolist(), file.get_tensor("lengths").tolist()
            except (SafetensorError, OSError) as error:
                raise UserError(f"the reference cache's {path} cannot be read ({error}); delete the folder") from error
            self.files[path], first = file.get_slice("values"), 0
            stream = path.name.partition(".")[0]
            for row, length in zip(rows, lengths, strict=True):
                self.places[stream, row] = path, first, first + length
                first += length

    def missing(self, visited):
        """Return {stream: rows of `visited` that are not here}."""
        return {name: [row for row in rows if (name, row) not in self.places] for name, rows in visited.items()}

    def values(self, name, stream):
        """Return (N, ...) values of a batch's counted tokens, row by row.

        Args:
            name: of the stream.
            stream: its part of an UnlearnBatch.
        Raises:
            UserError: a row is not here, or counted other tokens.
        """
        found = []
        counted = counted_positions(stream).sum(-1).tolist()
        for row, count in zip(stream["index"].tolist(), counted, strict=True):
            if row == FILLER:
                continue
            if (name, row) not in self.places:
                raise UserError(f"the reference cache has no row {row} of the {name} set; pass --reference live")
            path, first, last = self.places[name, row]
            if last - first != count:
                raise UserError(f"the reference cache counts other tokens in row {row} of the {name} set; delete it")
            found.append(self.files[path][first:last])
        if not found:
            return self._nothing(name)
        return torch.cat(found).to(self.device, non_blocking=True)

    def write(self, name, rows):
        """Write {row: (n, ...) values} of a stream into a file of its own."""
        if not rows:
            return
        tensors = {
            "rows": torch.tensor(list(rows)),
            "lengths": torch.tensor([len(values) for values in rows.values()]),
            "values": torch.cat(list(rows.values())).contiguous(),
        }
        number = len(list(self.folder.glob(f"{name}.{self.rank}.*.safetensors")))
        path = self.folder / f"{name}.{self.rank}.{number}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)

    def delete(self):
        """Delete the folder."""
        self.places, self.files = {}, {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def num_bytes(self):
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def _nothing(self, name):
        (path, _, _) = next(place for key, place in self.places.items() if key[0] == name)
        return self.files[path][0:0].to(self.device)


def fill(trainer, cache, readings, missing, source):
    """Compute the values of rows, a share on each process, and write them.

    Args:
        trainer: UnlearnTrainer.
        cache: ReferenceCache.
        readings: {stream: Reading}.
        missing: {stream: row numbers}.
        source: function of (UnlearnBatch, streams) -> {stream: (N, ...)} that asks the model before training.
    """
    args = trainer.args
    total = sum(len(rows) for rows in missing.values())
    logger.info("asking the reference about %d rows, once", total)
    for name in readings:
        dataset = trainer.train_dataset
        rows = sorted(missing[name], key=lambda row: -len(dataset.streams[name][row]["input_ids"]))
        done, size = {}, 0
        step = args.per_device_eval_batch_size * args.world_size
        for first in range(0, len(rows), step):
            # Neighbors in length on every process, and as many forwards: sharded weights are gathered together.
            mine = rows[first : first + step][args.process_index :: args.world_size]
            found = _ask(trainer, dataset, name, mine or [FILLER], source)
            done.update({row: values for row, values in found.items() if row != FILLER})
            size += sum(values.nbytes for values in found.values())
            if size > _FLUSH_BYTES or len(done) >= _FLUSH_ROWS:
                cache.write(name, done)
                done, size = {}, 0
        cache.write(name, done)
    trainer.accelerator.wait_for_everyone()
    cache.reload()
    logger.info("the reference's answers take %.1f MB in %s", cache.num_bytes() / 1e6, cache.folder)


def cache_key(trainer, readings, with_adapters=False):
    """Return what a cache's values depend on, as JSON; any difference makes the cache stale."""
    language_model = trainer.reader.language_model
    tokenizer, args = trainer.processing_class, trainer.args
    template = args.question_template or getattr(tokenizer, "chat_template", None)
    precision = "bf16" if args.autocast_in_forward else trainer.accelerator.mixed_precision
    return {
        "weights": weights_fingerprint(trainer, with_adapters),
        "config": [type(language_model).__name__, _config_digest(language_model.config)],
        "precision": f"{trainer.model.dtype} computed in {precision}".replace("torch.", ""),
        "tokenizer": None if tokenizer is None else _digest(sorted(tokenizer.get_vocab().items())),
        "template": _digest(template),
        "data": {name: trainer.train_dataset.fingerprints[name] for name in readings},
        "readings": {name: [reading.name, *reading.settings] for name, reading in readings.items()},
    }


def weights_fingerprint(trainer, with_adapters=False):
    """Return the sha256 of the weights and buffers before training; of the weights' files under ZeRO-3."""
    model = trainer.reader.language_model
    if trainer.zero_stage() == 3:
        found = loaded_fingerprint(model)
        if found is None:
            raise UserError("under ZeRO-3 the reference is known by the model's files, but it was loaded from none")
        return found
    found, skips_adapters = hashlib.sha256(), hasattr(trainer.model, "disable_adapter") and not with_adapters
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not (skips_adapters and "lora_" in name):
            plain = name.replace(".base_layer", "").replace("base_model.model.", "")
            found.update(f"{plain}{tuple(weight.shape)}{weight.dtype}".encode())
            found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _config_digest(config):
    """Return a digest of what a config says about the computation: rotary scales, softcaps, the kind of attention."""
    said = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        said.pop(name, None)
    return _digest(json.loads(json.dumps([said, config._attn_implementation], default=str, sort_keys=True)))


def _ask(trainer, dataset: UnlearnDataset, name, rows, source):
    """Return {row: values on the CPU} of one batch."""
    batch = trainer._prepare_inputs(trainer.data_collator([dataset[(name, row)] for row in rows]))
    values = source(batch, (name,))[name].cpu()
    lengths = counted_positions(batch[name]).sum(-1).tolist()
    return dict(zip(rows, values.split(lengths), strict=True))


def _claim(folder, key, may_replace):
    """Begin a cache, or go on with one of the same key; returns the key."""
    path = folder / KEY
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--reference_cache '{folder}' is a file")
    if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--reference_cache '{folder}' holds other files and no {KEY}; pass an empty or a new folder")
    if path.is_file():
        changed = _differences(path, key)
        if not changed:
            return key
        if not may_replace:
            raise UserError(
                f"the reference cache '{folder}' is stale: it was made with other {' and '.join(changed)}; "
                "delete it, or pass another --reference_cache"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--reference_cache '{folder}' cannot be made: {error.strerror}") from error
    partial = folder.with_name(f"{folder.name}.{KEY}.partial")
    partial.write_text(json.dumps(key, indent=1), encoding="utf-8")
    os.replace(partial, path)
    return key


def _differences(path, key):
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return [name for name in key if before.get(name) != key[name]]
    except (ValueError, AttributeError) as error:
        raise UserError(f"the reference cache's {path} cannot be read ({error}); delete the folder") from error


def _digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
