"""Sparse prefill attention by its definition, one token's list at a time.

    K   = [compressed_kv | k_pe] of the list's tokens
    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

Inputs are widened to float64 first; nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references._listed_attention import attend
from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64, as `attend` gives them."""
    q, indices = tensor(inputs, "q"), tensor(inputs, "indices").long()
    keys_of_step = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=1)

    def keys_of(token: int) -> Tensor:
        entries = indices[token, 0]
        return keys_of_step[entries[(entries >= 0) & (entries < len(q))]]

    rank = int(number(inputs, "kv_lora_rank"))
    return attend(q, keys_of, number(inputs, "softmax_scale"), rank, precision)


ORACLE = Oracle(
    name="sparse_prefill",
    operator="sparse_prefill",
    role="definition",
    source="FastDeploy O18; arXiv:2405.04434 section 2.1.3 over listed tokens",
    run=run,
)
