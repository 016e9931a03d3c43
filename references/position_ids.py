"""Positions by their definition: cached length of the token's slot plus the token's place in its row."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """position_ids [Tp] int32; integers, so precision changes nothing."""
    batch_ids = tensor(inputs, "batch_id_per_token").long()
    starts = tensor(inputs, "cu_seqlens_q").long()
    cached = tensor(inputs, "seq_lens_decoder").long()
    real = batch_ids >= 0
    slots = batch_ids[real]
    tokens = torch.arange(len(batch_ids), device=batch_ids.device)[real]
    positions = torch.full_like(batch_ids, -1)
    positions[real] = cached[slots] + tokens - starts[slots]
    return {"position_ids": positions.to(torch.int32)}


ORACLE = Oracle(
    name="position_ids",
    operator="position_ids",
    role="definition",
    source="FastDeploy get_position_ids_and_mask_encoder_batch (O01), REQUIRED form",
    run=run,
)
