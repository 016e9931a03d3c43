"""Positions again, counted slot after slot: neither batch ids nor prefix sums are looked at.

A slot's first new token stands right behind what it has cached, each further one a place on.
"""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """position_ids [Tp] int32."""
    batch_ids = tensor(inputs, "batch_id_per_token")
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    positions: list[int] = []
    for length, prefill, new in zip(cached, encoder, this_time, strict=True):
        # A prefill row's chunk is what it adds to the step (rule V1), so either number counts it.
        positions += range(length, length + (prefill or new))
    padding = batch_ids.numel() - len(positions)
    counted = torch.tensor(positions + [-1] * padding, dtype=torch.int32)
    return {"position_ids": counted.to(batch_ids.device)}


ORACLE = Oracle(
    name="position_ids_counted",
    operator="position_ids",
    role="derivation",
    source="FastDeploy get_position_ids_and_mask_encoder_batch (O01), its loops over slots",
    run=run,
)
