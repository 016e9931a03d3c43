"""Physical cache rows of the keys that each token sees through a sliding window.

Inputs
    block_tables        [B, MB] int32      physical blocks of each slot; slot stride free, last axis dense
    cu_seqlens_q        [B + 1] int32      exclusive prefix sum of the slots' new tokens
    seq_lens_decoder    [B] int32          tokens of each slot that are cached
    batch_id_per_token  [Tp] int32         slot of each token, negative for padding
    block_size                             tokens a block
    window                                 keys that a token sees, itself included; 0: all

Output
    swa_indices         [Tp, 1, N] int32   token stride free, last axis dense

Token t of slot b stands at position p = seq_lens_decoder[b] + t - cu_seqlens_q[b] and sees the positions from
max(0, p - window + 1) to p, cached or new. Entry j of its row is the physical row of the j-th of them, the
oldest first: block_tables[b, k // block_size] * block_size + k % block_size. Entries behind the newest are
-1, and so are all of padding, those whose column the table does not have, and those whose block is negative.

Every entry is written. N must hold the window, or the longest sequence where that is less; caches have fewer
than 2^31 rows. Any block size, any window, any number of tokens (none: no launch). No host synchronisation;
neither lengths nor sizes recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_TOKENS = 8
BLOCK_INDICES = 128
"""Indices a program: 8 for each thread of 4 warps, 512 bytes of a row at a time."""

NO_WINDOW = 2**31 - 1
"""A window that hides nothing: no position reaches it."""

MAX_ROWS = 2**31
"""Rows of cache that an int32 can tell apart."""


@triton.jit(
    do_not_specialize=[
        "block_tables_stride",
        "max_blocks",
        "block_size",
        "window",
        "num_tokens",
        "num_indices",
    ]
)
def _list_keys(
    block_tables,
    block_tables_stride,
    cu_seqlens_q,
    seq_lens_decoder,
    batch_id_per_token,
    swa_indices,
    swa_indices_stride,
    max_blocks,
    block_size,
    window,
    num_tokens,
    num_indices,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INDICES: tl.constexpr,
):
    """BLOCK_INDICES successive indices of BLOCK_TOKENS tokens. Grid: (tiles of tokens, tiles of indices)."""
    # 1. Positions of the tokens, and of the oldest key that each sees.
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_step = tokens < num_tokens
    slots = tl.load(batch_id_per_token + tokens, mask=in_step, other=-1)
    is_real = slots >= 0
    starts = tl.load(cu_seqlens_q + slots, mask=is_real, other=0)
    cached = tl.load(seq_lens_decoder + slots, mask=is_real, other=0)
    positions = cached + tokens - starts
    oldest = tl.maximum(positions - window + 1, 0)

    # 2. The table's entries of the visible keys.
    columns = tl.program_id(1) * BLOCK_INDICES + tl.arange(0, BLOCK_INDICES)[None, :]
    keys = oldest[:, None] + columns
    blocks = keys // block_size
    is_visible = is_real[:, None] & (keys <= positions[:, None]) & (blocks < max_blocks)
    table = block_tables + slots.to(tl.int64)[:, None] * block_tables_stride
    entries = tl.load(table + blocks, mask=is_visible, other=-1)

    # 3. Their rows.
    rows = tl.where(entries >= 0, entries * block_size + keys % block_size, -1)
    target = swa_indices + tokens.to(tl.int64)[:, None] * swa_indices_stride
    tl.store(target + columns, rows, mask=in_step[:, None] & (columns < num_indices))


def swa_indices(
    block_tables, cu_seqlens_q, seq_lens_decoder, batch_id_per_token, indices, block_size, window
) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring, `indices` the output."""
    num_tokens, _, num_indices = indices.shape
    if num_tokens == 0 or num_indices == 0:
        return
    grid = (triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_indices, BLOCK_INDICES))
    _list_keys[grid](
        block_tables,
        block_tables.stride(0),
        cu_seqlens_q,
        seq_lens_decoder,
        batch_id_per_token,
        indices,
        indices.stride(0),
        block_tables.shape[1],
        block_size,
        window or NO_WINDOW,
        num_tokens,
        num_indices,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_INDICES=BLOCK_INDICES,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        rows = (case.options.pool or 0) * layer.block_size
        if rows > MAX_ROWS:
            return f"indices are int32: a cache has at most {MAX_ROWS:,} rows, got {rows:,}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    swa_indices(
        inputs["block_tables"],
        inputs["cu_seqlens_q"],
        inputs["seq_lens_decoder"],
        inputs["batch_id_per_token"],
        outputs["swa_indices"],
        inputs["block_size"],
        inputs["window"],
    )


PATHS = (
    KernelPath(
        name="triton/swa_indices",
        operator="swa_indices",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
