"""Quantized copies of a checkpoint, made by bitsandbytes and torchao while loading, and what they know more or less."""

import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass

import numpy as np
import torch

from llm_unlearn.evaluation.metrics import bootstrap_stderr
from llm_unlearn.evaluation.scores import NONE, Metric, absent

logger = logging.getLogger(__name__)

GROUP_SIZE = 32
"""Weights of a row that share a scale under int4; it divides the rows of all common architectures."""
COMPARED = (
    "probability", "truth_ratio", "choice_accuracy", "rouge_l_recall", "verbmem", "knowmem", "secret_extraction",
)  # fmt: skip
"""Metrics of a set that are reported for every scheme."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantize.

    Attributes:
        package: that does it.
        bits: of a weight.
        make: function of the dtype of what is not quantized; returns transformers' configuration.
    """

    package: str
    bits: int
    make: object

    def version(self):
        """Return the package with its version, for results.json."""
        return f"{self.package} {importlib.metadata.version(self.package)}"


def _eight_bits(dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _four_bits(kind):
    def make(dtype):
        from transformers import BitsAndBytesConfig

        # Whatever else changes than the weights would be taken for the effect of quantization.
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)

    return make


def _integers_of_four_bits(dtype):
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP_SIZE)))


SCHEMES = {
    "int8": Scheme("bitsandbytes", 8, _eight_bits),
    "nf4": Scheme("bitsandbytes", 4, _four_bits("nf4")),
    "fp4": Scheme("bitsandbytes", 4, _four_bits("fp4")),
    "int4": Scheme("torchao", 4, _integers_of_four_bits),
}
"""LLM.int8() of arXiv:2208.07339; NF4 and FP4 of QLoRA, arXiv:2305.14314, a scale for 64 weights; integers rounded to
nearest, a scale for `GROUP_SIZE` weights, the rounding of arXiv:2410.16454's first attack."""


def unavailable(scheme):
    """Return why a scheme cannot be tried, or None.

    Args:
        scheme: a key of `SCHEMES`.
    """
    package = SCHEMES[scheme].package
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed; pip install {package}"
    return None


def is_quantized(weight):
    """Return whether a weight is stored in fewer bits: integers of bitsandbytes, or a tensor class of torchao."""
    return weight.dtype in (torch.int8, torch.uint8) or type(weight).__module__.startswith("torchao.")


def quantized_share(model):
    """Return the share of a model's weights that are stored quantized, whatever the library was asked for.

    Embeddings, the head, norms and biases keep their precision in all schemes, which in a small model is a large share.

    Args:
        model: a loaded model.
    Returns:
        (share in [0, 1], number of all weights).
    """
    inside, seen = 0, set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter | torch.Tensor) and is_quantized(weight) and id(weight) not in seen:
            seen.add(id(weight))
            # Two weights of four bits share a byte, so that the stored shape says little.
            inside += module.in_features * module.out_features
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in seen)
    return inside / (inside + outside), inside + outside


def compared_metrics(metrics):
    """Return those of an outcome's metrics that every scheme is compared by."""
    return {name: metric for name, metric in metrics.items() if name.rpartition("/")[2] in COMPARED}


def scheme_metrics(scheme, full, quantized, share, num_weights, seed=0):
    """Compare a quantized copy with the checkpoint.

    Args:
        scheme: its name.
        full: suite.Outcome of the checkpoint.
        quantized: suite.Outcome of the copy, to the same questions.
        share: of the weights that are quantized.
        num_weights: all of them.
        seed: of the bootstrap.
    Returns:
        {"<scheme>/<metric>": Metric, "<scheme>/<metric>/change": Metric}; a change is quantized minus full precision,
        better in the metric's own direction, and where it is a mean of examples its standard error is that of their
        differences.
    """
    found = {f"{scheme}/quantized_share": Metric(share, None, num_weights, NONE)}
    after = compared_metrics(quantized.metrics)
    for name, before in compared_metrics(full.metrics).items():
        found[f"{scheme}/{name}"] = after[name]
        if before.value is None or after[name].value is None:
            reason = before.reason or after[name].reason
            found[f"{scheme}/{name}/change"] = absent(reason, before.direction)
            continue
        change = after[name].value - before.value
        stderr = _paired_stderr(name, full.examples, quantized.examples, change, seed)
        found[f"{scheme}/{name}/change"] = Metric(change, stderr, after[name].n, before.direction)
    return found


def _paired_stderr(name, before, after, change, seed):
    part, _, value = name.rpartition("/")
    rows = zip(before.get(part, []), after.get(part, []), strict=True)
    pairs = [(second[value], first[value]) for first, second in rows if value in first and value in second]
    differences = np.array([second - first for second, first in pairs], dtype=np.float64)
    # A metric that is no plain mean of the examples, as a truth ratio, has another change than their mean.
    if not len(differences) or not np.isclose(differences.mean(), change, rtol=1e-6, atol=1e-9):
        return None
    return bootstrap_stderr([differences], seed=seed)


def absent_metrics(scheme, full, reason):
    """Return the metrics of a scheme that did not run, null with the reason."""
    names = {f"{scheme}/quantized_share": NONE}
    for name, metric in compared_metrics(full.metrics).items():
        names |= {f"{scheme}/{name}": metric.direction, f"{scheme}/{name}/change": metric.direction}
    return {name: absent(reason, direction) for name, direction in names.items()}


def example_rows(outcomes):
    """Return rows for per_example.jsonl: what every precision says about each example.

    Args:
        outcomes: {"full" or scheme: suite.Outcome}, to the same questions.
    Returns:
        list of {"split", "index", precision: {metric: value}}.
    """
    rows = []
    for part, examples in outcomes["full"].examples.items():
        for number, example in enumerate(examples):
            row = {"split": example["split"], "index": example["index"]}
            for precision, outcome in outcomes.items():
                values = outcome.examples[part][number]
                row[precision] = {name: values[name] for name in COMPARED if name in values}
                if "generation" in values:
                    row[precision]["generation"] = values["generation"]
            rows.append(row)
    return rows
