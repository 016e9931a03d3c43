"""Indices of a sliding window again, slot by slot: the last so many of a sequence's rows of cache.

Of each slot the rows of cache that hold its sequence are listed in order; a token sees the end of the list
up to itself. Which slot a token belongs to is counted, not read.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """swa_indices [Tp, 1, width] int32."""
    block_tables = tensor(inputs, "block_tables")
    block_size, window = int(number(inputs, "block_size")), int(number(inputs, "window"))
    most = block_tables.shape[1] * block_size
    most = min(window, most) if window else most
    width = most + -most % 128
    spans = pairwise(tensor(inputs, "cu_seqlens_q").tolist())
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    lists: list[list[int]] = []
    for table, cached, (start, end) in zip(block_tables.tolist(), decoder, spans, strict=True):
        held: list[int] = []
        for block in table[: -(-(cached + end - start) // block_size)]:
            held += range(block * block_size, (block + 1) * block_size)
        for length in range(cached + 1, cached + end - start + 1):
            hidden = length - window if 0 < window < length else 0
            lists.append(held[hidden:length])
    lists += [[]] * (len(tensor(inputs, "batch_id_per_token")) - len(lists))
    padded = [rows + [-1] * (width - len(rows)) for rows in lists]
    indices = torch.tensor(padded, dtype=torch.int32, device=block_tables.device)
    return {"swa_indices": indices.view(len(lists), 1, width)}


ORACLE = Oracle(
    name="swa_indices_walked",
    operator="swa_indices",
    role="derivation",
    source="FastDeploy get_swa_indexer_top_k (O21), REQUIRED form, slot by slot",
    run=run,
)
