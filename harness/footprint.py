"""How much memory a case will take, before any of it is."""

from __future__ import annotations

from cases import Case, Row
from cases.blocks import blocks_needed
from cases.contract import Fill, Operator
from cases.layers import Layer
from harness.buffers import SPARSE_BYTES
from harness.fill import CACHES, CHUNK_ELEMENTS
from harness.gqa_data import GROUP_FILLS, group_bytes
from harness.model_data import model_sizes
from harness.rope_data import rope_bytes
from harness.state_data import state_bytes
from harness.tensors import DTYPES, INDEX_TILE


def required_bytes(case: Case, operator: Operator, device: str) -> int:
    """About how much memory judging a case takes: tensors, snapshots, float64 copies for the oracle.

    Of a cache so large that only the blocks in use are watched, the host makes no more than these real;
    a GPU allocates it whole, once. From step to step the tensors of two steps are held.
    """
    item = DTYPES[case.options.dtype].itemsize
    if operator.is_stack:
        steps = [_stack_bytes(case, rows, item) for rows in case.steps]
    elif any(spec.fill in GROUP_FILLS for spec in operator.inputs):
        steps = [group_bytes(case, operator, rows, device) for rows in case.steps]
    elif any(spec.fill is Fill.ROPE_TABLE for spec in operator.inputs):
        steps = [rope_bytes(case, rows, device, item) for rows in case.steps]
    else:
        steps = [_step_bytes(case, rows, operator, device) for rows in case.steps]
    return max(steps) * (2 if len(steps) > 1 else 1)


def _step_bytes(case: Case, rows: tuple[Row, ...], operator: Operator, device: str) -> int:
    """The same of one step."""
    tokens = sum(row.new for row in rows)
    longest = max((row.length for row in rows), default=0)
    fills = {spec.fill for spec in operator.inputs}
    has_lists = not fills.isdisjoint((Fill.LISTED_QUERY, Fill.STEP_LISTED_QUERY))
    attends = has_lists or Fill.QUERY in fills
    has_cache = not fills.isdisjoint(CACHES)
    pairs = max((row.new * row.length for row in rows if row.is_decode), default=0)
    prefill_pairs = max((row.new * row.length for row in rows if row.seq_lens_encoder), default=0)
    prefill_keys = sum(row.length for row in rows if row.seq_lens_encoder)
    total = CHUNK_ELEMENTS * 8 * 6
    for layer in case.layers:
        item = DTYPES[layer.dtype].itemsize
        needed = blocks_needed(case.steps, layer.block_size)
        block = layer.block_size * layer.latent_width * item
        cache = (case.options.pool or needed + needed // 2 + 3) * block if has_cache else 0
        if cache > SPARSE_BYTES:
            # Each used block with its two neighbours, and two snapshots of them.
            total += 9 * needed * block + (cache if device == "cuda" else 0)
        else:
            total += 3 * cache
        total += longest * layer.latent_width * 8 + tokens * layer.latent_width * 4 * item
        if attends:
            queries = tokens * layer.latent_width * (4 * item + 3 * 8)
            total += (queries + pairs * 8 * 3) * layer.num_attention_heads
        total += _list_bytes(layer, tokens) * has_lists
        total += state_bytes(layer, tokens, item) * (Fill.PREFIX_OUT in fills)
        if any("window_indices" in spec.axes for spec in operator.outputs):
            # Output and its poisoned copy; results of two references, positions, blocks and rows in int64.
            longest_table = (longest // layer.block_size + 2) * layer.block_size
            total += tokens * (min(layer.window or longest_table, longest_table) + INDEX_TILE) * 48
        if any("prefill_keys" in spec.axes for spec in operator.outputs):
            # Output, its poisoned copy, two references and what they are compared as.
            total += prefill_keys * layer.latent_width * item * 6
        if Fill.DECODE_OUTPUT in fills:
            # Outputs of two branches with their snapshots, one merged, two references and what they are
            # compared as; queries with their snapshot, and the same of them packed.
            width = 10 * layer.v_head_dim + 8 * layer.qk_head_dim
            total += tokens * layer.num_attention_heads * width * item
        if Fill.KEY_WEIGHT in fills:
            # Weights with their snapshots and float64 copies, both emulations; keys, values and scores of the
            # longest row; queries, outputs and what a path makes of them.
            weights = layer.kv_lora_rank * (layer.qk_nope_head_dim + layer.v_head_dim)
            wide = layer.latent_width + layer.qk_head_dim + layer.v_head_dim
            history = (longest + prefill_keys) * (layer.qk_head_dim + layer.v_head_dim)
            all_pairs = max((row.new * row.length for row in rows), default=0)
            elements = weights * 4 + tokens * wide * 4 + history * 3 + all_pairs * 4
            # Beside them the lists of a packed cache, each with its snapshot.
            lists = tokens * (min(layer.window or longest, longest) + INDEX_TILE) * (layer.cache == "packed")
            total += elements * 8 * layer.num_attention_heads + lists * 8
        if Fill.KV_B_WEIGHT in fills:
            # Both layouts and what is made of each, with gaps, snapshots, two references and bytes compared.
            total += layer.kv_b_proj_width * layer.kv_lora_rank * item * 40
        if Fill.HEAD_KEY in fills:
            # Tensors, snapshots and float64 copies of queries, keys and values; scores of one row.
            elements = (tokens + prefill_keys) * (layer.qk_head_dim + layer.v_head_dim)
            total += (elements * (3 * item + 8) + prefill_pairs * 8 * 3) * layer.num_attention_heads
    return total


def _list_bytes(layer: Layer, tokens: int) -> int:
    """Lists, their snapshots and what they are made of; keys and logits of the one token that is computed."""
    elements = tokens * 8 + layer.latent_width * 3 + layer.num_attention_heads * 4
    return layer.index_topk * elements * 8


def _stack_bytes(case: Case, rows: tuple[Row, ...], item: int) -> int:
    """The same of one step of a whole model.

    Weights with their snapshots and float64 copies; caches; every stage of every token of every history, kept
    by three oracles and an emulation; logits of attention of the longest row.
    """
    layer, num_layers = case.layers[0], case.options.layers
    sizes = model_sizes(layer, num_layers)
    hidden, wide = sizes["hidden_size"], sizes["q_width"] + layer.kv_b_proj_width + sizes["attention_width"]
    inner = max(hidden, sizes["q_lora_rank"], layer.kv_lora_rank)
    weights = hidden * (3 * sizes["intermediate_size"] + layer.latent_width) + wide * inner
    tokens = sum(row.length for row in rows)
    longest = max((row.length for row in rows), default=0)
    stages = 2 * wide + 4 * hidden + 3 * sizes["intermediate_size"] + 2 * layer.latent_width
    needed = blocks_needed(case.steps, layer.block_size)
    blocks = case.options.pool or needed + needed // 2 + 3
    cache = num_layers * blocks * layer.block_size * layer.latent_width * item
    elements = num_layers * (5 * weights + 4 * tokens * stages) + 3 * sizes["vocab_size"] * (hidden + tokens)
    return 3 * cache + 8 * (elements + 4 * longest**2 * layer.num_attention_heads)
