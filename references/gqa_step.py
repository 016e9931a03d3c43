"""Attention of query heads in groups by its definition, one row at a time.

    s   = softmax_scale * q K^T          K, V: what the row's tokens see, gathered through its block table
    lse = ln (e^sink + sum_j e^(s_j))    over first <= j <= p
    out = sum_j e^(s_j - lse) V_j

Inputs are widened to float64 first; nothing is rounded. With a `Precision` the same lines run in float32
with the weights and the output rounded, as a kernel in one pass would: the budgets' baseline. Padding tokens:
out 0, lse -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, maybe_tensor, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V], lse [Tp, H] and logit_magnitude [Tp, H], in float64.

    `logit_magnitude` is what the partial sums of a token's visible logits reach: the largest of |s_j|, of
    softmax_scale * sqrt(sum_i (q_i K_ji)^2) and of the sink. 0 for padding.
    """
    q, k_cache, v_cache = (tensor(inputs, name) for name in ("query", "k_cache", "v_cache"))
    tables = tensor(inputs, "block_tables")
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    new_tokens = tensor(inputs, "seq_lens_this_time").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    softmax_scale, window = number(inputs, "softmax_scale"), int(number(inputs, "window"))
    working = torch.float64 if precision is None else torch.float32
    (tokens, heads), (kv_heads, block_size) = q.shape[:2], k_cache.shape[1:3]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, v_cache.shape[3], **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]
    sinks = maybe_tensor(inputs, "sinks")

    for slot, new in enumerate(new_tokens):
        if new == 0:
            continue
        # [kv_heads, group, new, K] against [kv_heads, 1, keys, K]: a group shares its keys.
        query = q[starts[slot] : starts[slot] + new].to(working)
        query = query.reshape(new, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
        own = cached[slot] + torch.arange(new, device=q.device)
        oldest = max(0, cached[slot] - window + 1) if window else 0
        position = torch.arange(oldest, cached[slot] + new, device=q.device)
        blocks = tables[slot, position // block_size].to(torch.int64)
        keys, values = (
            cache[blocks, :, position % block_size].to(working).movedim(1, 0).unsqueeze(1)
            for cache in (k_cache, v_cache)
        )

        hidden = position[None, :] > own[:, None]
        if window:
            hidden |= position[None, :] <= own[:, None] - window
        logits = (query @ keys.mT * softmax_scale).masked_fill(hidden, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        spread = (query.square() @ keys.square().mT).sqrt() * softmax_scale
        magnitude = torch.maximum(logits.abs(), spread).masked_fill(hidden, 0.0).amax(-1)
        total = torch.zeros_like(largest)
        if sinks is not None:
            sink = sinks.to(working).view(kv_heads, -1, 1, 1)
            largest = torch.maximum(largest, sink)
            total = torch.exp(sink - largest)
            magnitude = torch.maximum(magnitude, sink.squeeze(-1).abs())
        weights = torch.exp(logits - largest)
        total = total + weights.sum(-1, keepdim=True)
        if precision is not None:
            weights = weights.to(precision.weights).to(working)
        row_out = weights @ values / total
        if precision is not None:
            row_out = row_out.to(precision.output)

        at = slice(starts[slot], starts[slot] + new)
        # [kv_heads, group, new, ...] -> [new, H, ...].
        out[at] = row_out.permute(2, 0, 1, 3).flatten(1, 2).to(torch.float64)
        log_sum = (largest + torch.log(total)).squeeze(-1)
        lse[at] = log_sum.permute(2, 0, 1).flatten(1).to(torch.float64)
        logit_magnitude[at] = magnitude.permute(2, 0, 1).flatten(1).to(torch.float64)
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude}


ORACLE = Oracle(
    name="gqa_step",
    operator="gqa_step",
    role="definition",
    source="arXiv:2305.13245 section 2.2; sinks: arXiv:2309.17453 with the learned logit of gpt-oss",
    run=run,
)
