"""The mean gradient of a set of rows, its batches split over processes and summed in one fixed order."""
# Shapes: E elements of one parameter that are this process's, W processes.

import logging

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from llm_unlearn.addons.mask_ranking import share_of
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.head_reading import HeadReader, score_streams

logger = logging.getLogger(__name__)

_BUCKET = 2**24


class Blocks:
    """Batches of tokenized rows of similar length: the same ones on any number of processes, which take turns.

    Args:
        rows: list of {"input_ids", "labels"}.
        size: rows of a batch.
        pad_id: a token to pad with.
        multiple: every width is a multiple of so many tokens.
        device: torch.device.
    """

    def __init__(self, rows, size, pad_id, multiple, device):
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
        self.parts = [[rows[n] for n in order[first : first + size]] for first in range(0, len(rows), size)]
        self.collator, self.device = UnlearnCollator(pad_id, multiple), device
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def rounds(self, name):
        """Yield (this process's batch or None, how many processes have one) until all batches have had their turn."""
        firsts = range(0, len(self.parts), self.world)
        for first in tqdm(firsts, name, disable=self.rank > 0, leave=False):
            own = self.parts[first + self.rank :][:1] if first + self.rank < len(self.parts) else []
            batch = {key: value.to(self.device) for key, value in self.collator.pad(own[0]).items()} if own else None
            yield batch, min(self.world, len(self.parts) - first)


class GradientSums:
    """Sums the gradients of batches, in the order of the batches, in float32.

    On one process with weights in float32 that is what a backward does by itself. Several hold a share of every
    parameter each: they send one another their shares of each batch's gradient, and add them up in the order of the
    batches, so that the sums are bit for bit those of one process.

    Args:
        parameters: {name: parameter}.
    """

    def __init__(self, parameters):
        self.parameters = parameters
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self._adds_up_itself = self.world == 1 and all(p.dtype == torch.float32 for p in parameters.values())
        self._sums = {} if self._adds_up_itself else {name: self._zeros(p) for name, p in parameters.items()}

    def add(self, count):
        """Take over the gradients of the last backward.

        Args:
            count: how many processes, from the first, have had one.
        """
        if self._adds_up_itself:
            return
        if self.world == 1:
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    self._sums[name] += parameter.grad.reshape(-1)
        else:
            for names in self._buckets():
                self._exchange(names, count)
        for parameter in self.parameters.values():
            parameter.grad = None

    def take(self):
        """Return {name: (E,) float32 sum of this process's share}, and let the parameters have no gradient."""
        found = self._sums
        if self._adds_up_itself:
            found = {
                name: self._zeros(p) if p.grad is None else p.grad.reshape(-1) for name, p in self.parameters.items()
            }
        for parameter in self.parameters.values():
            parameter.grad = None
        self._sums = {}
        return found

    def _zeros(self, parameter):
        _, count = share_of(parameter.numel(), self.world, self.rank)
        return torch.zeros(count, device=parameter.device)

    def _buckets(self):
        """Yield names of parameters that are sent together."""
        names, size = [], 0
        for name, parameter in self.parameters.items():
            if names and size + parameter.numel() > _BUCKET:
                yield names
                names, size = [], 0
            names, size = [*names, name], size + parameter.numel()
        yield names

    def _exchange(self, names, count):
        lengths = [share_of(self.parameters[name].numel(), self.world, 0)[1] for name in names]
        sent = torch.cat(
            [self._rows(self.parameters[name], length) for name, length in zip(names, lengths, strict=True)], 1
        )
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        for gradients in received[:count]:
            for name, part in zip(names, gradients.split(lengths), strict=True):
                self._sums[name] += part[: len(self._sums[name])]

    def _rows(self, parameter, length):
        """Return (W, length) float32: each process's share of a parameter's gradient, padded to be equally long."""
        if parameter.grad is None:
            return torch.zeros(self.world, length, device=parameter.device)
        flat = parameter.grad.reshape(-1).float()
        return torch.nn.functional.pad(flat, (0, self.world * length - len(flat))).view(self.world, length)


def mean_gradients(model, parameters, blocks, tokens, name):
    """Return the gradient of the mean negative log-likelihood of the tokens that count.

        g = (1/N) * sum_n d nll_n / d theta

    Args:
        model: causal language model, in evaluation mode, whole on every process.
        parameters: {name: parameter}, which have no gradient yet.
        blocks: Blocks.
        tokens: N, how many tokens count in all of them.
        name: of the set, for the progress bar.
    Returns:
        ({name: (E,) float32 of this process's share}, the mean itself in nats).
    """
    reader, sums = HeadReader(model), GradientSums(parameters)
    total = torch.zeros((), device=blocks.device)
    for batch, count in blocks.rounds(f"gradients of the {name} set"):
        if batch is not None:
            pad_id = blocks.collator.pad_token_id
            output = score_streams(reader, model, {name: batch}, (name,), pad_id, linear=(name,))[name]
            loss = -output.logps.sum() / tokens
            loss.backward()
            total += loss.detach()
        sums.add(count)
    if dist.is_initialized():
        dist.all_reduce(total)
    return sums.take(), float(total)
