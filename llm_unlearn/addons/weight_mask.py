"""Training some of the weights: all others stay bit for bit what they are, on every backend and in every optimizer."""
# Shapes: E elements of a tensor, ceil(E / 8) bytes of its mask.

import contextlib
import difflib
import logging

import torch
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.mask_files import read_mask
from llm_unlearn.errors import UserError
from llm_unlearn.models import loaded_fingerprint
from llm_unlearn.optimizer_steps import OptimizerSteps, local
from llm_unlearn.processes import is_first_process
from llm_unlearn.reference import is_peft

logger = logging.getLogger(__name__)

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def weight_mask_of(trainer):
    """Return the WeightMask that a trainer's arguments ask for, or None."""
    return WeightMask(trainer) if trainer.args.weight_mask else None


class WeightMask(OptimizerSteps):
    """Holds the weights that a mask leaves out: no gradient, no momentum, no decay, no share in the gradient's norm.

    Gradients are masked once per optimizer step, right before their norm is taken; DeepSpeed, which takes it out of
    sight, gets every micro-batch's masked as soon as they are made. What acts on gradients after that, as a pull does,
    is masked once more. Weight decay is applied here, to the weights that train, just as the optimizer would; an
    optimizer that might move a weight without a gradient gets its masked weights back after the step, for whose time
    they are copied.

    In memory it is one bit for each weight of this process's shards; under DeepSpeed, one more for each of the model.

    Attributes:
        file: MaskFile.
        record: what `unlearning.json` says of it.

    Args:
        trainer: UnlearnTrainer, whose trained parameters are chosen.
    Raises:
        UserError: adapters; a mask of another model; a name or a shape that the model does not have; no weight left.
    """

    def __init__(self, trainer):
        if is_peft(trainer.model):
            raise UserError(
                "--weight_mask says which weights of the model itself train, but with adapters none of them does, and "
                "an adapter's factors have no weight of the model to themselves; leave out --use_peft or the mask"
            )
        super().__init__(trainer, "--weight_mask")
        args = trainer.args
        self.file = read_mask(args.weight_mask, args.allow_pickle_mask, trainer.model)
        self._aliases, self._names, self._held, self._decays = _checked_names(self.file, trainer.model), {}, [], []
        trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        kept = sum(_kept(self.file, self._aliases.get(name), p) for name, p in trained)
        if kept == 0:
            raise UserError(f"the mask '{self.file.path}' leaves no weight to train; pass one of a larger --ratio")
        self._check_model()
        share = kept / sum(_size(p) for _, p in trained)
        self.record = {"file": self.file.path, "sha256": self.file.sha256, "trained_share": share, **self.file.record}
        logger.info("--weight_mask: %.4f of the weights train", share)

    def mask_gradients(self):
        """Set to 0 the gradients of the weights that are left out; under DeepSpeed they are already."""
        for part in self._parts.values():
            if part.tensor.grad is not None:
                self.mask(part.tensor, local(part.tensor.grad))

    def mask(self, tensor, values):
        """Set to 0 what belongs to weights that are left out.

        Args:
            tensor: one that the optimizer steps.
            values: contiguous, for each element of it that is this process's; changed in place.
        """
        packed = self._parts[id(tensor)].kept
        if packed is not None:
            packed_bits.keep(values, packed)

    # ---- On the optimizer ----

    @contextlib.contextmanager
    def attached(self):
        """Hold the weights in the training run inside; see OptimizerSteps.attached."""
        accelerator = self.trainer.accelerator
        original = accelerator.clip_grad_norm_

        def clip_grad_norm_(*given, **options):
            # transformers takes the norm in every step, be it only to log it.
            self.mask_gradients()
            return original(*given, **options)

        accelerator.clip_grad_norm_ = clip_grad_norm_
        self._look_at_names()
        try:
            with super().attached():
                yield self
        finally:
            accelerator.clip_grad_norm_ = original
            self._names = {}

    def follow(self, optimizer):
        """Hold the weights that an optimizer steps."""
        self._look_at_names()
        inner = super().follow(optimizer)
        self._hooks.append(inner.register_step_post_hook(self._after_step))
        for parameter in self.trainer.model.parameters() if self.trainer.is_deepspeed_enabled else ():
            key = self._names[id(parameter)] if parameter.requires_grad else None
            if key is not None and not self.file.bits(key).all():
                self._hooks.append(parameter.register_hook(_hook(self.file.packed(key).to(self.trainer.args.device))))
        return inner

    def kept(self, part):
        """Return the mask of what this process holds of a part, or None where all of it trains."""
        held = local(part.tensor)
        bits = torch.zeros(held.shape, dtype=torch.bool)
        for piece in part.pieces:
            key = self._names[id(piece.parameter)]
            whole = None if key is None else self.file.bits(key)
            bits[piece.place] = True if whole is None else _shard(whole, piece, bits[piece.place].numel())
        own = torch.cat([bits[piece.place].reshape(-1) for piece in part.pieces])
        return None if own.all() else packed_bits.pack(bits.reshape(-1)).to(held.device)

    def before_step(self, optimizer):
        """Mask what others did to the gradients, and decay the weights that train in the optimizer's place."""
        # Nothing but hooks like this one comes between the norm and the step.
        if len(optimizer._optimizer_step_pre_hooks) > 1:
            self.mask_gradients()
        for group in optimizer.param_groups:
            parts = [self._parts[id(tensor)] for tensor in group["params"] if tensor.grad is not None]
            kind = _decay_kind(optimizer, group)
            if kind is None:
                self._held += [_masked_out(part) for part in parts if part.kept is not None]
            elif group["weight_decay"] and any(part.kept is not None for part in parts):
                for part in parts:
                    kind(part, optimizer, group)
                self._decays.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0

    def _after_step(self, *_):
        for tensor, bits, values in self._held:
            tensor[bits] = values
        for group, decay in self._decays:
            group["weight_decay"] = decay
        self._held, self._decays = [], []

    # ---- Private ----

    def _look_at_names(self):
        """Note which name in the file each parameter has; FSDP2 makes new parameters."""
        for name, parameter in self.trainer.model.named_parameters():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            self._names[id(parameter)] = self._aliases.get(name)

    def _check_model(self):
        """Refuse the mask of another model."""
        wanted, model = self.file.record.get("model_hash"), self.trainer.model
        where = getattr(model.config, "_name_or_path", None)
        if wanted is None or not where:
            if is_first_process():
                logger.warning("nothing tells whether the mask '%s' was made for this model", self.file.path)
            return
        found = self.trainer.on_first_rank(lambda: loaded_fingerprint(model))
        if found != wanted:
            raise UserError(
                f"the mask '{self.file.path}' was made for other weights than those of '{where}', those of "
                f"'{self.file.record.get('model')}'; make one for it with utils/make_weight_mask.py"
            )


