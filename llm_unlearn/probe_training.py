"""Training transformer probes: from an early checkpoint's hidden states to the final model's, row by row.

The models are frozen, whole on every process, and run up to the highest layer that is asked for; the rows of a batch
are split over the processes, and the gradients are summed.
"""
# Shapes: B sequences, T tokens, D hidden size, L layers.

import logging
from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm

from llm_unlearn.activations import capture
from llm_unlearn.data.plan import BatchPlan
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset, pad_id
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions, own_states, wide_dtype
from llm_unlearn.probe import TransformerProbe, probe_depth
from llm_unlearn.truncation import truncate

logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class FitOptions:
    """How probes are trained.

    Attributes:
        learning_rate: of AdamW, constant.
        epochs: passes over the rows.
        batch_size: rows on each process.
        max_steps: end after so many steps; None after the epochs.
        seed: of the probes' first weights and of the order of the rows.
    """

    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 4
    max_steps: int | None = None
    seed: int = 42


class StatePairs:
    """What two frozen models of one architecture hand on at the same layers for the same rows.

    Both are cut down to the layers that run, in place.

    Args:
        early: causal language model.
        final: another one.
        layers: indices of decoder layers, from 0.
        device: torch.device where they run.
    Raises:
        UserError: a layer that the models do not have, or models of different shapes.
    """

    def __init__(self, early, final, layers, device):
        self.layers, self.device = list(layers), device
        depths = [len(decoder_layers(model)) for model in (early, final)]
        sizes = [model.config.get_text_config(decoder=True).hidden_size for model in (early, final)]
        if len(set(depths)) > 1 or len(set(sizes)) > 1:
            raise UserError(
                f"the early model has {depths[0]} layers of size {sizes[0]}, the final one {depths[1]} of size "
                f"{sizes[1]}; they must be checkpoints of one model"
            )
        self.num_layers, self.hidden_size = depths[0], sizes[0]
        if not all(0 <= layer < self.num_layers for layer in self.layers):
            raise UserError(f"--layers {' '.join(map(str, layers))}: the models have layers 0 to {self.num_layers - 1}")
        self.models = [model.requires_grad_(False).eval() for model in (early, final)]
        for model in self.models:
            truncate(model, max(self.layers))
            model.to(device)

    @torch.no_grad()
    def __call__(self, stream):
        """Return ({layer: (B, T-1, D)} of the early model, the same of the final one, token mask, counted mask).

        Args:
            stream: one stream of an UnlearnBatch, on the device.
        """
        inputs = {name: stream[name] for name in ("input_ids", "attention_mask")}
        found = []
        for model in self.models:
            modules = decoder_layers(model)
            with capture(*(modules[layer] for layer in self.layers)) as hidden:
                model(**inputs, use_cache=False)
            found.append({layer: own_states(h) for layer, h in zip(self.layers, hidden, strict=True)})
        return *found, stream["attention_mask"][:, 1:].bool(), counted_positions(stream)


class Errors:
    """Sums of squared errors of one layer, of its probe and of two maps that know nothing of the row.

    Args:
        hidden_size: D.
        device: torch.device.
    """

    def __init__(self, hidden_size, device):
        dtype = wide_dtype(device)
        self.count = torch.zeros((), dtype=dtype, device=device)
        self.probe, self.identity, self.squares = (torch.zeros_like(self.count) for _ in range(3))
        self.targets = torch.zeros(hidden_size, dtype=dtype, device=device)

    def add(self, said, early, final):
        """Count tokens.

        Args:
            said: (N, D) of the probe, or None where only the targets' mean is of interest.
            early: (N, D) hidden states of the early model.
            final: (N, D) of the final one, the targets.
        """
        early, final = early.to(self.targets.dtype), final.to(self.targets.dtype)
        self.count += len(final)
        self.targets += final.sum(0)
        self.squares += final.square().sum()
        self.identity += (early - final).square().sum()
        if said is not None:
            self.probe += (said.to(self.targets.dtype) - final).square().sum()

    def over_all_processes(self):
        """Sum what every process counted, in place; returns itself."""
        packed = torch.cat([torch.stack([self.count, self.probe, self.identity, self.squares]), self.targets])
        packed = reduce(packed, "sum")
        (self.count, self.probe, self.identity, self.squares), self.targets = packed[:4], packed[4:]
        return self

    def mean_target(self):
        """Return (D,) the mean of the targets."""
        return self.targets / self.count

    def means(self, constant):
        """Return {"tokens", "probe", "identity", "mean"}: mean squared errors per token and dimension.

        Args:
            constant: (D,) what the map "mean" says of every token.
        """
        of_constant = self.squares - 2 * (constant @ self.targets) + self.count * (constant @ constant)
        sums = {"probe": self.probe, "identity": self.identity, "mean": of_constant}
        per = self.count * len(self.targets)
        return {"tokens": int(self.count)} | {name: float(value / per) for name, value in sums.items()}


