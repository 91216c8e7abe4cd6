"""P1 to P3: the output layer with its loss alone, forward and backward, against dense logits and bare products."""
# Shapes: N positions, D hidden size, V vocabulary, S positions of a sequence.

import functools
import importlib.util
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from training_meters import alternate, clear_gradients, peak_bytes, ratios, seconds
from training_peers import BETA
from training_report import Row

from llm_unlearn.chunked_head import Projection, token_scores
from llm_unlearn.objectives.preference import npo

_SHAPES = {"cpu": (4096, 256, 32_000), "cuda": (16_384, 4096, 128_256)}
_QUICK = (64, 16, 97)
SEQUENCES = 8
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of a gradient's largest difference beside the largest entry of the dense one: sums come in another order; in bfloat16
logits are rounded besides."""
_TARGETS = {"P1": (0.15, 1.05), "P2": (0.15, 1.05), "P3": (0.12, 1.10)}
_SLOW = {"trl"}
"""Timed once, after the others: what TRL runs where there is no Triton takes several times as long."""
_JOBS = {
    "P1": ("negative log-likelihood", "mean of all tokens", 3),
    "P2": ("log-probabilities of tokens", "NPO over sequences", 4),
    "P3": ("KL divergence from the reference", "mean of all tokens", 4),
}


@dataclass(frozen=True)
class Head:
    """What every variant reads.

    Attributes:
        hidden: (N, D) leaf.
        weight: (V, D) leaf.
        labels: (N,) int64.
        ref_hidden, ref_weight: of the reference, without gradients.
        logits: (N, V) buffer for bare products.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    logits: torch.Tensor


