"""Keys of prefill rows by their definition, row after row: the cached positions, then the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """full_compressed_kv [Tk, R] and full_k_pe [Tk, D]; a copy, so precision changes nothing."""
    latent_cache = tensor(inputs, "latent_cache")
    compressed_kv, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    block_size, width = latent_cache.shape[2:]
    rank = compressed_kv.shape[1]
    # A row without cached tokens follows no table, so that there need not be one.
    parts = [compressed_kv.new_empty(0, width)]
    for slot, (new, cached) in enumerate(zip(encoder, decoder, strict=True)):
        if new == 0:
            continue
        if cached > 0:
            blocks = tensor(inputs, "block_tables")[slot, : -(-cached // block_size)].tolist()
            parts.append(latent_cache[blocks, 0].reshape(-1, width)[:cached])
        own = slice(starts[slot], starts[slot] + new)
        parts.append(torch.cat([compressed_kv[own], k_pe[own]], dim=1))
    full = torch.cat(parts)
    return {"full_compressed_kv": full[:, :rank], "full_k_pe": full[:, rank:]}


ORACLE = Oracle(
    name="read_cache_interleave",
    operator="read_cache_interleave",
    role="definition",
    source="FastDeploy fused_read_cache_and_interleave (O09), prefill rows alone",
    run=run,
)
