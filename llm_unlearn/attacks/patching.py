"""The unlearning depth score: how much of the target's knowledge is erased from a model's layers, by patching."""
# Shapes: R rows, L decoder layers, D hidden size, N scored tokens of a batch.

import contextlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from llm_unlearn.attacks.answer_states import answer_means, each_depth, row_means, segment_means
from llm_unlearn.decoder import causal_lm, decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.metrics import bootstrap_stderr
from llm_unlearn.evaluation.scores import HIGHER, Metric, absent
from llm_unlearn.evaluation.statistics import Scorer

THRESHOLD = 0.05
"""tau: nats per token that the gold model's states must cost at a layer, so that the layer counts for a row."""


def model_shape(model):
    """Return what two models must share so that one's layers mean something in the other.

    Args:
        model: causal language model.
    Returns:
        (model type, decoder layers, hidden size, embedded tokens).
    """
    language_model = causal_lm(model)
    config = language_model.config.get_text_config(decoder=True)
    embedded = language_model.get_input_embeddings().num_embeddings
    return config.model_type, len(decoder_layers(model)), config.hidden_size, embedded


def require_same_shape(shapes, names):
    """Refuse two models that are no checkpoints of one model.

    Args:
        shapes: two of `model_shape`.
        names: what the message calls the models.
    Raises:
        UserError: another architecture, depth, hidden size or vocabulary.
    """
    if shapes[0] == shapes[1]:
        return
    described = [
        f"{name} is a {kind} of {depth} layer{'s' * (depth != 1)} of size {size} with {tokens} tokens"
        for name, (kind, depth, size, tokens) in zip(names, shapes, strict=True)
    ]
    raise UserError(
        f"{described[0]}, but {described[1]}; layers are compared between checkpoints of one model, so pass one"
    )


@contextlib.contextmanager
def patched(layer, batch, states):
    """Replace what a decoder layer hands on, where scored tokens are predicted, while the context is open.

    Args:
        layer: module, as `decoder_layers(model)[l]`.
        batch: packing.Batch that the model runs on.
        states: (N, D) of another model at the same layer and places; cast to this one's dtype.
    """
    hook = layer.register_forward_hook(partial(_replace, batch, states))
    try:
        yield
    finally:
        hook.remove()


def _replace(batch, states, module, args, output):
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    hidden[batch.rows, batch.reads] = states.to(hidden.dtype)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def patching_drops(target, source, rows, bounds):
    """Return (R, L): what the target loses of each answer when one of its layers says what another model's says.

        drop_l = (1/n) * sum_t (log p(y_t) - log p_l(y_t))

    over the n tokens y of the answer, in nats; p is the target's distribution, and p_l its distribution when layer l's
    output is replaced by the source's, at the positions that predict y and at no other. The layers above l, the prompt
    and the head are the target's own. So at the last layer p_l is the target's head on the source's last states.

    Args:
        target: a causal language model that knows the answers, on its device, unwrapped, in eval mode.
        source: another one of its shape, on the same device.
        rows: list of AuditedRow.
        bounds: Bounds.
    Raises:
        UserError: models of different shapes.
    """
    require_same_shape([model_shape(model) for model in (target, source)], ("the target", "the model patched into it"))
    sequences = [sequence for row in rows for sequence in row.sequences]
    scorer = Scorer(target, bounds.pad_id, max_tokens=bounds.max_tokens, share=False)
    # Finds out what else than its head makes the target's logits, before anything is patched.
    scorer.score(sequences[:1])
    run_source, layers = Scorer(source, bounds.pad_id, share=False).head, decoder_layers(target)

    def read(batch, counts):
        states = {}
        with each_depth(source, batch, lambda depth, found: states.update({depth: found})):
            run_source(batch)
        whole, drops = scorer.head(batch)[0], []
        for number, layer in enumerate(layers):
            with patched(layer, batch, states[number + 1]):
                drops.append(whole - scorer.head(batch)[0])
        return segment_means(torch.stack(drops, -1), counts)

    return row_means(answer_means(target, sequences, read, bounds, "patching"), [row.sequences for row in rows])


@dataclass
class Depth:
    """The unlearning depth score and what it is made of.

    Attributes:
        score: mean over the rows that have a layer that counts; None where none has.
        stderr: bootstrap standard error over these rows.
        by_row: (R,) score of each row, NaN where no layer counts.
        by_layer: (L,) the share of what gold erases that is erased at the layer; NaN where it counts for no row.
        counts: (L,) number of rows for which the layer counts.
    """

    score: float | None
    stderr: float | None
    by_row: np.ndarray
    by_layer: np.ndarray
    counts: np.ndarray


def unlearning_depth(drops, gold_drops, threshold=THRESHOLD, seed=0):
    """Score how much of what the target knows, and gold does not, is erased from a model's layers.

        K_i     = {l : gold_drop_il > tau}
        ratio_il = clip(drop_il / gold_drop_il, 0, 1)
        UDS_i   = sum_{l in K_i} gold_drop_il * ratio_il / sum_{l in K_i} gold_drop_il
        UDS     = mean of UDS_i over the rows with K_i not empty

    0: every layer still carries the knowledge as the target's does; 1: it costs the target as much to hear the layer as
    to hear that of a model which never saw the answer. By definition the target itself has 0 and gold 1.

    Args:
        drops: (R, L) of the audited model, see `patching_drops`.
        gold_drops: (R, L) of the model retrained without the forget set.
        threshold: tau, nats per token. A layer at which gold's states cost no more tells nothing about the row.
        seed: of the bootstrap.
    Returns:
        Depth.
    Source: Lee, Kim and Jo 2026, arXiv:2605.24614, Eqs. 1-6. Differs from the authors' code: the whole answer is
        scored, the end of the sequence included, and not a span of it that was marked by hand, and no row is left out
        because the target does not know it; the sums by layer are ours.
    """
    counting = gold_drops > threshold
    weights = np.where(counting, gold_drops, 0.0)
    erased = np.where(counting, np.clip(drops, 0.0, gold_drops), 0.0)
    with np.errstate(invalid="ignore"):
        by_row, by_layer = erased.sum(1) / weights.sum(1), erased.sum(0) / weights.sum(0)
    scored = by_row[np.isfinite(by_row)]
    score = float(scored.mean()) if len(scored) else None
    stderr = bootstrap_stderr([scored], seed=seed) if len(scored) else None
    return Depth(score, stderr, by_row, by_layer, counting.sum(0))


def depth_metrics(depth):
    """Return {"uds/forget": Metric} of a Depth."""
    if depth.score is None:
        reason = f"at no layer do the gold model's states cost the target more than {THRESHOLD} nats per token"
        return {"uds/forget": absent(reason, HIGHER)}
    return {"uds/forget": Metric(depth.score, depth.stderr, int(np.isfinite(depth.by_row).sum()), HIGHER)}
