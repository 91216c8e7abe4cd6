"""Following what an optimizer steps, tensor by tensor on every backend, and acting right before each of its steps."""
# Shapes: E elements that one tensor of an optimizer holds on this process.

import contextlib
import dataclasses
import math

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Piece:
    """The elements of one parameter in a tensor of an optimizer.

    Attributes:
        place: where they are in the tensor.
        size: how many elements the whole parameter has.
        parameter: the model's.
        first: the number of the first of them in the flattened parameter; None where a DTensor knows its own place.
    """

    place: object
    size: int
    parameter: torch.nn.Parameter
    first: int | None = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """What an optimizer steps as one tensor: a parameter, a shard of one, or shards of many end to end.

    Attributes:
        tensor: the optimizer's.
        pieces: which parameters its elements belong to; padding belongs to none.
        device: what collectives run on.
        groups: groups of processes, one after the other, whose pieces make whole parameters.
        kept: what `OptimizerSteps.kept` returned for it.
    """

    tensor: torch.Tensor
    pieces: tuple
    device: torch.device
    groups: tuple = ()
    kept: object = None

    @property
    def num_shards(self):
        """Into how many pieces, each on another process, a parameter is cut."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    def summed(self, values):
        """Return (K,) sums over the shards of each of the K parameters."""
        # Of an offloaded optimizer the shards are on the CPU, which has no collectives beside a GPU's.
        found = values.to(self.device)
        for group in self.groups:
            dist.all_reduce(found, group=group)
        return found.to(values.device)


class OptimizerSteps:
    """Base of what acts on gradients or weights once per optimizer step, after clipping.

    Nothing is gathered: a process acts on its own shards.

    Args:
        trainer: UnlearnTrainer.
        flag: what the user typed to get it, for messages.
    Raises:
        UserError: FSDP version 1, whose flat shards do not know their tensors.
    """

    def __init__(self, trainer, flag):
        if trainer.accelerator.distributed_type == DistributedType.FSDP and not trainer.is_fsdp2():
            raise UserError(
                f"{flag} needs to know which weights a shard holds, which FSDP version 1 hides; leave the version out "
                "of --fsdp_config"
            )
        self.trainer, self.flag = trainer, flag
        self._parts, self._hooks = {}, []

    def kept(self, part):
        """Return what to keep of a part, when it is first seen; None keeps nothing."""
        return None

    def before_step(self, optimizer):
        """Act on what an optimizer is about to step; DeepSpeed steps one flat tensor after the other.

        Args:
            optimizer: torch.optim.Optimizer.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def attached(self):
        """Act on the optimizer that is made inside; to be entered while the model is the start model.

        transformers shards the model and loads a checkpoint into it in one function, with no hook between the two but
        accelerate's `prepare`. Of several the one that is entered last acts last.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            self._hold(_whole_part(p, trainer.args.device) for p in trained)
        original = accelerator.prepare

        def prepare(*given, **options):
            prepared = original(*given, **options)
            for part in prepared if isinstance(prepared, (list, tuple)) else (prepared,):
                if isinstance(part, AcceleratedOptimizer):
                    self.follow(part)
            return prepared

        accelerator.prepare = prepare
        try:
            yield self
        finally:
            accelerator.prepare = original
            for hook in self._hooks:
                hook.remove()
            self._parts, self._hooks = {}, []

    def follow(self, optimizer):
        """Hold what an optimizer steps, as far as it is not held already, and act before its steps.

        Args:
            optimizer: as accelerate returned it.
        Returns:
            torch.optim.Optimizer that does the steps.
        """
        device, outer, inner = self.trainer.args.device, None, optimizer
        while hasattr(inner, "optimizer"):
            outer, inner = inner, inner.optimizer
        if isinstance(outer, AcceleratedOptimizer):
            parameters = [p for group in inner.param_groups for p in group["params"]]
            make = {True: _dtensor_part, False: _whole_part}
            self._hold(make[hasattr(p, "device_mesh")](p, device) for p in parameters)
        else:
            self._hold(_zero_parts(outer, device, self.flag))
        self._hooks.append(inner.register_step_pre_hook(self._before_step))
        return inner

    def _hold(self, parts):
        for part in parts:
            if id(part.tensor) not in self._parts:
                self._parts[id(part.tensor)] = dataclasses.replace(part, kept=self.kept(part))

    def _before_step(self, optimizer, *_):
        with torch.no_grad():
            self.before_step(optimizer)


def local(tensor):
    """Return what this process holds of a tensor, without a gradient; a change of it is one of the tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _whole_part(parameter, device):
    return Part(parameter, (Piece(..., parameter.numel(), parameter),), device)


def _dtensor_part(parameter, device):
    mesh = parameter.device_mesh
    groups = [mesh.get_group(axis) for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
    return Part(parameter, (Piece(..., parameter.numel(), parameter, None),), device, tuple(groups))


def _zero_parts(zero, device, flag):
    """Return the parts of DeepSpeed's own optimizer, which steps flat tensors."""
    if hasattr(zero, "fp32_partitioned_groups_flat") and not zero.swap_optimizer:
        flats, groups, pieces_of = zero.fp32_partitioned_groups_flat, zero.fp16_groups, _pieces_in_stage_3
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        flats, groups, pieces_of = zero.single_partition_of_fp32_groups, zero.bit16_groups, _pieces_in_stage_2
    else:
        raise UserError(
            f"{flag} cannot follow DeepSpeed's {type(zero).__name__} as the file sets it up; pass --deepspeed "
            "ds_configs/zero2.json or ds_configs/zero3.json, or leave bf16, fp16 and nvme out of yours"
        )
    return [
        Part(flat, pieces_of(group), device, (dist.group.WORLD,)) for flat, group in zip(flats, groups, strict=True)
    ]


def _pieces_in_stage_3(parameters):
    """Return the pieces of a flat tensor of ZeRO-3, in which every process has an equal share of each parameter."""
    pieces, start = [], 0
    for parameter in parameters:
        length, rank = parameter.partition_numel(), dist.get_rank()
        own = min(max(parameter.ds_numel - rank * length, 0), length)
        pieces.append(Piece(slice(start, start + own), parameter.ds_numel, parameter, rank * length))
        start += length
    return tuple(pieces)


def _pieces_in_stage_2(parameters):
    """Return the pieces of a flat tensor of ZeRO-1 and 2, cut through all parameters, of which some are elsewhere."""
    pieces = []
    for parameter in parameters:
        mapping, place, first = parameter._hp_mapping, slice(0, 0), 0
        if mapping is not None:
            address = mapping.get_hp_fragment_address()
            place, first = slice(address.start, address.start + address.numel), mapping.lp_fragment_address.start
        pieces.append(Piece(place, parameter.numel(), parameter, first))
    return tuple(pieces)
