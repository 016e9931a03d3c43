"""Cache write by its definition: token t goes to physical row slot_mapping[t] unless that is negative."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Precision, Writes, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their contents; a copy, so precision changes nothing."""
    slot_mapping = tensor(inputs, "slot_mapping")
    written = slot_mapping >= 0
    rows = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=-1)
    return {"latent_cache": Writes(slot_mapping[written], rows[written])}


ORACLE = Oracle(
    name="latent_cache_write",
    operator="latent_cache_write",
    role="definition",
    source="FastDeploy mla_write_cache_triton (O15)",
    run=run,
)
