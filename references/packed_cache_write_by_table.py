"""Packed cache write again, from lengths and block tables, with a table of the 127 numbers of e4m3.

Row b's i-th new token stands at position p = seq_lens_decoder[b] + i, in block
block_tables[b, p // block_size] at offset p % block_size. A quotient is rounded to float32 from float64,
which changes nothing: 53 bits are more than twice 24 and two. Its code is the number of midpoints between
neighbouring numbers that lie below it; on a midpoint, of the two codes the even one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from references.oracle import Inputs, Oracle, Precision, Writes, tensor, text

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Codes 0 to 7 count 512ths; from there on, every eight codes begin with a power of two.
MAGNITUDES = [code / 512 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
MIDPOINTS = np.array([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their bytes, token after token."""
    cache, k_pe = tensor(inputs, "packed_cache"), tensor(inputs, "k_pe")
    latents = tensor(inputs, "compressed_kv").float().cpu().numpy()
    ropes = k_pe.contiguous().view(torch.int16).cpu().numpy()
    block_size = cache.shape[2]
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    rows: list[int] = []
    for slot, table in enumerate(tensor(inputs, "block_tables").tolist()):
        positions = range(decoder[slot], decoder[slot] + this_time[slot])
        rows += [table[p // block_size] * block_size + p % block_size for p in positions]
    scale_fmt = text(inputs, "scale_fmt")
    values = np.empty((len(rows), cache.shape[3]), np.uint8)
    for token in range(len(rows)):
        values[token] = np.concatenate([*_latent(latents[token], scale_fmt), _bytes(ropes[token])])
    where = torch.tensor(rows, device=cache.device, dtype=torch.int64)
    return {"packed_cache": Writes(where, torch.from_numpy(values).to(cache.device))}


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


ORACLE = Oracle(
    name="packed_cache_write_by_table",
    operator="packed_cache_write",
    role="derivation",
    source="FastDeploy dsk_attn_write_cache (O17), REQUIRED form; OCP 8-bit floating point, table 1",
    run=run,
)
