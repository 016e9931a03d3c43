"""Attention over lists of every row kind again, in NumPy: numbers first, then an online softmax over entries.

Derived independently of `static_attention.py`. Row b's i-th new token stands at position seq_lens_decoder[b]
+ i, in block block_tables[b, position // block_size]: slot_mapping is not looked at. A number is quantised by
arithmetic: its quotient by the scale, in the binade of 2^e, is a whole number of steps of 2^(max(e, -6) - 3),
the nearest, of two as near the even one. That count of steps is the code's mantissa, and the code comes last.
What is read from the cache is decoded the other way round: (8 + f) 2^(e - 10), or f 2^-9 where e = 0.

Every list becomes places in one table, which holds the step's own tokens first and then each row of the cache
that some list of a row with a history names. Entry after entry, tokens whose entry has a place take it in,

    m' = max(m, s),   l' = l e^(m - m') + e^(s - m'),   a' = a e^(m - m') + e^(s - m') v

and out = a / l, lse = m + ln l where there was any.

Source: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3; OCP 8-bit floating point, table 1.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, flag, number, tensor, text

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Out [Tp, H, R] and lse [Tp, H], float64, on the host, and the cache rows written.

    Raises:
        ValueError: a precision other than float64 is asked for.
    """
    if precision is not None:
        raise ValueError("the online derivation exists in float64 only, got a Precision")
    cache = tensor(inputs, "packed_cache")
    latents = tensor(inputs, "compressed_kv").float().cpu().numpy()
    halves = tensor(inputs, "k_pe").contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    queries = tensor(inputs, "q").double().cpu().numpy()
    lists = tensor(inputs, "indices").cpu().numpy()[:, 0].astype(np.int64)
    rank, softmax_scale = latents.shape[1], number(inputs, "softmax_scale")
    lasts = tensor(inputs, "cu_seqlens_q").tolist()
    new = _new_rows(inputs, cache.shape[2])
    packed = _packed(latents[: len(new)], halves[: len(new)], text(inputs, "scale_fmt"))

    # Places of the lists' entries; -1 of what is no key.
    places = np.full(lists.shape, -1)
    of_cache = np.zeros(len(lists), dtype=bool)
    lengths = tensor(inputs, "seq_lens_decoder").tolist()
    for (first, last), length in zip(pairwise(lasts), lengths, strict=True):
        of_cache[first:last] = length > 0
        limit = cache.shape[0] * cache.shape[2] if length > 0 else len(lists)
        mine = lists[first:last]
        places[first:last] = np.where((mine >= 0) & (mine < limit), mine, -1)
    named = np.unique(places[of_cache])
    named = named[named >= 0]
    at = torch.from_numpy(named).to(cache.device)
    stored = cache[at // cache.shape[2], 0, at % cache.shape[2]].cpu().numpy()
    for token, row in enumerate(new):
        stored[named == row] = packed[token]
    places[of_cache] = np.where(
        places[of_cache] < 0, -1, len(lists) + np.searchsorted(named, places[of_cache])
    )
    own = np.hstack([latents.astype(np.float64), _bf16(halves)])
    table = np.vstack([own, _unpacked(stored, rank, rounded=flag(inputs, "rounds_keys"))])

    maximum, total = np.full(queries.shape[:2], -np.inf), np.zeros(queries.shape[:2])
    accumulator = np.zeros((*queries.shape[:2], rank))
    for entry in range(lists.shape[1]):
        takers = np.flatnonzero(places[:, entry] >= 0)
        keys = table[places[takers, entry]]
        score = np.einsum("thl,tl->th", queries[takers], keys) * softmax_scale
        larger = np.maximum(maximum[takers], score)
        keep, add = np.exp(maximum[takers] - larger), np.exp(score - larger)
        maximum[takers], total[takers] = larger, total[takers] * keep + add
        accumulator[takers] *= keep[..., None]
        accumulator[takers] += add[..., None] * keys[:, None, :rank]
    total[total == 0] = 1.0
    rows = torch.tensor(new, dtype=torch.int64, device=cache.device)
    return {
        "out": torch.from_numpy(accumulator / total[..., None]),
        "lse": torch.from_numpy(maximum + np.log(total)),
        "packed_cache": Writes(rows, torch.from_numpy(packed).to(cache.device)),
    }


def _new_rows(inputs: Inputs, block_size: int) -> list[int]:
    """The cache row of every real token, from lengths and tables."""
    rows: list[int] = []
    counts = tensor(inputs, "seq_lens_this_time").tolist()
    tables = tensor(inputs, "block_tables").tolist()
    for table, first, count in zip(tables, tensor(inputs, "seq_lens_decoder").tolist(), counts, strict=True):
        positions = range(first, first + count)
        rows += [table[p // block_size] * block_size + p % block_size for p in positions]
    return rows


def _packed(latents: Float32, halves: Halves, scale_fmt: str) -> Bytes:
    """[n, R] and [n, D] -> [n, R + R / 32 + 2 D]: the bytes of packed rows."""
    tiles = latents.reshape(len(latents), latents.shape[1] // 128, 128)
    with np.errstate(invalid="ignore"):
        amax = np.nan_to_num(np.abs(tiles), nan=0.0, posinf=np.inf).max(-1)
        if scale_fmt == "fp32":
            scales = np.maximum(amax / np.float32(448), np.float32(2.0**-126))
        else:
            mantissas, exponents = np.frexp(np.maximum(amax, np.float32(1e-4)) / np.float32(448))
            powers = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
            scales = np.where(np.isinf(amax), amax, powers).astype(np.float32)
        quotients = tiles / scales[..., None]
    codes = _codes(quotients).reshape(latents.shape)
    return np.hstack([codes, _bytes(scales), _bytes(halves)])


def _codes(quotients: Float32) -> Bytes:
    """e4m3 codes of numbers up to 448 and a rounding more: whole steps of their binades, ties to even."""
    magnitudes = np.where(np.isnan(quotients), 0.0, np.abs(quotients)).astype(np.float64)
    # 0 has no binade of its own; 2^-9 is in the lowest.
    _, above = np.frexp(np.maximum(magnitudes, 2.0**-9))
    exponents = np.maximum(above - 1, -6)
    steps = np.rint(np.ldexp(magnitudes, 3 - exponents)).astype(np.int64)
    # 16 steps are 8 of the next binade, and the count says so itself: 8 (e + 6) more where 8 belong to e.
    codes = np.minimum(steps + 8 * (exponents + 6), 126) + 128 * np.signbit(quotients)
    return np.where(np.isnan(quotients), 127, codes).astype(np.uint8)


def _unpacked(rows: Bytes, rank: int, *, rounded: bool) -> Float64:
    """[n, R + R / 32 + 2 D] -> [n, R + D]: the numbers that packed rows stand for."""
    codes = rows[:, :rank].astype(np.int64)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    numbers = np.where(exponents == 0, np.ldexp(mantissas, -9), np.ldexp(8.0 + mantissas, exponents - 10))
    numbers = np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -numbers, numbers))
    scales = np.ascontiguousarray(rows[:, rank : rank + rank // 32]).view("<f4").astype(np.float64)
    latents = numbers * np.repeat(scales, 128, axis=1)
    if rounded:
        bits = latents.astype(np.float32).view(np.uint32).astype(np.uint64)
        # To the nearest upper half: half a step is added, less one where the half below it is even.
        upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        latents = np.where(np.isnan(latents), latents, _bf16(upper.astype(np.uint16)))
    halves = np.ascontiguousarray(rows[:, rank + rank // 32 :]).view("<u2")
    return np.hstack([latents, _bf16(halves)])


def _bf16(halves: Halves) -> Float64:
    """The numbers of which these are the bits."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _bytes(values: npt.NDArray[np.generic]) -> Bytes:
    """[n, k] -> [n, k * itemsize]: the bytes of numbers as they lie in memory."""
    return np.ascontiguousarray(values).view(np.uint8)


ORACLE = Oracle(
    name="static_attention_online",
    operator="static_attention",
    role="derivation",
    source="arXiv:1805.02867 algorithm 3; OCP 8-bit floating point, table 1; lengths and tables alone",
    run=run,
)
