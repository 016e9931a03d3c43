"""Launchers that take torch tensors, on Paddle tensors: DLPack views of the same memory, Paddle's stream.

Two steps, which share nothing but the check below:

- `on_paddle` is the engine's: a launcher of torch tensors becomes one of Paddle tensors.
- `from_torch` is the harness's: a launcher of Paddle tensors becomes a path on the harness's torch tensors.

A view has the address and the strides of the tensor it was made from, or the call raises: a kernel that
reads a copy is slow, and one that writes a copy is wrong. The host waits for nothing.

Not: gradients; a tensor that asks for one is refused. Not verified on a GPU: no build of Paddle with CUDA was
at hand. Ordering the streams is, with a stand-in for Paddle (`tests/test_paddle.py`): by events, so that a
graph that torch captures holds the launch too. Whether a capture may wait for Paddle's current stream is
up to Paddle: for the legacy default stream none may.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

# Before Paddle, so that torch reads OMP_NUM_THREADS as it was set.
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from harness.kernel_path import Tensors

SIGACTION_BYTES = 256
"""Room for a `struct sigaction`: 152 bytes in glibc."""


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Undoes what importing Paddle does to the process; where Paddle was imported before, that is nothing.

    Paddle handles SIGTERM and five fatal signals, adds a handler to the root logger and lowers its level to
    INFO, sets OMP_NUM_THREADS, and warns of a missing ccache.
    """
    # Not paddle.disable_signal_handler(): it sets default actions, and Python's own handlers would be lost.
    libc = ctypes.CDLL(None)
    actions = {number: ctypes.create_string_buffer(SIGACTION_BYTES) for number in signal.valid_signals()}
    for number, action in actions.items():
        libc.sigaction(number, None, action)
    # A SIGTERM waits until its action is restored: Paddle's prints a traceback. (A thread of a pool that
    # some library began before may still take it.)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    threads = os.environ.get("OMP_NUM_THREADS")
    # A larger number makes Paddle print a notice. Nothing here is computed by Paddle.
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No ccache found", UserWarning)
            yield
    finally:
        for number, action in actions.items():
            libc.sigaction(number, action, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        root.setLevel(level)
        root.handlers[:] = handlers
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


with process_unchanged():
    import paddle

LANES = ("interpreted", "compiled") if paddle.is_compiled_with_cuda() else ("interpreted",)
"""Where this build of Paddle can hold the tensors."""


# ---- the engine's side ---------------------------------------------------------------------------


def on_paddle(launcher: Callable[..., None]) -> Callable[..., None]:
    """A launcher's like that takes Paddle tensors, alone or in mappings, and launches on Paddle's stream."""

    @wraps(launcher)
    def launch(*arguments: Any, **named: Any) -> None:
        arguments = tuple(_mapped(as_torch, paddle.Tensor, value) for value in arguments)
        named = _mapped(as_torch, paddle.Tensor, named)
        with ExitStack() as streams:
            # Triton launches on torch's current stream; what Paddle computed is ready on Paddle's.
            for device in _gpus(*arguments, named):
                streams.enter_context(torch.cuda.stream(stream_of_paddle(device)))
            launcher(*arguments, **named)

    return launch


def as_torch(tensor: paddle.Tensor) -> torch.Tensor:
    """A torch view of a Paddle tensor.

    Raises:
        ValueError: the tensor asks for a gradient.
        RuntimeError: the view is a copy.
    """
    # The kernels have no backward. A capsule would drop the gradient without a word.
    if not tensor.stop_gradient:
        raise ValueError("the kernel has no backward, but a tensor has stop_gradient=False: detach() it")
    # A capsule, not the tensor: asked for by the tensor, Paddle orders its stream before torch's.
    view = from_dlpack(paddle.to_dlpack(tensor))
    _require_same_memory(view, tensor)
    return view


def stream_of_paddle(device: torch.device) -> torch.cuda.Stream:
    """Paddle's current stream on a GPU."""
    # Not paddle.device.cuda.current_stream: deprecated, and in a build without CUDA it ends the process.
    _, handle = paddle.device.current_stream(f"gpu:{device.index}").__cuda_stream__()
    return torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]


# ---- the harness's side --------------------------------------------------------------------------


def from_torch(launch: Callable[[Tensors, Tensors, Tensors], None]) -> Callable[..., None]:
    """A path's `run`, for a launcher that takes inputs, outputs and workspace as Paddle tensors."""

    def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
        given = (inputs, outputs, workspace)
        presented = [_mapped(as_paddle, torch.Tensor, tensors) for tensors in given]
        with ExitStack() as joined:
            for device in _gpus(*given):
                joined.enter_context(_between(torch.cuda.current_stream(device), stream_of_paddle(device)))
            launch(*presented)

    return run


def as_paddle(tensor: torch.Tensor) -> paddle.Tensor:
    """A Paddle view of a torch tensor.

    Raises:
        RuntimeError: the view is a copy.
    """
    view = paddle.from_dlpack(to_dlpack(tensor))
    _require_same_memory(tensor, view)
    return view


@contextmanager
def _between(ours: torch.cuda.Stream, theirs: torch.cuda.Stream) -> Iterator[None]:
    """Work enqueued on `theirs` runs after what `ours` held, and before what it will hold."""
    theirs.wait_stream(ours)
    try:
        yield
    finally:
        # Where the launch raised too: a capture that is not joined again cannot be ended.
        ours.wait_stream(theirs)


# ---- of both -------------------------------------------------------------------------------------


def _require_same_memory(ours: torch.Tensor, theirs: paddle.Tensor) -> None:
    """Raises RuntimeError where one of a pair is a copy: Paddle may copy what is strided."""
    # A tensor without elements has no address in DLPack; torch reports 0, Paddle what it likes.
    moved = ours.numel() > 0 and ours.data_ptr() != theirs.data_ptr()
    if moved or ours.stride() != tuple(theirs.strides):
        raise RuntimeError(
            f"DLPack must hand on the same memory, but torch has strides {list(ours.stride())} at "
            f"{ours.data_ptr():#x} and Paddle {list(theirs.strides)} at {theirs.data_ptr():#x}: "
            "allocate it contiguous"
        )


def _mapped(convert: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """The value, converted if it is of a kind; of a mapping, its values."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, Mapping):
        return {name: _mapped(convert, kind, item) for name, item in value.items()}
    return value


def _gpus(*values: Any) -> set[torch.device]:
    """Where those of the values are that are torch tensors on a GPU; of a mapping, its values."""
    found = set()
    for value in values:
        if isinstance(value, Mapping):
            found |= _gpus(*value.values())
        elif isinstance(value, torch.Tensor) and value.is_cuda:
            found.add(value.device)
    return found
