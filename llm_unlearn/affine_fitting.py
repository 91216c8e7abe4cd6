"""Fitting affine maps from one model's hidden states to another's, from sums over tokens in one pass over the rows."""
# Shapes: B sequences, T tokens, N counted tokens, D hidden size of the target model, E of the teacher.

import math
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from llm_unlearn.activations import capture_layers, run_without_head
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions, own_states
from llm_unlearn.truncation import truncate


@dataclass
class Moments:
    """Sums over tokens from which a map of one layer is solved, in float64; none of the states is kept.

    Attributes:
        count: (1,) tokens.
        x: (E,) sum of the teacher's states.
        y: (D,) sum of the target model's states.
        xx, xy, yy: (E, E), (E, D) and (D, D) sums of their products; `yy` is None unless asked for.
    """

    count: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor | None

    @classmethod
    def zeros(cls, teacher_size, size, device, with_yy=False):
        """Return the sums over no token."""

        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        products = zeros(teacher_size, teacher_size), zeros(teacher_size, size), zeros(size, size) if with_yy else None
        return cls(zeros(1), zeros(teacher_size), zeros(size), *products)

    def add(self, x, y):
        """Add tokens.

        Args:
            x: (N, E) states of the teacher.
            y: (N, D) states of the target model at the same tokens.
        """
        x, y = x.to(self.x), y.to(self.y)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        if self.yy is not None:
            self.yy.addmm_(y.T, y)

    def all_reduce(self):
        """Add up the sums of all processes, which all call; every one of them then has the same."""
        if torch.distributed.is_initialized():
            for part in vars(self).values():
                if part is not None:
                    torch.distributed.all_reduce(part)

    def centered(self):
        """Return (mean of x, mean of y, C_xx, C_xy, C_yy or None), scatters around the means, not divided by N.

        Raises:
            UserError: no token was added, or states that are not finite.
        """
        if not self.count:
            raise UserError("the rows hold no token that counts, so that no affine map can be fitted to them")
        if not all(part.isfinite().all() for part in vars(self).values() if part is not None):
            raise UserError("hidden states of one of the models are NaN or infinite, and no affine map can be fitted")
        mean_x, mean_y = self.x / self.count, self.y / self.count
        scatters = self.xx - torch.outer(mean_x, self.x), self.xy - torch.outer(mean_x, self.y)
        return mean_x, mean_y, *scatters, None if self.yy is None else self.yy - torch.outer(mean_y, self.y)


def fit_ridge(moments, alpha):
    """Solve the ridge regression of the target model's states on the teacher's.

        W = (C_xx + alpha * I)^-1 C_xy,   b = mu_y - mu_x W,   y = x W + b

    C are scatters around the means, sums and not averages, so that `alpha` weighs less the more tokens there are; the
    intercept is not penalized.

    Args:
        moments: Moments.
        alpha: > 0, in the unit of the teacher's states squared.
    Returns:
        (weight (D, E) = W^T, bias (D,)), float64.
    Source: EleutherAI/unlearn, affine maps of checkpoint transfer.
    """
    mean_x, mean_y, c_xx, c_xy, _ = moments.centered()
    identity = torch.eye(len(c_xx), dtype=c_xx.dtype, device=c_xx.device)
    solved = torch.linalg.solve(c_xx + alpha * identity, c_xy)
    return solved.T, mean_y - mean_x @ solved


