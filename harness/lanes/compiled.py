"""Kernels compiled for and run on an NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.lanes._lane import Lane

if TYPE_CHECKING:
    from harness.coverage.collect import Collector


def unavailable() -> str | None:
    """None, or what is missing."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device answers"
    return None


def start() -> None:
    """CUDA paths of this process are built by nvcc."""
    from harness.cuda import build

    build.use(build.DEVICE)


def synchronize() -> None:
    """Waits, then runs a sentinel: an error left behind by a kernel shows here and not in the next case."""
    import torch

    torch.cuda.synchronize()
    sentinel = torch.ones(1, device="cuda") + 1
    if sentinel.item() != 2:
        raise RuntimeError("the CUDA context computes 1 + 1 wrongly: it is broken")


def measure(collector: Collector) -> None:
    """Compiled kernels of both languages tell by probes; what launches them is Python."""
    from harness.coverage.cuda import CudaProbes
    from harness.coverage.probes import Probes
    from harness.cuda import build

    probes = Probes(collector.files, LANE.device)
    probes.install()
    collector.add_source(probes.take)
    cuda_probes = CudaProbes(collector.files)
    build.measure(cuda_probes)
    collector.add_source(cuda_probes.take)


LANE = Lane(
    name="compiled",
    device="cuda",
    environment={"TRITON_INTERPRET": None},
    unavailable=unavailable,
    start=start,
    synchronize=synchronize,
    measure=measure,
)
