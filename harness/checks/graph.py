"""Check `graph`: a captured CUDA graph, replayed with other lengths and tables, equals an eager launch.

Captured on the launch's own tensors, then replayed on (1) the same contents, (2) the slots in reverse:
other lengths, tables and data in tensors of the same shapes, (3) the last decode row turned idle and
its tokens become padding. Outputs and workspace are poisoned before every replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from cases import Case, Kind, Row
from harness.buffers import Buffer
from harness.checks._check import CheckPlugin, same_bits
from harness.checks._variant import keyed_rows
from harness.kernel_path import no_plan
from harness.launch import Launch
from harness.verdict import CheckResult, Status
from harness.verdict import Kind as VerdictKind


def run(launch: Launch) -> Iterator[CheckResult]:
    """Captures once and replays on every variant of the batch."""
    if launch.path.plan is not no_plan:
        yield CheckResult(
            "graph", Status.SKIPPED, reason="the library's engine plans a step outside the graph"
        )
        return
    if launch.batch.metadata.tokens == 0:
        yield CheckResult("graph", Status.SKIPPED, reason="no token: nothing is launched")
        return
    launch.reset()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        launch.enqueue()
    launch.lane.synchronize()
    for what, case in (("the same batch", launch.case), *_variants(launch)):
        eager = Launch.prepare(case, launch.path, launch.lane)
        if not _same_shapes(launch, eager):
            yield CheckResult("graph", Status.SKIPPED, reason=f"{what}: tensors have other shapes")
            continue
        _share_scratch(launch, eager)
        _load(launch, eager)
        eager.run()
        graph.replay()
        launch.lane.synchronize()
        for index in range(len(launch.layers)):
            for spec in launch.operator.outputs:
                label = launch.tensor_label(spec.name, index)
                reason = f"{label} of a replay on {what} differs from an eager launch"
                got = eager_rows(launch, eager, spec.name, index)
                expected = eager.token_rows(spec.name, index)
                yield same_bits("graph", VerdictKind.WRONG, eager, label, got, expected, reason)
    _load(launch, Launch.prepare(launch.case, launch.path, launch.lane))
    launch.run()


def eager_rows(launch: Launch, eager: Launch, name: str, index: int) -> torch.Tensor:
    """The replay's output by token, rows placed as the eager batch has them."""
    replayed = replace(eager, layers=launch.layers)
    return replayed.token_rows(name, index)


def _variants(launch: Launch) -> Iterator[tuple[str, Case]]:
    rows = keyed_rows(launch)
    slots = [row for row in rows if row.is_slot]
    padding = sum(row.new for row in rows if not row.is_slot)
    tail = [Row(Kind.PAD, new=padding)] if padding else []
    yield "reversed slots", replace(launch.case, steps=((*reversed(slots), *tail),))
    decoding = [slot for slot, row in enumerate(slots) if row.is_decode]
    if decoding:
        freed = slots[decoding[-1]]
        kept = list(slots)
        kept[decoding[-1]] = Row(Kind.IDLE)
        steps = ((*kept, Row(Kind.PAD, new=padding + freed.new)),)
        variant = replace(launch.case, steps=steps)
        pools = {layer.batch.pages.num_blocks for layer in launch.layers}
        if len(pools) == 1 and "pool" in launch.operator.options:
            # A captured graph keeps its cache; layers with pools of their own are told apart by shape.
            variant = variant.with_options(pool=pools.pop())
        yield "a row turned idle", variant


def _same_shapes(launch: Launch, eager: Launch) -> bool:
    return all(
        [buffer.view.shape for buffer in (*ours.batch.inputs.values(), *ours.outputs.values())]
        == [buffer.view.shape for buffer in (*theirs.batch.inputs.values(), *theirs.outputs.values())]
        for ours, theirs in zip(launch.layers, eager.layers, strict=True)
    )


def _share_scratch(launch: Launch, eager: Launch) -> None:
    """Gives the eager launch workspace of the captured shapes: what an engine keeps for both.

    A path may plan by the room it has, and another plan may give other bits.
    """
    for ours, theirs in zip(launch.layers, eager.layers, strict=True):
        theirs.workspace = {
            name: Buffer.allocate(buffer.view.shape, buffer.view.dtype, buffer.view.device)
            for name, buffer in ours.workspace.items()
        }


def _load(launch: Launch, source: Launch) -> None:
    """Copies another batch's inputs into the captured tensors and poisons outputs and workspace."""
    launch.reset()
    for ours, theirs in zip(launch.layers, source.layers, strict=True):
        for name, buffer in ours.batch.inputs.items():
            buffer.raw.copy_(theirs.batch.inputs[name].raw)


CHECK = CheckPlugin(
    "graph",
    "a replayed CUDA graph equals an eager launch, with other lengths and tables too",
    run,
    lanes=("compiled",),
    relaunches=True,
)
