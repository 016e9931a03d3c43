"""Selection and merge again, in NumPy, token after token by slot: no prefix sum and no slice of tokens.

Of the tokens that say they are slot b's, all are decode tokens if b has cached tokens and no new prefill
ones; how many there are is the row's length this step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor

BITS = {2: torch.int16, 4: torch.int32}
"""Values are carried as integers of their size: what is copied is bits."""


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Merged [Tp, H, V], is_decode [Tp] int32 and cache_seqlens [B] int32, on the host."""
    prefill_out, decode_out = tensor(inputs, "prefill_out"), tensor(inputs, "decode_out")
    encoder = tensor(inputs, "seq_lens_encoder").cpu().numpy()
    decoder = tensor(inputs, "seq_lens_decoder").cpu().numpy()
    batch_ids = tensor(inputs, "batch_id_per_token").cpu().numpy()
    bits = BITS[prefill_out.dtype.itemsize]
    prefill = prefill_out.contiguous().view(bits).cpu().numpy()
    decode = decode_out.contiguous().view(bits).cpu().numpy()

    # A slot that has cached tokens is decoding, unless it was given a chunk of its prompt.
    decoding = np.logical_and(decoder != 0, encoder == 0)
    counts = np.zeros(len(encoder), np.int64)
    merged, is_decode = np.zeros_like(prefill), np.zeros(len(batch_ids), np.int32)
    for token, slot in enumerate(batch_ids):
        if slot < 0:
            continue
        counts[slot] += 1
        is_decode[token] = decoding[slot]
        merged[token] = (prefill, decode)[is_decode[token]][token]
    lengths = np.where(decoding & (counts > 0), decoder + counts, 0).astype(np.int32)
    return {
        "merged": torch.from_numpy(merged).view(prefill_out.dtype),
        "is_decode": torch.from_numpy(is_decode),
        "cache_seqlens": torch.from_numpy(lengths),
    }


ORACLE = Oracle(
    name="decode_rows_by_token",
    operator="decode_rows",
    role="derivation",
    source="FastDeploy batch_id_per_token and the row kinds of its ForwardMeta",
    run=run,
)
