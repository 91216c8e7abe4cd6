"""The frozen reference: the model before unlearning, as a cache of its answers, as adapters off, or as a copy."""
# Shapes: B sequences, T tokens, D hidden size, N counted positions.

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType, broadcast, extract_model_from_parallel

from llm_unlearn.activations import capture_layers, run_without_head
from llm_unlearn.chunked_head import Projection, compute_dtype
from llm_unlearn.errors import UserError
from llm_unlearn.head import (
    concatenate,
    counted_labels,
    counted_positions,
    counted_states,
    own_states,
    split,
)
from llm_unlearn.head_reading import HeadReader
from llm_unlearn.models import LOADED_WITH
from llm_unlearn.reference_cache import ReferenceCache, fill
from llm_unlearn.truncation import truncate


@dataclass(frozen=True)
class Reading:
    """What is read off the reference at the counted tokens of a stream.

    Attributes:
        name: of the cache's files.
        read: function of (Head, states (B, T, D), stream of an UnlearnBatch) -> (N, ...); with `layers` of
            ({layer: what it hands on (B, T, D)}, stream) -> (N, ...).
        settings: whatever else the values depend on, as JSON can hold it; a cache made under others is refused.
        layers: decoder layers that are read, instead of the head.
    """

    name: str
    read: Callable
    settings: tuple = ()
    layers: tuple = ()


def _read_logps(head, states, stream):
    return head.scores(counted_states(states, stream), counted_labels(stream))[0]


def _read_hidden(head, states, stream):
    hidden = counted_states(states, stream)
    return hidden if head.is_dense else hidden.to(compute_dtype(hidden, head.module.weight))


LOGPS = Reading("logps", _read_logps)
"""(N,) log-probability of each counted token, nats."""

HIDDEN = Reading("hidden", _read_hidden)
"""(N, D) last hidden states, from which the reference's own head makes its exact distributions."""


def states_at(layers):
    """Return the Reading of (N, L, D): what each of L decoder layers hands on at the counted tokens themselves."""

    def read(states, stream):
        mask = counted_positions(stream)
        return torch.stack([own_states(states[layer])[mask] for layer in layers], 1)

    return Reading("states", read, tuple(layers), tuple(layers))


