"""Packing and merge again, in NumPy, token after token by slot: no prefix sum is read, no slice of tokens.

Of the tokens that say they are slot b's, all are decode tokens if b has cached tokens and no new prefill
ones; how many there are is the row's length this step. The next decode token has the next packed place, and
a slot's packed tokens begin behind those that say they are a smaller slot's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor

BITS = {2: torch.int16, 4: torch.int32}
"""Values are carried as integers of their size: what is copied is bits."""


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """The five outputs, on the host."""
    names = ("query", "prefill_out", "decode_out")
    dtype = tensor(inputs, "query").dtype
    query, prefill, decode = (
        tensor(inputs, name).contiguous().view(BITS[dtype.itemsize]).cpu().numpy() for name in names
    )
    encoder = tensor(inputs, "seq_lens_encoder").cpu().numpy()
    decoder = tensor(inputs, "seq_lens_decoder").cpu().numpy()
    batch_ids = tensor(inputs, "batch_id_per_token").cpu().numpy()

    # A slot that has cached tokens is decoding, unless it was given a chunk of its prompt.
    decoding = np.logical_and(decoder != 0, encoder == 0)
    counts = np.zeros(len(encoder), np.int64)
    packed_ids = np.full(len(decode), -1, np.int32)
    packed_query, merged = np.zeros((len(decode), *query.shape[1:]), query.dtype), np.zeros_like(prefill)
    place = 0
    for token, slot in enumerate(batch_ids):
        if slot < 0:
            continue
        counts[slot] += 1
        if not decoding[slot]:
            merged[token] = prefill[token]
            continue
        packed_ids[place], packed_query[place], merged[token] = slot, query[token], decode[place]
        place += 1
    smaller = packed_ids[:place, None] < np.arange(len(encoder) + 1)
    lengths = np.where(decoding & (counts > 0), decoder + counts, 0)
    return {
        "cu_seqlens_q_decode": torch.from_numpy(smaller.sum(0).astype(np.int32)),
        "batch_id_per_decode_token": torch.from_numpy(packed_ids),
        "packed_query": torch.from_numpy(packed_query).view(dtype),
        "merged": torch.from_numpy(merged).view(dtype),
        "cache_seqlens": torch.from_numpy(lengths.astype(np.int32)),
    }


ORACLE = Oracle(
    name="decode_rows_by_token",
    operator="decode_rows",
    role="derivation",
    source="FastDeploy batch_id_per_token and the row kinds of its ForwardMeta",
    run=run,
)
