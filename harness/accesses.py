"""What interpreted kernels do to memory, for all who want to see it: loads, stores, atomics and selects.

Triton's interpreter is patched here once. Watchers are called before each access with what it is, its
pointers and its mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

Watcher = Callable[[str, Any, npt.NDArray[np.bool_]], None]
"""(load, store, atomic or select; the handle of the pointers, None for a select; the mask) -> None."""

_WATCHERS: list[Watcher] = []
"""Those of this process."""


def watch(watcher: Watcher) -> None:
    """Shows a watcher every access of this process from now on."""
    if not _WATCHERS:
        _patch()
    _WATCHERS.append(watcher)


def _patch() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    cas, rmw = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw
    select = InterpreterBuilder.create_select

    def new_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _tell("load", ptrs, mask.data)
        return load(self, ptrs, mask, *rest)

    def new_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _tell("store", ptrs, mask.data)
        return store(self, ptrs, value, mask, *rest)

    def new_cas(self: Any, ptr: Any, *rest: Any) -> Any:
        _tell("atomic", ptr, np.ones_like(ptr.data, dtype=bool))
        return cas(self, ptr, *rest)

    def new_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        _tell("atomic", ptr, mask.data)
        return rmw(self, op, ptr, val, mask, *rest)

    def new_select(self: Any, condition: Any, *rest: Any) -> Any:
        _tell("select", None, condition.data)
        return select(self, condition, *rest)

    InterpreterBuilder.create_masked_load = new_load
    InterpreterBuilder.create_masked_store = new_store
    InterpreterBuilder.create_atomic_cas = new_cas
    InterpreterBuilder.create_atomic_rmw = new_rmw
    InterpreterBuilder.create_select = new_select


def _tell(what: str, pointers: Any, mask: npt.NDArray[np.bool_]) -> None:
    for watcher in _WATCHERS:
        watcher(what, pointers, mask)


def kernel_frame() -> FrameType | None:
    """The innermost frame that belongs to a kernel, None if there is none."""
    library = _library()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((library, "<")) and file not in OURS:
            return frame
        frame = frame.f_back
    return None


OURS = {__file__}
"""Files of watchers, whose frames lie between the interpreter's."""


@cache
def _library() -> str:
    import triton

    return str(Path(triton.__file__).parent)
