"""CUDA kernels compiled for the processor, every thread a fiber, on any machine with g++."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.lanes._lane import Lane

if TYPE_CHECKING:
    from harness.coverage.collect import Collector


def unavailable() -> str | None:
    """None, or what is missing."""
    from harness.cuda import build

    return build.lacking(build.HOST)


def start() -> None:
    """Paths of this process are built by g++."""
    import torch

    from harness.cuda import build

    # Workers share the processors; kernels use one.
    torch.set_num_threads(1)
    build.use(build.HOST)


def measure(collector: Collector) -> None:
    """Kernels tell by probes; what launches them is Python."""
    from harness.coverage.cuda import CudaProbes
    from harness.cuda import build

    probes = CudaProbes(collector.files)
    build.measure(probes)
    collector.add_source(probes.take)


LANE = Lane(
    name="host",
    device="cpu",
    environment={
        "TRITON_INTERPRET": None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # A kernel's plan asks for the GPU's size, and a forked process may not: no GPU, on any machine.
        "CUDA_VISIBLE_DEVICES": "",
    },
    unavailable=unavailable,
    start=start,
    measure=measure,
)
