"""A step's rows as libraries want them: lists of tokens, prefix sums and cache rows, made on the device.

They ask how long a list is, so they wait for the device: what an engine does once a step, in a path's `plan`.
Beside them the workspace of the decode kernel with splits that several libraries have.
"""

from __future__ import annotations

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
