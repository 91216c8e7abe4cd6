"""Greedy decoding of many prompts: sorted by length, finished rows dropped, loops cut short and said so."""
# Shapes: R live rows, P tokens of the longest prompt of a batch.

import hashlib
import inspect
import logging
from dataclasses import asdict, dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import DynamicCache

from llm_unlearn.evaluation.store import RecordStore

logger = logging.getLogger(__name__)

_DROP_SHARE = 1 / 16
_LONGEST_PERIOD, _LOOP_REPEATS, _LOOP_TOKENS, _LOOK_EVERY = 24, 6, 96, 8
_STOP_WINDOW = 12
# Settings of a generation config with which greedy decoding is more than the first choice at each step.
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0, "min_new_tokens": 0}
_UNSET = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
_UNSET += ("sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config")


@dataclass(frozen=True)
class Prompt:
    """What to continue, and until when.

    Attributes:
        ids: token ids.
        max_new_tokens: at most that many tokens.
        stop: strings before which the text ends.
    """

    ids: tuple
    max_new_tokens: int = 200
    stop: tuple = ()

    @property
    def key(self):
        """What this prompt is called in a store."""
        text = f"{' '.join(map(str, self.ids))}|{self.max_new_tokens}|{self.stop!r}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Generation:
    """A greedy continuation.

    Attributes:
        text: without special tokens, cut before the stop string.
        num_tokens: new tokens, the end-of-sequence token included.
        finished: whether it ended by itself.
        collapsed: whether it ran into a loop; its tokens continue the loop without having been decoded.
    """

    text: str
    num_tokens: int
    finished: bool
    collapsed: bool


