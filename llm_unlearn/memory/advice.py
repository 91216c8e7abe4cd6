"""What to change where a run does not fit: each change with what it saves for this very run."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from llm_unlearn.errors import UserError
from llm_unlearn.memory.case import BUCKET_ELEMENTS, LIVE_ELEMENTS, Backend
from llm_unlearn.memory.estimate import estimate

_MOST_CHANGES = 3
_WORTH = 0.01  # of the total
_ADAMS = ("adamw_torch", "adamw_torch_fused", "adamw_anyprecision", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit")


@dataclass(frozen=True)
class Change:
    """One change of the command line.

    Attributes:
        flags: what to type.
        topic: changes of one topic exclude each other.
        cost: 0 where the run computes the same, only otherwise; else how far it departs from what was asked for.
        apply: function of a Case to the changed Case, or None where it changes nothing.
    """

    flags: str
    topic: str
    cost: int
    apply: object


@dataclass(frozen=True)
class Advice:
    """What can be done.

    Attributes:
        single: ((Change, Estimate), ...) by what they save, the most first.
        fewest: (changes, Estimate) of the smallest combination that fits, or None.
    """

    single: tuple
    fewest: tuple | None


def advise(found):
    """Try every change alone, then the fewest together that fit.

    Args:
        found: Estimate that does not fit.
    Returns:
        Advice. Of combinations of the same number, those that compute the same come first, then the smallest.
    """
    changes = [change for change in _changes(found.case) if change.apply(found.case) is not None]
    tried = [(change, made) for change in changes if (made := _together(found.case, (change,)))]
    tried.sort(key=lambda pair: pair[1].total)
    single = [(change, made) for change, made in tried if found.total - made.total > _WORTH * found.total]
    helpful = {id(change) for change, _ in single}
    # What computes the same costs nothing to try with others, even where it saves nothing alone.
    candidates = [change for change, _ in tried if id(change) in helpful or change.cost == 0]
    return Advice(tuple(single), _fewest(found.case, candidates))


def _fewest(case, changes):
    if not _everything(case, changes).fits:
        return None
    for count in range(1, _MOST_CHANGES + 1):
        fitting = []
        for combination in itertools.combinations(changes, count):
            if len({change.topic for change in combination}) < count:
                continue
            made = _together(case, combination)
            if made is not None and made.fits:
                fitting.append((sum(change.cost for change in combination), made.total, combination, made))
        if fitting:
            _, _, combination, made = min(fitting, key=lambda found: found[:2])
            return combination, made
    return None


def _everything(case, changes):
    """Return the Estimate with the best change of every topic; where even that is too much, no search is made."""
    best = {change.topic: change for change in reversed(changes)}
    for change in best.values():
        case = change.apply(case) or case
    return estimate(case)


def _together(case, combination):
    """Return the Estimate of a case with some changes, or None where they cannot be made of this model."""
    try:
        for change in combination:
            case = change.apply(case)
            if case is None:
                return None
        return estimate(case)
    except UserError:
        return None


def _changes(case):
    """Return every Change that this kind of run knows."""
    changes = [
        Change("--gradient_checkpointing True", "activations", 0, _set(checkpointing=True)),
        Change("--sequential_backward True", "streams", 0, _sequential),
        Change("--bf16 True", "compute", 1, lambda c: _set(autocast=torch.bfloat16)(c) if not c.autocast else None),
        Change("--optim paged_adamw_8bit", "optimizer", 1, _eight_bits),
        Change(f"--max_length {case.width // 2}", "length", 1, lambda c: _set(width=c.width // 2)(c)),
    ]
    for rows in dict.fromkeys((case.batch_size // 2, 1)):
        if 0 < rows < case.batch_size and case.batch_size % rows == 0:
            steps = case.accumulation * case.batch_size // rows
            flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {steps}"
            changes.append(Change(flags, "batch", 0, _smaller_batch(case.batch_size // rows)))
    return [*changes, *_of_weights(case), *_of_reference(case), *_of_backend(case)]


def _of_weights(case):
    if case.load_in_4bit:
        return []
    bf16 = "" if case.dtype.itemsize < 4 else " --dtype bfloat16"
    lora = "" if case.use_peft else "--use_peft True"
    narrow = torch.bfloat16 if bf16 else case.dtype
    four = {"use_peft": True, "load_in_4bit": True, "load_in_8bit": False, "dtype": narrow}
    changes = [
        Change(f"{lora} --load_in_4bit True{bf16}".strip(), "weights", 1 if case.use_peft else 2, _four_bits(**four))
    ]
    if (lora or bf16) and not case.load_in_8bit:
        changed = _set(use_peft=True, dtype=narrow)
        changes.append(Change(f"{lora}{bf16}".strip(), "weights", 1, changed))
    return changes


def _of_reference(case):
    if case.reference_mode != "live":
        return []
    if case.use_peft:
        return [Change("--reference adapter_off", "reference", 0, _set(reference="adapter_off"))]
    return [Change("--reference cached", "reference", 0, _set(reference="cached"))]


def _of_backend(case):
    """ZeRO-3 and FSDP for several processes, and the host's memory."""
    processes = case.backend.processes
    sharded = Backend("zero", processes, 3, bucket_elements=BUCKET_ELEMENTS, live_elements=LIVE_ELEMENTS)
    backends = {
        "--deepspeed ds_configs/zero3_offload.json": dataclasses.replace(
            sharded, offloads_weights=True, offloads_optimizer=True
        )
    }
    if processes > 1:
        backends["--deepspeed ds_configs/zero3.json"] = sharded
        backends["--fsdp 'full_shard auto_wrap'"] = Backend("fsdp", processes)
    return [Change(flags, "backend", 0, _sharded(backend)) for flags, backend in backends.items()]


def _set(**values):
    """Return the function that sets fields of a Case, and returns None where they are so already."""

    def apply(case):
        changed = dataclasses.replace(case, **values)
        return None if changed == case else changed

    return apply


def _sequential(case):
    return _set(sequential=True)(case) if len(case.streams) > 1 else None


def _eight_bits(case):
    return _set(optim="paged_adamw_8bit")(case) if case.optim in _ADAMS and case.backend.kind == "single" else None


def _sharded(backend):
    """Quantized weights and 8-bit optimizers are not sharded."""

    def apply(case):
        is_narrow = case.load_in_4bit or case.load_in_8bit or "8bit" in case.optim
        return None if is_narrow else _set(backend=backend)(case)

    return apply


def _four_bits(**values):
    return lambda case: _set(**values)(case) if case.backend.kind in ("single", "ddp") else None


def _smaller_batch(factor):
    def apply(case):
        streams = tuple((name, max(rows // factor, 1)) for name, rows in case.streams)
        return dataclasses.replace(case, streams=streams, accumulation=case.accumulation * factor)

    return apply
