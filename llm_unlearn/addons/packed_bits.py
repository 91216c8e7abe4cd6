"""One bit for each weight: packed eight to a byte, and put to work without being unpacked as a whole."""
# Shapes: E elements of a tensor, ceil(E / 8) bytes.

import functools

import torch

_CHUNK_BYTES = {"cpu": 2**17}
"""Bytes of bits at a time: on a CPU what they become stays in its cache."""
_CHUNK_BYTES_ELSEWHERE = 2**23
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(bits):
    """Pack booleans, the first into the highest bit of a byte, as numpy.packbits does.

    Args:
        bits: (E,) bool.
    Returns:
        (ceil(E / 8),) uint8; the bits beyond E are 0.
    """
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    found = torch.zeros(len(padded), dtype=torch.uint8, device=bits.device)
    for place in range(8):
        found |= padded[:, place].to(torch.uint8) << (7 - place)
    return found


def unpack(packed, count):
    """Return (count,) bool: the first bits of what `pack` made."""
    table = _bits(packed.device).view(torch.uint8)
    return table.index_select(0, packed.int()).view(torch.bool).view(-1)[:count]


def count(packed):
    """Return how many bits are set, an int."""
    table = _bits(packed.device).sum(1)
    return sum(int(table.index_select(0, chunk.int()).sum()) for chunk in packed.split(2**22))


def keep(tensor, packed):
    """Set to +0 the elements of a tensor whose bit is 0, in place; NaN too.

    Args:
        tensor: contiguous, of E elements in 16, 32 or 64 bits.
        packed: (ceil(E / 8),) uint8 on the same device.
    """
    integer = _INTEGERS[tensor.element_size()]
    table = torch.where(_bits(tensor.device), -1, 0).to(integer)
    for part, bits in _chunks(tensor, packed):
        part.view(integer).bitwise_and_(_rows(table, bits, part))


def scale(tensor, packed, factor):
    """Multiply the elements of a tensor whose bit is 1 by a factor, in place; the others stay bit for bit.

    Args:
        tensor: as for `keep`.
        packed: as for `keep`.
        factor: float, or a tensor of no dimension.
    """
    # A product of a tensor and a number is taken in float32 at least.
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    factor = torch.as_tensor(factor, dtype=dtype, device=tensor.device)
    table = torch.where(_bits(tensor.device), factor, torch.ones_like(factor))
    for part, bits in _chunks(tensor, packed):
        part.mul_(_rows(table, bits, part))


@functools.cache
def _bits(device):
    """Return (256, 8) bool: the bits of every byte."""
    return (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(7, -1, -1, device=device)) % 2 == 1


def _chunks(tensor, packed):
    """Yield (elements, their bits) from the front; eight elements to a byte but for the last."""
    size = _CHUNK_BYTES.get(tensor.device.type, _CHUNK_BYTES_ELSEWHERE)
    return zip(tensor.view(-1).split(8 * size), packed.split(size), strict=True)


def _rows(table, bits, part):
    """Return the rows of a table for some bytes, end to end, as long as a part."""
    return table.index_select(0, bits.int()).view(-1)[: len(part)]
