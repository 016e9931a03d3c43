"""Sparse decode attention again, in NumPy: all tokens' j-th entries at once, with an online softmax over j.

Derived independently of `sparse_decode.py`: no list is filtered and no matrix of keys ever exists. For entry
after entry, the tokens whose entry is a row of the cache take that row in,

    m' = max(m, s),   l' = l e^(m - m') + e^(s - m'),   a' = a e^(m - m') + e^(s - m') v

and out = a / l, lse = m + ln l where there was any. A code c is decoded by arithmetic: with sign, exponent e
and mantissa f of 1, 4 and 3 bits, (8 + f) 2^(e - 10), or f 2^-9 where e = 0; 0x7F and 0xFF are no numbers. A
float32 is read off its bytes, and a bf16 number is the upper half of one. Where the path rounds its keys, the
product of code and scale becomes a float32 and loses its lower half: to the nearest, of two as near the even.

Source: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3; OCP 8-bit floating point, table 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, flag, number, tensor

Float64 = npt.NDArray[np.float64]


def _number_of(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


NUMBERS = np.array([_number_of(code) for code in range(256)])


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R] and lse [Tp, H], float64, on the host.

    Raises:
        ValueError: a precision other than float64 is asked for.
    """
    if precision is not None:
        raise ValueError("the online derivation exists in float64 only, got a Precision")
    cache = tensor(inputs, "packed_cache")
    queries = tensor(inputs, "q").to(torch.float64).cpu().numpy()
    lists = tensor(inputs, "indices").cpu().numpy()
    softmax_scale, rank = number(inputs, "softmax_scale"), int(number(inputs, "kv_lora_rank"))
    block_size = cache.shape[2]
    num_rows = cache.shape[0] * block_size
    shape = queries.shape[:2]
    maximum, total = np.full(shape, -np.inf), np.zeros(shape)
    accumulator = np.zeros((*shape, rank))
    for entry in range(lists.shape[2]):
        rows = lists[:, 0, entry].astype(np.int64)
        takers = np.flatnonzero((rows >= 0) & (rows < num_rows))
        if len(takers) == 0:
            continue
        at = torch.from_numpy(rows[takers]).to(cache.device)
        stored = cache[at // block_size, 0, at % block_size].cpu().numpy()
        keys = _read(stored, rank, rounded=flag(inputs, "rounds_keys"))
        score = np.einsum("thl,tl->th", queries[takers], keys) * softmax_scale
        larger = np.maximum(maximum[takers], score)
        keep, add = np.exp(maximum[takers] - larger), np.exp(score - larger)
        maximum[takers] = larger
        total[takers] = total[takers] * keep + add
        values = add[..., None] * keys[:, None, :rank]
        accumulator[takers] = accumulator[takers] * keep[..., None] + values
    has_key = total != 0
    total[~has_key] = 1.0
    out = accumulator / total[..., None]
    return {"out": torch.from_numpy(out), "lse": torch.from_numpy(maximum + np.log(total))}


def _read(rows: npt.NDArray[np.uint8], rank: int, *, rounded: bool) -> Float64:
    """[n, width] uint8 -> [n, R + D]: the numbers that rows of the cache stand for."""
    end = rank + rank // 32
    scales = np.ascontiguousarray(rows[:, rank:end]).view("<f4").astype(np.float64)
    halves = np.ascontiguousarray(rows[:, end:]).view("<u2").astype(np.uint32)
    ropes = (halves << 16).view(np.float32).astype(np.float64)
    columns = np.arange(rank)
    latents = NUMBERS[rows[:, columns]] * scales[:, columns // 128]
    return np.hstack([_halved(latents) if rounded else latents, ropes])


def _halved(values: Float64) -> Float64:
    """The numbers of bf16 next to numbers as float32 has them; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    high += (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    halved = (high << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.isnan(values), values, halved)


ORACLE = Oracle(
    name="sparse_decode_online",
    operator="sparse_decode",
    role="derivation",
    source="arXiv:1805.02867 algorithm 3; OCP 8-bit floating point, table 1",
    run=run,
)
