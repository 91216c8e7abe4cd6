"""What a step of training costs: FLOPs by shape, CPU seconds of one thread, bytes alive at the peak."""

import gc
import math
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from llm_unlearn.memory.live_bytes import LiveBytes

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}
"""Products of matrices, and the place of the first factor among their arguments."""
_LARGE = 2**23
"""Elements of the largest product that something may be written into: a chunk of logits, see chunked_head.py."""


def flops(step):
    """Return the floating-point operations of a call: of its matrix products and attention, by their shapes.

    Two operations that torch 2.13 does not count are added: products that are summed in place, as our head has them,
    and the attention kernel of the CPU.
    """

    def in_place(_total, first, second, out_shape=None, **kwargs):
        return mm_flop(first, second)

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, query, key, value)

    uncounted = {
        _ATEN.addmm_: in_place,
        _ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        step()
    return counter.get_total_flops()


class UncomputedProducts(TorchDispatchMode):
    """Returns zeros for products of matrices and for attention at once: for counting what would take hours to compute.

    All the rest runs as ever: rows, masks, caches, which term asks whom. Neither FLOPs nor bytes depend on values.

    Args:
        with_memory: give large results memory of their own, as they have when computed; otherwise one zero stands for
            all, so that the gradients of large weights take none.
    """

    def __init__(self, with_memory=False):
        super().__init__()
        self.with_memory = with_memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet is _ATEN.addmm_:
            return args[0]
        if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
            return torch.zeros_like(args[0]), args[0].new_zeros(args[0].shape[:-1])
        if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
            return tuple(torch.zeros_like(part) for part in args[1:4])
        if packet not in _PRODUCTS or kwargs:
            return function(*args, **(kwargs or {}))
        first, second = args[_PRODUCTS[packet] :][:2]
        shape = (*first.shape[:-1], second.shape[-1])
        if self.with_memory or math.prod(shape) <= _LARGE:
            return first.new_zeros(shape)
        return first.new_zeros(()).expand(shape)


class Stopwatch:
    """Counts from where it is made: CPU seconds of this thread, or on CUDA those between two events.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device):
        self.is_cuda = device == "cuda"
        self._started = self._mark()

    def seconds(self):
        """Return what has passed."""
        now = self._mark()
        if not self.is_cuda:
            return now - self._started
        torch.cuda.synchronize()
        return self._started.elapsed_time(now) / 1000

    def _mark(self):
        if not self.is_cuda:
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(step, device):
    """Return how long a call takes, see Stopwatch."""
    watch = Stopwatch(device)
    step()
    return watch.seconds()


def alternate(variants, repeats, device):
    """Time variants in alternation; each has run before.

    Args:
        variants: {name: function}; what it returns is dropped.
        repeats: rounds.
        device: "cpu" or "cuda".
    Returns:
        {name: list of seconds, one for each round}.
    """
    found = {name: [] for name in variants}
    for _ in range(repeats):
        for name, step in variants.items():
            found[name].append(seconds(step, device))
    return found


def ratios(found, over):
    """Return the quotients of two lists of seconds round by round: what slows the machine for a while slows both."""
    return [ours / theirs for ours, theirs in zip(found, over, strict=True)]


def peak_bytes(step, device):
    """Return the bytes at the peak of a call beyond what is held at its start.

    On the CPU every storage counts from the operation that makes it until it is freed, but not what an operation needs
    inside; on CUDA the allocator tells.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    # Kept in a list, so that no new storage takes the address of an old one.
    held = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and _has_storage(found)]
    with LiveBytes(held) as counter:
        step()
    return counter.peak


def _has_storage(tensor):
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def clear_gradients(*tensors):
    """Drop gradients, so that the next backward makes them anew."""
    for tensor in tensors:
        tensor.grad = None
