"""A step's rows as libraries want them: lists of tokens, prefix sums and cache rows, made on the device.

They ask how long a list is, so they wait for the device: what an engine does once a step, in a path's `plan`.
Beside them the workspace of the decode kernel with splits that several libraries have, and what becomes of
tokens that a library is not given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cases.layers import Layer
from harness.kernel_path import Tensors, Workspace


def prefix_sum(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1] int32, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def decode_tokens(inputs: Tensors) -> tuple[Tensor, Tensor]:
    """Tokens of decode and draft rows, and how many keys each sees, itself included: [Td] int64 each."""
    slots = inputs["batch_id_per_token"].long()
    # Padding's id is negative.
    rows = slots.clamp_min(0)
    cached = inputs["seq_lens_decoder"].long()
    if cached.numel() == 0:
        return slots.new_empty(0), slots.new_empty(0)
    decodes = (slots >= 0) & (inputs["seq_lens_encoder"][rows] == 0) & (cached[rows] > 0)
    position = torch.arange(len(slots), device=slots.device) - inputs["cu_seqlens_q"].long()[rows]
    tokens = decodes.nonzero().flatten()
    return tokens, (cached[rows] + position + 1)[tokens]


def decode_slots(inputs: Tensors) -> Tensor:
    """Slots of decode and draft rows with a token this step: [Bd] int64."""
    new: Tensor = inputs["cu_seqlens_q"].diff()
    decodes = (inputs["seq_lens_encoder"] == 0) & (inputs["seq_lens_decoder"] > 0) & (new > 0)
    slots: Tensor = decodes.nonzero().flatten()
    return slots


def spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each start on, as many as its length: [n] and [n] -> [sum of lengths] int64."""
    starts, lengths = starts.long(), lengths.long()
    before = lengths.cumsum(0) - lengths
    shift = torch.repeat_interleave(starts - before, lengths)
    return shift + torch.arange(len(shift), device=shift.device)


def cache_rows(inputs: Tensors, slots: Tensor, lengths: Tensor) -> Tensor:
    """Physical rows of the first tokens of each slot, so many of each: [n] and [n] -> [sum] int64."""
    block_size = inputs["latent_cache"].shape[2]
    position = spans(torch.zeros_like(lengths), lengths)
    slot = torch.repeat_interleave(slots, lengths)
    block = inputs["block_tables"][slot, position // block_size].long()
    rows: Tensor = block * block_size + position % block_size
    return rows


def split_results(layer: Layer, tokens: int, splits: int) -> Workspace:
    """Output and LSE of each split of a token's keys: float32 [tokens, heads, splits, R] and without R."""
    shape = (tokens, layer.num_attention_heads, splits)
    return {"attn_logits": ((*shape, layer.kv_lora_rank), "float32"), "attn_lse": (shape, "float32")}


def decode_and_padding_rows(inputs: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Decode and padding tokens as rows of one token, as an engine's graph of decode rows has them.

    Returns:
        The tokens [n] int64, rising; how many keys each sees [n] int32, 0 of padding; a line of the block
        table for each [n, max_blocks], zeros of padding.
    """
    slots, tables = inputs["batch_id_per_token"].long(), inputs["block_tables"]
    tokens, visible = decode_tokens(inputs)
    lengths = torch.zeros_like(slots, dtype=torch.int32)
    lengths[tokens] = visible.int()
    rows = ((slots < 0) | (lengths > 0)).nonzero().flatten()
    lengths = lengths[rows]
    lines = tables.new_zeros((len(rows), tables.shape[1]))
    lines[lengths > 0] = tables[slots[tokens]]
    return rows, lengths, lines


def attend_at(tokens: Tensor, outputs: Tensors, attend: Callable[[Tensor, Tensor], None]) -> None:
    """Outputs of some tokens, in their order, and the contract's 0 and -inf at all others.

    Args:
        tokens: [n] int64, rising.
        attend: writes the outputs [n, H, V] and the LSE [n, H], those of the engine where all are its tokens.
    """
    out, lse = outputs["out"], outputs["lse"]
    if len(tokens) == len(out):
        if len(out) > 0:
            attend(out, lse)
        return
    out.zero_()
    lse.fill_(-torch.inf)
    if len(tokens) > 0:
        some = out.new_empty((len(tokens), *out.shape[1:]))
        some_lse = lse.new_empty((len(tokens), lse.shape[1]))
        attend(some, some_lse)
        out[tokens], lse[tokens] = some, some_lse


def rows_at(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a tensor, rising; the tensor itself if these are all."""
    return values if len(rows) == len(values) else values[rows]
