"""Random numbers that depend on (seed, epoch, image) and on nothing else.

A generator with a state would make masks and crops depend on the batch an image falls into, on the
number of workers, and on where a run was resumed. A hash of counters has no state: 1, 2 or 4
workers, a resumed run and a permuted batch all draw the same numbers for the same image.
"""

import torch
from torch import Tensor

# One stream per use; two streams never share numbers.
CROP, MASK, CLUSTER, RATIO, HINT, PART, VIEW, TEACHER, REFERENCE = range(9)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def uniform(keys: Tensor, count: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Draw `count` uniform numbers for every image.

    Args:
        keys: (B,) int64, one identity per image.
        count: numbers per image.
        stream: one of the constants of this module.

    Returns:
        (B, count) float32 in the open interval (0, 1), on the device of `keys`.

    Source: the finalizer of SplitMix64 over (seed, epoch, stream, key, position).
    """
    counters = torch.tensor([seed, epoch, stream], dtype=torch.int64)
    state = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        state = _mix(state + counter + _GOLDEN)
    # A Python number, since copying a tensor would make the host wait for a GPU.
    rows = _mix(keys ^ int(state))  # (B,)
    columns = torch.arange(1, count + 1, device=keys.device) * _GOLDEN  # (count,)
    bits = _mix(rows[:, None] + columns)
    # 23 bits and half a step: k + 0.5 is exact in float32, so neither 0 nor 1 occurs and
    # log(-log(u)) is finite.
    return ((bits & 0x7FFFFF).float() + 0.5) / 0x800000


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically; torch's `>>` carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