def fit_svcca(moments, variance):
    """Map between the directions that matter on both sides, by canonical correlations.

        C_xx = U_x L_x U_x^T,  C_yy = U_y L_y U_y^T,  each cut to the fewest directions that explain `variance`
        L_x^-1/2 U_x^T C_xy U_y L_y^-1/2 = P R Q^T,   R the canonical correlations
        W = U_x L_x^-1/2 P R Q^T L_y^1/2 U_y^T,   b = mu_y - mu_x W,   y = x W + b

    A canonical variate of the target model is predicted as its correlation times the teacher's variate, which is the
    least-squares prediction; what lies outside of the kept directions is predicted by its mean.

    Args:
        moments: Moments with `yy`.
        variance: share of each side's variance that the kept directions explain, in (0, 1].
    Returns:
        (weight (D, E) = W^T, bias (D,), R in descending order), float64; the mean of R is the SVCCA similarity.
    Source: Raghu et al. 2017, arXiv:1706.05806 (SVCCA); named by EleutherAI/unlearn, whose trainers use none. Differs
        from SVCCA's code: the singular vectors come from scatters and not from all states, which is the same.
    """
    mean_x, mean_y, c_xx, c_xy, c_yy = moments.centered()
    basis_x, scales_x = _principal(c_xx, variance)
    basis_y, scales_y = _principal(c_yy, variance)
    whitened = (basis_x / scales_x).T @ c_xy @ (basis_y / scales_y)
    left, correlations, right = torch.linalg.svd(whitened, full_matrices=False)
    # Rounding, and nothing else, takes a correlation beyond 1.
    correlations = correlations.clamp(max=1.0)
    solved = (basis_x / scales_x) @ (left * correlations) @ right @ (basis_y * scales_y).T
    return solved.T, mean_y - mean_x @ solved, correlations


def _principal(scatter, variance):
    """Return (directions (D, K), square roots (K,) of their shares of the scatter) that explain `variance` of it."""
    values, vectors = torch.linalg.eigh(scatter)
    values, vectors = values.flip(0), vectors.flip(1)
    is_there = values > values[0] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[is_there], vectors[:, is_there]
    if not len(values):
        raise UserError("the hidden states are the same at every token, so that no affine map can be fitted to them")
    share = values.cumsum(0) / values.sum()
    # The fewest that reach it: all before which it is not reached yet.
    count = min(int((share < variance * (1 - 1e-12)).sum()) + 1, len(values))
    return vectors[:, :count], values[:count].sqrt()


class Residuals:
    """How far a layer's map is from the target model's states, over tokens that it was not fitted to.

    Args:
        size: D.
        device: where it is summed.
    """

    def __init__(self, size, device):
        # Tokens, squared residuals and squared changes; then for each coordinate the sum of y and of its square.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._y = torch.zeros(2, size, dtype=torch.float64, device=device)

    def add(self, x, y, mapped):
        """Add tokens.

        Args:
            x: (N, E) states of the teacher.
            y: (N, D) states of the target model.
            mapped: (N, D) what the map makes of x.
        """
        x, y, mapped = (part.to(self._y) for part in (x, y, mapped))
        unmapped = (y - x).square().sum() if x.shape == y.shape else y.new_tensor(math.nan)
        self._sums += torch.stack([y.new_tensor(len(y)), (y - mapped).square().sum(), unmapped])
        self._y += torch.stack([y.sum(0), y.square().sum(0)])

    def report(self):
        """Return what was found; all processes call together.

        Returns:
            {"mse": mean square error over tokens and coordinates, "identity_mse": the same of the teacher's own states
            or None where their size differs, "r2": share of the variance around each coordinate's mean that the map
            explains, None where there is no variance, "tokens"}.
        """
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
            torch.distributed.all_reduce(self._y)
        count, squared, unmapped = self._sums.tolist()
        total = float((self._y[1] - self._y[0].square() / count).sum())
        values = count * self._y.shape[1]
        return {
            "mse": squared / values,
            "identity_mse": None if math.isnan(unmapped) else unmapped / values,
            "r2": 1 - squared / total if total > 0 else None,
            "tokens": int(count),
        }


