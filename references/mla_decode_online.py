"""Decode attention again, in NumPy: key after key along the block table with an online softmax.

Derived independently of `mla_decode.py`: no score matrix and no mask ever exist. For each key in
order of position the running maximum m, sum l and accumulator a of every query that sees it become

    m' = max(m, s),   l' = l e^(m - m') + e^(s - m'),   a' = a e^(m - m') + e^(s - m') v

and out = a / l, lse = m + ln l.

Source: Milakov and Gimelshein, arXiv:1805.02867, algorithm 3.
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
        raise ValueError("the online derivation exists in float64 only, got a Precision")
    q = tensor(inputs, "q")
    latent_cache = tensor(inputs, "latent_cache")
    tables = tensor(inputs, "block_tables").cpu().numpy()
    encoder = tensor(inputs, "seq_lens_encoder").cpu().numpy()
    decoder = tensor(inputs, "seq_lens_decoder").cpu().numpy()
    batch_ids = tensor(inputs, "batch_id_per_token").cpu().numpy()
    softmax_scale, rank = number(inputs, "softmax_scale"), int(number(inputs, "kv_lora_rank"))
    block_size = latent_cache.shape[2]
    out = np.zeros((*q.shape[:2], rank))
    lse = np.full(q.shape[:2], -np.inf)

    for slot in np.unique(batch_ids[batch_ids >= 0]):
        if encoder[slot] > 0:
            continue
        mine = np.flatnonzero(batch_ids == slot)
        queries = q[torch.from_numpy(mine).to(q.device)].to(torch.float64).cpu().numpy()
        shape = queries.shape[:2]
        maximum, total = np.full(shape, -np.inf), np.zeros(shape)
        accumulator = np.zeros((*shape, rank))
        kv_len = int(decoder[slot]) + len(mine)
        for position in range(kv_len):
            if position % block_size == 0:
                block = latent_cache[int(tables[slot, position // block_size]), 0]
                block_rows = block.to(torch.float64).cpu().numpy()
            key = block_rows[position % block_size]
            # Query i stands at position decoder + i, so key `position` is seen from query first on.
            first = max(0, position - int(decoder[slot]))
            score = queries[first:] @ key * softmax_scale
            larger = np.maximum(maximum[first:], score)
            keep, add = np.exp(maximum[first:] - larger), np.exp(score - larger)
            maximum[first:] = larger
            total[first:] = total[first:] * keep + add
            accumulator[first:] = accumulator[first:] * keep[..., None] + add[..., None] * key[:rank]
        out[mine] = accumulator / total[..., None]
        lse[mine] = maximum + np.log(total)
    return {"out": torch.from_numpy(out), "lse": torch.from_numpy(lse)}


ORACLE = Oracle(
    name="mla_decode_online",
    operator="mla_decode",
    role="derivation",
    source="arXiv:1805.02867 algorithm 3",
    run=run,
)
