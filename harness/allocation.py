"""What a path allocates while it runs. It should be nothing: scratch memory comes from the harness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.lanes import Lane


@dataclass
class Allocated:
    """Bytes that were allocated, whether freed again or not."""

    bytes: int = 0


@contextmanager
def allocations(lane: Lane) -> Iterator[Allocated]:
    """Counts what torch allocates on the lane's device; read the count after the block."""
    allocated = Allocated()
    if lane.device == "cuda":
        before = _cuda_bytes()
        yield allocated
        allocated.bytes = _cuda_bytes() - before
        return
    counter = _Counter()
    with counter, _uncounted_interpreter(counter):
        yield allocated
    allocated.bytes = counter.bytes


def _cuda_bytes() -> int:
    """All that was ever allocated."""
    return int(torch.cuda.memory_stats().get("allocated_bytes.all.allocated", 0))


class _Counter(TorchDispatchMode):
    """Adds up the new storages among the results of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.is_paused:
            known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                    self.bytes += leaf.untyped_storage().nbytes()
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _uncounted_interpreter(counter: _Counter) -> Iterator[None]:
    """Leaves out the copies that Triton's interpreter makes of a launch's tensors."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    launch = GridExecutor.__call__

    def paused(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.is_paused = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            counter.is_paused = False

    with patch.object(GridExecutor, "__call__", paused):
        yield
