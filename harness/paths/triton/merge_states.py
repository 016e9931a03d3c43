"""Merge two attention states over disjoint keys, outputs with their LSEs, into the state over all of them.

Inputs
    prefix_out                 [Tp, H, V]     model dtype, token and head strides free, last axis dense
    prefix_lse                 [Tp, H] f32    natural log, token stride free; infinite: the state is empty
    suffix_out                 [Tp, H, V]     like prefix_out
    suffix_lse                 [Tp, H] f32    like prefix_lse
Outputs
    out                        [Tp, H, V]     model dtype, token and head strides free, last axis dense
    lse                        [Tp, H] f32    natural log, token stride free, last axis dense

lse = ln(exp(prefix_lse) + exp(suffix_lse)), and out is the sum of both outputs, each times exp(its LSE less
lse); computed in fp32 from differences of LSEs, so that none overflows, and rounded once. An infinite LSE, of
either sign, says that its state has seen no key: its output is not read, NaN even. With two of them out is 0
and lse -inf.

out may be the output of one of the states: every element is read before it is written. lse has memory of its
own. NaN in an LSE is handed on.

Any H, V from 1, any Tp, none included. Tensors beyond 2^32 elements. No host synchronisation; numbers of
tokens and heads do not recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_ELEMENTS = 4096
"""Elements of an output a program: 8 KiB of bf16, four 16-byte loads of each state a thread."""

MOST_COLUMNS = 1024
"""Columns of a program at most; wider outputs take several."""


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _merge_rows(
    prefix_out,
    prefix_stride_token,
    prefix_stride_head,
    prefix_lse,
    prefix_lse_stride_token,
    suffix_out,
    suffix_stride_token,
    suffix_stride_head,
    suffix_lse,
    suffix_lse_stride_token,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_token,
    num_rows,
    num_heads,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Merges BLOCK_V columns of BLOCK_ROWS rows, each a (token, head).

    Grid: (ceil(rows / BLOCK_ROWS), ceil(V_HEAD_DIM / BLOCK_V)).
    """
    # 1. The LSEs of the rows. An infinite one, of either sign, is of no key.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    tokens = rows // num_heads
    heads = rows % num_heads
    no_key = float("-inf")
    prefix = tl.load(prefix_lse + tokens * prefix_lse_stride_token + heads, mask=is_row, other=no_key)
    suffix = tl.load(suffix_lse + tokens * suffix_lse_stride_token + heads, mask=is_row, other=no_key)
    has_prefix = tl.abs(prefix) != float("inf")
    has_suffix = tl.abs(suffix) != float("inf")
    prefix = tl.where(has_prefix, prefix, no_key)
    suffix = tl.where(has_suffix, suffix, no_key)

    # 2. What each is worth beside the larger one, which is worth 1. Without a key nothing is subtracted: -inf
    # less -inf is NaN.
    has_keys = has_prefix | has_suffix
    largest = tl.where(has_keys, tl.maximum(prefix, suffix), 0.0)
    prefix_worth = tl.exp(prefix - largest)
    suffix_worth = tl.exp(suffix - largest)
    total = tl.where(has_keys, prefix_worth + suffix_worth, 1.0)
    merged_lse = tl.where(has_keys, largest + tl.log(total), no_key)
    is_first = tl.program_id(1) == 0
    tl.store(lse + tokens * lse_stride_token + heads, merged_lse, mask=is_row & is_first)

    # 3. The outputs. Of an empty state nothing is read: 0 x NaN is NaN.
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_element = is_row[:, None] & (columns < V_HEAD_DIM)[None, :]
    prefix_rows = prefix_out + tokens * prefix_stride_token + heads * prefix_stride_head
    suffix_rows = suffix_out + tokens * suffix_stride_token + heads * suffix_stride_head
    out_rows = out + tokens * out_stride_token + heads * out_stride_head
    from_prefix = tl.load(
        prefix_rows[:, None] + columns[None, :], mask=is_element & has_prefix[:, None], other=0.0
    )
    from_suffix = tl.load(
        suffix_rows[:, None] + columns[None, :], mask=is_element & has_suffix[:, None], other=0.0
    )
    prefix_share = prefix_worth / total
    suffix_share = suffix_worth / total
    merged = prefix_share[:, None] * from_prefix.to(tl.float32)
    merged += suffix_share[:, None] * from_suffix.to(tl.float32)
    tl.store(out_rows[:, None] + columns[None, :], merged.to(from_prefix.dtype), mask=is_element)


def tile_for(width: int) -> tuple[int, int]:
    """Rows (token, head) of a program and columns at a time, powers of two."""
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    return max(1, BLOCK_ELEMENTS // columns), columns


def merge_states(prefix_out, prefix_lse, suffix_out, suffix_lse, out, lse) -> None:
    """Launches the merge; shapes and dtypes as in the module's docstring."""
    num_tokens, num_heads, width = out.shape
    num_rows = num_tokens * num_heads
    if num_rows == 0:
        return
    block_rows, block_v = tile_for(width)
    _merge_rows[(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_v))](
        prefix_out,
        prefix_out.stride(0),
        prefix_out.stride(1),
        prefix_lse,
        prefix_lse.stride(0),
        suffix_out,
        suffix_out.stride(0),
        suffix_out.stride(1),
        suffix_lse,
        suffix_lse.stride(0),
        out,
        out.stride(0),
        out.stride(1),
        lse,
        lse.stride(0),
        num_rows,
        num_heads,
        V_HEAD_DIM=width,
        BLOCK_ROWS=block_rows,
        BLOCK_V=block_v,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: one launch on the harness's tensors."""
    merge_states(
        inputs["prefix_out"],
        inputs["prefix_lse"],
        inputs["suffix_out"],
        inputs["suffix_lse"],
        outputs["out"],
        outputs["lse"],
    )


PATHS = (
    KernelPath(
        name="triton/merge_states",
        operator="merge_states",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
