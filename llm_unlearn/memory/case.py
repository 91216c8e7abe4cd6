"""The run whose memory is asked for: what of the flags changes it, in one value that advice can vary."""

import dataclasses
from dataclasses import dataclass

import torch

BUCKET_ELEMENTS, LIVE_ELEMENTS = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults of reduce_bucket_size and stage3_max_live_parameters."""


@dataclass(frozen=True, eq=False)
class Source:
    """What stays the same whatever is advised; compared by identity.

    Attributes:
        config: the model's transformers config.
        flags: TRL's ModelConfig with ours, for LoRA and quantization.
        args: the method's arguments, for the optimizer's settings.
        method: id of the method.
        needs_reference, is_kl: whether a term compares with the reference, and whether it compares distributions.
        is_linear: whether a term's gradient is taken in the head's forward.
        width_from: what the width of the batch was read from, in words.
    """

    config: object
    flags: object
    args: object
    method: str
    needs_reference: bool
    is_kl: bool
    is_linear: bool
    width_from: str


@dataclass(frozen=True)
class Backend:
    """How a run is spread over processes.

    Attributes:
        kind: "single", "ddp", "fsdp" or "zero".
        processes: how many.
        stage: of ZeRO.
        reshards: whether FSDP frees the gathered weights after each layer's forward.
        offloads_weights, offloads_optimizer: to the host's memory.
        bucket_elements: elements in the buffers that gradients are reduced in.
        live_elements: gathered elements that ZeRO-3 keeps at most.
    """

    kind: str = "single"
    processes: int = 1
    stage: int = 0
    reshards: bool = True
    offloads_weights: bool = False
    offloads_optimizer: bool = False
    bucket_elements: int = 0
    live_elements: int = 0

    @property
    def shards_weights(self):
        """Whether each process holds its part of the weights alone."""
        return self.kind == "fsdp" or self.stage == 3

    @property
    def shards_gradients(self):
        """Whether each process holds its part of the gradients alone."""
        return self.kind == "fsdp" or self.stage >= 2


@dataclass(frozen=True)
class Case:
    """Everything that an estimate depends on; `dataclasses.replace` makes another command line of it.

    Attributes:
        source: what advice does not change.
        dtype: of the weights as they are loaded.
        autocast: dtype that the forward runs in, or None for the weights' own.
        use_peft, load_in_4bit, load_in_8bit: LoRA, and how its base is quantized.
        streams: ((name, rows), ...) of one micro-batch on one device.
        width: tokens of the longest row.
        checkpointing: whether only the layers' inputs are kept for the backward.
        accumulation: micro-batches of a step.
        sequential: whether the streams are run backward one after the other.
        optim: name of the optimizer.
        reference: "live", "cached" or "adapter_off" as asked for, or None for the automatic choice.
        backend: Backend.
        attention: attention implementation, or None for the model's own choice.
        device_type: "cuda" or "cpu".
        device_bytes: its memory.
    """

    source: Source
    dtype: torch.dtype
    autocast: torch.dtype | None
    use_peft: bool
    load_in_4bit: bool
    load_in_8bit: bool
    streams: tuple
    width: int
    checkpointing: bool
    accumulation: int
    sequential: bool
    optim: str
    reference: str | None
    backend: Backend
    attention: str | None
    device_type: str
    device_bytes: float

    @property
    def rows(self):
        """Sequences in one forward: all streams together, or the largest alone."""
        sizes = [rows for _, rows in self.streams] or [0]
        return max(sizes) if self.sequential else sum(sizes)

    @property
    def batch_size(self):
        """Rows of the anchor stream."""
        return self.streams[0][1]

    @property
    def reference_mode(self):
        """How the reference is had: "none", "adapter_off", "cached" or "live"."""
        if not self.source.needs_reference:
            return "none"
        return self.reference or ("adapter_off" if self.use_peft else "cached")

    def of_model(self):
        """Return this case without what does not change the model, as a key of what was measured."""
        return dataclasses.replace(self.of_micro_batch(), streams=(), width=0, checkpointing=False)

    def of_micro_batch(self):
        """Return this case without what does not change a micro-batch's forward and backward, as such a key."""
        kind = "fsdp" if self.backend.kind == "fsdp" else "single"
        return dataclasses.replace(
            self, streams=(("all", self.rows),), accumulation=1, sequential=False, optim="", reference=None,
            backend=Backend(kind), device_type="cpu", device_bytes=0.0,
        )  # fmt: skip

    def lora_flags(self):
        """Return the ModelConfig of this case, or None without LoRA."""
        if not self.use_peft:
            return None
        return dataclasses.replace(
            self.source.flags, use_peft=True, load_in_4bit=self.load_in_4bit, load_in_8bit=self.load_in_8bit
        )
