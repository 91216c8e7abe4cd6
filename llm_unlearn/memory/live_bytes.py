"""The bytes of tensors that are alive, counted while code runs on real or on fake tensors."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make until they are freed; views and in-place results count nothing.

    Use it inside a FakeTensorMode, and nothing is really allocated.

    Args:
        known: tensors that are there already and do not count.

    Attributes:
        live, peak: bytes now, and at most since `restart`.
    """

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self._known = {_key(tensor) for tensor in known}
        self._alive = {}

    def restart(self):
        """Let `peak` start anew from what is alive."""
        self.peak = self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        key = _key(tensor)
        if key in self._alive or key in self._known:
            return
        storage = tensor.untyped_storage()
        self._alive[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.live -= self._alive.pop(key)


def _key(tensor):
    return tensor.untyped_storage()._cdata
