"""What a cache manager allocates for a stack: every tensor by name, on the device and on the host.

A manager that serves a pipeline stage is given that stage's layers; `layer_offset` is the number of the first
of them in the whole model, and keys carry that number:

| key                  | tensor                                                                           |
|----------------------|----------------------------------------------------------------------------------|
| ("key", layer)       | the latent cache of a layer, in the model dtype or, packed, in uint8; its keys   |
| ("value", layer)     | its values, where query heads share keys in groups                               |
| ("indexer", layer)   | the keys of a sparse indexer, where the model has one                            |

No latent layer has a ("value", layer): its values are its latents. Shapes, dtypes and block sizes are each
layer's own (`cases/cache_layout.py`). A host buffer holds what is swapped out of the device, block by block
and byte by byte, so its blocks have the same shape and items of the same size.

Source: FastDeploy's V1 cache manager (`create_kv_cache`, `create_host_kv_cache`); B59 to B62.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cases.cache_layout import ITEM_BYTES, layer_caches
from cases.layers import Layer

CacheKey = tuple[str, int]
"""What a tensor is, and the layer that it belongs to, counted through the whole model."""

ROLES = {
    "latent_cache": "key",
    "packed_cache": "key",
    "indexer_cache": "indexer",
    "k_cache": "key",
    "v_cache": "value",
}


@dataclass(frozen=True)
class Allocation:
    """One tensor: its shape, dtype as torch names it, and bytes."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


def device_caches(
    layers: Sequence[Layer], num_blocks: int, layer_offset: int = 0
) -> dict[CacheKey, Allocation]:
    """The tensors of a stack with so many blocks a layer, in the order of the layers.

    Raises:
        ValueError: a number is negative.
    """
    if num_blocks < 0 or layer_offset < 0:
        raise ValueError(
            f"blocks and layers are counted from 0 on, got {num_blocks} blocks and layer {layer_offset}"
        )
    found = {}
    for number, layer in enumerate(layers, layer_offset):
        for cache in layer_caches(layer):
            shape = cache.shape(num_blocks)
            size = math.prod(shape) * ITEM_BYTES[cache.dtype]
            found[ROLES[cache.name], number] = Allocation(shape, cache.dtype, size)
    return found


def host_caches(
    layers: Sequence[Layer], num_host_blocks: int, layer_offset: int = 0
) -> dict[CacheKey, Allocation]:
    """The host buffers of a stack: as on the device, with another number of blocks.

    Raises:
        ValueError: a number is negative.
    """
    return device_caches(layers, num_host_blocks, layer_offset)


def total_bytes(caches: Mapping[CacheKey, Allocation]) -> int:
    """What all of a manager's tensors take together."""
    return sum(allocation.bytes for allocation in caches.values())
