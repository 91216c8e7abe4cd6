"""Wanda's choice of weights: by their size times that of what they multiply, row by row of the linear layers."""
# Shapes: N tokens, D input features, O output rows of a linear layer.

import contextlib
from itertools import accumulate

import torch
import torch.distributed as dist

from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.mask_files import linear_weights
from llm_unlearn.decoder import causal_lm
from llm_unlearn.errors import UserError

_ROWS = 512


def wanda(weights, squares):
    """Score of a linear layer's weights: |W_oj| * sqrt(mean over tokens of x_j^2), (O, D) float32.

    Args:
        weights: (O, D).
        squares: (D,) mean squares of the input features.
    Source: Sun et al. 2023, arXiv:2306.11695.
    """
    return weights.abs().float() * squares.sqrt().to(weights.device, torch.float32)


@torch.no_grad()
def input_squares(model, blocks, tokens):
    """Return {name of its weight: (D,) float64 mean over tokens of x_j^2} of the linear layers in the decoder layers.

    Args:
        model: causal language model, whole on every process.
        blocks: gradient_sums.Blocks.
        tokens: how many there are in all of them, all but padding.
    Raises:
        UserError: there are no linear layers in them.
    """
    linears = linear_weights(model)
    if not linears:
        raise UserError("--score wanda ranks linear layers, and the decoder layers of this model have none of torch's")
    sizes = [module.in_features for _, module in linears]
    total = torch.zeros(sum(sizes), dtype=torch.float64, device=blocks.device)
    for batch, count in blocks.rounds("inputs of the linear layers"):
        own = torch.zeros_like(total)
        if batch is not None:
            mask = batch["attention_mask"].bool()
            with _summing([module for _, module in linears], mask, own.split(sizes)):
                causal_lm(model).base_model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                )
        # In the order of the batches, so that any number of processes finds the same sums.
        for part in _gathered(own)[:count]:
            total += part
    return {name: part / tokens for (name, _), part in zip(linears, total.split(sizes), strict=True)}


def select_rows(model, squares, ratio, shapes):
    """Choose in each output row the same share of weights, such that floor(ratio * size of the model) train in all.

    As published all parameters but the linear layers in the decoder layers train whole.

    Args:
        model: causal language model.
        squares: of `input_squares`.
        ratio: fractions.Fraction, share of all weights that train.
        shapes: {name of a parameter: its shape}, all of them.
    Returns:
        {name: (ceil(E / 8),) uint8 bits on the CPU}.
    Raises:
        UserError: the other parameters alone are more than that.
    Source: Sun et al. 2023, arXiv:2306.11695. Differs from the authors' code, where the ratio is that of the linear
        layers alone.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, ranked = sum(sizes.values()), sum(sizes[name] for name in squares)
    kept = int(ratio * total) - (total - ranked)
    if kept < 0:
        raise UserError(
            f"--score wanda ranks the linear layers alone, and {(total - ranked) / total:.4f} of the weights are in "
            "others, which all train; pass a larger --ratio or another --score"
        )
    chosen, passed = {name: packed_bits.pack(torch.ones(size, dtype=torch.bool)) for name, size in sizes.items()}, 0
    parameters = dict(model.named_parameters())
    for name in squares:
        rows, columns = shapes[name]
        # What all rows up to each one keep, rounded, so that the sum over all of them is exact.
        ends = [kept * end // ranked for end in accumulate([passed] + [columns] * rows)]
        counts = torch.tensor(ends).diff()
        passed += rows * columns
        chosen[name] = packed_bits.pack(_highest(wanda(parameters[name].detach(), squares[name]), counts).view(-1))
    return chosen


def _highest(scores, counts):
    """Return (O, D) bool: in each row its highest scores, so many as given, the earlier one where scores tie."""
    found = []
    for part, number in zip(scores.split(_ROWS), counts.to(scores.device).split(_ROWS), strict=True):
        order = part.argsort(dim=1, descending=True, stable=True)
        is_high = torch.arange(part.shape[1], device=part.device) < number.unsqueeze(1)
        found.append(torch.zeros_like(is_high).scatter_(1, order, is_high).cpu())
    return torch.cat(found)


@contextlib.contextmanager
def _summing(modules, mask, sums):
    """Add up the squares of what goes into modules; expert layers get a selection of tokens, padding among them."""

    def hook(total):
        def add(_module, inputs):
            features = inputs[0]
            features = features[mask] if features.shape[:2] == mask.shape else features.flatten(0, -2)
            total.add_(features.double().square().sum(0))

        return add

    hooks = [module.register_forward_pre_hook(hook(total)) for module, total in zip(modules, sums, strict=True)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _gathered(tensor):
    """Return what every process has, in their order."""
    if not dist.is_initialized():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found
