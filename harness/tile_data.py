"""What latents hold that are to be quantised in tiles: every kind of tile that quantisers get wrong.

A tile of 128 columns depends on (seed, key, position, layer, tile) alone. Most of its numbers are bell-shaped
integers times a power of two; a hash chooses its kind, each as often:

| kind         | amax          | what it is for                                                         |
|--------------|---------------|------------------------------------------------------------------------|
| `plain` x 3  | some 3 x 2^k  | a scale that is no power of two, another one in every tile             |
| `three`      | 3             | the scale 0.0066964, between 2^-8 and 2^-7                              |
| `integers`   | 448           | the scale 1: codes are what is rounded, many of them ties              |
| `above`      | 450 x 2^-9    | just above 448 x 2^-9: the next power of two                           |
| `outlier`    | 512           | the others become subnormal codes and zeros                            |
| `largest`    | 3.39e38       | the largest bf16 numbers of both signs: nothing may overflow           |
| `high`       | some 6e4      | far beyond 448                                                         |
| `low`        | some 1e-30    | a scale without a floor of 1e-5 or 1e-4                                |
| `least`      | below 2^-117  | amax / 448 is subnormal: the scale is 2^-126                           |
| `subnormal`  | below 2^-126  | bf16 numbers that many units flush                                     |
| `zero`       | 0             | nothing to divide by; zeros of both signs                              |
| `nan`        | some 3        | two NaN of either sign, the second with another payload                |
| `infinite`   | infinite      | one infinity, and a NaN beside it                                      |
| `all_nan`    | none          | no number at all                                                       |
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.hashing import bits, normal_integers, row_seeds
from harness.kv_b_data import hard_numbers

TILE = 128
PLAIN_EXPONENTS = 16
SIGN = -0x8000
NAN, SIGNALLING_NAN, INFINITY, LARGEST = 0x7FC0, 0x7F81 + SIGN, 0x7F80, 0x7F7F
"""Bits of bf16 numbers; the second has its sign set."""


def tiled_latents(keys: Tensor, positions: Tensor, rank: int, seed: int, layer: int) -> Tensor:
    """[n, R] bf16: the latents of n tokens; keys, positions: [n] int64."""
    seeds = row_seeds(seed, f"tiles.{layer}", keys, positions)
    integers = normal_integers(seeds, rank).view(len(keys), rank // TILE, TILE)
    words = bits(row_seeds(seed, f"kinds.{layer}", keys, positions), integers.shape[1])
    kinds = (words % len(KINDS)).unsqueeze(-1)
    tiles = torch.zeros_like(integers, dtype=torch.int16)
    for number, kind in enumerate(KINDS):
        tiles = torch.where(kinds == number, kind(integers, words.unsqueeze(-1)), tiles)
    return tiles.flatten(1).view(torch.bfloat16)


def hard_rope_keys(keys: Tensor, positions: Tensor, width: int, seed: int, layer: int) -> Tensor:
    """[n, D] bf16: rotated keys of n tokens, one number in 16 a zero with a sign, a subnormal one or NaN."""
    seeds = row_seeds(seed, f"hard.{layer}", keys, positions)
    values = _times(normal_integers(seeds, width), 2.0**-7)
    nans = torch.tensor([NAN, SIGNALLING_NAN], dtype=torch.int16, device=keys.device)
    hard = torch.cat([hard_numbers(torch.bfloat16, keys.device), nans])
    words = bits(seeds, width)
    chosen = hard[(words >> 8) % len(hard)]
    return torch.where((words & 0xF) == 0, chosen, values).view(torch.bfloat16)


def whole_scales(latents: Tensor) -> Tensor:
    """[n, R] multiples of 1/4 -> [n, R] between -3.5 and 3.5, of which every tile's last is 3.5.

    All scales are 2^-7 then and all codes exact: logits that data mode `deep` makes equal stay equal.
    """
    tiles = latents.clamp(-3.5, 3.5).view(len(latents), -1, TILE)
    tiles[..., -1] = 3.5
    return tiles.flatten(1)


def _times(integers: Tensor, factor: float | Tensor) -> Tensor:
    """Integers times a power of two, as bits of bf16: int16."""
    return (integers.to(torch.float32) * factor).bfloat16().view(torch.int16)


def _with(tiles: Tensor, *numbers: int) -> Tensor:
    """Tiles whose first columns hold other numbers, given as bits of bf16."""
    tiles[..., : len(numbers)] = torch.tensor(numbers, dtype=torch.int16, device=tiles.device)
    return tiles


def _plain(integers: Tensor, words: Tensor) -> Tensor:
    powers = [2.0 ** (exponent - 14) for exponent in range(PLAIN_EXPONENTS)]
    factors = torch.tensor(powers, dtype=torch.float32, device=integers.device)
    return _times(integers, factors[(words >> 8) % PLAIN_EXPONENTS])


def _bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))


def _three(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers.clamp(-384, 384), 2.0**-7), _bits_of(3.0))


def _integers(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers.clamp(-448, 448), 1.0), _bits_of(-448.0))


def _above(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers.clamp(-448, 448), 2.0**-9), _bits_of(450 / 512))


def _outlier(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers, 2.0**-8), _bits_of(512.0))


def _largest(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers, 2.0**118), LARGEST, LARGEST + SIGN)


def _high(integers: Tensor, words: Tensor) -> Tensor:
    return _times(integers, 2.0**7)


def _low(integers: Tensor, words: Tensor) -> Tensor:
    return _times(integers, 2.0**-108)


def _least(integers: Tensor, words: Tensor) -> Tensor:
    return _times(integers.clamp(-447, 447), 2.0**-126)


def _subnormal(integers: Tensor, words: Tensor) -> Tensor:
    # As bits: a conversion from float32 might flush them.
    return (integers.abs() & 0x7F).to(torch.int16) + torch.where(integers < 0, SIGN, 0).to(torch.int16)


def _zero(integers: Tensor, words: Tensor) -> Tensor:
    return torch.where(integers < 0, SIGN, 0).to(torch.int16)


def _nan(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers, 2.0**-7), NAN, SIGNALLING_NAN)


def _infinite(integers: Tensor, words: Tensor) -> Tensor:
    return _with(_times(integers, 2.0**-7), INFINITY + SIGN, NAN)


def _all_nan(integers: Tensor, words: Tensor) -> Tensor:
    return torch.full_like(integers, NAN, dtype=torch.int16)


KINDS = (
    *(_plain, _plain, _plain, _three, _integers, _above, _outlier, _largest),
    *(_high, _low, _least, _subnormal, _zero, _nan, _infinite, _all_nan),
)
