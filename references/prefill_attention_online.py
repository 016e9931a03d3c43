"""Causal prefill attention as a running softmax, a key at a time, in NumPy.

Shares nothing with the definition: it walks the flat key axis by token, keeps for every query a maximum,
a sum and an output, and rescales them when a larger logit comes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor

Array = npt.NDArray[np.float64]


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V] and lse [Tp, H], float64."""
    q, k, v = (_host(tensor(inputs, name)) for name in ("query", "key", "value"))
    is_prefill = tensor(inputs, "seq_lens_encoder").tolist()
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    key_starts = tensor(inputs, "cu_seqlens_k_prefill").tolist()
    softmax_scale = number(inputs, "softmax_scale")
    tokens, heads = q.shape[:2]
    out = np.zeros((tokens, heads, v.shape[2]))
    lse = np.full((tokens, heads), -np.inf)

    for slot, (begin, end) in enumerate(pairwise(starts)):
        if not is_prefill[slot]:
            continue
        rows = end - begin
        largest = np.full((rows, heads), -np.inf)
        total = np.zeros((rows, heads))
        running = np.zeros((rows, heads, v.shape[2]))
        for number_of_key in range(cached[slot] + rows):
            # Key j is hidden from the queries before position j.
            seen = slice(max(0, number_of_key - cached[slot]), rows)
            at = key_starts[slot] + number_of_key
            logit = softmax_scale * np.sum(q[begin:end][seen] * k[at], axis=-1)
            larger = np.maximum(largest[seen], logit)
            shrink, weight = np.exp(largest[seen] - larger), np.exp(logit - larger)
            total[seen] = total[seen] * shrink + weight
            running[seen] = running[seen] * shrink[..., None] + weight[..., None] * v[at]
            largest[seen] = larger
        out[begin:end] = running / total[..., None]
        lse[begin:end] = largest + np.log(total)
    device = tensor(inputs, "query").device
    return {"out": torch.from_numpy(out).to(device), "lse": torch.from_numpy(lse).to(device)}


def _host(values: Tensor) -> Array:
    widened: Array = values.to("cpu", torch.float64).numpy()
    return widened


ORACLE = Oracle(
    name="prefill_attention_online",
    operator="prefill_attention",
    role="derivation",
    source="arXiv:1805.02867 (online normaliser), applied key by key",
    run=run,
)
