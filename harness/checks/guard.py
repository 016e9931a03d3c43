"""Check `guard`: nothing is written outside the outputs, the workspace and, in a cache, the declared rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness.buffers import Buffer
from harness.checks._check import CheckPlugin
from harness.launch import Launch, LayerLaunch
from harness.verdict import CheckResult, Kind, Status, Where, ranges
from references.oracle import Writes


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result an output and a workspace tensor."""
    for index, layer in enumerate(launch.layers):
        buffers = {**layer.outputs, **layer.workspace}
        for name, buffer in buffers.items():
            label = launch.tensor_label(name, index)
            if launch.path.allocates:
                reason = "the library allocates its own outputs"
                yield CheckResult("guard", Status.SKIPPED, label, reason=reason)
            elif name in launch.operator.in_place:
                yield _in_place(launch, layer, index, name, label)
            elif buffer.untouched_outside():
                yield CheckResult("guard", Status.PASSED, label)
            else:
                reason = f"the path wrote outside {label}, into the guard bands or the gaps of a strided view"
                yield CheckResult("guard", Status.FAILED, label, Kind.GUARD, reason)


def _in_place(launch: Launch, layer: LayerLaunch, index: int, name: str, label: str) -> CheckResult:
    """Every byte but those of the declared rows must be as before the launch."""
    buffer = layer.outputs[name]
    writes = launch.expected(index)[name]
    if not isinstance(writes, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return Writes for {name}")
    # Rounded if need be: both sides get the same, and only the bytes around them are compared.
    values = writes.values.to(buffer.view.dtype)
    after = buffer.snapshot()
    flat = buffer.view.view(-1, buffer.view.shape[-1])
    flat[writes.rows] = values
    outside_after = buffer.snapshot()
    buffer.restore(layer.before[name])
    flat[writes.rows] = values
    outside_before = buffer.snapshot()
    buffer.restore(after)
    if torch.equal(outside_after, outside_before):
        return CheckResult("guard", Status.PASSED, label)
    where = Where(blocks=_blocks(buffer, outside_after, outside_before))
    reason = f"the path wrote to {label} outside the rows that the case declares"
    return CheckResult("guard", Status.FAILED, label, Kind.GUARD, reason, where=where)


def _blocks(buffer: Buffer, after: torch.Tensor, before: torch.Tensor) -> str:
    """Physical blocks with a differing byte; empty where only guards differ or the buffer is sparse."""
    if buffer.sparse:
        return ""
    offset = buffer.view.storage_offset() * buffer.view.element_size()
    block_bytes = buffer.view.stride(0) * buffer.view.element_size()
    body = slice(offset, offset + block_bytes * buffer.view.shape[0])
    differs = (after[body] != before[body]).view(buffer.view.shape[0], -1).any(1)
    return ranges(differs.nonzero().flatten().tolist())


CHECK = CheckPlugin("guard", "nothing is written outside what the contract declares", run)