class Generator:
    """Decodes prompts greedily under one model, each distinct one once, sharded over the processes.

    The text is that of `model.generate(do_sample=False)`. A row whose last tokens repeat a period of at most 24 tokens
    six times over, 96 tokens or more, is in a loop: it is not decoded further, its text continues the loop, and it is
    counted.

    Args:
        model: a causal language model on its device, unwrapped, in eval mode.
        tokenizer: its tokenizer.
        pad_id: an id to pad with.
        folder: as for `statistics.Scorer`.
        max_tokens: tokens that a batch holds in its cache at most.
        max_sequences: rows of a batch at most; None: no bound.
        lockstep: weights are sharded, every process decodes equally many steps.
        cap_loops: whether loops are cut short.
        progress: whether the first process shows a progress bar.
    """

    kind, activity = "generations", "generating"

    def __init__(
        self, model, tokenizer, pad_id, folder=None, max_tokens=16384, max_sequences=None, lockstep=False,
        cap_loops=True, progress=False,
    ):  # fmt: skip
        self.model, self.tokenizer, self.pad_id, self.lockstep = model, tokenizer, pad_id, lockstep
        self.max_tokens, self.max_sequences, self.cap_loops = max_tokens, max_sequences, cap_loops
        self.processes = PartialState()
        self.progress = progress and self.processes.is_main_process
        self.store = RecordStore(folder, self.kind, self.processes.process_index)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
        self.own_loop = not lockstep and _is_plain(config) and _can_cache(model)
        self.known = None
        names = ("prompts_decoded", "prompts_reused", "prompt_tokens", "decode_steps", "decode_row_steps")
        self.counters = dict.fromkeys((*names, "ideal_row_steps", "collapsed_rows"), 0)

    @torch.no_grad()
    def generate(self, prompts):
        """Continue prompts; all processes call together and all get all results.

        Args:
            prompts: list of Prompt, repetitions allowed.
        Returns:
            list of Generation in the same order.
        """
        if self.known is None:
            records = gather_object([self.store.read()])
            self.known = {key: _generation(record) for part in records for key, record in part.items()}
        keys = [self._key(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self.known}
        self.counters["prompts_reused"] += len(set(keys)) - len(missing)
        self._generate_missing(list(missing.values()))
        results = [self.known[key] for key in keys]
        self.counters["collapsed_rows"] = sum(generation.collapsed for generation in self.known.values())
        return results

    def _key(self, prompt):
        return prompt.key if self.cap_loops else f"{prompt.key}-uncapped"

    def _generate_missing(self, prompts):
        batches = self._batches(prompts)
        rank, world = self.processes.process_index, self.processes.num_processes
        mine, found = batches[rank::world], {}
        counts = dict.fromkeys(self.counters, 0)
        rounds = range(-(-len(batches) // world) if self.lockstep else len(mine))
        for number in tqdm(rounds, self.activity, disable=not self.progress, leave=False):
            batch = mine[number] if number < len(mine) else batches[0][:1]
            decoded = self._decode(batch, counts) if self.own_loop else self._decode_with_generate(batch, counts)
            if number >= len(mine):
                continue
            done = {self._key(prompt): self._finish(prompt, row) for prompt, row in zip(batch, decoded, strict=True)}
            self.store.append([{"key": key, **asdict(generation)} for key, generation in done.items()])
            found |= done
        for part, part_counts in gather_object([(found, counts)]):
            self.known |= part
            for name, value in part_counts.items():
                self.counters[name] += value
        self.counters["prompts_decoded"] += len(prompts)

    def _batches(self, prompts):
        """Cut prompts into batches of like length and bounded cache, the longest first."""
        ordered = sorted(prompts, key=lambda prompt: (-self._room(prompt), -len(prompt.ids), prompt.key))
        batches, batch = [], []
        for prompt in ordered:
            longest = max(len(other.ids) + other.max_new_tokens for other in [*batch, prompt])
            too_many = self.max_sequences is not None and len(batch) == self.max_sequences
            # transformers' own loop stops all rows of a batch at the same length.
            is_other = not self.own_loop and batch and self._room(batch[0]) != self._room(prompt)
            if batch and (too_many or is_other or (len(batch) + 1) * longest > self.max_tokens):
                batches.append(batch)
                batch = []
            batch.append(prompt)
        return [*batches, batch] if batch else batches

    def _padded(self, batch):
        """Return (ids, mask), (R, P) each, padded on the left."""
        width = max(len(prompt.ids) for prompt in batch)
        ids = [[*[self.pad_id] * (width - len(prompt.ids)), *prompt.ids] for prompt in batch]
        lengths = torch.tensor([len(prompt.ids) for prompt in batch])
        mask = torch.arange(width) >= width - lengths.unsqueeze(1)
        return torch.tensor(ids, device=self.model.device), mask.long().to(self.model.device)

    def _decode(self, batch, counts):
        rows = [self._row(prompt) for prompt in batch]
        live = list(rows)
        # A prompt with several continuations is read once.
        distinct = {prompt.ids: prompt for prompt in batch}
        places = {ids: place for place, ids in enumerate(distinct)}
        readers = torch.tensor([places[prompt.ids] for prompt in batch], device=self.model.device)
        ids, mask = self._padded(list(distinct.values()))
        counts["prompt_tokens"] += ids.numel()
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while True:
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1]
            if len(logits) < len(live):
                cache.batch_select_indices(readers)
                logits, mask, positions = logits[readers], mask[readers], positions[readers]
            chosen = self._choose(logits, live)
            for row, token in zip(live, chosen.tolist(), strict=True):
                self._append(row, token)
            open_rows = [number for number, row in enumerate(live) if not row.done]
            if not open_rows:
                break
            # A shrinking batch costs a copy of the cache, so that a few finished rows ride along for a moment.
            if len(live) - len(open_rows) > _DROP_SHARE * len(live):
                kept = torch.tensor(open_rows, device=ids.device)
                cache.batch_select_indices(kept)
                live, chosen = [live[number] for number in open_rows], chosen[kept]
                mask, positions = mask[kept], positions[kept]
            ids = chosen.unsqueeze(-1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            # A row that is done rides along, and must not look up a position beyond the last one.
            positions = (positions[:, -1:] + 1).clamp(max=None if self.context is None else self.context - 1)
            counts["decode_steps"] += 1
            counts["decode_row_steps"] += len(live)
        counts["ideal_row_steps"] += sum(max(row.decoded - 1, 0) for row in rows)
        return rows

    def _choose(self, logits, rows):
        """Return the (R,) next tokens of the rows from the (R, V) logits."""
        return logits.argmax(-1)

    def _processors(self, rows):
        """Return what makes `generate`, which takes the first choice, choose as `_choose` does; None: nothing."""
        return None

    def _row(self, prompt):
        return DecodedRow(prompt, self._room(prompt))

    def _room(self, prompt):
        """Return how many tokens may follow a prompt within the model's context."""
        wanted = prompt.max_new_tokens
        return wanted if self.context is None else max(0, min(wanted, self.context - len(prompt.ids)))

    def _append(self, row, token):
        if row.done:
            return
        if row.room == 0:
            row.done = True
            return
        row.ids.append(token)
        row.decoded += 1
        if token in self.ends:
            row.done = row.finished = True
        elif row.decoded >= row.room or self._stops(row):
            row.done = True
        elif self.cap_loops and row.decoded % _LOOK_EVERY == 0:
            period = loop_period(row.ids)
            if period:
                loop = row.ids[-period:]
                row.ids += [loop[number % period] for number in range(row.room - len(row.ids))]
                row.done = row.collapsed = True

    def _stops(self, row):
        if not row.prompt.stop:
            return False
        tail = self.tokenizer.decode(row.ids[-_STOP_WINDOW:], skip_special_tokens=True)
        row.finished = any(stop in tail for stop in row.prompt.stop)
        return row.finished

    def _decode_with_generate(self, batch, counts):
        """Decode by transformers' own loop, for models and settings that ours does not know; all rows of equal room."""
        room = self._room(batch[0])
        rows = [self._row(prompt) for prompt in batch]
        if room == 0 and not self.lockstep:
            return rows
        ids, mask = self._padded(batch)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(room, 1), pad_token_id=self.pad_id,
            synced_gpus=self.lockstep, temperature=None, top_p=None, top_k=None,
            logits_processor=self._processors(rows),
        )  # fmt: skip
        counts["prompt_tokens"] += ids.numel()
        steps = output.shape[1] - ids.shape[1]
        counts["decode_steps"] += steps - 1
        counts["decode_row_steps"] += (steps - 1) * len(batch)
        for row, tokens in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            for token in tokens[: row.room]:
                row.ids.append(token)
                row.finished = token in self.ends
                if row.finished or self._stops(row):
                    break
        counts["ideal_row_steps"] += sum(max(len(row.ids) - 1, 0) for row in rows)
        return rows

    def _finish(self, prompt, row):
        text = self.tokenizer.decode(row.ids, skip_special_tokens=True)
        found = [text.find(stop) for stop in prompt.stop if stop in text]
        return Generation(text[: min(found)] if found else text, len(row.ids), row.finished, row.collapsed)


class DecodedRow:
    """A row while it is decoded.

    Attributes:
        prompt: Prompt.
        room: new tokens at most.
        ids: new tokens so far; where it ran into a loop, all of them.
        decoded: how many of them the model chose.
        done, finished, collapsed: whether it is over; because it ended by itself; because it ran into a loop.
    """

    def __init__(self, prompt, room):
        self.prompt, self.room = prompt, room
        self.ids, self.decoded = [], 0
        self.done = self.finished = self.collapsed = False


def loop_period(ids):
    """Return the period of the loop in which a generation ends, or 0.

    Args:
        ids: token ids so far.
    Returns:
        the smallest period of at most 24 tokens that the end repeats six times, 96 tokens or more; 0 without one.
    """
    for period in range(1, _LONGEST_PERIOD + 1):
        length = max(_LOOP_REPEATS * period, _LOOP_TOKENS)
        if len(ids) < length:
            if _LOOP_REPEATS * period > len(ids):
                return 0
            continue
        tail = ids[-length:]
        if tail[period:] == tail[:-period]:
            return period
    return 0


def _generation(record):
    return Generation(record["text"], record["num_tokens"], record["finished"], record["collapsed"])


def _is_plain(config):
    changed = [name for name, plain in _PLAIN.items() if getattr(config, name, None) not in (None, plain)]
    return not changed and not any(getattr(config, name, None) for name in _UNSET)


def _can_cache(model):
    """Return whether a model takes what our loop gives it: a growing cache, positions, and logits of the end only."""
    wanted = {"past_key_values", "position_ids", "attention_mask", "logits_to_keep"}
    plain = getattr(model, "get_base_model", lambda: model)()
    if not wanted <= set(inspect.signature(plain.forward).parameters) or getattr(plain, "_is_stateful", False):
        return False
    if not getattr(plain, "_supports_default_dynamic_cache", lambda: True)():
        return False
    return all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=model.config).layers)
