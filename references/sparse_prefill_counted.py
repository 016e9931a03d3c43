"""Sparse prefill attention again, in NumPy: over all tokens of the step, each as often as a list names it.

Derived independently of `sparse_prefill.py`: no list is followed. A list becomes a count c of every token of
the step, how often it is named, and the softmax is taken over all of them with these counts,

    lse = ln sum_i c_i exp(s_i),   out = sum_i c_i exp(s_i - lse) v_i

Tokens that are never named are left out: what they hold may be no number. Two sums at a time become one by
logaddexp, which cannot overflow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R] and lse [Tp, H], float64, on the host.

    Raises:
        ValueError: a precision other than float64 is asked for.
    """
    if precision is not None:
        raise ValueError("the counted derivation exists in float64 only, got a Precision")
    queries, latents, ropes = (
        tensor(inputs, name).to(torch.float64).cpu().numpy() for name in ("q", "compressed_kv", "k_pe")
    )
    lists = tensor(inputs, "indices").cpu().numpy()[:, 0]
    softmax_scale, rank = number(inputs, "softmax_scale"), latents.shape[1]
    tokens, heads = queries.shape[:2]
    out, lse = np.zeros((tokens, heads, rank)), np.full((tokens, heads), -np.inf)
    for token in range(tokens):
        counts = np.bincount(np.clip(lists[token], -1, tokens) + 1, minlength=tokens + 2)[1:-1]
        for other in np.flatnonzero(counts):
            latent_share = queries[token, :, :rank] @ latents[other]
            logit = softmax_scale * (latent_share + queries[token, :, rank:] @ ropes[other])
            added = logit + np.log(counts[other])
            merged = np.logaddexp(lse[token], added)
            kept, taken = np.exp(lse[token] - merged), np.exp(added - merged)
            out[token] = out[token] * kept[:, None] + taken[:, None] * latents[other]
            lse[token] = merged
    return {"out": torch.from_numpy(out), "lse": torch.from_numpy(lse)}


ORACLE = Oracle(
    name="sparse_prefill_counted",
    operator="sparse_prefill",
    role="derivation",
    source="softmax with multiplicities; logaddexp of NumPy",
    run=run,
)
