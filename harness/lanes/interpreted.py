"""Triton kernels run by Triton's interpreter, program after program, on any machine."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from harness.lanes._lane import Lane

if TYPE_CHECKING:
    from harness.coverage.collect import Collector


def unavailable() -> str | None:
    """None, or what is missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'mla-harness[triton]'"
    return None


def start() -> None:
    """Repairs the interpreter and watches every pointer it follows."""
    import numpy as np
    import torch

    from harness import bounds, interpreter

    # Kernels overflow and make NaN silently, as on a GPU: what comes of it is for the checks to judge.
    np.seterr(all="ignore")
    # Workers share the processors; the interpreter itself uses one.
    torch.set_num_threads(1)
    interpreter.repair()
    bounds.install()


def measure(collector: Collector) -> None:
    """Lines come from coverage.py; lanes of masks and empty loops from the interpreter."""
    collector.watch_interpreter()


LANE = Lane(
    name="interpreted",
    device="cpu",
    # Triton reads it when @triton.jit decorates; set after `import triton` it would raise.
    environment={
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # A kernel's plan asks for the GPU's size, and a forked process may not: no GPU, on any machine.
        "CUDA_VISIBLE_DEVICES": "",
    },
    unavailable=unavailable,
    start=start,
    measure=measure,
)
