"""Rows of a packed cache, written and read with Torch's own casts: for definitions, never for derivations.

Divisors are tensors: divided by a Python number, Torch on a GPU multiplies by its reciprocal, which gives
other bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
E4M3_MAX = 448.0
LEAST_SCALE = 2.0**-126
LEAST_AMAX = 1e-4
NAN_CODE = 0x7F


def packed_rows(latents: Tensor, k_pe: Tensor, scale_fmt: str) -> Tensor:
    """[n, R], [n, D] bf16 -> [n, R + R / 32 + 2 D] uint8: the rows of n tokens."""
    tiles = latents.to(torch.float32).view(len(latents), latents.shape[1] // TILE, TILE)
    scales = tile_scales(tiles, scale_fmt)
    ratios = tiles / scales.unsqueeze(-1)
    codes = ratios.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(ratios.isnan(), NAN_CODE, codes)
    parts = [codes.flatten(1), *(part.contiguous().view(torch.uint8) for part in (scales, k_pe))]
    return torch.cat(parts, dim=1)


def tile_scales(tiles: Tensor, scale_fmt: str) -> Tensor:
    """[n, tiles, 128] float32 -> [n, tiles] float32: what the codes of a tile are multiplied by."""
    amax = torch.where(tiles.isnan(), 0.0, tiles.abs()).amax(-1)
    largest = torch.full_like(amax, E4M3_MAX)
    if scale_fmt == "fp32":
        return (amax / largest).clamp_min(LEAST_SCALE)
    least = amax.clamp_min(LEAST_AMAX) / largest
    powers = [2.0**exponent for exponent in range(-30, 128)]
    steps = torch.tensor([*powers, torch.inf], dtype=torch.float32, device=tiles.device)
    return steps[torch.searchsorted(steps, least)]


def dequantised(rows: Tensor, rank: int, *, rounded: bool) -> Tensor:
    """[n, R + R / 32 + 2 D] uint8 -> [n, R + D] float64: what packed rows stand for.

    A code times a scale is exact; `rounded`, it is rounded to float32 and then to bf16.
    """
    scales_end = rank + rank // TILE * 4
    codes, scales = rows[:, :rank].contiguous(), rows[:, rank:scales_end].contiguous()
    k_pe = rows[:, scales_end:].contiguous().view(torch.bfloat16)
    tiles = codes.view(torch.float8_e4m3fn).double().view(len(rows), rank // TILE, TILE)
    latents = (tiles * scales.view(torch.float32).double().unsqueeze(-1)).flatten(1)
    if rounded:
        latents = latents.float().bfloat16().double()
    return torch.cat([latents, k_pe.double()], dim=1)
