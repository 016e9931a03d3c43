"""Attention over lists of every row kind by its definition, one token's list at a time.

    new = the packed rows of this step's tokens, at slot_mapping
    K   = [compressed_kv | k_pe] of the list's tokens, where the token's row has nothing cached;
          else the list's rows, new ones before what the cache holds, codes times their tiles' scales
    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

Divisors are tensors: divided by a Python number, Torch on a GPU multiplies by its reciprocal, which gives
other bytes. Stored bytes become float64: a code times a scale is exact there. Where the path rounds its keys,
the product is rounded to float32 and then to bf16. With a `Precision` the attention runs in float32 with the
weights and the output rounded, as a kernel in one pass would: the budgets' baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import (
    Inputs,
    Oracle,
    Outputs,
    Precision,
    Writes,
    flag,
    largest_partial_sums,
    number,
    tensor,
    text,
)

TILE = 128
E4M3_MAX = 448.0


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64, and the cache rows written.

    `logit_magnitude` is what the partial sums of a row's logits reach: the largest of |s_j|, of
    softmax_scale * sqrt(sum_i (q_i K_ji)^2) and of the sums over the columns on their way, in their order.
    0 where the list names no key.
    """
    q, cache = tensor(inputs, "q"), tensor(inputs, "packed_cache")
    latents, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    slots, cached = tensor(inputs, "slot_mapping"), tensor(inputs, "seq_lens_decoder").tolist()
    softmax_scale, rank = number(inputs, "softmax_scale"), int(number(inputs, "kv_lora_rank"))
    stored = cache.view(-1, cache.shape[3])
    is_written = (slots >= 0) & (slots < len(stored))
    new_slots = slots[is_written]
    new_rows = quantised(latents[is_written], k_pe[is_written], text(inputs, "scale_fmt"))

    keys_of_step = torch.cat([latents, k_pe], dim=1)
    working = torch.float64 if precision is None else torch.float32
    tokens, heads = q.shape[:2]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, rank, **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]

    for token, slot in enumerate(tensor(inputs, "batch_id_per_token").tolist()):
        if slot < 0:
            continue
        entries = tensor(inputs, "indices")[token, 0].long()
        limit = len(stored) if cached[slot] > 0 else tokens
        listed = entries[(entries >= 0) & (entries < limit)]
        if len(listed) == 0:
            continue
        if cached[slot] > 0:
            rows = stored[listed]
            key, place = (listed.unsqueeze(1) == new_slots).nonzero(as_tuple=True)
            rows[key] = new_rows[place]
            keys = dequantised(rows, rank, rounded=flag(inputs, "rounds_keys")).to(working)
        else:
            keys = keys_of_step[listed].to(working)
        query = q[token].to(working)
        logits = query @ keys.T * softmax_scale
        largest = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if precision is not None:
            weights = weights.to(precision.weights).to(working)
        row_out = weights @ keys[:, :rank] / total
        if precision is not None:
            row_out = row_out.to(precision.output)

        out[token] = row_out.to(torch.float64)
        lse[token] = (largest + torch.log(total)).squeeze(-1).to(torch.float64)
        spread = (query.square() @ keys.T.square()).sqrt() * softmax_scale
        reached = torch.maximum(largest_partial_sums(query, keys) * softmax_scale, spread)
        logit_magnitude[token] = torch.maximum(logits.abs(), reached).amax(-1).to(torch.float64)
    written = Writes(new_slots, new_rows)
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude, "packed_cache": written}


def quantised(latents: Tensor, k_pe: Tensor, scale_fmt: str) -> Tensor:
    """[n, R], [n, D] bf16 -> [n, R + R / 32 + 2 D] uint8: the packed rows of n tokens."""
    tiles = latents.float().view(len(latents), latents.shape[1] // TILE, TILE)
    amax = torch.where(tiles.isnan(), 0.0, tiles.abs()).amax(-1)
    largest = torch.full_like(amax, E4M3_MAX)
    if scale_fmt == "fp32":
        scales = (amax / largest).clamp_min(2.0**-126)
    else:
        least = amax.clamp_min(1e-4) / largest
        powers = [2.0**exponent for exponent in range(-30, 128)]
        steps = torch.tensor([*powers, torch.inf], dtype=torch.float32, device=tiles.device)
        scales = steps[torch.searchsorted(steps, least)]
    ratios = (tiles / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    codes = torch.where(ratios.isnan(), 0x7F, ratios.to(torch.float8_e4m3fn).view(torch.uint8))
    parts = [codes.flatten(1), *(part.contiguous().view(torch.uint8) for part in (scales, k_pe))]
    return torch.cat(parts, dim=1)


def dequantised(rows: Tensor, rank: int, *, rounded: bool) -> Tensor:
    """[n, R + R / 32 + 2 D] uint8 -> [n, R + D] float64: what packed rows stand for."""
    end = rank + rank // 32
    codes, scales, k_pe = rows[:, :rank], rows[:, rank:end], rows[:, end:]
    tiles = codes.contiguous().view(torch.float8_e4m3fn).double().view(len(rows), -1, TILE)
    latents = (tiles * scales.contiguous().view(torch.float32).double().unsqueeze(-1)).flatten(1)
    if rounded:
        latents = latents.float().bfloat16().double()
    return torch.cat([latents, k_pe.contiguous().view(torch.bfloat16).double()], dim=1)


ORACLE = Oracle(
    name="static_attention",
    operator="static_attention",
    role="definition",
    source="FastDeploy O20, REQUIRED form; arXiv:2405.04434 section 2.1.3 over the rows of section 3.3",
    run=run,
)
