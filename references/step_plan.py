"""Step plan by its definition: maxima over masks, candidates in a vector, the list by repetition."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor

LONE_CHUNK = 64
"""Tokens a tile where the step has one slot."""

CANDIDATES = 12
"""Chunk sizes tried: block_size * 2^i for i below this."""


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """max_lens [9], decoder_(batch|tile)_ids [plan_tiles], decoder_(num_tiles|chunk_size) [1], all int32."""
    encoder = tensor(inputs, "seq_lens_encoder").long()
    decoder = tensor(inputs, "seq_lens_decoder").long()
    this_time = tensor(inputs, "seq_lens_this_time").long()
    lengths = decoder + this_time
    active, is_decode = this_time > 0, (encoder == 0) & (this_time > 0)
    everything = torch.ones_like(active)
    maxima = [
        _largest(this_time, everything),
        _largest(encoder, everything),
        _largest(decoder, everything),
        _largest(lengths, active),
        _largest(decoder, is_decode),
        _largest(lengths, active & (decoder > 0)),
    ]
    keys = torch.where(is_decode, lengths, 0)
    chunk = LONE_CHUNK
    if len(keys) != 1:
        chunk = _chunk(keys, int(number(inputs, "block_size")), int(number(inputs, "multiprocessors")))
    tiles = _ceil_div(keys, chunk)
    total = int(tiles.sum())
    first = (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
    batch_ids = keys.new_full((int(number(inputs, "plan_tiles")),), -1)
    tile_ids = batch_ids.clone()
    batch_ids[:total] = torch.arange(len(keys), device=keys.device).repeat_interleave(tiles)
    tile_ids[:total] = torch.arange(total, device=keys.device) - first
    return {
        "max_lens": _int32(maxima + [0] * 3, keys),
        "decoder_batch_ids": batch_ids.to(torch.int32),
        "decoder_tile_ids": tile_ids.to(torch.int32),
        "decoder_num_tiles": _int32([total], keys),
        "decoder_chunk_size": _int32([chunk], keys),
    }


def _chunk(keys: Tensor, block_size: int, multiprocessors: int) -> int:
    """The candidate that leaves the most tiles in the last wave, the largest of equals."""
    candidates = block_size * 2 ** torch.arange(CANDIDATES, device=keys.device)
    totals = _ceil_div(keys[None, :], candidates[:, None]).sum(1) % multiprocessors
    best = (totals == totals.max()).nonzero().max()
    return int(candidates[best])


def _ceil_div(values: Tensor, by: int | Tensor) -> Tensor:
    return (values + by - 1) // by


def _largest(values: Tensor, among: Tensor) -> int:
    return int(values[among].max()) if bool(among.any()) else 0


def _int32(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


ORACLE = Oracle(
    name="step_plan",
    operator="step_plan",
    role="definition",
    source="FastDeploy get_block_shape_and_split_kv_block (O05), MLA branch",
    run=run,
)
