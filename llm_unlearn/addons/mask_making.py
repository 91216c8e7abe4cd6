"""Making weight masks: one pass over the forget and one over the retain set, then any number of ratios."""
# Shapes: E elements of one parameter that are this process's.

import logging
import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from llm_unlearn.addons.gradient_sums import Blocks, mean_gradients
from llm_unlearn.addons.mask_ranking import Scored, coarse_counts, select, share_of, whole
from llm_unlearn.addons.wagle import random_scores, scores_of
from llm_unlearn.addons.wanda import input_squares, select_rows
from llm_unlearn.data.streams import pad_id
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.stream_trainer import padding_multiple
from llm_unlearn.weight_mask_flags import READS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskOptions:
    """How weights are chosen.

    Attributes:
        score: of `weight_mask_flags.READS`.
        ratios: shares of the weights that train, as written.
        scope: global, all weights in one ranking; layer, each decoder layer in one of its own, and each parameter
            outside them.
        gamma: of the score wagle.
        seed: of the score random.
        batch_size: rows of a batch.
    """

    score: str
    ratios: tuple
    scope: str = "global"
    gamma: float | None = None
    seed: int = 42
    batch_size: int = 4


@dataclass
class Masks:
    """Masks of one model.

    Attributes:
        bits: {ratio as written: {name of a parameter: (ceil(size / 8),) uint8 on the CPU}}.
        shapes: {name: its shape}, in the model's order.
        counts: (32768,) int64 histogram of the scores, see `mask_ranking.coarse_counts`, or None for wanda.
    """

    bits: dict
    shapes: dict
    counts: torch.Tensor | None


def make_masks(model, rows, tokenizer, options, state):
    """Make masks; all processes together, each with the whole model.

    Args:
        model: causal language model, plain; its gradients are overwritten.
        rows: {"forget": tokenized rows, "retain": the same}, as far as the score reads them.
        tokenizer: a transformers tokenizer, for its pad token.
        options: MaskOptions.
        state: accelerate.PartialState.
    Returns:
        Masks, the same bits on any number of processes.
    Raises:
        UserError: see `select_rows`.
        NonFiniteError: a score is not finite.
    """
    device = state.device
    model.to(device).eval().requires_grad_(True)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sets = {
        name: Blocks(rows[name], options.batch_size, pad_id(tokenizer), padding_multiple(device), device)
        for name in READS[options.score]
    }
    ratios = [Fraction(text) for text in options.ratios]
    if options.score == "wanda":
        tokens = sum(len(row["input_ids"]) for row in rows["forget"])
        squares = input_squares(model, sets["forget"], tokens)
        found = [select_rows(model, squares, ratio, shapes) for ratio in ratios]
        return Masks(dict(zip(options.ratios, found, strict=True)), shapes, None)
    scored = _scored(model, sets, rows, options, state)
    counts = coarse_counts(scored, device)
    chosen = select(scored, counts, ratios, device)
    bits = {
        text: {name: whole(part, math.prod(shapes[name])) for name, part in found.items()}
        for text, found in zip(options.ratios, chosen, strict=True)
    }
    return Masks(bits, shapes, counts.sum(0).cpu())


def counted_tokens(rows):
    """Return how many tokens of tokenized rows count; the first of a row never does."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def pools_of(model, scope):
    """Return {name of a parameter: number of the pool in which it is ranked}."""
    names = dict(model.named_parameters())
    if scope == "global":
        return dict.fromkeys(names, 0)
    layer_of = {id(p): layer for layer, module in enumerate(decoder_layers(model)) for p in module.parameters()}
    keys = {name: layer_of.get(id(p), name) for name, p in names.items()}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: numbers[key] for name, key in keys.items()}


def _scored(model, sets, rows, options, state):
    """Return [Scored] of this process's share of every parameter."""
    parameters = dict(model.named_parameters())
    gradients = _gradients(model, parameters, sets, rows, state.device)
    pools, found = pools_of(model, options.scope), []
    for name, parameter in parameters.items():
        size = parameter.numel()
        first, count = share_of(size, state.num_processes, state.process_index)
        if options.score == "random":
            scores = random_scores(name, size, options.seed)[first : first + count].to(state.device)
        else:
            weights = parameter.detach().reshape(-1)[first : first + count]
            parts = {part: sums.pop(name) for part, sums in gradients.items()}
            scores = scores_of(options.score, weights, **parts, gamma=options.gamma)
        found.append(Scored(name, pools[name], scores, size))
    return found


def _gradients(model, parameters, sets, rows, device):
    """Return {set: {name of a parameter: (E,) float32}}; where a second set follows, the first waits on the CPU."""
    found = {}
    for part, blocks in sets.items():
        tokens = counted_tokens(rows[part])
        sums, mean = mean_gradients(model, parameters, blocks, tokens, part)
        logger.info("%s: %d sequences, %d tokens, %.4f nats per token", part, len(rows[part]), tokens, mean)
        is_last = part == list(sets)[-1]
        found[part] = sums if is_last else {name: values.to("cpu") for name, values in sums.items()}
    return found
