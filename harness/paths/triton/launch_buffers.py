"""List the tiles of one layer's launch: of prefill rows' and decode rows' queries, and of all rows' keys.

Inputs
    seq_lens_encoder     [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder     [B] int32      tokens cached before the step
    seq_lens_this_time   [B] int32      tokens that the slot adds to the step
Outputs
    encoder_batch_ids    [N_e] int32    slot of each tile of 64 query rows of a prefill row
    decoder_batch_ids    [N_d] int32    slot of each tile of 16 query rows of another row
    kv_batch_ids         [N_k] int32    slot of each block of keys of a row with new tokens
    *_tile_ids           as their lists int32: number of the tile within its row; both -1 behind the last
    num_tiles, capacity  [3] int32      of encoder, decoder and kv: entries in use, and room
Workspace
    tile_starts          [3, B + 1] int32  tiles of the rows before each

A token has group_size query rows, the query heads of a KV head. `capacity` of this file says how long the
lists must be, from shapes alone: of one layer or, with all of its group sizes, of a whole stack. O(B) work in
one program a list, O(log B) an entry. No host synchronisation, nothing recompiles; without a slot, num_tiles
and capacity are still written.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from cases import Case
from cases.operators.launch_buffers import DECODER_TILE, ENCODER_TILE, LISTS
from harness.kernel_path import KernelPath, Tensors, Workspace

BLOCK_SLOTS = 256
"""Slots at a time: two for each thread of 4 warps."""

BLOCK_TILES = 256
"""Entries of a list a program."""

PREFILL_QUERIES = tl.constexpr(0)
DECODE_QUERIES = tl.constexpr(1)
KEYS = tl.constexpr(2)


@triton.jit(do_not_specialize=["num_slots", "group_size", "tile_rows", "room"])
def _count_tiles(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    tile_starts,
    num_tiles,
    capacity,
    num_slots,
    group_size,
    tile_rows,
    room,
    LIST: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Where each row's tiles begin in one list. Grid: (1,)."""
    total = 0
    starts = tile_starts + LIST * (num_slots + 1)
    tl.store(starts, total)
    for first in range(0, num_slots, BLOCK_SLOTS):
        # 1. Rows of the list: query rows of its tokens, or keys.
        slots = first + tl.arange(0, BLOCK_SLOTS)
        in_step = slots < num_slots
        encoder = tl.load(seq_lens_encoder + slots, mask=in_step, other=0)
        cached = tl.load(seq_lens_decoder + slots, mask=in_step, other=0)
        new = tl.load(seq_lens_this_time + slots, mask=in_step, other=0)
        if LIST == PREFILL_QUERIES:
            rows = tl.where(encoder > 0, new * group_size, 0)
        elif LIST == DECODE_QUERIES:
            rows = tl.where(encoder > 0, 0, new * group_size)
        else:
            rows = tl.where(new > 0, cached + new, 0)

        # 2. Their tiles, summed up.
        tiles = tl.cdiv(rows, tile_rows)
        tl.store(starts + slots + 1, total + tl.cumsum(tiles, 0), mask=in_step)
        total += tl.sum(tiles, 0)
    tl.store(num_tiles + LIST, total)
    tl.store(capacity + LIST, room)


@triton.jit(do_not_specialize=["num_slots", "room", "halvings"])
def _write_tiles(
    tile_starts,
    batch_ids,
    tile_ids,
    num_slots,
    room,
    halvings,
    LIST: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """BLOCK_TILES entries of one list. Grid: (ceil(room / BLOCK_TILES),)."""
    # 1. The row of each entry: the last that begins at or before it, found by halving.
    entries = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    is_entry = entries < room
    starts = tile_starts + LIST * (num_slots + 1)
    used = tl.load(starts + num_slots)
    low = tl.zeros([BLOCK_TILES], tl.int32)
    high = low + num_slots
    for _ in range(halvings):
        middle = (low + high) // 2
        begins = tl.load(starts + middle, mask=is_entry, other=0)
        low = tl.where((begins <= entries) & (middle > low), middle, low)
        high = tl.where(begins <= entries, high, middle)

    # 2. Its number within the row; behind the last tile -1.
    begins = tl.load(starts + low, mask=is_entry, other=0)
    is_used = entries < used
    tl.store(batch_ids + entries, tl.where(is_used, low, -1), mask=is_entry)
    tl.store(tile_ids + entries, tl.where(is_used, entries - begins, -1), mask=is_entry)


def capacity(
    slots: int, max_row_tokens: int, group_sizes: Sequence[int], block_sizes: Sequence[int]
) -> dict[str, int]:
    """Room of each list, in tiles, that covers every layer whatever the lengths.

    Args:
        max_row_tokens: the most tokens that a row can have, cached and new.
        group_sizes, block_sizes: of each layer: query heads a KV head, and tokens a cache block.
    """
    # The most query rows come from the fewest KV heads, the most blocks from the smallest.
    query_rows, keys = max_row_tokens * max(group_sizes), min(block_sizes)
    return {
        "encoder": slots * triton.cdiv(query_rows, ENCODER_TILE),
        "decoder": slots * triton.cdiv(query_rows, DECODER_TILE),
        "kv": slots * triton.cdiv(max_row_tokens, keys),
    }


def list_tiles(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    lists,
    num_tiles,
    capacities,
    tile_starts,
    *,
    group_size: int,
    block_size: int,
) -> None:
    """Launches the kernels; shapes and dtypes as in the module's docstring.

    Args:
        lists: (batch_ids, tile_ids) of encoder, decoder and kv.
    """
    num_slots = seq_lens_encoder.shape[0]
    for number, (batch_ids, tile_ids) in enumerate(lists):
        room = batch_ids.shape[0]
        _count_tiles[(1,)](
            seq_lens_encoder,
            seq_lens_decoder,
            seq_lens_this_time,
            tile_starts,
            num_tiles,
            capacities,
            num_slots,
            group_size,
            (ENCODER_TILE, DECODER_TILE, block_size)[number],
            room,
            LIST=number,
            BLOCK_SLOTS=BLOCK_SLOTS,
        )
        if room > 0:
            _write_tiles[(triton.cdiv(room, BLOCK_TILES),)](
                tile_starts,
                batch_ids,
                tile_ids,
                num_slots,
                room,
                num_slots.bit_length() + 1,
                LIST=number,
                BLOCK_TILES=BLOCK_TILES,
            )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def workspace(case: Case) -> Workspace:
    """Prefix sums of the three lists' tiles."""
    slots = sum(row.is_slot for row in case.steps[0])
    return {"tile_starts": ((len(LISTS), slots + 1), "int32")}


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    list_tiles(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        [(outputs[f"{name}_batch_ids"], outputs[f"{name}_tile_ids"]) for name in LISTS],
        outputs["num_tiles"],
        outputs["capacity"],
        workspace["tile_starts"],
        group_size=inputs["num_attention_heads"] // inputs["num_key_value_heads"],
        block_size=inputs["block_size"],
    )


PATHS = (
    KernelPath(
        name="triton/launch_buffers",
        operator="launch_buffers",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
