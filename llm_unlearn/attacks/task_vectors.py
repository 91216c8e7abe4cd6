"""Task vectors as directions in weight space: whether fine-tuning leads back to where unlearning came from."""

import math
import re
from dataclasses import dataclass

import torch

from llm_unlearn.errors import UserError

CHUNK_ELEMENTS = 2**24
NUM_LAYER_GROUPS = 3
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_EMBEDDINGS = ("embed", "wte", "wpe")


class ModelTensors:
    """The parameters of a model in memory, read as `checkpoint_arithmetic.CheckpointFiles` are; tied ones once.

    Attributes:
        folder: what to call the model in messages.

    Args:
        model: torch.nn.Module.
        what: what to call it.
    """

    def __init__(self, model, what):
        self.folder, self._tensors = what, dict(model.named_parameters())

    def names(self):
        """Return the names of all tensors."""
        return self._tensors.keys()

    def part(self, name):
        """Return a tensor as something with get_shape() that is read where it is indexed."""
        return _Part(self._tensors[name])


class _Part:
    """One tensor, indexed in parts."""

    def __init__(self, tensor):
        self._tensor = tensor.detach()

    def get_shape(self):
        """Return the shape as a list."""
        return list(self._tensor.shape)

    def __getitem__(self, index):
        return self._tensor[index]


@dataclass
class Alignment:
    """Sums over the weights of two vectors a and b, from which their angle follows.

    Attributes:
        dot: sum of a_i * b_i.
        first: sum of a_i squared.
        second: sum of b_i squared.
    """

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0

    def add(self, first, second):
        """Take in some weights of both vectors, float64."""
        self.dot += float((first * second).sum())
        self.first += float(first.square().sum())
        self.second += float(second.square().sum())

    @property
    def cosine(self):
        """Cosine in [-1, 1], or None where one of the vectors is zero, or not finite, and has no direction."""
        if not (0 < self.first < math.inf and 0 < self.second < math.inf and math.isfinite(self.dot)):
            return None
        return max(-1.0, min(1.0, self.dot / (math.sqrt(self.first) * math.sqrt(self.second))))

    def as_dict(self):
        """Return cosine and the two norms, for JSON; a norm that is not finite is None."""
        norms = {"finetuning_norm": self.first, "unlearning_norm": self.second}
        found = {name: math.sqrt(square) if math.isfinite(square) else None for name, square in norms.items()}
        return {"cosine": self.cosine, **found}


def task_vector_cosines(finetuned, unlearned, target):
    """Compare what fine-tuning did to the weights with what unlearning had done to them.

        a = theta_finetuned - theta_unlearned,   b = theta_unlearned - theta_target
        cos(a, b) = sum_i a_i b_i / (||a|| ||b||)

    Below 0, fine-tuning on unrelated data undoes the unlearning as it goes; a robust model lies at 0 or above. All sums
    are of float64; no whole tensor is copied.

    Args:
        finetuned, unlearned, target: ModelTensors or CheckpointFiles of like models.
    Returns:
        {"all": Alignment, group: Alignment}; the groups of `layer_groups`, in the order of the layers.
    Raises:
        UserError: tensors with other names or shapes.
    Source: Wang et al. 2025, arXiv:2506.01339 (ILU), the cosine of tau_{u->ft} and tau_u.
    """
    models = (finetuned, unlearned, target)
    require_equal_names(models)
    groups = layer_groups(unlearned.names())
    found = {"all": Alignment()} | {group: Alignment() for group in dict.fromkeys(groups.values())}
    for name, group in groups.items():
        parts = [model.part(name) for model in models]
        for index in _chunks(parts[0].get_shape()):
            after, before, start = (part[index] for part in parts)
            if not after.is_floating_point():
                continue
            after, before, start = (value.to("cpu", torch.float64) for value in (after, before, start))
            for alignment in (found["all"], found[group]):
                alignment.add(after - before, before - start)
    return found


def require_equal_names(models):
    """Refuse models whose tensors are not called alike, or have other shapes.

    Args:
        models: ModelTensors or CheckpointFiles, two at least.
    Raises:
        UserError: naming a tensor.
    """
    first, *others = models
    for other in others:
        differing = sorted(set(first.names()) ^ set(other.names()))
        if differing:
            raise UserError(
                f"'{first.folder}' and '{other.folder}' are models of other architectures: only one of them has "
                f"{differing[0]}"
            )
        for name in first.names():
            shapes = [model.part(name).get_shape() for model in (first, other)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{name} has the shape {shapes[0]} in '{first.folder}' and {shapes[1]} in '{other.folder}'"
                )


def layer_groups(names):
    """Say to which part of the model each tensor belongs.

    Args:
        names: of the tensors; the first number in a name is its decoder layer.
    Returns:
        {name: group} in the order embeddings, layers from the first to the last in three like groups (each layer alone
        where there are at most three), head; the head includes the final norm.
    """
    layers = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    count = max(layers.values(), default=-1) + 1
    found = {}
    for name in names:
        if name in layers:
            found[name] = (1, layers[name] * NUM_LAYER_GROUPS // count if count > NUM_LAYER_GROUPS else layers[name])
        else:
            found[name] = (0, 0) if any(word in name for word in _EMBEDDINGS) else (2, 0)
    members = {}
    for name, layer in layers.items():
        members.setdefault(found[name], set()).add(layer)
    shown = {key: _shown(min(these), max(these)) for key, these in members.items()}
    shown |= {(0, 0): "embeddings", (2, 0): "head"}
    return {name: shown[found[name]] for name in sorted(found, key=lambda name: (found[name], name))}


def _shown(first, last):
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _chunks(shape):
    """Return what to index a tensor with, so many rows at once that they are not too many elements."""
    if not shape:
        return [...]
    step = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
