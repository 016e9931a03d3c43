"""What a layer keeps of every token: tensors, dtypes and bytes, and how many blocks a memory holds.

| `cache`  | tensor         | dtype         | one token's row                                             |
|----------|----------------|---------------|-------------------------------------------------------------|
| `same`   | `latent_cache` | model dtype   | latent and k_pe                                             |
| `fp8`    | `latent_cache` | float8_e4m3fn | the same, without a scale                                   |
| `packed` | `packed_cache` | uint8         | latent in e4m3, a float32 scale a tile of 128, k_pe in bf16 |

Every tensor is [blocks, 1, block_size, width]. A model with a sparse indexer keeps its keys beside them,
whatever the option: uint8 [blocks, block_size, I + 4 I / 128], in each block all keys, then all scales.

A window hides keys and frees none: a layer with one has as many blocks as a layer without. There is no
tensor of values: they are the latents.

A layer whose query heads share keys in groups keeps both, in the model dtype: `k_cache` [blocks, KV heads,
block_size, K] and `v_cache` [blocks, KV heads, block_size, V], with KV heads and widths of its own.

Source: FastDeploy's cache shapes and block estimate, DeepSeek-V3.2's and FlashMLA's row of 656 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cases.layers import Layer

TILE = 128
"""Columns of a latent that share a scale."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "uint8": 1}
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class RowPart:
    """A run of equal numbers in the row that a token has in a cache."""

    name: str
    dtype: str
    elements: int

    @property
    def bytes(self) -> int:
        """What the part takes."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of one layer's cache.

    Attributes:
        dtype: what the tensor is allocated as, as torch names it.
        parts: what a token has in it, in order.
        has_head_axis: whether there is an axis of KV heads behind the blocks.
        heads: how many KV heads, each with these parts.
    """

    name: str
    dtype: str
    block_size: int
    parts: tuple[RowPart, ...]
    has_head_axis: bool = True
    heads: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes a token, in all heads."""
        return self.heads * sum(part.bytes for part in self.parts)

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return self.row_bytes * self.block_size

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of the tensor with so many blocks."""
        heads = (self.heads,) if self.has_head_axis else ()
        width = self.row_bytes // self.heads // ITEM_BYTES[self.dtype]
        return (num_blocks, *heads, self.block_size, width)

    def offset(self, part: str) -> int:
        """The byte of a row at which a part begins.

        Raises:
            KeyError: the row has no such part.
        """
        start = 0
        for item in self.parts:
            if item.name == part:
                return start
            start += item.bytes
        raise KeyError(part)


def layer_caches(layer: Layer) -> tuple[CacheTensor, ...]:
    """The tensors that one layer keeps.

    Raises:
        ValueError: a packed cache of latents that are no whole number of tiles.
    """
    if not layer.model.has_latents:
        return key_value_caches(layer)
    caches = [_packed(layer) if layer.cache == "packed" else _latent(layer)]
    if layer.model.index_head_dim is not None:
        width = layer.model.index_head_dim
        parts = (RowPart("key", "float8_e4m3fn", width), RowPart("scales", "float32", _tiles(width)))
        caches.append(CacheTensor("indexer_cache", "uint8", layer.block_size, parts, has_head_axis=False))
    return tuple(caches)


def key_value_caches(layer: Layer) -> tuple[CacheTensor, CacheTensor]:
    """The two tensors of a layer whose query heads share keys in groups."""
    dtype = TORCH_NAMES[layer.dtype]
    key, value = RowPart("key", dtype, layer.qk_head_dim), RowPart("value", dtype, layer.v_head_dim)
    heads = layer.num_key_value_heads
    return (
        CacheTensor("k_cache", dtype, layer.block_size, (key,), heads=heads),
        CacheTensor("v_cache", dtype, layer.block_size, (value,), heads=heads),
    )


def packed_row_bytes(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """R + 4 R / 128 + 2 D: bytes of a token in a packed cache. 656 for 512 and 64."""
    return sum(part.bytes for part in _packed_parts(kv_lora_rank, qk_rope_head_dim))


def block_bytes(layers: Sequence[Layer]) -> int:
    """What one block takes in all layers together."""
    return sum(cache.block_bytes for layer in layers for cache in layer_caches(layer))


def cache_bytes(layers: Sequence[Layer], num_blocks: int) -> int:
    """What caches of so many blocks a layer take."""
    return block_bytes(layers) * num_blocks


def blocks_within(layers: Sequence[Layer], memory: int) -> int:
    """How many blocks a layer fit into so many bytes, the same number in every layer.

    Raises:
        ValueError: there is no layer, or memory is negative.
    """
    if not layers or memory < 0:
        raise ValueError(
            f"blocks are counted for at least one layer and 0 bytes, got {len(layers)}, {memory}"
        )
    return memory // block_bytes(layers)


def _latent(layer: Layer) -> CacheTensor:
    dtype = "float8_e4m3fn" if layer.cache == "fp8" else TORCH_NAMES[layer.dtype]
    parts = (RowPart("latent", dtype, layer.kv_lora_rank), RowPart("k_pe", dtype, layer.qk_rope_head_dim))
    return CacheTensor("latent_cache", dtype, layer.block_size, parts)


def _packed(layer: Layer) -> CacheTensor:
    parts = _packed_parts(layer.kv_lora_rank, layer.qk_rope_head_dim)
    return CacheTensor("packed_cache", "uint8", layer.block_size, parts)


def _packed_parts(kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[RowPart, ...]:
    return (
        RowPart("latent", "float8_e4m3fn", kv_lora_rank),
        RowPart("scales", "float32", _tiles(kv_lora_rank)),
        RowPart("k_pe", "bfloat16", qk_rope_head_dim),
    )


def _tiles(width: int) -> int:
    if width % TILE:
        raise ValueError(f"a scale belongs to {TILE} columns, got {width} columns: no whole number of tiles")
    return width // TILE
