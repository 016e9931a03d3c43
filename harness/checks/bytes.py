"""Check `bytes`: a step takes and moves no more memory than what its rows need.

Taken: the workspace that the path asks for. Moved: the least that the operator must move (its `work`), and
twice what the launch wrote of its workspace, which is what no longer holds the poison that was there. Both
may be `SLACK` times what the contract grants (its `scratch`). Allocated while the path runs: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.allocation import allocations
from harness.buffers import NAN_BYTE, Buffer, bytes_of
from harness.checks._check import CheckPlugin
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status

SLACK = 1.25
"""A quarter for tails and metadata: a second copy of the values would be more."""

SMALL_BYTES = 1 << 16
"""What nobody counts, a layer: metadata and tails."""


def run(launch: Launch) -> Iterator[CheckResult]:
    """Launches again, counting."""
    scratch, work = launch.operator.scratch, launch.operator.work
    if scratch is None or work is None:
        reason = f"the contract of {launch.operator.name} does not say what scratch memory it needs"
        yield CheckResult("bytes", Status.SKIPPED, reason=reason)
        return
    launch.reset()
    with allocations(launch.lane) as allocated:
        # Not `run`: waiting for the device computes something itself.
        launch.enqueue()
    launch.lane.synchronize()
    case = launch.case
    granted = sum(int(SLACK * scratch(case, layer)) + SMALL_BYTES for layer in case.layers)
    least = sum(work(case, layer).bytes for layer in case.layers)
    buffers = [buffer for layer in launch.layers for buffer in layer.workspace.values()]
    taken = sum(_size(buffer) for buffer in buffers)
    written = sum(_written(buffer) for buffer in buffers)
    by_scratch = f"{SLACK} x what the contract grants, and {SMALL_BYTES // 2**10} KiB a layer"
    for what, got, allowed, source in (
        ("taken", taken, granted, by_scratch),
        ("moved", least + 2 * written, least + 2 * granted, by_scratch),
        ("allocated", allocated.bytes, 0, "a path gets its scratch memory from the harness"),
    ):
        if what == "allocated" and launch.path.allocates:
            yield CheckResult("bytes", Status.SKIPPED, what, reason="the library allocates its own outputs")
            continue
        measured = {"error": float(got), "budget": float(allowed), "budget_source": source}
        if got <= allowed:
            yield CheckResult("bytes", Status.PASSED, what, **measured)  # type: ignore[arg-type]
            continue
        reason = f"{got:,} bytes are {what}, and the rows need at most {allowed:,}"
        yield CheckResult("bytes", Status.FAILED, what, Kind.WRONG, reason, **measured)  # type: ignore[arg-type]


def _size(buffer: Buffer) -> int:
    return buffer.view.numel() * buffer.view.element_size()


def _written(buffer: Buffer) -> int:
    """Bytes of a workspace tensor that no longer hold its poison, in whole elements."""
    if buffer.view.numel() == 0:
        return 0
    if buffer.view.is_floating_point():
        changed = (bytes_of(buffer.view) != NAN_BYTE).view(*buffer.view.shape, -1).any(-1)
    else:
        pristine = Buffer.allocate(buffer.view.shape, buffer.view.dtype, buffer.view.device)
        changed = buffer.view != pristine.view
    return int(changed.sum()) * buffer.view.element_size()


CHECK = CheckPlugin("bytes", "no more memory is taken and moved than the rows need", run, relaunches=True)
