"""Indices of a sliding window by their definition: all positions of all tokens at once, in int64."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """swa_indices [Tp, 1, width] int32; -1 behind the visible keys and for padding."""
    tables = tensor(inputs, "block_tables").long()
    batch_ids = tensor(inputs, "batch_id_per_token").long()
    block_size, window = int(number(inputs, "block_size")), int(number(inputs, "window"))
    real = batch_ids >= 0
    slots, tokens = batch_ids[real], torch.arange(len(batch_ids), device=tables.device)[real]
    decoder, starts = tensor(inputs, "seq_lens_decoder").long(), tensor(inputs, "cu_seqlens_q").long()
    newest = (decoder[slots] + tokens - starts[slots]).unsqueeze(1)
    oldest = (newest - window + 1).clamp_min(0) if window else torch.zeros_like(newest)
    width = room(tables.shape[1] * block_size, window)
    seen = oldest + torch.arange(width, device=tables.device)
    in_window = seen <= newest
    blocks = torch.where(in_window, seen, 0) // block_size
    rows = tables[slots.unsqueeze(1), blocks] * block_size + seen % block_size
    indices = torch.full((len(batch_ids), 1, width), -1, dtype=torch.int32, device=tables.device)
    indices[real, 0] = torch.where(in_window, rows, -1).int()
    return {"swa_indices": indices}


def room(keys: int, window: int) -> int:
    """Entries a token: the window, or all keys of a table where that is less, to a multiple of 128."""
    return -(-min(window or keys, keys) // 128) * 128


ORACLE = Oracle(
    name="swa_indices",
    operator="swa_indices",
    role="definition",
    source="FastDeploy get_swa_indexer_top_k (O21), REQUIRED form",
    run=run,
)
