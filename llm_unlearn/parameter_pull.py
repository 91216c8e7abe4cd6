"""Pulling what trains toward where it started, or away from there, by the gradient and shard by shard."""
# Shapes: K parameters, E elements of them that one tensor of an optimizer holds on this process.

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError
from llm_unlearn.objectives.parameters import absolute_sum, squared_distance


class ParameterPull:
    """Adds the gradient of a function of theta - theta0 to the gradients, once per optimizer step, after clipping.

    theta0 are the trained weights of the model that `train` was called with, also in a run that goes on from a
    checkpoint. Nothing is gathered: a process holds the start of its own shards, beside them, or on the CPU where it
    has whole tensors; norms of whole tensors are sums over shards. A weight without a gradient does not train in this
    step, and is left alone. The logged `loss` does not contain the term, which is logged by itself, as of before the
    step and without its coefficient.

    Attributes:
        holds_start: whether theta0 is held; without it the function is one of theta.

    Args:
        trainer: UnlearnTrainer.
        name: as logged, `loss/<name>`.
        measure: function of objectives.parameters.
        coefficient: function that returns the term's weight at the present step; negative pushes away.
        flag: what the user typed to get it, for messages.
        needs_norms: whether the gradient depends on the norm of whole tensors.
    Raises:
        UserError: FSDP version 1, whose flat shards do not know their tensors.
    """

    holds_start = True

    def __init__(self, trainer, name, measure, coefficient, flag, needs_norms=True):
        if trainer.accelerator.distributed_type == DistributedType.FSDP and not trainer.is_fsdp2():
            raise UserError(
                f"{flag} needs to know which weights a shard holds, which FSDP version 1 hides; leave the version out "
                "of --fsdp_config"
            )
        self.trainer, self.name, self.measure, self.coefficient = trainer, name, measure, coefficient
        self.flag, self.needs_norms = flag, needs_norms
        self._parts, self._hooks = {}, []

    @contextlib.contextmanager
    def attached(self):
        """Act on the optimizer that is made inside; to be entered while the model is the start model.

        transformers shards the model and loads a checkpoint into it in one function, with no hook between the two but
        accelerate's `prepare`.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            self._hold(_whole_part(p, trainer, self.holds_start) for p in trained)
        original = accelerator.prepare

        def prepare(*given, **options):
            prepared = original(*given, **options)
            for part in prepared if isinstance(prepared, (list, tuple)) else (prepared,):
                if isinstance(part, AcceleratedOptimizer):
                    self._follow(part)
            return prepared

        accelerator.prepare = prepare
        try:
            yield self
        finally:
            accelerator.prepare = original
            for hook in self._hooks:
                hook.remove()
            self._parts, self._hooks = {}, []

    def _hold(self, parts):
        for part in parts:
            self._parts.setdefault(id(part.tensor), part)

    def _follow(self, optimizer):
        """Hold the start of what an optimizer steps, as far as it is not held already, and act before its steps."""
        outer, inner = None, optimizer
        while hasattr(inner, "optimizer"):
            outer, inner = inner, inner.optimizer
        if isinstance(outer, AcceleratedOptimizer):
            parameters = [p for group in inner.param_groups for p in group["params"] if id(p) not in self._parts]
            make = {True: _dtensor_part, False: _whole_part}
            self._hold(make[hasattr(p, "device_mesh")](p, self.trainer, self.holds_start) for p in parameters)
        else:
            self._hold(self._zero_parts(outer))
        self._hooks.append(inner.register_step_pre_hook(self._before_step))

    def _zero_parts(self, zero):
        """Return the parts of DeepSpeed's own optimizer, which steps flat tensors."""
        if hasattr(zero, "fp32_partitioned_groups_flat") and not zero.swap_optimizer:
            flats, groups, pieces_of = zero.fp32_partitioned_groups_flat, zero.fp16_groups, _pieces_in_stage_3
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            flats, groups, pieces_of = zero.single_partition_of_fp32_groups, zero.bit16_groups, _pieces_in_stage_2
        else:
            raise UserError(
                f"{self.flag} cannot follow DeepSpeed's {type(zero).__name__} as the file sets it up; pass --deepspeed "
                "ds_configs/zero2.json or ds_configs/zero3.json, or leave bf16, fp16 and nvme out of yours"
            )
        device = self.trainer.args.device
        starts = [flat.detach().clone() if self.holds_start else None for flat in flats]
        return [
            _Part(flat, start, pieces_of(group), device, (dist.group.WORLD,))
            for flat, start, group in zip(flats, starts, groups, strict=True)
        ]

    @torch.no_grad()
    def _before_step(self, optimizer, *_):
        """Add to the gradients of what is about to be stepped; DeepSpeed steps one flat tensor after the other."""
        coefficient, total = self.coefficient(), torch.zeros((), device=self.trainer.args.device)
        # torch's gradient scaler leaves the division by its scale to a fused optimizer.
        scale = getattr(optimizer, "grad_scale", None)
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    total += self._pull(self._parts[id(tensor)], coefficient, scale).to(total.device)
        self.trainer._log_term(self.name, total, standalone=False)

    def _pull(self, part, coefficient, scale):
        """Pull one tensor; returns this process's share of its values."""
        difference = part.difference()
        squares = torch.stack([difference[piece.place].norm().square() for piece in part.pieces])
        squares = part.summed(squares) if self.needs_norms else squares
        sizes = torch.tensor([piece.size for piece in part.pieces], dtype=squares.dtype, device=squares.device)
        values, factors = self.measure(squares, sizes)
        factors = factors * coefficient if scale is None else factors * coefficient * scale.to(factors.device)
        gradient = _local(part.tensor.grad)
        for piece, factor in zip(part.pieces, factors, strict=True):
            gradient[piece.place].add_((difference[piece.place] * factor).to(gradient.dtype))
        shares = self.trainer.args.world_size / (1 if self.needs_norms else part.num_shards)
        return values.sum() / shares


