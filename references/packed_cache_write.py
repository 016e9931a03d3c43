"""Packed cache write by its definition: tiles of 128 in float32, rounded to e4m3 by Torch's own cast."""

from __future__ import annotations

from references._packed_rows import packed_rows
from references.oracle import Inputs, Oracle, Precision, Writes, tensor, text


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Writes]:
    """The rows written and their bytes; these are exact, so precision changes nothing."""
    cache, slot_mapping = tensor(inputs, "packed_cache"), tensor(inputs, "slot_mapping")
    written = (slot_mapping >= 0) & (slot_mapping < cache.shape[0] * cache.shape[2])
    latents, k_pe = tensor(inputs, "compressed_kv")[written], tensor(inputs, "k_pe")[written]
    rows = packed_rows(latents, k_pe, text(inputs, "scale_fmt"))
    return {"packed_cache": Writes(slot_mapping[written], rows)}


ORACLE = Oracle(
    name="packed_cache_write",
    operator="packed_cache_write",
    role="definition",
    source="FastDeploy section 3.3 (a) and (c), O17; the cast is Torch's",
    run=run,
)
