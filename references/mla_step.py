"""A step of MLA attention by its definition: each row alone, from its full history, unabsorbed.

    c, r = the row's cached tokens from the cache, then its new ones from the inputs
    k    = [c w_uk[h]^T | r]      v = c w_uv[h]
    s    = softmax_scale * q k^T  over p - window < j <= p = seq_lens_decoder + i for the i-th new token
    out  = softmax(s) v

Where the cache is packed, c and r are what its rows stand for, those of the new tokens too, which are packed
first: rounding them is part of the question, and no error. A path that rounds what it dequantises is asked
with keys so rounded.

Inputs are widened to float64 first; nothing else is rounded. With a `Precision` the same lines run in float32
with k_nope, v, the weights and the output rounded, as a step in one pass would: the budgets' baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references._packed_rows import dequantised, packed_rows
from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, flag, number, tensor, text


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Out [Tp, H, V], logit_magnitude and logit_spread [Tp, H], in float64, and the cache rows written.

    `logit_magnitude` is what the partial sums of a row's visible logits reach: the largest of |s_j| and of
    softmax_scale * sqrt(sum_i (q_i k_ji)^2). `logit_spread` is the largest of the latter over the columns of
    k_nope alone, those that a step rounds, without columns in which all keys of the row agree: their error
    is the same in every logit and no weight's. 0 where no key is visible.
    """
    q = torch.cat([tensor(inputs, "q_nope"), tensor(inputs, "q_pe")], dim=-1)
    w_uk, w_uv = tensor(inputs, "w_uk"), tensor(inputs, "w_uv")
    latent_cache = tensor(inputs, "latent_cache")
    new_rows = _new_rows(inputs)
    block_size, width = latent_cache.shape[2:]
    flat_cache = latent_cache.view(-1, width)
    tables = tensor(inputs, "block_tables").to(q.device, torch.int64)
    cached_lengths = tensor(inputs, "seq_lens_decoder").tolist()
    softmax_scale, window = number(inputs, "softmax_scale"), int(number(inputs, "window"))
    working = torch.float64 if precision is None else torch.float32
    rank, tokens, heads = w_uk.shape[2], q.shape[0], q.shape[1]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, w_uv.shape[2], **empty)  # type: ignore[call-overload]
    magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]
    spread = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]
    written = [torch.empty(0, dtype=torch.int64, device=q.device)]

    def rounded(values: Tensor) -> Tensor:
        return values if precision is None else values.to(precision.output).to(working)

    first = 0
    for slot, new in enumerate(tensor(inputs, "seq_lens_this_time").tolist()):
        if new == 0:
            continue
        cached, last = cached_lengths[slot], first + new
        positions = torch.arange(cached + new, device=q.device)
        rows = tables[slot, positions // block_size] * block_size + positions % block_size
        written.append(rows[cached:])
        stored = torch.cat([flat_cache[rows[:cached]], new_rows[first:last]])
        history = _meaning(inputs, stored, rank).to(working)
        latents, rope = history[:, :rank], history[:, rank:]
        # [H, kv_len, width]: a head at a time is a matrix product.
        k_nope = rounded(latents @ w_uk.to(working).mT)
        keys = torch.cat([k_nope, rope.expand(heads, -1, -1)], dim=-1)
        values = rounded(latents @ w_uv.to(working))
        query = q[first:last].to(working).movedim(1, 0)

        behind = positions[cached:, None] - positions[None, :]
        hidden = (behind < 0) | (behind >= (window or cached + new))
        logits = (query @ keys.mT * softmax_scale).masked_fill(hidden, -torch.inf)
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        total = weights.sum(-1, keepdim=True)
        if precision is not None:
            weights = weights.to(precision.weights).to(working)
        out[first:last] = rounded(weights @ values / total).movedim(0, 1).to(torch.float64)

        sizes = (query.square() @ keys.square().mT).sqrt() * softmax_scale
        sizes = sizes.masked_fill(hidden, 0.0)
        differs = k_nope.amax(1, keepdim=True) != k_nope.amin(1, keepdim=True)
        moved = query[..., : k_nope.shape[2]].square() @ (k_nope * differs).square().mT
        moved = (moved.sqrt() * softmax_scale).masked_fill(hidden, 0.0)
        spread[first:last] = moved.amax(-1).mT.to(torch.float64)
        largest = torch.maximum(logits.abs().masked_fill(hidden, 0.0), sizes)
        magnitude[first:last] = largest.amax(-1).mT.to(torch.float64)
        first = last
    return {
        "out": out,
        "logit_magnitude": magnitude,
        "logit_spread": spread,
        "latent_cache": Writes(torch.cat(written), new_rows[:first]),
    }


def _new_rows(inputs: Inputs) -> Tensor:
    """[Tp, width]: the cache rows of the new tokens."""
    latents, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    if tensor(inputs, "latent_cache").dtype is torch.uint8:
        return packed_rows(latents, k_pe, text(inputs, "scale_fmt"))
    return torch.cat([latents, k_pe], dim=-1)


def _meaning(inputs: Inputs, rows: Tensor, rank: int) -> Tensor:
    """[n, width] -> [n, R + D]: what rows of the cache stand for."""
    if rows.dtype is torch.uint8:
        return dequantised(rows, rank, rounded=flag(inputs, "rounds_keys"))
    return rows


ORACLE = Oracle(
    name="mla_step",
    operator="mla_step",
    role="definition",
    source="arXiv:2405.04434 equations 9-19 of section 2.1.2; bottom-right causal as in FlashAttention 2.1",
    run=run,
)