class PullToStart(ParameterPull):
    """L2-SP: the trained weights are held to where they started.

        P = coefficient * sum_k ||theta_k - theta0_k||^2

    Args:
        trainer: UnlearnTrainer.
        coefficient: function that returns the coefficient at the present step.
    Source: Li et al. 2018, arXiv:1802.01483; EleutherAI/unlearn (sequential unlearning, `l2sp_coef`). Differs from the
        authors' code, which clips the gradient of the term together with that of the loss.
    """

    def __init__(self, trainer, coefficient):
        super().__init__(trainer, "l2_sp", squared_distance, coefficient, "--regularizer l2_sp", needs_norms=False)


class PullToZero(ParameterPull):
    """L1: the trained weights are pulled to 0, all with the same force.

        P = coefficient * sum_k ||theta_k||_1

    Args:
        trainer: UnlearnTrainer.
        coefficient: function that returns the coefficient at the present step.
    Source: Jia et al. 2023, arXiv:2304.04934 (L1-sparse unlearning). Differs from the authors' code, which clips the
        gradient of the term together with that of the loss.
    """

    holds_start = False

    def __init__(self, trainer, coefficient):
        super().__init__(trainer, "l1", absolute_sum, coefficient, "--unlearn_method l1_sparse", needs_norms=False)

    def _pull(self, part, coefficient, scale):
        weights, gradient, total = _local(part.tensor), _local(part.tensor.grad), 0.0
        factor = coefficient if scale is None else coefficient * scale.to(gradient.device)
        for piece in part.pieces:
            value, signs = self.measure(weights[piece.place])
            gradient[piece.place].add_((signs * factor).to(gradient.dtype))
            total = total + value
        return total / (self.trainer.args.world_size / part.num_shards)


@dataclass(frozen=True)
class _Piece:
    """The elements of one parameter in a tensor: their place, and how many the whole parameter has."""

    place: object
    size: int


@dataclass(frozen=True)
class _Part:
    """What an optimizer steps as one tensor: a parameter, a shard of one, or shards of many end to end.

    Attributes:
        tensor: the optimizer's.
        start: (E,) or of the tensor's shape, what this process held of it at the start, or None.
        pieces: which parameters its elements belong to; padding belongs to none.
        device: what collectives run on.
        groups: groups of processes, one after the other, whose pieces make whole parameters.
    """

    tensor: torch.Tensor
    start: torch.Tensor | None
    pieces: tuple
    device: torch.device
    groups: tuple = ()

    @property
    def num_shards(self):
        """Into how many pieces, each on another process, a parameter is cut."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    def difference(self):
        """Return what the tensor holds minus what it held at the start."""
        local = _local(self.tensor)
        return local - self.start.to(local.device, non_blocking=True)

    def summed(self, squares):
        """Return (K,) sums over the shards of each parameter."""
        # Of an offloaded optimizer the shards are on the CPU, which has no collectives beside a GPU's.
        found = squares.to(self.device)
        for group in self.groups:
            dist.all_reduce(found, group=group)
        return found.to(squares.device)


def _local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _whole_part(parameter, trainer, holds_start):
    start, held = None, parameter.detach()
    if holds_start:
        start = torch.empty_like(held, device="cpu", pin_memory=parameter.is_cuda).copy_(held)
    return _Part(parameter, start, (_Piece(..., parameter.numel()),), trainer.args.device)


def _dtensor_part(parameter, trainer, holds_start):
    mesh = parameter.device_mesh
    groups = [mesh.get_group(axis) for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
    pieces = (_Piece(..., parameter.numel()),)
    start = _local(parameter).clone() if holds_start else None
    return _Part(parameter, start, pieces, trainer.args.device, tuple(groups))


def _pieces_in_stage_3(parameters):
    """Return the pieces of a flat tensor of ZeRO-3, in which every process has an equal share of each parameter."""
    pieces, first = [], 0
    for parameter in parameters:
        length, rank = parameter.partition_numel(), dist.get_rank()
        own = min(max(parameter.ds_numel - rank * length, 0), length)
        pieces.append(_Piece(slice(first, first + own), parameter.ds_numel))
        first += length
    return tuple(pieces)


def _pieces_in_stage_2(parameters):
    """Return the pieces of a flat tensor of ZeRO-1 and 2, cut through all parameters, of which some are elsewhere."""
    pieces = []
    for parameter in parameters:
        mapping, place = parameter._hp_mapping, slice(0, 0)
        if mapping is not None:
            address = mapping.get_hp_fragment_address()
            place = slice(address.start, address.start + address.numel)
        pieces.append(_Piece(place, parameter.numel()))
    return tuple(pieces)
