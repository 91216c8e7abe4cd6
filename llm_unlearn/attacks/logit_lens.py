"""The logit lens as an audit: how likely the forgotten answer is when the head reads it off each layer."""
# Shapes: R rows, D hidden size, L decoder layers, V vocabulary, N scored tokens of a batch.
# Depth 0 is what the embeddings hand on, depth l + 1 what decoder layer l does.

from dataclasses import dataclass

import numpy as np
import torch

from llm_unlearn.attacks.answer_states import answer_means, each_depth, row_means, segment_means
from llm_unlearn.chunked_head import chunk_rows
from llm_unlearn.evaluation.metrics import bootstrap_stderr
from llm_unlearn.evaluation.scores import LOWER, Metric, mean_metric
from llm_unlearn.evaluation.token_statistics import ScoringHead
from llm_unlearn.lens import TunedLens
from llm_unlearn.lens_files import base_model_identity, read_lens


@dataclass
class LensReading:
    """What a lens reads of the rows of a set.

    Attributes:
        nll: (R, L + 1) negative log-likelihood per token of each answer at each depth, nats.
        accuracy: (R, L + 1) share of its tokens that are the lens's first choice.
    """

    nll: np.ndarray
    accuracy: np.ndarray

    @property
    def probability(self):
        """(R, L + 1) probability of each answer per token: exp(-nll), the geometric mean over its tokens."""
        return np.exp(-self.nll)


def own_lens(model):
    """Return the logit lens of a model: its own final norm and head, in float32, at every depth.

    Args:
        model: causal language model, whole.
    Raises:
        UserError: the model does more between its last layer and its logits than a norm, a matrix, scale and softcap.
    """
    lens = TunedLens.of(model, copies=lambda parts: [part.detach() for part in parts])
    lens.require_agreement(model)
    lens.narrow(torch.float32)
    return lens.eval()


def stored_lens(model, place, allow_pickle=False, token=None):
    """Return a tuned lens from disk or the Hub on the model that it was trained on.

    The embeddings, and the last layer, are read without a translator.

    Args:
        model: the target model.
        place: folder, or name on the Hub; see `lens_files.read_lens`.
        allow_pickle, token: see there.
    Raises:
        UserError: no lens, the lens of another model, a layer without a translator.
    """
    lens = own_lens(model)
    stored = read_lens(place, lens, range(1, lens.num_layers), allow_pickle, token)
    stored.require_model(base_model_identity(model))
    lens.add_translators(stored.translators, stored.translators)
    return lens.requires_grad_(False)


def read_answers(model, lens, rows, bounds):
    """Read the answers of rows off every depth, in one forward a batch.

        nll_l = -(1/n) * sum_t log softmax(head(norm(h_l[t - 1])))[y_t]

    over the n tokens y of the answer; the prompt does not count. At the last depth it is the model's own likelihood.

    Args:
        model: a causal language model on its device, unwrapped, in eval mode.
        lens: TunedLens; of this model, or of another one of its shape that reads its states.
        rows: list of AuditedRow.
        bounds: Bounds.
    Returns:
        LensReading.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, arXiv:2303.08112 (tuned).
    """
    head = ScoringHead(model)

    def read(batch, counts):
        found = {}

        def score(depth, states):
            found[depth] = segment_means(_scores(lens, depth, states, batch), counts)

        with each_depth(model, batch, score):
            head(batch)
        return torch.stack([found[depth] for depth in sorted(found)], 1)

    sequences = [sequence for row in rows for sequence in row.sequences]
    means = row_means(answer_means(model, sequences, read, bounds, "lens"), [row.sequences for row in rows])
    return LensReading(nll=-means[..., 0], accuracy=means[..., 1])


def _scores(lens, depth, states, batch):
    """Return (N, 2): log-probability of each scored token under the lens, nats, and whether it is the first choice."""
    hidden, projection = lens.hidden(depth, states), lens.projection
    found = []
    size = chunk_rows(len(projection.weight), hidden.device)
    for part, labels in zip(hidden.split(size), batch.labels.split(size), strict=True):
        logits = projection.logits(part, torch.promote_types(part.dtype, torch.float32))
        logps = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        found.append(torch.stack([logps, (logits.argmax(-1) == labels).to(logps.dtype)], -1))
    return torch.cat(found)


def lens_metrics(reading, seed=0):
    """Return the metrics of a LensReading, over decoder layers; the embeddings, which say the token before, stay out.

    `lens/forget_probability_last` is the mean probability at the last layer, the model's own; `..._best_layer_...` that
    at the layer where the mean is largest; `lens/forget_area` the mean over all layers.

    Args:
        reading: LensReading.
        seed: of the bootstrap over rows.
    """
    values = reading.probability[:, 1:]

    def best(sample):
        return float(sample.mean(0).max())

    stderr = bootstrap_stderr([values], best, seed=seed)
    return {
        "lens/forget_probability_last": mean_metric(values[:, -1], LOWER, seed),
        "lens/forget_best_layer_probability": Metric(best(values), stderr, len(values), LOWER),
        "lens/forget_area": mean_metric(values.mean(1), LOWER, seed),
    }
