"""The counter hash that all data come from: the same integers on every machine and device.

A library's random stream is no source of reproducible data: for one seed, torch.randn differs between
processors with and without AVX-512. Integer multiplication and shifts do not.

Source of the mixer: the 64-bit finaliser of MurmurHash3 (Austin Appleby, public domain).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Integers = TypeVar("Integers", "Tensor", npt.NDArray[np.int64])
"""int64 of torch or of NumPy, which wrap around in the same way."""

_FIRST = 0xFF51AFD7ED558CCD
_SECOND = 0xC4CEB9FE1A85EC53
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / the golden ratio: spreads successive counters over the 64 bits."""


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def text_seed(text: str) -> int:
    """A signed 64-bit integer that stands for a text."""
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def mix(x: Integers) -> Integers:
    """Every bit of the result depends on every bit of x. int64 -> int64, any shape."""
    # >> is arithmetic on int64, hence the masks.
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    x = x * _signed(_FIRST)
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    x = x * _signed(_SECOND)
    return x ^ ((x >> 33) & 0x7FFFFFFF)


def row_seeds(seed: int, name: str, keys: Integers, positions: Integers) -> Integers:
    """One 64-bit seed for each (seed, name, key, position). int64 [n], int64 [n] -> int64 [n]."""
    start = mix(keys + _signed(text_seed(name) ^ (seed * _GOLDEN)))
    return mix(start + positions * _signed(_GOLDEN))


def bits(seeds: Tensor, count: int) -> Tensor:
    """`count` 32-bit integers for each seed. int64 [...] -> int64 [..., count] in [0, 2^32)."""
    # Blocks are laid out, and a batch is drawn, without torch.
    import torch

    counters = torch.arange(-(-count // 2), device=seeds.device, dtype=torch.int64)
    words = mix(seeds.unsqueeze(-1) + (counters + 1) * _signed(_GOLDEN))
    halves = torch.stack([words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF], dim=-1)
    return halves.flatten(-2)[..., :count]


def normal_integers(seeds: Tensor, count: int) -> Tensor:
    """Bell-shaped integers of mean 0: the sum of four bytes less 510. int64 [..., count].

    Standard deviation `NORMAL_STD`, range -510 to 510.
    """
    word = bits(seeds, count)
    total = (word & 0xFF) + ((word >> 8) & 0xFF) + ((word >> 16) & 0xFF) + (word >> 24)
    return total - 510


NORMAL_STD = (4 * (256**2 - 1) / 12) ** 0.5
"""Standard deviation of `normal_integers`: four independent uniform bytes."""


def hash_host(values: npt.NDArray[np.int64], seed: int, name: str) -> npt.NDArray[np.int64]:
    """One 64-bit integer for each value, on the host."""
    return row_seeds(seed, name, np.zeros_like(values), values)
