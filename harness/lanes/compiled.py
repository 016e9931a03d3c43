"""Kernels compiled for and run on an NVIDIA GPU."""

from __future__ import annotations

from harness.lanes._lane import Lane


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


LANE = Lane(
    name="compiled",
    device="cuda",
    environment={"TRITON_INTERPRET": None},
    unavailable=unavailable,
    start=start,
    synchronize=synchronize,
)
