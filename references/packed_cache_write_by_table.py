"""Packed cache write again, from lengths and block tables, with a table of the 127 numbers of e4m3.

Row b's i-th new token stands at position p = seq_lens_decoder[b] + i, in block
block_tables[b, p // block_size] at offset p % block_size.
"""

from __future__ import annotations

import numpy as np
import torch

from references._packed_rows_by_table import packed_row
from references.oracle import Inputs, Oracle, Precision, Writes, tensor, text


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their bytes, token after token."""
    cache, k_pe = tensor(inputs, "packed_cache"), tensor(inputs, "k_pe")
    latents = tensor(inputs, "compressed_kv").float().cpu().numpy()
    ropes = k_pe.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    block_size = cache.shape[2]
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    rows: list[int] = []
    for slot, table in enumerate(tensor(inputs, "block_tables").tolist()):
        positions = range(decoder[slot], decoder[slot] + this_time[slot])
        rows += [table[p // block_size] * block_size + p % block_size for p in positions]
    scale_fmt = text(inputs, "scale_fmt")
    values = np.empty((len(rows), cache.shape[3]), np.uint8)
    for token in range(len(rows)):
        values[token] = packed_row(latents[token], ropes[token], scale_fmt)
    where = torch.tensor(rows, device=cache.device, dtype=torch.int64)
    return {"packed_cache": Writes(where, torch.from_numpy(values).to(cache.device))}


ORACLE = Oracle(
    name="packed_cache_write_by_table",
    operator="packed_cache_write",
    role="derivation",
    source="FastDeploy dsk_attn_write_cache (O17), REQUIRED form; OCP 8-bit floating point, table 1",
    run=run,
)
