"""Tiles counted: every query row of every token, and every key, is put into its tile, one after another.

A tile is what begins where the one before is full, or where a batch row begins; rooms are found by filling
every slot's row with as many tokens as it can have.
"""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor

QUERY_ROWS = {"encoder": 64, "decoder": 16}


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """As the definition, on the host."""
    slots = list(
        zip(
            *(tensor(inputs, f"seq_lens_{name}").tolist() for name in ("encoder", "decoder", "this_time")),
            strict=True,
        )
    )
    heads, kv_heads = (int(number(inputs, f"num_{name}_heads")) for name in ("attention", "key_value"))
    block_size, longest = int(number(inputs, "block_size")), int(number(inputs, "max_row_tokens"))
    tiles: dict[str, list[tuple[int, int]]] = {"encoder": [], "decoder": [], "kv": []}
    for slot, (encoder, cached, new) in enumerate(slots):
        if new == 0:
            continue
        name = "encoder" if encoder else "decoder"
        # Of one KV head: those query heads of a token that read it.
        readers = sum(head * kv_heads // heads == 0 for head in range(heads))
        tiles[name] += [(slot, tile) for tile in _filled(new * readers, QUERY_ROWS[name])]
        tiles["kv"] += [(slot, tile) for tile in _filled(cached + new, block_size)]
    most = longest * sum(head * kv_heads // heads == 0 for head in range(heads))
    room = {name: len(slots) * len(_filled(most, size)) for name, size in QUERY_ROWS.items()}
    room["kv"] = len(slots) * len(_filled(longest, block_size))
    outputs = {}
    for name, entries in tiles.items():
        for column, kind in enumerate(("batch_ids", "tile_ids")):
            written = [entry[column] for entry in entries]
            unused = [-1] * (room[name] - len(written))
            outputs[f"{name}_{kind}"] = torch.tensor(written + unused, dtype=torch.int32)
    counts = {"num_tiles": [len(tiles[name]) for name in tiles], "capacity": [room[name] for name in tiles]}
    return {**outputs, **{name: torch.tensor(values, dtype=torch.int32) for name, values in counts.items()}}


def _filled(rows: int, size: int) -> list[int]:
    """Numbers of the tiles that so many rows fill, the last perhaps in part."""
    return sorted({row // size for row in range(rows)})


ORACLE = Oracle(
    name="launch_buffers_counted",
    operator="launch_buffers",
    role="derivation",
    source="FastDeploy O05: the work lists as its kernels read them, a (slot, tile) each",
    run=run,
)