def split_rows(rows, seed):
    """Divide rows at random into those to train on and every tenth, at least one, to report on.

    Args:
        rows: list of at least two.
        seed: of the choice.
    Returns:
        (rows to train on, held-out rows), each in the given order.
    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"probes need at least 2 rows, one of them to report on, but the set has {len(rows)}")
    count = max(1, round(HELD_OUT_SHARE * len(rows)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    return [row for n, row in enumerate(rows) if n not in held_out], [rows[n] for n in sorted(held_out)]


def make_probes(pairs, seed):
    """Return {layer: TransformerProbe} with first weights that depend on the seed, and not on which layers there are.

    Args:
        pairs: StatePairs.
        seed: int.
    """
    probes = {}
    with torch.random.fork_rng(devices=[]):
        for layer in pairs.layers:
            torch.manual_seed(seed)
            probe = TransformerProbe(pairs.hidden_size, probe_depth(pairs.num_layers, layer))
            probes[layer] = probe.to(pairs.device)
    return probes


class Batches:
    """Batches of tokenized rows, one share for each process.

    Args:
        rows: list of {"input_ids", "labels"}.
        tokenizer: a transformers tokenizer, for its pad token.
        state: accelerate.PartialState.
        options: FitOptions.
    """

    def __init__(self, rows, tokenizer, state, options):
        self.dataset, self.device = UnlearnDataset({"forget": rows}), state.device
        self.collator = UnlearnCollator(pad_id(tokenizer))
        self.plan = BatchPlan(
            self.dataset.sizes, options.seed, options.batch_size, state.num_processes, state.process_index,
            lengths=self.dataset.lengths,
        )  # fmt: skip

    def __len__(self):
        return len(self.plan)

    def epoch(self, number):
        """Yield the batches of an epoch, on the device."""
        self.plan.set_epoch(number)
        for rows in self.plan:
            stream = self.collator([self.dataset[row] for row in rows])["forget"]
            yield {name: tensor.to(self.device) for name, tensor in stream.items()}


def fit(probes, pairs, batches, options, progress=False):
    """Train the probes of all layers together, each on its own error; as if one after the other, for one forward.

        L = sum_t m_t * ||probe(h_early)_t - h_final_t||^2 / (D * sum_t m_t)

    with m_t = 1 where a token counts; both sums run over the batches of all processes.

    Args:
        probes: {layer: TransformerProbe}, trained in place.
        pairs: StatePairs.
        batches: Batches of the training rows.
        options: FitOptions.
        progress: whether to show a bar.
    Returns:
        (steps taken, {layer: (D,) mean of the targets that were seen}).
    Source: EleutherAI/unlearn, its transformer probe. Differs from the authors' code: the mean is over the tokens that
        count, theirs over padding as well; nothing else of a row's padding is seen either.
    """
    parameters = [parameter for probe in probes.values() for parameter in probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    steps = options.max_steps or options.epochs * len(batches)
    seen = {layer: Errors(pairs.hidden_size, pairs.device) for layer in probes}
    streams = _endless(batches)
    for _ in tqdm(range(steps), "training probes", disable=not progress, leave=False):
        early, final, tokens, counted = pairs(next(streams))
        total = reduce(counted.sum().to(wide_dtype(pairs.device)), "sum").clamp(min=1)
        loss = 0.0
        for layer, probe in probes.items():
            said = probe(early[layer], tokens)[counted]
            seen[layer].add(None, early[layer][counted], final[layer][counted])
            loss = loss + (said - final[layer][counted].to(said.dtype)).square().sum() / (total * pairs.hidden_size)
        optimizer.zero_grad()
        loss.backward()
        _sum_gradients(parameters)
        optimizer.step()
    return steps, {layer: errors.over_all_processes().mean_target() for layer, errors in seen.items()}


@torch.no_grad()
def measure(probes, pairs, batches, constants):
    """Return {layer: {"tokens", "probe", "identity", "mean"}}: mean squared errors over rows of all processes.

    Args:
        probes: {layer: TransformerProbe}.
        pairs: StatePairs.
        batches: Batches.
        constants: {layer: (D,)}, what the map "mean" says.
    """
    errors = {layer: Errors(pairs.hidden_size, pairs.device) for layer in probes}
    for stream in batches.epoch(0):
        early, final, tokens, counted = pairs(stream)
        for layer, probe in probes.items():
            said = probe(early[layer], tokens)[counted]
            errors[layer].add(said, early[layer][counted], final[layer][counted])
    return {layer: found.over_all_processes().means(constants[layer]) for layer, found in errors.items()}


def _endless(batches):
    number = 0
    while True:
        yield from batches.epoch(number)
        number += 1


def _sum_gradients(parameters):
    """Sum the gradients over all processes; the loss is divided by the tokens of all of them already."""
    flat = reduce(torch.cat([parameter.grad.reshape(-1) for parameter in parameters]), "sum")
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
