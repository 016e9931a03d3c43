"""Tensors in memory of their own, where one byte too far is noticed by the tools that look for it.

For kernels built by `SANITIZED`:

    | no access | slack | tensor, its gaps between rows | no access |

Before and behind lie pages that nobody may touch. Slack and gaps are poisoned for AddressSanitizer, which
must be loaded in this process; an input's pages cannot be written.

On a GPU each tensor is an allocation of just its size, which compute-sanitizer knows the bounds of.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.buffers import Buffer

GUARD_BYTES = 1 << 30
"""Address space, not memory: an offset that is off by a row, a block or a sign lands there."""

ALIGNMENT = 256
"""Of a tensor's first element, as `Buffer` has it."""

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x20, 0x4000


@dataclass
class GuardedMemory:
    """The tensors of one launch; `close` gives their memory back and makes them unusable.

    Attributes:
        places: by name, where a tensor's first byte is and where the byte behind its last.
        inputs: names of those that may not be written.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    _mapped: list[tuple[int, int]] = field(default_factory=list)

    def tensor(self, name: str, buffer: Buffer, *, writable: bool) -> Tensor:
        """A copy of a buffer's view, of the same shape and strides.

        Raises:
            MemoryError: there is no address space for it.
        """
        view = buffer.view
        size = extent_of(view)
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        base = _map(GUARD_BYTES + pages + GUARD_BYTES)
        self._mapped.append((base, GUARD_BYTES + pages + GUARD_BYTES))
        first = base + GUARD_BYTES
        if size == 0:
            return view.new_empty(view.shape)
        start = first + pages - -(-size // ALIGNMENT) * ALIGNMENT
        _protect(first, pages, PROT_READ | PROT_WRITE)
        memory = torch.frombuffer((ctypes.c_ubyte * size).from_address(start), dtype=torch.uint8)
        copy_watched(buffer, memory)
        _asan("__asan_poison_memory_region", first, pages)
        for offset, length in _dense_parts(view):
            _asan("__asan_unpoison_memory_region", start + offset, length)
        if not writable:
            _protect(first, pages, PROT_READ)
            self.inputs.append(name)
        self.places[name] = (start, start + size)
        return torch.as_strided(memory.view(view.dtype), view.shape, view.stride())

    def close(self) -> None:
        """Gives the memory back, unpoisoned: other tensors may come to lie there."""
        for base, size in self._mapped:
            _asan("__asan_unpoison_memory_region", base + GUARD_BYTES, size - 2 * GUARD_BYTES)
            _LIBC.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))
        self._mapped.clear()


class DeviceMemory:
    """The same for a GPU, where torch's allocator must not cache: PYTORCH_NO_CUDA_MEMORY_CACHING=1."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.inputs: list[str] = []

    def tensor(self, name: str, buffer: Buffer, *, writable: bool) -> Tensor:
        """A copy of a buffer's view, of the same shape and strides."""
        view = buffer.view
        memory = torch.zeros(extent_of(view), dtype=torch.uint8, device=view.device)
        copy_watched(buffer, memory)
        return torch.as_strided(memory.view(view.dtype), view.shape, view.stride())

    def close(self) -> None:
        """Nothing: tensors free their memory."""


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value


def _map(size: int) -> int:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    found = _LIBC.mmap(None, ctypes.c_size_t(size), PROT_NONE, flags, -1, ctypes.c_long(0))
    if found is None or found == _MAP_FAILED:
        raise MemoryError(f"no address space for {size:,} bytes")
    return int(found)


def _protect(start: int, size: int, protection: int) -> None:
    if _LIBC.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), protection) != 0:
        raise MemoryError(f"{size:,} bytes could not be had: errno {ctypes.get_errno()}")


def _asan(function: str, start: int, size: int) -> None:
    getattr(_LIBC, function)(ctypes.c_void_p(start), ctypes.c_size_t(size))


def extent_of(view: Tensor) -> int:
    """Bytes from a view's first element to behind its last, gaps included."""
    if view.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return (last + 1) * view.element_size()


def _dense_parts(view: Tensor) -> list[tuple[int, int]]:
    """Offset and length, in bytes, of every part of a view that has no gap."""
    axes, dense = view.dim(), 1
    while axes > 0 and (view.stride(axes - 1) == dense or view.shape[axes - 1] == 1):
        axes -= 1
        dense *= view.shape[axes]
    item = view.element_size()
    outer = itertools.product(*(range(size) for size in view.shape[:axes]))
    strides = view.stride()[:axes]
    return [
        (sum(i * stride for i, stride in zip(index, strides, strict=True)) * item, dense * item)
        for index in outer
    ]


def copy_watched(buffer: Buffer, memory: Tensor) -> None:
    """The view's bytes and those of its gaps; of a huge buffer what is watched, the rest stays zero."""
    offset = buffer.view.storage_offset() * buffer.view.element_size()
    for start, end in buffer.watched:
        begin, stop = max(start, offset), min(end, offset + len(memory))
        if begin < stop:
            memory[begin - offset : stop - offset] = buffer.raw[begin:stop]
