"""The first part of a composed path that departs, told by what it left in its workspace.

A workspace tensor that has the name of step metadata, or of an output of another operator, holds what that
name means everywhere: what is computed from others can be compared before the output is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.checks._check import bits_differ
from harness.launch import Launch
from harness.metadata import slot_mapping
from references.oracle import oracle_for

METADATA = ("cu_seqlens_q", "batch_id_per_token", "cu_seqlens_k", "cu_seqlens_k_prefill", "position_ids")
KEYS = ("full_compressed_kv", "full_k_pe")


def first_part(launch: Launch, index: int) -> str:
    """The name of the first tensor of a layer's workspace that is not what its name says; or empty."""
    workspace = launch.layers[index].workspace
    for name, expected in _expected(launch, index):
        if name not in workspace:
            continue
        got = workspace[name].view[: len(expected)]
        if bool(bits_differ(got, expected.to(got.device, got.dtype)).any()):
            return name
    return ""


def _expected(launch: Launch, index: int) -> Iterator[tuple[str, Tensor]]:
    """What workspace tensors hold, in the order in which one is made from another; of real tokens alone."""
    metadata, layer = launch.batch.metadata, launch.layers[index]
    real = int(metadata.cu_seqlens_q[-1])
    for name in METADATA:
        values = torch.from_numpy(getattr(metadata, name))
        yield name, values[:real] if name == "position_ids" else values
    if "block_tables" not in layer.batch.tensors or not set(KEYS) & set(layer.workspace):
        return
    tables = layer.batch.tensors["block_tables"].cpu().numpy()
    slots = slot_mapping(metadata, tables, layer.batch.layer.block_size)
    yield "slot_mapping", torch.from_numpy(slots[:real])
    if layer.batch.layer.cache != "same":
        # Its keys are read as they are packed, and never gathered.
        return
    step = {name: torch.from_numpy(getattr(metadata, name)) for name in METADATA}
    # History is not written by a step: the cache may be read after it.
    inputs = {**layer.inputs, **{name: step[name] for name in ("cu_seqlens_q", "cu_seqlens_k_prefill")}}
    keys = oracle_for("read_cache_interleave", "definition").run(inputs, None)
    for name in KEYS:
        value = keys[name]
        if isinstance(value, Tensor):
            yield name, value
