"""A batch drawn as text: its rows, where their tokens lie in the cache, and the step's metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

from cases import Case, Row
from cases.cache_layout import CacheTensor, key_value_caches, layer_caches
from cases.contract import contract_of
from cases.layers import Layer
from harness.metadata import StepMetadata, slot_mapping, step_metadata
from harness.paging import Pages, lay_out

MAX_BLOCKS = 12
MAX_VALUES = 24


def draw(case: Case) -> str:
    """Every step of a case."""
    parts = [str(case)]
    # Whatever option `cache` says, which such an operator does not have.
    inputs = {spec.name for spec in contract_of(case).inputs}
    for index, step in enumerate(case.steps):
        metadata = step_metadata(step)
        parts.append(f"\nstep {index}: {metadata.slots} slots, {metadata.tokens} tokens")
        parts += _metadata(metadata)
        for layer in case.layers:
            if "k_cache" in inputs:
                caches: tuple[CacheTensor, ...] = key_value_caches(layer)
            else:
                caches = layer_caches(replace(layer, cache="packed") if "packed_cache" in inputs else layer)
            parts += _layer(step, layer, metadata, lay_out(case, layer)[index], caches)
    return "\n".join(parts)


def _metadata(metadata: StepMetadata) -> list[str]:
    return [f"  {name:<21}{_values(value.tolist())}" for name, value in vars(metadata).items()]


def _layer(
    step: tuple[Row, ...],
    layer: Layer,
    metadata: StepMetadata,
    pages: Pages,
    caches: tuple[CacheTensor, ...],
) -> list[str]:
    width = f"rows of {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
    if caches[0].name == "k_cache":
        width = f"{layer.num_key_value_heads} KV heads of {layer.qk_head_dim} and {layer.v_head_dim}"
    about = f"{layer.num_attention_heads} heads, {width} {layer.dtype}"
    about += f", softmax scale {layer.softmax_scale:.7f}"
    slots = slot_mapping(metadata, pages.block_tables, layer.block_size)
    lines = [
        f"  layer {layer.index}: {about}, {pages.num_blocks} blocks of {layer.block_size}",
        *(_cache(cache, pages.num_blocks) for cache in caches),
        f"  {'slot_mapping':<21}{_values(slots.tolist())}",
        "    slot  row               blocks (# cached, + new, . free; @ shared)",
    ]
    shared = shared_blocks(pages)
    for slot, row in enumerate(row for row in step if row.is_slot):
        blocks = pages.blocks[slot].tolist()
        cells = [
            f"{'@' if block in shared else ''}{block}:{_fill(row, number, layer.block_size)}"
            for number, block in enumerate(blocks[:MAX_BLOCKS])
        ]
        if len(blocks) > MAX_BLOCKS:
            cells.append(f"... {len(blocks) - MAX_BLOCKS} more")
        lines.append(f"    {slot:>4}  {row!s:<16}  {' '.join(cells)}")
    return lines


def shared_blocks(pages: Pages) -> set[int]:
    """The physical blocks that several rows hold."""
    owners = Counter(block for blocks in pages.blocks for block in blocks.tolist())
    return {block for block, count in owners.items() if count > 1}


def _cache(cache: CacheTensor, num_blocks: int) -> str:
    shape = list(cache.shape(num_blocks))
    size = f"{cache.row_bytes:,} bytes a token, {cache.block_bytes:,} a block"
    return f"  {cache.name:<21}{shape} {cache.dtype}, {size}"


def _fill(row: Row, number: int, block_size: int) -> str:
    """One block in at most eight characters, each standing for an equal share of its tokens."""
    shares = min(8, block_size)
    edges = [number * block_size + share * block_size // shares for share in range(shares + 1)]
    marks = []
    for start, end in pairwise(edges):
        holds_new = max(start, row.cached) < min(end, row.length)
        marks.append("+" if holds_new else "#" if start < row.cached else ".")
    return "".join(marks)


def _values(values: list[int]) -> str:
    text = " ".join(map(str, values[:MAX_VALUES]))
    return text + (f" ... {len(values) - MAX_VALUES:,} more" if len(values) > MAX_VALUES else "")
