"""Timing paths, in a worker of lane `compiled`, beside what the device can do in the same run.

Every time is the median of launches of a captured CUDA graph, timed with events, each after L2 has been
overwritten. Ceilings: a copy and a read of 2 GiB, a bf16 product of two 8192 x 8192 random matrices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from cases import parse
from cases.contract import contract_of
from harness.kernel_path import KernelPath
from harness.lanes import Lane
from harness.launch import Launch, PathFailure
from harness.task import Measured, Rates, Task

FLUSH_BYTES = 256 << 20
"""Five times the L2 of an H100."""

ROUNDS = 15
CEILING_ELEMENTS = 1 << 29
MATRIX = 8192


def ceilings() -> Rates:
    """Measures the device."""
    copy, read = _memory_rates()
    return Rates(torch.cuda.get_device_name(), copy, read, _matrix_rate())


def _memory_rates() -> tuple[float, float]:
    """Bytes a second copied, reads and writes counted, and bytes a second read."""
    source = torch.empty(CEILING_ELEMENTS, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    # As a kernel and as the driver's own copy: the faster one is what can be done.
    as_kernel = median_seconds(lambda: torch.neg(source, out=target))
    as_copy = median_seconds(lambda: target.copy_(source))
    read = median_seconds(lambda: torch.sum(source, dim=0, out=target[0]))
    return 2 * size / min(as_kernel, as_copy), size / read


def _matrix_rate() -> float:
    """Operations a second of a bf16 matrix product."""
    left = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
    right, product = torch.randn_like(left), torch.empty_like(left)
    return 2 * MATRIX**3 / median_seconds(lambda: torch.mm(left, right, out=product))


def measure(tasks: Sequence[Task], paths: Mapping[str, KernelPath], lane: Lane) -> list[Measured]:
    """The median time of one case on each path, all its layers in turn.

    Paths take turns, round by round: what the clocks do, they do to all. One that raises is left out.
    """
    case = parse(tasks[0].case)
    operator = contract_of(case)
    found: dict[str, Measured] = {}
    launches: dict[str, Callable[[], None]] = {}
    for task in tasks:
        unsupported = paths[task.path].supports(case)
        if unsupported is None and operator.work is None:
            unsupported = f"{operator.name} states no work to compare a time with"
        if unsupported is not None:
            found[task.path] = Measured(task.case, task.path, reason=unsupported)
            continue
        try:
            launch = Launch.prepare(case, paths[task.path], lane)
            launch.run()
            # Made once a step for all layers, and outside the graph that an engine captures.
            launches[task.path] = partial(launch.enqueue, launch.plan())
        except PathFailure as error:
            found[task.path] = Measured(task.case, task.path, reason=str(error))
    medians = dict(zip(launches, medians_of(list(launches.values())), strict=True))
    work = [operator.work(case, layer) for layer in case.layers if operator.work is not None]
    for path, seconds in medians.items():
        found[path] = Measured(
            tasks[0].case,
            path,
            seconds=seconds,
            bytes=sum(part.bytes for part in work),
            flops=sum(part.flops for part in work),
        )
    return [found[task.path] for task in tasks]


def median_seconds(launch: Callable[[], object]) -> float:
    """Median of ROUNDS replays of what `launch` enqueues, L2 cold each time."""
    return medians_of([launch])[0]


def medians_of(launches: Sequence[Callable[[], object]]) -> list[float]:
    """The same of several, which take turns."""
    graphs = [_captured(launch) for launch in launches]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, times in zip(graphs, seconds, strict=True):
            flush.zero_()
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
    return [statistics.median(times) for times in seconds]


def _captured(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `launch` enqueues, after it was launched once."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
