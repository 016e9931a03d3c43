"""Physical cache row of every token of a step.

Inputs
    block_tables        [B, MB] int32   physical blocks of each slot; slot stride free, last axis dense
    batch_id_per_token  [Tp] int32      slot of each token, negative for padding
    position_ids        [Tp] int32      absolute position of each token; anything for padding
    block_size                          tokens a block

Output
    slot_mapping        [Tp] int64

Token t of slot b at position p gets block_tables[b, p // block_size] * block_size + p % block_size, in int64.
It gets -1 where b or p is negative, where the table has no column p // block_size, and where the entry is
negative; what the table holds elsewhere is not read.

Any block size, any number of tokens (none: no launch). No host synchronisation; neither lengths nor the block
size recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_TOKENS = 256
"""Tokens a program: two for each thread of 4 warps."""


@triton.jit(do_not_specialize=["block_tables_stride", "max_blocks", "block_size", "num_tokens"])
def _map_tokens(
    block_tables,
    block_tables_stride,
    batch_id_per_token,
    position_ids,
    slot_mapping,
    max_blocks,
    block_size,
    num_tokens,
    BLOCK_TOKENS: tl.constexpr,
):
    """Physical rows of BLOCK_TOKENS successive tokens. Grid: (ceil(num_tokens / BLOCK_TOKENS),)."""
    # 1. Slots and positions. Padding's position is whatever an earlier step left.
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_step = tokens < num_tokens
    slots = tl.load(batch_id_per_token + tokens, mask=in_step, other=-1)
    positions = tl.load(position_ids + tokens, mask=in_step, other=-1)

    # 2. The table's entry, where there is one. Compare before dividing: -1 // block_size is 0 in C.
    blocks = positions // block_size
    in_table = (slots >= 0) & (positions >= 0) & (blocks < max_blocks)
    entries = tl.load(
        block_tables + slots.to(tl.int64) * block_tables_stride + blocks, mask=in_table, other=-1
    )

    # 3. The row; int64, blocks * block_size passes 2^31 in large caches.
    rows = entries.to(tl.int64) * block_size + positions % block_size
    tl.store(slot_mapping + tokens, tl.where(entries >= 0, rows, -1), mask=in_step)


def map_tokens(block_tables, batch_id_per_token, position_ids, slot_mapping, block_size) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens = batch_id_per_token.shape[0]
    if num_tokens == 0:
        return
    _map_tokens[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        block_tables,
        block_tables.stride(0),
        batch_id_per_token,
        position_ids,
        slot_mapping,
        block_tables.shape[1],
        block_size,
        num_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


def supports(case: Case) -> str | None:
    """None: the kernel takes every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    map_tokens(
        inputs["block_tables"],
        inputs["batch_id_per_token"],
        inputs["position_ids"],
        outputs["slot_mapping"],
        inputs["block_size"],
    )


PATHS = (
    KernelPath(
        name="triton/slot_mapping",
        operator="slot_mapping",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
