"""Rows of a packed cache, written and read with a table of the numbers of e4m3: for derivations alone.

A quotient is rounded to float32 from float64, which changes nothing: 53 bits are more than twice 24 and two.
Its code is the number of midpoints between neighbouring numbers that lie below it; on a midpoint, of the two
codes the even one. A bf16 number is the upper half of a float32; where a product is to be rounded to one, it
becomes a float32 and loses its lower half: to the nearest, of two as near the even.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]

# Codes 0 to 7 count 512ths; from there on, every eight codes begin with a power of two.
MAGNITUDES = [code / 512 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
MIDPOINTS = np.array([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
SIGNED = np.array([*MAGNITUDES, math.nan, *(-number for number in MAGNITUDES), math.nan])
"""The number of every code."""


def packed_row(latent: Float32, rope: Halves, scale_fmt: str) -> Bytes:
    """[R] and [D] bits of bf16 -> [R + R / 32 + 2 D]: the row of one token."""
    return np.concatenate([*_latent(latent, scale_fmt), _bytes(rope)])


def unpacked_rows(rows: Bytes, rank: int, *, rounded: bool) -> Float64:
    """[n, R + R / 32 + 2 D] -> [n, R + D]: what rows stand for, products rounded to bf16 or not."""
    end = rank + rank // 32
    scales = np.ascontiguousarray(rows[:, rank:end]).view("<f4").astype(np.float64)
    latents = SIGNED[rows[:, :rank]] * scales.repeat(128, axis=1)
    ropes = np.ascontiguousarray(rows[:, end:]).view("<u2")
    return np.hstack([_halved(latents) if rounded else latents, _widened(ropes)])


def _widened(halves: Halves) -> Float64:
    """Numbers of bf16, given as their bits."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _halved(values: Float64) -> Float64:
    """The numbers of bf16 next to numbers as float32 has them; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    high += (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    return np.where(np.isnan(values), values, _widened(high.astype(np.uint16)))


def _latent(latent: Float32, scale_fmt: str) -> tuple[Bytes, Bytes]:
    """[R] -> the codes [R] and the bytes of the scales."""
    tiles = [latent[start : start + 128] for start in range(0, len(latent), 128)]
    scales = np.array([_scale(tile, scale_fmt) for tile in tiles], np.float32)
    codes = [_codes(tile, scale) for tile, scale in zip(tiles, scales, strict=True)]
    return np.concatenate(codes), _bytes(scales)


def _scale(tile: Float32, scale_fmt: str) -> np.float32:
    """The scale of one tile."""
    largest = max((abs(float(value)) for value in tile if value == value), default=0.0)  # noqa: PLR0124
    if scale_fmt == "ue8m0":
        least = max(largest, float(np.float32(1e-4))) / 448
        mantissa, exponent = math.frexp(least)
        # A power of two has the mantissa 1/2; frexp leaves infinity as it is.
        return np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)) if math.isfinite(least) else least)
    return np.float32(max(largest / 448, 2.0**-126))


def _codes(tile: Float32, scale: np.float32) -> Bytes:
    """[128] -> the codes of one tile."""
    with np.errstate(invalid="ignore"):
        quotients = (tile.astype(np.float64) / np.float64(scale)).astype(np.float32)
    magnitudes = np.abs(quotients).astype(np.float64)
    below = np.searchsorted(MIDPOINTS, magnitudes, side="left")
    not_above = np.searchsorted(MIDPOINTS, magnitudes, side="right")
    codes = np.where(below % 2 == 0, below, not_above) + 128 * np.signbit(quotients)
    return np.where(np.isnan(quotients), 127, codes).astype(np.uint8)


def _bytes(values: npt.NDArray[np.generic]) -> Bytes:
    """The bytes of numbers as they lie in memory."""
    return np.frombuffer(values.tobytes(), np.uint8)