def run(args, ids=("P1", "P2", "P3")):
    """Return the rows of the head.

    Args:
        args: the parsed command line.
        ids: which of P1, P2, P3.
    """
    shape = _QUICK if args.quick else _SHAPES[args.device]
    head = make_head(shape, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    rows = []
    for id in ids:
        variants = make_variants(id, head)
        peaks = check(variants, head, args.device)
        timed = {name: step for name, step in variants.items() if name not in _SLOW}
        spent = alternate({"floor": floor(head, _JOBS[id][2]), **timed}, args.repeats, args.device)
        for name in _SLOW & variants.keys():
            spent[name] = [seconds(variants[name], args.device)]
        clear_gradients(head.hidden, head.weight)
        rows += _rows(id, shape, peaks, spent)
    return rows


def make_head(shape, device, dtype):
    """Return a Head with random entries.

    Args:
        shape: (N, D, V).
        device: where.
        dtype: of hidden states and weights.
    """
    positions, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    hidden, weight = drawn(positions, width), drawn(vocabulary, width, scale=width**-0.5)
    labels = torch.randint(vocabulary, (positions,), generator=generator).to(device)
    ref_hidden = hidden + drawn(positions, width, scale=0.1)
    ref_weight = weight + drawn(vocabulary, width, scale=0.1 * width**-0.5)
    logits = drawn(positions, 1).expand(-1, vocabulary).contiguous()
    return Head(hidden.requires_grad_(), weight.requires_grad_(), labels, ref_hidden, ref_weight, logits)


def floor(head, products):
    """Return the bare products of matrices that no variant can do without, into memory that is there already.

    Args:
        head: Head.
        products: 3, or 4 where the logits have to be made twice, or those of the reference too.
    """
    hidden, weight = head.hidden.detach(), head.weight.detach()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def multiply():
        for _ in range(products - 2):
            torch.mm(hidden, weight.T, out=head.logits)
        torch.mm(head.logits, weight, out=grad_hidden)
        torch.mm(head.logits.T, hidden, out=grad_weight)

    return multiply


def make_variants(id, head):
    """Return {name: function that runs forward and backward}; "dense" and "ours" are always there."""
    reads = {"P1": (_dense_logps, _our_logps), "P2": (_dense_logps, _our_logps), "P3": (_dense_kl, _our_kl)}[id]
    reduce = _npo if id == "P2" else lambda values: values.mean() if id == "P3" else -values.mean()
    linear = None if id == "P2" else torch.ones(len(head.labels), device=head.labels.device)
    found = {"dense": reads[0], "ours": functools.partial(reads[1], linear=linear)}
    if id != "P3":
        found["torch"] = functools.partial(_torch_logps, mean=id == "P1")
    if importlib.util.find_spec("trl.kernels") and id != "P1":
        found["trl"] = _trl_kl if id == "P3" else _trl_logps
    if id == "P1" and head.weight.is_cuda and importlib.util.find_spec("liger_kernel"):
        found["liger"] = _liger_logps
    return {name: lambda read=read: reduce(read(head)).backward() for name, read in found.items()}


def check(variants, head, device):
    """Compare the gradients of all variants with those of dense logits; the first run of each, which is not timed.

    Returns:
        {name: bytes at the peak}.
    Raises:
        AssertionError: a difference beyond the tolerance, or NaN.
    """
    expected, peaks = None, {}
    for name, step in variants.items():
        clear_gradients(head.hidden, head.weight)
        peaks[name] = peak_bytes(step, device)
        found = head.hidden.grad, head.weight.grad
        expected = found if expected is None else expected
        for ours, dense in zip(found, expected, strict=True):
            off = ((ours - dense).abs().max() / dense.abs().max()).item()
            assert off <= TOLERANCE[dense.dtype], f"{name} differs from dense by {off:.2g}"
    return peaks


def _rows(id, shape, peaks, spent):
    what, term, products = _JOBS[id]
    job = f"head: {what} ({term}), T={shape[0]}, D={shape[1]}, V={shape[2]}"
    peak_target, time_target = _TARGETS[id]
    absolute = {f"{name} seconds": statistics.median(found) for name, found in spent.items()}
    rest = {name: spent[name] for name in spent if name != "floor"}
    over = {name: ratios(found, spent["floor"][-len(found) :]) for name, found in rest.items()}
    absolute |= {f"{name} peak bytes": peak for name, peak in peaks.items()}
    rows = [Row(id, job, "peak / dense", peaks["ours"] / peaks["dense"], None, peak_target, absolute=absolute)]
    rows.append(Row.timed(id, job, f"time / {products} bare products", over["ours"], over["dense"], time_target))
    names = {"torch": "torch linear_cross_entropy", "trl": "TRL", "liger": "Liger"}
    for name, title in names.items():
        if name in over:
            rows.append(Row(id, f"the same, {title}", "peak / dense", peaks[name] / peaks["dense"]))
            rows.append(Row.timed(id, f"the same, {title}", f"time / {products} bare products", over[name]))
    return rows


def _npo(logps):
    """NPO over sequences of equal length, the reference as likely as chance: the weights depend on the values."""
    sums = logps.view(SEQUENCES, -1).sum(-1)
    return npo(sums, sums.detach() + 1, BETA).mean()


def _dense_logps(head):
    logits = (head.hidden @ head.weight.T).float()
    return -F.cross_entropy(logits, head.labels, reduction="none")


def _our_logps(head, linear):
    return token_scores(head.hidden, Projection(head.weight), head.labels, linear=linear)[0]


def _torch_logps(head, mean):
    """torch's own chunks; on a CPU the automatic size of a chunk takes half as long again as 256 rows."""
    options = torch.nn.LinearCrossEntropyOptions(**({} if head.weight.is_cuda else {"batch_chunk_size": 256}))
    reduction = "mean" if mean else "none"
    return -F.linear_cross_entropy(head.hidden, head.weight, head.labels, reduction=reduction, options=options)


def _trl_logps(head):
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE

    arguments = (head.hidden, head.weight, None, head.labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(*arguments)[0]


def _trl_kl(head):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    arguments = (head.hidden, head.weight, None, head.ref_hidden, head.ref_weight, None, 0.0)
    return ChunkedDivergenceFunction.apply(*arguments)[0]


def _liger_logps(head):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(head.hidden, head.weight, head.labels)


def _dense_kl(head):
    """The divergence as open-unlearning makes it: both log-softmaxes whole."""
    own = (head.hidden @ head.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        reference = (head.ref_hidden @ head.ref_weight.T).float().log_softmax(-1)
    return F.kl_div(own, reference, reduction="none", log_target=True).sum(-1)


def _our_kl(head, linear):
    reference = head.ref_hidden, Projection(head.ref_weight)
    return token_scores(head.hidden, Projection(head.weight), head.labels, reference, linear=linear)[1]
