"""Absorbed decode attention by its definition, one row at a time.

    s   = softmax_scale * q K^T          K: the row's cached and new tokens, [kv_len, R + D]
    lse = ln sum_j exp(s_j)              over j <= seq_lens_decoder + i for the row's i-th new token
    out = sum_j exp(s_j - lse) K_j[:R]

Inputs are widened to float64 first; nothing is rounded. With a `Precision` the same lines run in
float32 with the weights and the output rounded, as a kernel in one pass would: the budgets' baseline.
Tokens of padding and of prefill rows: out 0, lse -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64.

    `logit_magnitude` is what the partial sums of a row's visible logits reach: the largest of |s_j| and
    of softmax_scale * sqrt(sum_i (q_i K_ji)^2), which is their size where products cancel. 0 where no
    key is visible.
    """
    q, latent_cache = tensor(inputs, "q"), tensor(inputs, "latent_cache")
    block_tables = tensor(inputs, "block_tables").tolist()
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    softmax_scale, rank = number(inputs, "softmax_scale"), int(number(inputs, "kv_lora_rank"))
    working = torch.float64 if precision is None else torch.float32
    block_size = latent_cache.shape[2]
    tokens, heads = q.shape[:2]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, rank, **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]

    for slot, cached in enumerate(decoder):
        first, last = starts[slot], starts[slot + 1]
        if first == last or encoder[slot] > 0:
            continue
        kv_len = cached + last - first
        blocks = block_tables[slot][: -(-kv_len // block_size)]
        keys = latent_cache[blocks, 0].reshape(-1, latent_cache.shape[3])[:kv_len].to(working)
        query = q[first:last].to(working)

        logits = torch.einsum("thl,kl->thk", query, keys) * softmax_scale
        position = torch.arange(kv_len, device=q.device)
        own = cached + torch.arange(last - first, device=q.device)
        hidden = position[None, :] > own[:, None]
        logits = logits.masked_fill(hidden[:, None, :], -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if precision is not None:
            weights = weights.to(precision.weights).to(working)
        row_out = torch.einsum("thk,kr->thr", weights, keys[:, :rank]) / total
        if precision is not None:
            row_out = row_out.to(precision.output)

        out[first:last] = row_out.to(torch.float64)
        lse[first:last] = (largest + torch.log(total)).squeeze(-1).to(torch.float64)
        spread = torch.einsum("thl,kl->thk", query.square(), keys.square()).sqrt() * softmax_scale
        magnitude = torch.maximum(logits.abs(), spread).masked_fill(hidden[:, None, :], 0.0)
        logit_magnitude[first:last] = magnitude.amax(-1).to(torch.float64)
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude}


ORACLE = Oracle(
    name="mla_decode",
    operator="mla_decode",
    role="definition",
    source="arXiv:2405.04434 equations 9-19, absorbed form of section 2.1.3",
    run=run,
)
