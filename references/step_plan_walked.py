"""Step plan again, in plain Python: tiles are cut off a row until none of its keys is left."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """max_lens [9], decoder_(batch|tile)_ids [plan_tiles], decoder_(num_tiles|chunk_size) [1], all int32."""
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    rows = list(zip(*(tensor(inputs, name).tolist() for name in names), strict=True))
    max_lens = [0] * 9
    decode_rows = []
    for slot, (encoder, cached, new) in enumerate(rows):
        reaches = [new, encoder, cached]
        if new:
            # Index 4 is of decode rows alone, index 5 of rows that have a cache.
            reaches += [cached + new, 0 if encoder else cached, cached + new if cached else 0]
            if not encoder:
                decode_rows.append((slot, cached + new))
        for index, reach in enumerate(reaches):
            max_lens[index] = max(max_lens[index], reach)

    sizes = [64]
    if len(rows) != 1:
        sizes = [int(number(inputs, "block_size")) << power for power in range(12)]
    last_wave, chunk = -1.0, 0
    tiles: list[tuple[int, int]] = []
    for size in sizes:
        cut = _cut(decode_rows, size)
        if len(cut) % number(inputs, "multiprocessors") >= last_wave:
            last_wave, chunk, tiles = len(cut) % number(inputs, "multiprocessors"), size, cut
    unused = [(-1, -1)] * (int(number(inputs, "plan_tiles")) - len(tiles))
    planned = {
        "max_lens": max_lens,
        "decoder_batch_ids": [slot for slot, _ in tiles + unused],
        "decoder_tile_ids": [tile for _, tile in tiles + unused],
        "decoder_num_tiles": [len(tiles)],
        "decoder_chunk_size": [chunk],
    }
    device = tensor(inputs, "seq_lens_decoder").device
    return {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in planned.items()}


def _cut(rows: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """(slot, tile) of every tile of rows (slot, keys)."""
    tiles = []
    for slot, keys in rows:
        for tile, _ in enumerate(range(0, keys, size)):
            tiles.append((slot, tile))
    return tiles


ORACLE = Oracle(
    name="step_plan_walked",
    operator="step_plan",
    role="derivation",
    source="FastDeploy get_block_shape_and_split_kv_block (O05), MLA branch, tile by tile",
    run=run,
)
