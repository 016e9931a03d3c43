"""Keys of prefill rows again, in NumPy, key after key from the prefix sums: lengths are not looked at.

Key t belongs to the one row b with cu_seqlens_k_prefill[b] <= t < cu_seqlens_k_prefill[b + 1]. Counted from
the row's end its place is e = cu_seqlens_k_prefill[b + 1] - t, and it is new if the row has that many new
tokens: then it is new token cu_seqlens_q[b + 1] - e.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor

BITS = {2: torch.int16, 4: torch.int32}
"""Values are carried as integers of their size: what is copied is bits."""


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """full_compressed_kv [Tk, R] and full_k_pe [Tk, D], on the host."""
    cache = tensor(inputs, "latent_cache")
    latents, ropes = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    ends_q = tensor(inputs, "cu_seqlens_q").cpu().numpy()[1:]
    starts_q = tensor(inputs, "cu_seqlens_q").cpu().numpy()[:-1]
    cu_k = tensor(inputs, "cu_seqlens_k_prefill").cpu().numpy()
    block_size, rank, dtype = cache.shape[2], latents.shape[1], cache.dtype
    bits = BITS[dtype.itemsize]
    keys = int(cu_k[-1])
    full_latent = torch.zeros(keys, rank, dtype=bits)
    full_rope = torch.zeros(keys, ropes.shape[1], dtype=bits)
    for key in range(keys):
        slot = int(np.flatnonzero((cu_k[:-1] <= key) & (key < cu_k[1:]))[0])
        from_end = int(cu_k[slot + 1]) - key
        if from_end <= ends_q[slot] - starts_q[slot]:
            token = int(ends_q[slot]) - from_end
            latent, rope = latents[token], ropes[token]
        else:
            position = key - int(cu_k[slot])
            block = int(tensor(inputs, "block_tables")[slot, position // block_size])
            row = cache[block, 0, position % block_size]
            latent, rope = row[:rank], row[rank:]
        full_latent[key] = latent.contiguous().view(bits).cpu()
        full_rope[key] = rope.contiguous().view(bits).cpu()
    return {"full_compressed_kv": full_latent.view(dtype), "full_k_pe": full_rope.view(dtype)}


ORACLE = Oracle(
    name="read_cache_interleave_by_key",
    operator="read_cache_interleave",
    role="derivation",
    source="FastDeploy cu_seqlens_k since pull request 7727, prefill rows alone",
    run=run,
)
