"""Plan a step on the device: maxima of its lengths, and the tiles that decode rows' keys are cut into.

Inputs
    seq_lens_encoder    [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder    [B] int32      tokens cached before the step
    seq_lens_this_time  [B] int32      tokens that the slot adds to the step
    block_size, multiprocessors        of the cache; of the GPU, or what plans shall be made for

Outputs
    max_lens            [9] int32      largest this_time, encoder, decoder; decoder + this_time of active
                                       slots; decoder of decode rows; decoder + this_time of active slots
                                       with a cache; three zeros
    decoder_batch_ids   [N] int32      slot of each tile
    decoder_tile_ids    [N] int32      its number within the row; both -1 from decoder_num_tiles on
    decoder_num_tiles   [1] int32
    decoder_chunk_size  [1] int32      tokens a tile

Workspace
    tile_starts         [B + 1] int32  tiles of the rows before each

A slot is active with this_time > 0, a decode row if besides encoder = 0. Tiles 0..ceil(keys / chunk) - 1 of
each decode row, keys = decoder + this_time, in the order of the slots. The chunk is 64 if B = 1, else the
block_size * 2^i, i = 0..11, with the most tiles modulo multiprocessors, on a tie the larger.

N must hold every tile: slots * max_blocks is enough, with one slot ceil(max_blocks * block_size / 64);
tiles past it would be lost. block_size * 2^11 must fit into int32. O(B) work in one program, O(log B) an
entry of the list. No host synchronisation, nothing recompiles; without a slot everything is still written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors, Workspace

BLOCK_SLOTS = 256
"""Slots at a time, 12 candidates each: 32 divisions a thread of 4 warps."""

BLOCK_TILES = 256
"""Entries of the list a program: two for each thread of 4 warps."""

LONE_CHUNK = tl.constexpr(64)
"""Tokens a tile where the step has one slot."""

CANDIDATES = tl.constexpr(12)
"""Chunk sizes tried, each twice the one before."""

LANES = tl.constexpr(16)
"""Candidates padded to a power of two."""


@triton.jit(do_not_specialize=["num_slots", "block_size", "multiprocessors"])
def _plan(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    max_lens,
    decoder_num_tiles,
    decoder_chunk_size,
    tile_starts,
    num_slots,
    block_size,
    multiprocessors,
    BLOCK_SLOTS: tl.constexpr,
):
    """Everything but the list. Grid: (1,)."""
    # 1. Maxima over all slots, and the number of tiles under every candidate. int64: with blocks of one token
    # the tiles of a large step pass 2^31, as the largest candidates of large blocks do.
    candidates = tl.arange(0, LANES)
    chunks = block_size.to(tl.int64) << tl.minimum(candidates, CANDIDATES - 1).to(tl.int64)
    totals = tl.zeros([LANES], dtype=tl.int64)
    most_new = 0
    most_prefill = 0
    most_cached = 0
    longest = 0
    most_decode_cached = 0
    longest_with_cache = 0
    for first in range(0, num_slots, BLOCK_SLOTS):
        slots = first + tl.arange(0, BLOCK_SLOTS)
        in_step = slots < num_slots
        encoder = tl.load(seq_lens_encoder + slots, mask=in_step, other=0)
        decoder = tl.load(seq_lens_decoder + slots, mask=in_step, other=0)
        this_time = tl.load(seq_lens_this_time + slots, mask=in_step, other=0)
        is_active = this_time > 0
        is_decode = is_active & (encoder == 0)
        lengths = decoder + this_time
        most_new = tl.maximum(most_new, tl.max(this_time, 0))
        most_prefill = tl.maximum(most_prefill, tl.max(encoder, 0))
        most_cached = tl.maximum(most_cached, tl.max(decoder, 0))
        longest = tl.maximum(longest, tl.max(tl.where(is_active, lengths, 0), 0))
        most_decode_cached = tl.maximum(most_decode_cached, tl.max(tl.where(is_decode, decoder, 0), 0))
        with_cache = is_active & (decoder > 0)
        longest_with_cache = tl.maximum(longest_with_cache, tl.max(tl.where(with_cache, lengths, 0), 0))
        keys = tl.where(is_decode, lengths, 0).to(tl.int64)
        totals += tl.sum((keys[:, None] + chunks[None, :] - 1) // chunks[None, :], 0)
    tl.store(max_lens + 0, most_new)
    tl.store(max_lens + 1, most_prefill)
    tl.store(max_lens + 2, most_cached)
    tl.store(max_lens + 3, longest)
    tl.store(max_lens + 4, most_decode_cached)
    tl.store(max_lens + 5, longest_with_cache)
    tl.store(max_lens + 6, 0)
    tl.store(max_lens + 7, 0)
    tl.store(max_lens + 8, 0)

    # 2. The chunk: the fullest last wave, then the larger candidate, in one number to take the maximum of.
    ranks = totals % multiprocessors * LANES + candidates
    best = tl.max(tl.where(candidates < CANDIDATES, ranks, -1), 0) % LANES
    chunk = block_size << best.to(tl.int32)
    chunk = tl.where(num_slots == 1, LONE_CHUNK, chunk)
    tl.store(decoder_chunk_size, chunk)

    # 3. Where each row's tiles begin in the list.
    num_tiles = 0
    tl.store(tile_starts, num_tiles)
    for first in range(0, num_slots, BLOCK_SLOTS):
        slots = first + tl.arange(0, BLOCK_SLOTS)
        in_step = slots < num_slots
        encoder = tl.load(seq_lens_encoder + slots, mask=in_step, other=1)
        decoder = tl.load(seq_lens_decoder + slots, mask=in_step, other=0)
        this_time = tl.load(seq_lens_this_time + slots, mask=in_step, other=0)
        is_decode = (this_time > 0) & (encoder == 0)
        keys = tl.where(is_decode, decoder + this_time, 0)
        # Not (keys + chunk - 1) // chunk, which passes 2^31 for the longest rows.
        tiles = keys // chunk + (keys % chunk > 0).to(tl.int32)
        tl.store(tile_starts + 1 + slots, num_tiles + tl.cumsum(tiles, 0), mask=in_step)
        num_tiles += tl.sum(tiles, 0)
    tl.store(decoder_num_tiles, num_tiles)


@triton.jit(do_not_specialize=["num_slots", "plan_tiles", "num_halvings"])
def _list_tiles(
    tile_starts,
    decoder_batch_ids,
    decoder_tile_ids,
    num_slots,
    plan_tiles,
    num_halvings,
    BLOCK_TILES: tl.constexpr,
):
    """BLOCK_TILES successive entries of the list. Grid: (ceil(plan_tiles / BLOCK_TILES),)."""
    # 1. Entries from the last row's end on are unused.
    entries = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    in_list = entries < plan_tiles
    is_used = entries < tl.load(tile_starts + num_slots)

    # 2. The last row that begins at or before the entry: of rows that begin together, only the last has
    # tiles. Invariant: tile_starts[low] <= entry, and entry < tile_starts[high].
    low = tl.zeros([BLOCK_TILES], dtype=tl.int32)
    high = tl.zeros([BLOCK_TILES], dtype=tl.int32) + num_slots
    for _ in range(num_halvings):
        # Rounded up to stay above low: a middle that is high already changes nothing.
        middle = (low + high + 1) // 2
        begins = tl.load(tile_starts + middle)
        low = tl.where(begins <= entries, middle, low)
        high = tl.where(begins <= entries, high, middle)

    # 3. Slot and number of the tile.
    tiles = entries - tl.load(tile_starts + low)
    tl.store(decoder_batch_ids + entries, tl.where(is_used, low, -1), mask=in_list)
    tl.store(decoder_tile_ids + entries, tl.where(is_used, tiles, -1), mask=in_list)


def plan_step(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    max_lens,
    decoder_batch_ids,
    decoder_tile_ids,
    decoder_num_tiles,
    decoder_chunk_size,
    tile_starts,
    *,
    block_size,
    multiprocessors,
) -> None:
    """Launches both kernels; shapes and dtypes as in the module's docstring."""
    num_slots = seq_lens_this_time.shape[0]
    plan_tiles = decoder_batch_ids.shape[0]
    _plan[(1,)](
        seq_lens_encoder,
        seq_lens_decoder,
        seq_lens_this_time,
        max_lens,
        decoder_num_tiles,
        decoder_chunk_size,
        tile_starts,
        num_slots,
        block_size,
        multiprocessors,
        BLOCK_SLOTS=BLOCK_SLOTS,
    )
    if plan_tiles == 0:
        return
    _list_tiles[(triton.cdiv(plan_tiles, BLOCK_TILES),)](
        tile_starts,
        decoder_batch_ids,
        decoder_tile_ids,
        num_slots,
        plan_tiles,
        # Halvings of an interval of num_slots until its ends are neighbours.
        num_slots.bit_length(),
        BLOCK_TILES=BLOCK_TILES,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        if layer.block_size << 11 >= 1 << 31:
            return f"block_size * 2^11 must fit into int32, got block_size {layer.block_size}"
    return None


def workspace(case: Case) -> Workspace:
    """Where each row's tiles begin."""
    slots = sum(row.is_slot for row in case.steps[0])
    return {"tile_starts": ((slots + 1,), "int32")}


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    plan_step(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        outputs["max_lens"],
        outputs["decoder_batch_ids"],
        outputs["decoder_tile_ids"],
        outputs["decoder_num_tiles"],
        outputs["decoder_chunk_size"],
        workspace["tile_starts"],
        block_size=inputs["block_size"],
        multiprocessors=inputs["multiprocessors"],
    )


PATHS = (
    KernelPath(
        name="triton/step_plan",
        operator="step_plan",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
        batch_invariant=True,
    ),
)
