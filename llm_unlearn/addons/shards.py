"""Whole tensors, the shards of them that processes have, and the pieces of those that are worked on at a time."""

import math

from llm_unlearn.optimizer_steps import local

PIECE = {"cpu": 2**16, "cuda": 2**24}
"""Elements that are worked on at a time: on a CPU what its caches hold, elsewhere what may be held besides."""


def pieces(*tensors):
    """Yield tensors of one shape piece by piece, for work on single elements that makes others of their size.

    Args:
        *tensors: a change of a piece is one of the tensor.
    """
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = PIECE.get(tensors[0].device.type, PIECE["cuda"])
    for number in range(math.ceil(tensors[0].numel() / size)):
        yield tuple(tensor.view(-1)[number * size : (number + 1) * size] for tensor in tensors)


def whole(shard, like):
    """Return the whole tensor of which every process has a shard, cut as a parameter is; all processes call it.

    Args:
        shard: this process's.
        like: the parameter; one that is not sharded gives the shard itself.
    """
    if not hasattr(like, "device_mesh"):
        return shard
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    # Of offloaded weights the shards are on the CPU, which has no collectives beside a GPU's.
    shard = shard.to(mesh.device_type)
    options = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(shard, mesh, like.placements, **options).full_tensor()


def own_shard(tensor, like):
    """Return this process's shard, cut as a parameter is, of a whole tensor that all processes have; nothing is sent.

    Args:
        tensor: whole.
        like: the parameter; one that is not sharded gives the tensor itself.
    """
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(placements=like.placements)).to(local(like).device)