class Reference:
    """The model as it was before unlearning, asked for what `readings` say.

    live: a frozen copy, made when the trainer is made (so a resumed run compares with the same model) and sharded as
    the policy is under FSDP2 and ZeRO-3. adapter_off: the policy with its LoRA adapters off, which costs no memory.
    cached: the answers themselves, computed before training for the rows that will be visited, and no second model.

    Args:
        trainer: UnlearnTrainer, whose model is not wrapped yet.
        readings: {stream: Reading}.
    Raises:
        UserError: a mode that cannot be had here.
    """

    def __init__(self, trainer, readings):
        self.trainer, self.readings = trainer, readings
        self.has_adapters_on = is_peft(trainer.model) and not _adapters_are_neutral(trainer)
        self.mode = _mode(trainer, self.has_adapters_on, readings)
        self.model = frozen_copy(trainer, self.last_layer()) if self.mode == "live" else None
        self._reader = HeadReader(extract_model_from_parallel(self.model)) if self.mode == "live" else trainer.reader
        self.projection = _projection(trainer, self) if HIDDEN in readings.values() else None
        self.cache = None

    def last_layer(self):
        """Return the index of the highest layer that is read, or None where the output is."""
        reads = [reading.layers for reading in self.readings.values()]
        return max(map(max, reads)) if all(reads) else None

    def prepare(self):
        """Fill the cache, where there is one, with the rows that training will visit; all processes together.

        Raises:
            UserError: the cache was made from another model, tokenizer, template or data set.
        """
        if self.mode != "cached" or self.cache is not None:
            return
        trainer = self.trainer
        cache = ReferenceCache.open(trainer, self.readings, self.has_adapters_on)
        visited = trainer.visited_rows()
        visited = {name: visited[name] for name in self.readings}
        # What one process says, because another may have looked before or after somebody wrote.
        missing = trainer.on_first_rank(lambda: cache.missing(visited))
        if any(missing.values()):
            if trainer.state.global_step > 0:
                raise UserError("the model has trained, and cannot say what it said before; pass --reference live")
            with self._before_training() as source:
                fill(trainer, cache, self.readings, missing, source)
        if any(cache.missing(visited).values()):
            raise UserError(f"process {trainer.args.process_index} does not see what others wrote to '{cache.folder}'")
        self.cache = cache

    def discard(self):
        """Delete the cache of a finished run, unless its place was asked for by name."""
        if self.cache is not None and not self.trainer.args.reference_cache and self.trainer.args.should_save:
            self.cache.delete()
            self.cache = None

    def values(self, inputs, streams):
        """Return {stream: (N, ...)} of what its Reading says about a batch, without gradients.

        Args:
            inputs: UnlearnBatch.
            streams: names, each with a Reading.
        """
        if self.mode != "cached":
            return self.read(self._reader, self.model, inputs, streams)
        self.prepare()
        return {name: self.cache.values(name, inputs[name]) for name in streams}

    @torch.no_grad()
    def read(self, reader, model, inputs, streams):
        """Ask a model, or with None the policy with its adapters off, in one forward; as `values` does."""
        batch = concatenate(inputs, streams, self.trainer.data_collator.pad_token_id)
        readings = {name: self.readings[name] for name in streams}
        at_head = [name for name in streams if not readings[name].layers]
        layers = sorted({layer for reading in readings.values() for layer in reading.layers})

        def read(head, states):
            parts = split(states, inputs, streams)
            return {name: readings[name].read(head, parts[name], inputs[name]) for name in at_head}

        is_plain = model is not None and self.trainer.zero_stage() != 3
        with self._running(model) as running, self.trainer.reference_autocast(is_plain):
            with capture_layers(running, layers) as states:
                found = reader(running, read, *batch) if at_head else run_without_head(running, *batch)
        parts = {layer: split(hidden, inputs, streams) for layer, hidden in states.items()}
        for name in streams:
            if name not in at_head:
                own = {layer: parts[layer][name] for layer in readings[name].layers}
                found[name] = readings[name].read(own, inputs[name])
        return {name: found[name] for name in streams}

    @contextlib.contextmanager
    def _running(self, model):
        if model is not None:
            yield model
            return
        policy = self.trainer.model_wrapped
        was_training, frozen = policy.training, [p for p in policy.parameters() if not p.requires_grad]
        policy.eval()
        try:
            with self.trainer.unwrapped(policy).disable_adapter():
                yield policy
        finally:
            policy.train(was_training)
            # PEFT lets everything in the active adapters train when it switches them on again.
            for parameter in frozen:
                parameter.requires_grad_(False)

    @contextlib.contextmanager
    def _before_training(self):
        """Yield a function that reads the model before training: the policy itself where it is whole on each process.

        Where it is sharded, a copy is made, sharded as the policy will be, and gone before training begins.
        """
        trainer = self.trainer
        is_whole = not trainer.is_sharded()
        is_placed = hasattr(trainer.model, "hf_device_map") or getattr(trainer.model, "is_quantized", False)
        if is_whole and not is_placed:
            trainer.model.to(trainer.args.device)
        model = trainer.model if is_whole else frozen_copy(trainer, self.last_layer())
        reader, was_training = HeadReader(extract_model_from_parallel(model)), model.training
        model.eval()
        cut = truncate(model, self.last_layer()) if is_whole and self.last_layer() is not None else None
        try:
            yield functools.partial(self.read, reader, model)
        finally:
            if cut is not None:
                cut.restore()
            model.train(was_training)
            if not is_whole:
                if hasattr(model, "destroy"):
                    model.destroy()
                del model, reader
                gc.collect()


