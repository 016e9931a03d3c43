"""Attention over the keys that each token's list names, one list at a time: for definitions.

    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

A list without a key: out 0, lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from references.oracle import Precision, largest_partial_sums

KeysOf = Callable[[int], Tensor]
"""Token -> [n, W]: the keys of its list, n = 0 where it names none."""


def attend(
    q: Tensor, keys_of: KeysOf, softmax_scale: float, rank: int, precision: Precision | None
) -> dict[str, Tensor]:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64, of queries [Tp, H, W].

    `logit_magnitude` is what the partial sums of a row's logits reach: the largest of |s_j|, of
    softmax_scale * sqrt(sum_i (q_i K_ji)^2) and of the sums over the columns on their way, in their order.
    0 where the list names no key. With a `Precision` the same lines run in float32 with the weights and the
    output rounded, as a kernel in one pass would: the budgets' baseline.
    """
    working = torch.float64 if precision is None else torch.float32
    tokens, heads = q.shape[:2]
    empty = {"dtype": torch.float64, "device": q.device}
    out = torch.zeros(tokens, heads, rank, **empty)  # type: ignore[call-overload]
    lse = torch.full((tokens, heads), -torch.inf, **empty)  # type: ignore[call-overload]
    logit_magnitude = torch.zeros(tokens, heads, **empty)  # type: ignore[call-overload]

    for token in range(tokens):
        keys = keys_of(token).to(working)
        if len(keys) == 0:
            continue
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
    return {"out": out, "lse": lse, "logit_magnitude": logit_magnitude}
