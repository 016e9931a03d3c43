"""Causal attention of prefill rows by its definition, one row at a time.

    s   = softmax_scale * q K^T          K, V: the row's cached and new tokens
    lse = ln sum_j exp(s_j)              over j <= seq_lens_decoder + i for the row's i-th new token
    out = sum_j exp(s_j - lse) V_j

Inputs are widened to float64 first; nothing is rounded. With a `Precision` the same lines run in
float32 with the weights and the output rounded, as a kernel in one pass would: the budgets' baseline.
Tokens of padding and of decode rows: out 0, lse -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V], lse [Tp, H] and logit_magnitude [Tp, H], in float64.

    `logit_magnitude` is what the partial sums of a row's visible logits reach: the largest of |s_j| and
    of softmax_scale * sqrt(sum_i (q_i K_ji)^2). 0 where no key is visible.
    """
    q, k, v = (tensor(inputs, name) for name in ("query", "key", "value"))
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    key_starts = tensor(inputs, "cu_seqlens_k_prefill").tolist()
    softmax_scale = number(inputs, "softmax_scale")
    working = torch.float64 if precision is None else torch.float32
    tokens, heads = q.shape[:2]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, v.shape[2], **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]

    for slot, new in enumerate(encoder):
        if new == 0:
            continue
        first, last = starts[slot], starts[slot] + new
        span = slice(key_starts[slot], key_starts[slot + 1])
        # [H, n, width]: a head at a time is a matrix product.
        query, keys, values = (part.to(working).movedim(1, 0) for part in (q[first:last], k[span], v[span]))

        logits = query @ keys.mT * softmax_scale
        position = torch.arange(keys.shape[1], device=q.device)
        own = cached[slot] + torch.arange(new, device=q.device)
        hidden = position[None, :] > own[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if precision is not None:
            weights = weights.to(precision.weights).to(working)
        row_out = weights @ values / total
        if precision is not None:
            row_out = row_out.to(precision.output)

        out[first:last] = row_out.movedim(0, 1).to(torch.float64)
        lse[first:last] = (largest + torch.log(total)).squeeze(-1).mT.to(torch.float64)
        spread = (query.square() @ keys.square().mT).sqrt() * softmax_scale
        magnitude = torch.maximum(logits.abs(), spread).masked_fill(hidden, 0.0)
        logit_magnitude[first:last] = magnitude.amax(-1).mT.to(torch.float64)
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude}


ORACLE = Oracle(
    name="prefill_attention",
    operator="prefill_attention",
    role="definition",
    source="arXiv:2405.04434 equations 1-8 of section 2.1.2; bottom-right causal as in FlashAttention 2.1",
    run=run,
)