def is_peft(model):
    """Return whether the model carries PEFT adapters that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def _adapters_are_neutral(trainer):
    """Return whether the model without its adapters is the model with them, and stays so: adapters that just began."""
    model = trainer.model
    theirs = ("lora_", "modules_to_save", "trainable_tokens")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trains_others = any(not any(part in name for part in theirs) for name in trained)
    began = sum(
        # Under ZeRO-3 each process sees its part.
        getattr(p, "ds_tensor", p).detach().count_nonzero().to(trainer.args.device).float()
        for name, p in model.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )
    changed = trainer.accelerator.reduce(torch.as_tensor(began, device=trainer.args.device).float(), "sum") > 0
    return not trains_others and not bool(changed)


def _mode(trainer, has_adapters_on, readings):
    """Return what `--reference` asks for, or what suits best: never a second model where one can be avoided."""
    asked, has_adapters = trainer.args.reference, is_peft(trainer.model)
    if asked == "adapter_off" and not has_adapters:
        raise UserError("--reference adapter_off needs adapters to switch off; pass --use_peft True or another mode")
    if asked == "adapter_off" and has_adapters_on:
        raise UserError(
            "--reference adapter_off: the model before unlearning is not the one without its adapters, because they "
            "have trained before or other weights train too; pass --reference cached"
        )
    if asked or (has_adapters and not has_adapters_on):
        return asked or "adapter_off"
    return "live" if _outweighs_a_model(trainer, readings) else "cached"


def _outweighs_a_model(trainer, readings):
    """Return whether the answers would take more room than the model: the states of many layers at many tokens."""
    size = trainer.reader.language_model.config.get_text_config(decoder=True).hidden_size
    tokens = trainer.train_dataset.num_tokens() if trainer.train_dataset is not None else {}
    answers = sum(4 * size * len(reading.layers) * tokens.get(name, 0) for name, reading in readings.items())
    return answers > sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trainer.model.parameters())


def frozen_copy(trainer, last_layer=None):
    """Return a frozen copy of the trainer's model in eval mode, sharded as the policy is under FSDP2 and ZeRO-3.

    Args:
        trainer: UnlearnTrainer.
        last_layer: index of the last layer that the copy keeps; None keeps all, and the head.
    """
    if trainer.zero_stage() == 3:
        # A partitioned model cannot be copied; from_pretrained partitions again, all ranks together.
        source = trainer.reader.language_model
        how = getattr(source, LOADED_WITH, {"dtype": source.dtype})
        model = type(source).from_pretrained(source.config._name_or_path, **how)
    else:
        model = copy.deepcopy(trainer.model)
    return frozen_as_policy(trainer, model, last_layer)


def frozen_as_policy(trainer, model, last_layer=None):
    """Freeze a second model in eval mode, and place it as the policy is: sharded under FSDP2 and ZeRO-3, else whole.

    Args:
        trainer: UnlearnTrainer.
        model: PreTrainedModel or PeftModel that is not wrapped; under ZeRO-3 one of from_pretrained, which partitions.
        last_layer: index of the last layer that it keeps; None keeps all, and the head.
    Returns:
        what is to be called, on the device.
    """
    accelerator, zero_stage = trainer.accelerator, trainer.zero_stage()
    model.requires_grad_(False)
    model.eval()
    if last_layer is not None:
        truncate(model, last_layer)
    if zero_stage == 3:
        return _zero3_engine(model, trainer)
    if accelerator.distributed_type == DistributedType.FSDP and trainer.is_fsdp2():
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return model.to(trainer.args.device)


def _zero3_engine(model, trainer):
    import deepspeed

    config = copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    for unused in ("optimizer", "scheduler"):
        config.pop(unused, None)
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config["train_micro_batch_size_per_gpu"] = trainer.args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = 1
    config.pop("train_batch_size", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _projection(trainer, reference):
    """Return the reference's head where the policy's own will not do, because it trains; whole on every process.

    A copy that is whole on each process lends its own; where the reference is sharded or cached, one head is kept.
    """
    head = trainer.reader.head
    if not head.trains():
        return None
    if reference.mode == "live" and trainer.zero_stage() != 3 and not trainer.is_fsdp2():
        lent = reference._reader.head.module
        return Projection(lent.weight, lent.bias)
    parts = [part for part in (head.module.weight, head.module.bias) if part is not None]
    with _gathered(parts, trainer.zero_stage()):
        kept = [part.detach().to(trainer.args.device, copy=True) for part in parts]
    if trainer.args.world_size > 1:
        # A loader that spares the host's memory fills the weights of the first process only.
        kept = [broadcast(part) for part in kept]
    if trainer.args.autocast_in_forward or trainer.accelerator.mixed_precision == "bf16":
        # The product runs in bfloat16 anyway: the same numbers in half the memory.
        kept = [part.to(torch.bfloat16) for part in kept]
    return Projection(kept[0], kept[1] if len(kept) > 1 else None)


def _gathered(parts, zero_stage):
    if zero_stage != 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts)