class StatePairs:
    """Two frozen models, read at the same layers and the same tokens; both are cut above the highest layer, in place.

    The tokens are those that a loss on hidden states counts: no padding, no prompt, and not the first of a row.

    Args:
        teacher: causal language model.
        target: another one, of the same tokenizer.
        layers: decoder layers, counted from 0; None takes all that both have.
        device: where they run.
    Raises:
        UserError: a layer that one of them does not have.
    """

    def __init__(self, teacher, target, layers, device):
        self.device, self.models = device, [model.requires_grad_(False).eval() for model in (teacher, target)]
        depths = [len(decoder_layers(model)) for model in self.models]
        self.layers = sorted(set(range(min(depths)) if layers is None else layers))
        for name, depth in zip(("teacher", "target model"), depths, strict=True):
            beyond = [layer for layer in self.layers if not 0 <= layer < depth]
            if beyond:
                raise UserError(f"layer {beyond[0]} does not exist: the {name} has layers 0 to {depth - 1}")
        self.sizes = [model.config.get_text_config(decoder=True).hidden_size for model in self.models]
        for model in self.models:
            truncate(model, max(self.layers))
            model.to(device)

    @torch.no_grad()
    def __call__(self, stream):
        """Return {layer: (states (N, E) of the teacher, states (N, D) of the target model)} of a padded batch."""
        stream = {name: tensor.to(self.device) for name, tensor in stream.items()}
        mask, found = counted_positions(stream), []
        for model in self.models:
            with capture_layers(model, self.layers) as states:
                run_without_head(model, stream["input_ids"], stream["attention_mask"])
            found.append({layer: own_states(hidden)[mask] for layer, hidden in states.items()})
        return {layer: (found[0][layer], found[1][layer]) for layer in self.layers}


class Batches:
    """Padded batches of tokenized rows of similar length, every so manyth of them.

    The batches are the same however many processes share them, so that the states in them are too.

    Args:
        rows: list of {"input_ids", "labels"}.
        batch_size: rows of a batch.
        pad_token_id: fills up.
        rank: of this process.
        processes: how many share the batches.
    """

    def __init__(self, rows, batch_size, pad_token_id=0, rank=0, processes=1):
        rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        parts = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
        self.parts, self._collator = parts[rank::processes], UnlearnCollator(pad_token_id)

    def __iter__(self):
        for part in self.parts:
            yield self._collator.pad(part)

    def __len__(self):
        return len(self.parts)


def fit(pairs, batches, solve, with_yy=False, progress=False):
    """Fit a map for each layer; all processes call together and all get the same.

    The sums take 8 * (E * E + E * D) bytes a layer, and 8 * D * D more with `with_yy`.

    Args:
        pairs: StatePairs.
        batches: Batches of this process.
        solve: function of Moments, `fit_ridge` for example; its first two results are weight and bias.
        with_yy: whether it reads `Moments.yy`.
        progress: whether a progress bar is shown.
    Returns:
        ({layer: what `solve` returned}, tokens).
    Raises:
        UserError: hidden states that are not finite, or no token that counts.
    """
    device = _wide_device(pairs.device)
    moments = {layer: Moments.zeros(*pairs.sizes, device, with_yy) for layer in pairs.layers}
    for stream in tqdm(batches, "fitting", disable=not progress, leave=False):
        for layer, states in pairs(stream).items():
            moments[layer].add(*states)
    found = {}
    for layer in pairs.layers:
        # One layer after the other, so that solving needs no more room than one of them.
        part = moments.pop(layer)
        part.all_reduce()
        found[layer] = solve(part)
    return found, int(part.count)


def measure(pairs, batches, maps, progress=False):
    """Return {layer: see `Residuals.report`} of maps on rows that they were not fitted to; all processes call together.

    Args:
        pairs: StatePairs.
        batches: Batches of this process.
        maps: affine.AffineMaps on the device of `pairs`.
        progress: whether a progress bar is shown.
    """
    residuals = {layer: Residuals(pairs.sizes[1], _wide_device(pairs.device)) for layer in pairs.layers}
    for stream in tqdm(batches, "measuring", disable=not progress, leave=False):
        for layer, (x, y) in pairs(stream).items():
            residuals[layer].add(x, y, maps(layer, x.float()))
    return {layer: part.report() for layer, part in residuals.items()}


def _wide_device(device):
    """Return where sums in float64 are kept: Apple's GPUs have no such type."""
    return torch.device("cpu") if device.type == "mps" else device
