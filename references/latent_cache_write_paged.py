"""Cache write again, from lengths and block tables alone: `slot_mapping` is not looked at.

Row b's i-th new token stands at position p = seq_lens_decoder[b] + i, in block
block_tables[b, p // block_size] at offset p % block_size.
"""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Precision, Writes, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their contents, token after token."""
    compressed_kv, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    block_size = tensor(inputs, "latent_cache").shape[2]
    tables = tensor(inputs, "block_tables").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    rows: list[int] = []
    for slot, table in enumerate(tables):
        positions = range(decoder[slot], decoder[slot] + this_time[slot])
        rows += [table[p // block_size] * block_size + p % block_size for p in positions]
    width = compressed_kv.shape[1] + k_pe.shape[1]
    values = compressed_kv.new_empty(len(rows), width)
    values[:, : compressed_kv.shape[1]] = compressed_kv[: len(rows)]
    values[:, compressed_kv.shape[1] :] = k_pe[: len(rows)]
    return {"latent_cache": Writes(torch.tensor(rows, device=values.device, dtype=torch.int64), values)}


ORACLE = Oracle(
    name="latent_cache_write_paged",
    operator="latent_cache_write",
    role="derivation",
    source="FastDeploy prefill_mla_write_cache and decode_mla_write_cache (O03, O04), REQUIRED form",
    run=run,
)
