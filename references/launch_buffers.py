"""Tiles by their definition: quotients rounded up, lists by repetition, rooms from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cases.operators.launch_buffers import DECODER_TILE, ENCODER_TILE
from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """(encoder|decoder|kv)_(batch|tile)_ids [room of the list], num_tiles [3] and capacity [3], int32."""
    encoder = tensor(inputs, "seq_lens_encoder").long()
    cached = tensor(inputs, "seq_lens_decoder").long()
    new = tensor(inputs, "seq_lens_this_time").long()
    group = int(number(inputs, "num_attention_heads")) // int(number(inputs, "num_key_value_heads"))
    block_size, longest = int(number(inputs, "block_size")), int(number(inputs, "max_row_tokens"))
    is_prefill = encoder > 0
    lists = {
        "encoder": (torch.where(is_prefill, new * group, 0), ENCODER_TILE, longest * group),
        "decoder": (torch.where(is_prefill, 0, new * group), DECODER_TILE, longest * group),
        "kv": (torch.where(new > 0, cached + new, 0), block_size, longest),
    }
    outputs, numbers, rooms = {}, [], []
    for name, (rows, tile, most) in lists.items():
        room = len(new) * -(-most // tile)
        tiles = (rows + tile - 1) // tile
        first = (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
        total = int(tiles.sum())
        batch_ids = new.new_full((room,), -1)
        tile_ids = batch_ids.clone()
        batch_ids[:total] = torch.arange(len(new), device=new.device).repeat_interleave(tiles)
        tile_ids[:total] = torch.arange(total, device=new.device) - first
        outputs[f"{name}_batch_ids"] = batch_ids.to(torch.int32)
        outputs[f"{name}_tile_ids"] = tile_ids.to(torch.int32)
        numbers.append(total)
        rooms.append(room)
    return {**outputs, "num_tiles": _int32(numbers, new), "capacity": _int32(rooms, new)}


def _int32(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


ORACLE = Oracle(
    name="launch_buffers",
    operator="launch_buffers",
    role="definition",
    source="FastDeploy get_block_shape_and_split_kv_block and allocate_launch_related_buffer (O05, P7)",
    run=run,
)
