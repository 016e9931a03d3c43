"""Shapes, dtypes and allocation of a contract's tensors in one layer of one step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cases.cache_layout import ITEM_BYTES, TILE, layer_caches, packed_row_bytes
from cases.contract import TensorSpec
from cases.layers import Layer
from cases.operators.launch_buffers import DECODER_TILE, ENCODER_TILE
from harness.buffers import Buffer
from harness.metadata import StepMetadata
from harness.model_data import model_sizes
from harness.paging import Pages
from harness.rope_data import table_positions

INDEX_TILE = 128
"""FlashMLA refuses indices of another number than a multiple of this."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def axis_sizes(layer: Layer, metadata: StepMetadata, pages: Pages, num_layers: int = 1) -> dict[str, int]:
    """The size of every axis that a contract may name; `num_layers` of a stack."""
    return {
        **model_sizes(layer, num_layers),
        "history_tokens": int(metadata.cu_seqlens_k[-1]),
        "one": 1,
        "tokens": metadata.tokens,
        "slots": metadata.slots,
        "slots_plus_one": metadata.slots + 1,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "qkv_width": layer.qkv_width,
        "qkvg_width": layer.qkvg_width,
        "qkvg_checkpoint_width": layer.qkvg_checkpoint_width,
        **_tile_lists(layer, metadata.slots, pages.block_tables.shape[1] * layer.block_size),
        "qkv_parts": 4,
        "offset_numbers": 3,
        "prefill_keys": int(metadata.cu_seqlens_k_prefill[-1]),
        "decode_tokens": len(metadata.packed_tokens),
        "kv_lora_rank": layer.kv_lora_rank,
        "qk_rope_head_dim": layer.qk_rope_head_dim,
        "latent_width": layer.latent_width,
        "cache_width": _cache_width(layer),
        "packed_width": _packed_width(layer),
        "qk_nope_head_dim": layer.qk_nope_head_dim,
        "qk_head_dim": layer.qk_head_dim,
        "v_head_dim": layer.v_head_dim,
        "num_blocks": pages.num_blocks,
        "block_size": layer.block_size,
        "max_blocks": pages.block_tables.shape[1],
        "plan_tiles": _plan_tiles(metadata.slots, pages.block_tables.shape[1], layer.block_size),
        "window_indices": _window_indices(layer, pages.block_tables.shape[1]),
        "index_topk": layer.index_topk,
        "maxima": 9,
        "tensor_parallel_size": layer.tensor_parallel_size,
        "kv_b_proj_width": layer.kv_b_proj_width,
        "table_positions": table_positions(metadata),
    }


def _cache_width(layer: Layer) -> int:
    """Elements of a token's row in the layer's cache."""
    cache = layer_caches(layer)[0]
    return cache.row_bytes // ITEM_BYTES[cache.dtype]


def _tile_lists(layer: Layer, slots: int, max_row_tokens: int) -> dict[str, int]:
    """Room for the tiles of every row with so many tokens: of 64 and 16 query rows, and of blocks of keys."""
    queries = max_row_tokens * layer.group_size
    sizes = {
        "encoder_tiles": (queries, ENCODER_TILE),
        "decoder_tiles": (queries, DECODER_TILE),
        "kv_tiles": (max_row_tokens, layer.block_size),
    }
    return {"tile_lists": 3, **{name: slots * -(-rows // size) for name, (rows, size) in sizes.items()}}


def _packed_width(layer: Layer) -> int:
    """Bytes of a token in a packed cache; 0 where latents are no whole number of tiles."""
    if layer.kv_lora_rank % TILE:
        return 0
    return packed_row_bytes(layer.kv_lora_rank, layer.qk_rope_head_dim)


def _window_indices(layer: Layer, max_blocks: int) -> int:
    """Room for the keys that a token can see, by its window and its table, in whole tiles of 128."""
    room = max_blocks * layer.block_size
    return -(-min(layer.window or room, room) // INDEX_TILE) * INDEX_TILE


def _plan_tiles(slots: int, max_blocks: int, block_size: int) -> int:
    """Room for every tile of a decode plan, from shapes alone.

    A tile is a whole number of blocks, so a row has no more tiles than its table has entries; but one
    slot alone is cut into tiles of 64 tokens whatever the block size.
    """
    return -(-max_blocks * block_size // 64) if slots == 1 else slots * max_blocks


def tensor_dtype(spec: TensorSpec, layer: Layer) -> torch.dtype:
    """The dtype of a contract's tensor in one layer."""
    if spec.dtype == "model":
        return DTYPES[layer.dtype]
    name = layer_caches(layer)[0].dtype if spec.dtype == "cache" else spec.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def allocate(
    spec: TensorSpec, layer: Layer, axes: Mapping[str, int], device: torch.device, *, strided: bool
) -> Buffer:
    """A poisoned buffer for one tensor of a contract."""
    shape = [axes[axis] for axis in spec.axes]
    return Buffer.allocate(shape, tensor_dtype(spec, layer), device, strided=strided and spec.strided)
