"""What probes call in kernels. Each is given the buffer of flags, or None and then compiles to nothing.

The buffer is COPIES * CAPACITY bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from harness.coverage.probes import CAPACITY, COPIES

_CAPACITY = tl.constexpr(CAPACITY)
_COPIES = tl.constexpr(COPIES)


@triton.jit
def _own(flags):
    """The program's copy: neighbours have different ones."""
    program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2)
    return flags + program % _COPIES * _CAPACITY


@triton.jit
def hit(flags, NUMBER: tl.constexpr):
    """Sets a flag: a block of statements runs. A plain store, for any number of programs may do it."""
    if flags is not None:
        tl.store(_own(flags) + NUMBER, 1)


@triton.jit
def masked(flags, ON: tl.constexpr, OFF: tl.constexpr, mask):
    """The mask; sets a flag if some lane is on, another if some lane is off."""
    if flags is not None:
        # Broadcast with a block of one, masks of any rank and constants alike become blocks.
        lanes = ((tl.full([1], 0, tl.int32) | mask) != 0).to(tl.int32)
        tl.store(_own(flags) + ON, 1, mask=tl.max(lanes) != 0)
        tl.store(_own(flags) + OFF, 1, mask=tl.min(lanes) == 0)
    return mask


@triton.jit
def entered(flags, EMPTY: tl.constexpr, BODY: tl.constexpr, start, stop, step):
    """Sets a flag if a range is empty, and another if it is not."""
    if flags is not None:
        is_empty = ((step > 0) & (start >= stop)) | ((step < 0) & (start <= stop))
        has_trips = ((step > 0) & (start < stop)) | ((step < 0) & (start > stop))
        tl.store(_own(flags) + EMPTY, 1, mask=is_empty)
        tl.store(_own(flags) + BODY, 1, mask=has_trips)


@triton.jit
def tested(flags, NUMBER: tl.constexpr, test):
    """Sets a flag if a loop's condition is false before its first trip."""
    if flags is not None:
        tl.store(_own(flags) + NUMBER, 1, mask=(tl.full([], 0, tl.int32) | test) == 0)
