"""`Buffer`: a tensor between guard bands, which can tell what was written where.

    raw:  | guard | view (perhaps strided, with gaps) | guard |

Guards, gaps and, for outputs, the view itself are poisoned before a launch; afterwards every byte that
the launch was not allowed to write must hold what it held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.paging import HUGE_BLOCK_ID

NAN_BYTE = 0xFF
"""0xFF bytes are NaN in e4m3, fp16, bf16 and fp32 alike; 0x7F would be finite in fp32."""

MIN_GUARD_BYTES = 4096
MAX_GUARD_BYTES = 1 << 20
GAP_HEADS = 1
GAP_COLUMNS = 128
"""Strided views leave out this much of every axis: rows stay aligned to 16 bytes."""

SPARSE_BYTES = 256 << 20
"""A tensor above this size is watched, poisoned and digested only around what is in use."""


@dataclass
class Buffer:
    """One tensor in its own allocation.

    Attributes:
        raw: [bytes] uint8, the whole allocation.
        view: the tensor that is handed out; storage shared with raw.
        watched: byte ranges of raw that are poisoned and compared; the whole of it unless the tensor is
            huge.
    """

    raw: Tensor
    view: Tensor
    watched: tuple[tuple[int, int], ...]

    @classmethod
    def allocate(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        strided: bool = False,
        row_axes: int = 1,
        used_rows: Tensor | None = None,
    ) -> Buffer:
        """An allocation whose every watched byte is poisoned: NaN, or for integers a huge block id.

        Args:
            shape: shape of the view.
            strided: leave gaps between the rows of the view (the last axis stays dense).
            row_axes: how many leading axes make up a "row" for guards (a cache's block is one).
            used_rows: for huge tensors, the indices along axis 0 that are in use.
        """
        padded = list(shape)
        if strided and len(shape) > 1:
            padded[-1] += GAP_COLUMNS
            for axis in range(1, len(shape) - 1):
                padded[axis] += GAP_HEADS
        itemsize = dtype.itemsize
        row_bytes = itemsize
        for size in padded[row_axes:]:
            row_bytes *= size
        guard = min(max(row_bytes, MIN_GUARD_BYTES), MAX_GUARD_BYTES) // 256 * 256
        body = row_bytes
        for size in padded[:row_axes]:
            body *= size
        total = guard + -(-body // 256) * 256 + guard
        raw = torch.empty(total, dtype=torch.uint8, device=device)
        strides = [0] * len(padded)
        step = 1
        for axis in reversed(range(len(padded))):
            strides[axis] = step
            step *= padded[axis]
        # torch gives empty tensors data_ptr 0, but storage and offset of this one lie between its guards.
        typed = raw[guard:].view(dtype) if dtype is not torch.uint8 else raw[guard:]
        view = torch.as_strided(typed, tuple(shape), tuple(strides), typed.storage_offset())
        watched: tuple[tuple[int, int], ...] = ((0, total),)
        if total > SPARSE_BYTES and used_rows is not None:
            watched = _around(used_rows, row_bytes, guard, total)
        buffer = cls(raw, view, watched)
        buffer.poison()
        return buffer

    @property
    def sparse(self) -> bool:
        """Whether only parts of the buffer are watched."""
        return self.watched != ((0, len(self.raw)),)

    @property
    def word(self) -> int:
        """The 32-bit pattern that poisons this buffer: NaN bytes, or a huge block id for integers."""
        is_integer = self.view.dtype in (torch.int32, torch.int64)
        return HUGE_BLOCK_ID if is_integer else -1

    def poison(self) -> None:
        """Fills every watched byte."""
        for start, end in self.watched:
            self.raw[start:end].view(torch.int32).fill_(self.word)

    def snapshot(self) -> Tensor:
        """The watched bytes, copied. uint8 [n]."""
        return torch.cat([self.raw[start:end] for start, end in self.watched])

    def equals(self, snapshot: Tensor) -> bool:
        """Whether the watched bytes are those of a snapshot."""
        return torch.equal(self.snapshot(), snapshot)

    def restore(self, snapshot: Tensor) -> None:
        """Puts the bytes of a snapshot back."""
        done = 0
        for start, end in self.watched:
            self.raw[start:end] = snapshot[done : done + end - start]
            done += end - start

    def untouched_outside(self) -> bool:
        """Whether guards and gaps still hold poison; the view may hold anything."""
        kept = self.view.clone()
        self.poison_view()
        intact = all(
            bool((self.raw[start:end].view(torch.int32) == self.word).all()) for start, end in self.watched
        )
        self.view.copy_(kept)
        return intact

    def poison_view(self) -> None:
        """Fills the view, and only it."""
        self._fill(self.view)

    def holds_poison(self) -> Tensor:
        """Elements of the view that hold the bits they were poisoned with, bool, shaped as the view."""
        if self.view.numel() == 0:
            return torch.zeros(self.view.shape, dtype=torch.bool, device=self.view.device)
        poison = torch.empty_like(self.view, memory_format=torch.contiguous_format)
        self._fill(poison)
        same = bytes_of(self.view.contiguous()) == bytes_of(poison)
        return same.view(*self.view.shape, self.view.dtype.itemsize).all(-1)

    def _fill(self, tensor: Tensor) -> None:
        """Poisons a tensor of the view's dtype."""
        if tensor.dtype is torch.int64:
            tensor.fill_((self.word << 32) | self.word)
        elif tensor.dtype is torch.int32:
            tensor.fill_(self.word)
        else:
            bytes_of(tensor).fill_(NAN_BYTE)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor whose last axis is dense, as uint8 with a wider last axis."""
    if tensor.dtype is torch.uint8:
        return tensor
    return tensor.view(torch.uint8)


def _around(used: Tensor, row_bytes: int, guard: int, total: int) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the used rows, their neighbours and the guards, merged."""
    rows = sorted({row + near for row in used.tolist() for near in (-1, 0, 1)})
    ranges = [(0, guard), (total - guard, total)]
    for row in rows:
        start = guard + row * row_bytes
        if start >= guard and start + row_bytes <= total - guard:
            ranges.append((start, start + row_bytes))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
