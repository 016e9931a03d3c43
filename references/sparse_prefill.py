"""Sparse prefill attention by its definition, one token's list at a time.

    K   = [compressed_kv | k_pe] of the list's tokens
    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

Inputs are widened to float64 first; nothing is rounded. With a `Precision` the same lines run in float32 with
the weights and the output rounded, as a kernel in one pass would: the budgets' baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, largest_partial_sums, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64.

    `logit_magnitude` is what the partial sums of a row's logits reach: the largest of |s_j|, of
    softmax_scale * sqrt(sum_i (q_i K_ji)^2) and of the sums over the columns on their way, in their order.
    0 where the list names no key.
    """
    q, indices = tensor(inputs, "q"), tensor(inputs, "indices").long()
    keys_of_step = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=1)
    softmax_scale, rank = number(inputs, "softmax_scale"), int(number(inputs, "kv_lora_rank"))
    working = torch.float64 if precision is None else torch.float32
    tokens, heads = q.shape[:2]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, rank, **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]

    for token, entries in enumerate(indices[:, 0]):
        listed = entries[(entries >= 0) & (entries < tokens)]
        if len(listed) == 0:
            continue
        keys, query = keys_of_step[listed].to(working), q[token].to(working)
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
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude}


ORACLE = Oracle(
    name="sparse_prefill",
    operator="sparse_prefill",
    role="definition",
    source="FastDeploy O18; arXiv:2405.04434 section 2.1.3 over listed tokens",
    run=run,
)