def _checked_names(file, model):
    """Return {name of a parameter in the model: its name in the file}, after comparing both."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named.items())}
    found = {}
    for name, shape in file.shapes.items():
        if name not in named:
            near = difflib.get_close_matches(name, named, n=1, cutoff=0)
            raise UserError(
                f"the mask '{file.path}' names '{name}', which the model does not have; near is '{near[0]}'"
            )
        own = tuple(getattr(named[name], "ds_shape", named[name].shape))
        if own != shape:
            raise UserError(f"the mask '{file.path}' has the shape {shape} for '{name}', but the model {own}")
        twin = found.setdefault(first[id(named[name])], name)
        if not torch.equal(file.packed(twin), file.packed(name)):
            raise UserError(f"the mask '{file.path}' tells '{name}' and '{twin}' apart, which are one in the model")
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in found]
    if missing and file.covers_all:
        raise UserError(f"the mask '{file.path}' does not say which weights of '{missing[0]}' train")
    return found


def _kept(file, key, parameter):
    return _size(parameter) if key is None else packed_bits.count(file.packed(key))


def _size(parameter):
    return getattr(parameter, "ds_numel", parameter.numel())


def _shard(whole, piece, count):
    """Return what this process's piece of a parameter has of its mask."""
    if piece.first is not None:
        return whole if piece.place is ... else whole.view(-1)[piece.first : piece.first + count]
    parameter = piece.parameter
    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def _hook(packed):
    def masked(gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        packed_bits.keep(gradient, packed)
        return gradient

    return masked


def _masked_out(part):
    """Return (tensor, which of its elements are masked out, their values)."""
    flat = local(part.tensor).view(-1)
    bits = ~packed_bits.unpack(part.kept, len(flat))
    return flat, bits, flat[bits]


def _decay_kind(optimizer, group):
    """Return how an optimizer that moves no weight without a gradient decays, or None for any other optimizer."""
    kind = type(optimizer)
    if getattr(optimizer, "decoupled_decay", False) or (
        kind in (torch.optim.Adam, torch.optim.AdamW) and group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    ):
        return _decay_weights
    return _decay_by_gradient if kind in (torch.optim.Adam, torch.optim.SGD) else None


def _decay_weights(part, optimizer, group):
    """theta <- theta * (1 - lr * weight_decay), as AdamW has it."""
    factor, skips = 1 - group["lr"] * group["weight_decay"], getattr(optimizer, "found_inf", None)
    held = local(part.tensor)
    if skips is not None:
        # A fused optimizer is called with gradients that are not finite, and then does nothing.
        factor = torch.where(skips.to(held.device) > 0, 1.0, torch.as_tensor(factor, device=held.device))
    if part.kept is None:
        held.mul_(factor)
    else:
        packed_bits.scale(held, part.kept, factor)


def _decay_by_gradient(part, optimizer, group):
    """g <- g + weight_decay * theta, as Adam and SGD have it."""
    gradient, scale = local(part.tensor.grad), getattr(optimizer, "grad_scale", None)
    gradient.add_(local(part.tensor), alpha=group["weight_decay"] * (1.0 if scale is None else float(scale)))
    if part.kept is not None:
        packed_bits.keep(gradient, part.kept)
