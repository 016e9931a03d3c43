"""Packed cache write by its definition: tiles of 128 in float32, rounded to e4m3 by Torch's own cast.

Divisors are tensors: divided by a Python number, Torch on a GPU multiplies by its reciprocal, which gives
other bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, Writes, tensor, text

TILE = 128
E4M3_MAX = 448.0
LEAST_SCALE = 2.0**-126
LEAST_AMAX = 1e-4
NAN_CODE = 0x7F


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their bytes; these are exact, so precision changes nothing."""
    cache, slot_mapping = tensor(inputs, "packed_cache"), tensor(inputs, "slot_mapping")
    written = (slot_mapping >= 0) & (slot_mapping < cache.shape[0] * cache.shape[2])
    latents, k_pe = tensor(inputs, "compressed_kv")[written], tensor(inputs, "k_pe")[written]
    rows = packed_rows(latents, k_pe, text(inputs, "scale_fmt"))
    return {"packed_cache": Writes(slot_mapping[written], rows)}


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


ORACLE = Oracle(
    name="packed_cache_write",
    operator="packed_cache_write",
    role="definition",
    source="FastDeploy section 3.3 (a) and (c), O17; the cast is Torch's",
    run=run,
)
