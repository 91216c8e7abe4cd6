"""Training linear probes that tell tokens of the forget set from tokens of the retain set by their hidden states."""
# Shapes: N counted tokens of a batch, D hidden size.

import logging
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from llm_unlearn.activations import capture_layers, run_without_head
from llm_unlearn.data.plan import BatchPlan
from llm_unlearn.data.selectors_states import LinearProbe
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset
from llm_unlearn.head import concatenate, counted_positions, own_states, split
from llm_unlearn.truncation import truncate

logger = logging.getLogger(__name__)

FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are trained.

    Attributes:
        learning_rate, weight_decay: of AdamW, constant.
        epochs: passes over the forget rows; as many retain rows are seen.
        batch_size: rows of each set in a step.
        seed: of the order of the rows.
    Source: EleutherAI/unlearn, its classification probes.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 3
    batch_size: int = 4
    seed: int = 42


class LayerStates:
    """What decoder layers of a frozen model hand on at the tokens of both sets that count.

    The model is cut down, in place, to the layers that run.

    Args:
        model: causal language model.
        layers: indices of decoder layers, from 0.
        device: torch.device where it runs.
        pad_token_id: fills shorter rows.
    """

    def __init__(self, model, layers, device, pad_token_id=0):
        self.layers, self.device, self.collator = list(layers), device, UnlearnCollator(pad_token_id)
        self.hidden_size = model.config.get_text_config(decoder=True).hidden_size
        self.model = model.requires_grad_(False).eval()
        truncate(model, max(self.layers))
        model.to(device)

    @torch.no_grad()
    def __call__(self, examples):
        """Return ({layer: (N, D) float32}, (N,) 1 for tokens of the forget set, 0 for those of the retain set).

        Args:
            examples: rows of UnlearnDataset, of either set or both.
        """
        batch = {
            stream: {name: tensor.to(self.device) for name, tensor in part.items()}
            for stream, part in self.collator(examples).items()
        }
        names, found, truth = list(batch), {}, []
        with capture_layers(self.model, self.layers) as states:
            run_without_head(self.model, *concatenate(batch, names, self.collator.pad_token_id))
        masks = {name: counted_positions(batch[name]) for name in names}
        for layer, hidden in states.items():
            parts = split(hidden, batch, names)
            found[layer] = torch.cat([own_states(parts[name])[masks[name]] for name in names]).float()
        for name in names:
            truth.append(torch.full((int(masks[name].sum()),), float(name == FORGET), device=self.device))
        return found, torch.cat(truth)


def fit_probes(states, rows, options, progress=False):
    """Train a probe for each layer, all on the same batches; each starts at zero.

        L = -(1/N) * sum_n [y_n * log s(z_n) + (1 - y_n) * log(1 - s(z_n))],   s = sigmoid, y_n = 1 for a forget token

    Args:
        states: LayerStates.
        rows: {"forget": tokenized rows, "retain": tokenized rows}.
        options: ProbeOptions.
        progress: whether to show a bar.
    Returns:
        ({layer: LinearProbe without a record}, steps taken).
    Source: EleutherAI/unlearn, its classification probes. Differs from the authors' code: the first token of a row is
        not read (see `head.own_states`).
    """
    dataset = UnlearnDataset({FORGET: rows[FORGET], RETAIN: rows[RETAIN]})
    plan = BatchPlan(dataset.sizes, options.seed, options.batch_size)
    zeros = {"device": states.device, "requires_grad": True}
    probes = {
        layer: LinearProbe(torch.zeros(states.hidden_size, **zeros), torch.zeros((), **zeros), layer, {})
        for layer in states.layers
    }
    parameters = [part for probe in probes.values() for part in (probe.weight, probe.bias)]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * len(plan)
    for step in tqdm(range(steps), "training probes", disable=not progress, leave=False):
        found, truth = states([dataset[key] for key in plan.batch(*divmod(step, len(plan)), 0)])
        loss = sum(
            torch.nn.functional.binary_cross_entropy_with_logits(probe(found[layer]), truth)
            for layer, probe in probes.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for probe in probes.values():
        probe.weight, probe.bias = probe.weight.detach(), probe.bias.detach()
    return probes, steps


def measure_probes(states, probes, rows, batch_size):
    """Return {layer: {"tokens", "forget_tokens", "accuracy", "precision", "recall", "f1"}} over all counted tokens.

    A token is called one of the forget set where its logit is above 0; None where nothing was called so, or nothing is.

    Args:
        states: LayerStates.
        probes: {layer: LinearProbe}.
        rows: {"forget": tokenized rows, "retain": tokenized rows}.
        batch_size: rows in a forward.
    """
    dataset = UnlearnDataset(rows)
    keys = [(name, number) for name, part in rows.items() for number in range(len(part))]
    counts = {layer: [0, 0, 0, 0] for layer in probes}
    for first in range(0, len(keys), batch_size):
        found, truth = states([dataset[key] for key in keys[first : first + batch_size]])
        for layer, probe in probes.items():
            called, is_forget = probe(found[layer]) > 0, truth > 0
            outcomes = (called & is_forget, called & ~is_forget, ~called & is_forget, ~called & ~is_forget)
            counts[layer] = [
                before + int(outcome.sum()) for before, outcome in zip(counts[layer], outcomes, strict=True)
            ]
    return {layer: scores_of(*four) for layer, four in counts.items()}


def scores_of(true_positives, false_positives, false_negatives, true_negatives):
    """Return {"tokens", "forget_tokens", "accuracy", "precision", "recall", "f1"} of four counts of tokens.

    precision = TP / (TP + FP), recall = TP / (TP + FN), f1 = 2 TP / (2 TP + FP + FN); None where that is 0 / 0.
    """
    called, actual = true_positives + false_positives, true_positives + false_negatives
    total = called + false_negatives + true_negatives

    def ratio(part, whole):
        return part / whole if whole else None

    return {
        "tokens": total,
        "forget_tokens": actual,
        "accuracy": ratio(true_positives + true_negatives, total),
        "precision": ratio(true_positives, called),
        "recall": ratio(true_positives, actual),
        "f1": ratio(2 * true_positives, called + actual),
    }
