"""Sparse decode attention by its definition, one token's list at a time.

    K   = the list's rows of the cache, their codes widened and multiplied by their tiles' scales
    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

Stored bytes become float64 first: a code times a scale is exact there. Where the path rounds its keys, the
product is rounded to float32 and then to bf16.
"""

from __future__ import annotations

from torch import Tensor

from references._listed_attention import attend
from references._packed_rows import dequantised
from references.oracle import Inputs, Oracle, Precision, flag, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, R], lse [Tp, H] and logit_magnitude [Tp, H], in float64, as `attend` gives them."""
    cache, indices = tensor(inputs, "packed_cache"), tensor(inputs, "indices").long()
    rank, rounded = int(number(inputs, "kv_lora_rank")), flag(inputs, "rounds_keys")
    stored = cache.view(-1, cache.shape[3])

    def keys_of(token: int) -> Tensor:
        entries = indices[token, 0]
        return dequantised(stored[entries[(entries >= 0) & (entries < len(stored))]], rank, rounded=rounded)

    return attend(tensor(inputs, "q"), keys_of, number(inputs, "softmax_scale"), rank, precision)


ORACLE = Oracle(
    name="sparse_decode",
    operator="sparse_decode",
    role="definition",
    source="FastDeploy O19, REQUIRED form; arXiv:2405.04434 section 2.1.3 over the rows of section 3.3",
    run=run,
)
