"""Attention of query heads in groups over paged keys and values, every row kind in one launch, with LSE.

Inputs
    query             [Tp, H, K]      model dtype, token and head strides free, rotated
    k_cache           [nb, G, bs, K]  model dtype, contiguous; new tokens written
    v_cache           [nb, G, bs, V]  model dtype, contiguous; new tokens written
    sinks             [H]             fp32, logits of no key, scaled; None: there are none
    block_tables      [B, max_blocks] int32, row stride free; entries past a row's length unread
    seq_lens_decoder  [B] int32       tokens cached before this step
    cu_seqlens_q      [B + 1] int32   exclusive prefix sum of the new tokens
    batch_id_per_token  [Tp] int32    slot of each token, negative for padding; read only where S > 1
Outputs
    out               [Tp, H, V]      model dtype, token and head strides free
    lse               [Tp, H]         fp32, contiguous, natural log
Workspace
    partial_out       [B, G, S, M, V] fp32, contiguous; only where S > 1
    partial_max       [B, G, S, M]    fp32, contiguous; only where S > 1: largest q . K_j
    partial_sum       [B, G, S, M]    fp32, contiguous; only where S > 1: sum of exp(s_j - max)

Head h reads KV head h // (H / G). Token t of row b stands at p = seq_lens_decoder[b] + t - cu_seqlens_q[b]
and sees keys up to p, the newest `window` of them where window is not 0. Padding: out 0, lse -inf.

A program works on M query rows of one KV head, numbered token by token and within a token head by head of
the group: a decode row's whole group shares what is read, and so do neighbouring tokens of a chunk, whatever
the size of the group. Where all tokens of a batch row fit into one program, their keys are divided among at
most S splits in whole tiles of keys, at least `min_split_tokens` each; splits without a key write nothing and
are not read. Longer chunks are not divided: they have programs enough.

Any H that is a multiple of G, any K and V (a tile of keys is one or two powers of two wide), any Tp (none: no
launch). bs is a power of two. bf16, fp16, fp32. Caches beyond 2^32 elements. No host synchronisation, and the
launch depends on shapes alone: a captured graph may be replayed with other lengths and tables. Numbers of
tokens, rows, blocks, heads and splits, the block size and the window do not recompile.

Not: quantised caches, logit caps, keys that are no prefix of the row's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from cases import Case
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths import _splits as splits
from harness.paths.triton.prefill_attention import ROWS_AT_A_TIME, find_row

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * log2 e)."""

COMBINE_SPLITS = 16
"""Splits that a program of the combine holds at a time."""

_NOT_SPECIALIZED = [
    "num_tokens",
    "num_rows",
    "num_key_value_heads",
    "group_size",
    "log2_block_size",
    "window",
    "num_splits",
    "min_split_tokens",
]


@triton.jit
def _oldest_key(position, window):
    """The oldest key that a token at a position sees, of a scalar or a block of positions."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def _split_tokens(seen, num_splits, min_split_tokens, BLOCK_N: tl.constexpr):
    """Keys a split: the seen ones divided evenly, not fewer than are worth a split, in whole tiles."""
    tokens = tl.maximum(tl.cdiv(seen, num_splits), min_split_tokens)
    return tl.cdiv(tokens, BLOCK_N) * BLOCK_N


@triton.jit
def _attend_tiles(
    accumulator,
    total,
    maximum,
    q_low,
    q_high,
    k_cache,
    v_cache,
    table,
    kv_head,
    num_key_value_heads,
    log2_block_size,
    begin,
    end,
    first_key,
    kv_end,
    oldest,
    newest,
    exponent_scale,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LOW_COLUMNS: tl.constexpr,
    HIGH_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Online softmax of a tile of query rows over keys begin to end, in tiles of BLOCK_N keys.

    A query row sees keys oldest to newest, all of them first_key to kv_end; without IS_MASKED each sees every
    key of every tile. What is not within is not read.
    """
    low_columns = tl.arange(0, LOW_COLUMNS)
    v_columns = tl.arange(0, V_COLUMNS)
    offset_mask = (1 << log2_block_size) - 1
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        # Masked values are 0 and not merely weighted 0: 0 * NaN would reach the output.
        is_key = (positions >= first_key) & (positions < kv_end)
        block = tl.load(table + (positions >> log2_block_size), mask=is_key, other=0)
        # int64 before the product: block * heads * block_size * width passes 2^32 in large caches.
        head_block = block.to(tl.int64) * num_key_value_heads + kv_head
        cache_row = (head_block << log2_block_size) + (positions & offset_mask)
        keys = k_cache + cache_row[:, None] * HEAD_DIM
        k_low = tl.load(keys + low_columns[None, :], mask=is_key[:, None], other=0.0)
        logits = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
        if HIGH_COLUMNS > 0:
            high_columns = LOW_COLUMNS + tl.arange(0, HIGH_COLUMNS)
            mask = is_key[:, None] & (high_columns < HEAD_DIM)[None, :]
            k_high = tl.load(keys + high_columns[None, :], mask=mask, other=0.0)
            logits = tl.dot(q_high, tl.trans(k_high), logits, input_precision="ieee")
        if IS_MASKED:
            is_seen = (positions[None, :] >= oldest[:, None]) & (positions[None, :] <= newest[:, None])
            logits = tl.where(is_seen, logits, float("-inf"))

        # A query row may see no key of a tile, nor of those before: then there is nothing to subtract.
        # Subtract before scaling: the difference of two large logits is exact, their scaled values are not.
        larger = tl.maximum(maximum, tl.max(logits, 1))
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        keep = tl.exp2((maximum - anchor) * exponent_scale)
        weights = tl.exp2((logits - anchor[:, None]) * exponent_scale)
        total = total * keep + tl.sum(weights, 1)
        mask = is_key[:, None] & (v_columns < V_HEAD_DIM)[None, :]
        values = tl.load(v_cache + cache_row[:, None] * V_HEAD_DIM + v_columns[None, :], mask=mask, other=0.0)
        accumulator = accumulator * keep[:, None]
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
        maximum = larger
    return accumulator, total, maximum


@triton.jit
def _with_sink(maximum, total, sinks, heads, is_row, softmax_scale, HAS_SINKS: tl.constexpr):
    """(logarithm of the whole sum, what values are multiplied by) of query rows with these keys.

    Rows without a key and without a sink: -inf and 0.
    """
    largest = maximum * softmax_scale
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_row, other=float("-inf"))
        larger = tl.maximum(largest, sink)
    else:
        sink = tl.full(largest.shape, float("-inf"), tl.float32)
        larger = largest
    anchor = tl.where(larger == float("-inf"), 0.0, larger)
    keep = tl.exp2((largest - anchor) * LOG2_E)
    whole = total * keep + tl.exp2((sink - anchor) * LOG2_E)
    factor = keep / tl.where(whole > 0, whole, 1.0)
    return anchor + tl.log(whole), factor


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_rows(
    query,
    query_stride_token,
    query_stride_head,
    k_cache,
    v_cache,
    sinks,
    block_tables,
    block_table_stride,
    seq_lens_decoder,
    cu_seqlens_q,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    partial_out,
    partial_max,
    partial_sum,
    softmax_scale,
    num_tokens,
    num_rows,
    num_key_value_heads,
    group_size,
    log2_block_size,
    window,
    num_splits,
    min_split_tokens,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LOW_COLUMNS: tl.constexpr,
    HIGH_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attention of BLOCK_M query rows of one batch row and KV head over one split of its keys.

    Grid: (tiles of all batch rows * KV heads, splits), KV heads fastest: those of one tile have queries side
    by side. Writes the outputs where one split has all keys, else its share into the workspace.
    """
    # 1. Locate the batch row. Last tiles first: they have the most keys.
    tiles = tl.num_programs(0) // num_key_value_heads
    tile = tiles - 1 - tl.program_id(0) // num_key_value_heads
    kv_head = tl.program_id(0) % num_key_value_heads
    split = tl.program_id(1)
    row, first_query = find_row(tile, cu_seqlens_q, num_rows, num_tokens, group_size, BLOCK_M, BLOCK_B)
    if row > num_rows:
        return
    is_batch_row = row < num_rows
    q_begin = tl.load(cu_seqlens_q + row)
    q_end = tl.load(cu_seqlens_q + row + 1, mask=is_batch_row, other=num_tokens)
    cached = tl.load(seq_lens_decoder + row, mask=is_batch_row, other=0)
    q_len = q_end - q_begin

    # 2. The query rows of the tile, and the keys that each sees. Padding has no keys.
    queries = first_query + tl.arange(0, BLOCK_M)
    is_query = queries < q_len * group_size
    places = tl.minimum(queries // group_size, q_len - 1)
    heads = kv_head * group_size + queries % group_size
    newest = cached + places
    oldest = _oldest_key(newest, window)
    tokens = (q_begin + places).to(tl.int64)

    # 3. This split's share of the keys that some query row of the tile sees.
    first_place = first_query // group_size
    last_place = tl.minimum((first_query + BLOCK_M - 1) // group_size, q_len - 1)
    first_key = _oldest_key(cached + first_place, window)
    begin = first_key // BLOCK_N * BLOCK_N
    end = tl.where(is_batch_row, cached + last_place + 1, begin)
    is_split = q_len * group_size <= BLOCK_M
    split_tokens = end - begin
    if is_split:
        split_tokens = _split_tokens(end - begin, num_splits, min_split_tokens, BLOCK_N)
    is_whole_row = split_tokens >= end - begin
    split_begin = begin + split * split_tokens
    split_end = tl.minimum(split_begin + split_tokens, end)
    if (split > 0) & (split_begin >= split_end):
        return

    # 4. Load the queries: as many columns as the largest power of two has, and the rest.
    low_columns = tl.arange(0, LOW_COLUMNS)
    q_rows = query + tokens[:, None] * query_stride_token + heads.to(tl.int64)[:, None] * query_stride_head
    q_low = tl.load(q_rows + low_columns[None, :], mask=is_query[:, None], other=0.0)
    q_high = q_low
    if HIGH_COLUMNS > 0:
        high_columns = LOW_COLUMNS + tl.arange(0, HIGH_COLUMNS)
        mask = is_query[:, None] & (high_columns < HEAD_DIM)[None, :]
        q_high = tl.load(q_rows + high_columns[None, :], mask=mask, other=0.0)

    # 5. Tiles at the window's edge, those that every query row sees whole, and those with the newest keys.
    common_begin = tl.cdiv(_oldest_key(cached + last_place, window), BLOCK_N) * BLOCK_N
    common_begin = tl.minimum(tl.maximum(common_begin, split_begin), split_end)
    common_end = (cached + first_place + 1) // BLOCK_N * BLOCK_N
    common_end = tl.maximum(tl.minimum(common_end, split_end), common_begin)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, V_COLUMNS], tl.float32)
    exponent_scale = softmax_scale * LOG2_E
    table = block_tables + row.to(tl.int64) * block_table_stride
    for part in tl.static_range(3):
        part_begin = split_begin
        part_end = common_begin
        if part == 1:
            part_begin = common_begin
            part_end = common_end
        if part == 2:
            part_begin = common_end
            part_end = split_end
        accumulator, total, maximum = _attend_tiles(
            accumulator,
            total,
            maximum,
            q_low,
            q_high,
            k_cache,
            v_cache,
            table,
            kv_head,
            num_key_value_heads,
            log2_block_size,
            part_begin,
            part_end,
            first_key,
            end,
            oldest,
            newest,
            exponent_scale,
            HEAD_DIM,
            V_HEAD_DIM,
            LOW_COLUMNS,
            HIGH_COLUMNS,
            V_COLUMNS,
            BLOCK_N,
            part != 1,
        )

    # 6. Store: straight to the outputs where this split has all keys. Padding: out 0, lse -inf.
    v_columns = tl.arange(0, V_COLUMNS)
    is_element = is_query[:, None] & (v_columns < V_HEAD_DIM)[None, :]
    if is_whole_row:
        log_sum, factor = _with_sink(maximum, total, sinks, heads, is_query, softmax_scale, HAS_SINKS)
        log_sum = tl.where(is_batch_row, log_sum, float("-inf"))
        out_rows = out + tokens[:, None] * out_stride_token + heads.to(tl.int64)[:, None] * out_stride_head
        values = accumulator * factor[:, None]
        tl.store(out_rows + v_columns[None, :], values.to(out.dtype.element_ty), mask=is_element)
        tl.store(lse + tokens * num_key_value_heads * group_size + heads, log_sum, mask=is_query)
    else:
        share = (row.to(tl.int64) * num_key_value_heads + kv_head) * num_splits + split
        partial = share * BLOCK_M + tl.arange(0, BLOCK_M)
        # Not their LSE: of logits near -6e4 its ulp is 4e-3, and so would be the error of a weight.
        tl.store(partial_max + partial, maximum, mask=is_query)
        tl.store(partial_sum + partial, total, mask=is_query)
        tl.store(
            partial_out + partial[:, None] * V_HEAD_DIM + v_columns[None, :], accumulator, mask=is_element
        )


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _combine_splits(
    batch_id_per_token,
    seq_lens_decoder,
    cu_seqlens_q,
    partial_out,
    partial_max,
    partial_sum,
    sinks,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    softmax_scale,
    num_key_value_heads,
    group_size,
    window,
    num_splits,
    min_split_tokens,
    V_HEAD_DIM: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merges the splits of one (token, head). Grid: (tokens * heads,).

    Over the splits s that have a key, with the maximum m of their partial_max:

        w_s = e^(softmax_scale * (partial_max[s] - m))
        out = sum_s w_s partial_out[s] / sum_s w_s partial_sum[s], and the sink's weight in the second sum
    """
    # 1. How many splits wrote something; with one, it already wrote the outputs.
    num_heads = num_key_value_heads * group_size
    token = (tl.program_id(0) // num_heads).to(tl.int64)
    head = tl.program_id(0) % num_heads
    row = tl.load(batch_id_per_token + token)
    if row < 0:
        return
    q_begin = tl.load(cu_seqlens_q + row)
    q_len = tl.load(cu_seqlens_q + row + 1) - q_begin
    if q_len * group_size > BLOCK_M:
        return
    cached = tl.load(seq_lens_decoder + row)
    begin = _oldest_key(cached, window) // BLOCK_N * BLOCK_N
    end = cached + q_len
    split_tokens = _split_tokens(end - begin, num_splits, min_split_tokens, BLOCK_N)
    if split_tokens >= end - begin:
        return
    used_splits = tl.cdiv(end - begin, split_tokens)

    # 2. Merge BLOCK_S splits at a time, rescaling as the maximum grows. All of it in fp32.
    columns = tl.arange(0, V_COLUMNS)
    is_column = columns < V_HEAD_DIM
    place = (token - q_begin) * group_size + head % group_size
    share = (row.to(tl.int64) * num_key_value_heads + head // group_size) * num_splits
    # Scalars as blocks of one: they are carried through the loop.
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([V_COLUMNS], tl.float32)
    exponent_scale = softmax_scale * LOG2_E
    for start in range(0, used_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        is_used = splits < used_splits
        partial = (share + splits) * BLOCK_M + place
        split_max = tl.load(partial_max + partial, mask=is_used, other=float("-inf"))
        split_sum = tl.load(partial_sum + partial, mask=is_used, other=0.0)
        split_out = tl.load(
            partial_out + partial[:, None] * V_HEAD_DIM + columns[None, :],
            mask=is_used[:, None] & is_column[None, :],
            other=0.0,
        )
        larger = tl.maximum(maximum, tl.max(split_max, 0))
        # The first splits may all lie behind a draft's window: they have no key that this token sees.
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        keep = tl.exp2((maximum - anchor) * exponent_scale)
        weight = tl.exp2((split_max - anchor) * exponent_scale)
        total = total * keep + tl.sum(split_sum * weight, 0)
        accumulator = accumulator * keep + tl.sum(weight[:, None] * split_out, 0)
        maximum = larger

    # 3. Store.
    is_stored = tl.arange(0, 1) == 0
    heads = head + tl.arange(0, 1)
    log_sum, factor = _with_sink(maximum, total, sinks, heads, is_stored, softmax_scale, HAS_SINKS)
    out_row = out + token * out_stride_token + head.to(tl.int64) * out_stride_head
    tl.store(out_row + columns, (accumulator * factor).to(out.dtype.element_ty), mask=is_column)
    tl.store(lse + token * num_heads + heads, log_sum, mask=is_stored)


@dataclass(frozen=True)
class Tile:
    """Shape of a program: query rows and keys it works on at a time, warps and pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(columns: int, itemsize: int) -> Tile:
    """The tile for the columns of keys and values together, padded, and the item size.

    64 query rows, for decode rows too: a tensor core of an H100 takes no fewer at once, and at one token of a
    group of 6 they compute 64 operations for every byte of the cache, where it could do 290.
    """
    if itemsize == 4:
        return Tile(32, 32, 4, 1)
    if columns > 384:
        return Tile(64, 32, 4, 2)
    return Tile(64, 64, 4, 2)


def padded_columns(head_dim: int, v_head_dim: int) -> tuple[int, int, int]:
    """(low, high, values): columns of a tile. Keys have the largest power of two, and what holds the rest."""
    # tl.dot takes no fewer than 16 columns.
    low = 1 << (head_dim.bit_length() - 1)
    high = 0 if low == head_dim else max(16, triton.next_power_of_2(head_dim - low))
    return low, high, max(16, triton.next_power_of_2(v_head_dim))


def tiles_of(tokens: int, rows: int, group_size: int, queries: int) -> int:
    """Tiles of query rows that any lengths of so many rows need: each may end in one that is not full."""
    at_most = triton.cdiv(tokens * group_size, queries) + rows + 1
    return int(min(tokens * triton.cdiv(group_size, queries), at_most))


def gqa_step(
    query,
    k_cache,
    v_cache,
    sinks,
    block_tables,
    seq_lens_decoder,
    cu_seqlens_q,
    batch_id_per_token,
    out,
    lse,
    *,
    softmax_scale: float,
    window: int,
    num_splits: int,
    min_split_tokens: int = 0,
    partial_out=None,
    partial_max=None,
    partial_sum=None,
) -> None:
    """Launches the two kernels; shapes and dtypes as in the module's docstring."""
    tokens, heads, head_dim = query.shape
    if tokens == 0:
        return
    kv_heads, block_size, v_head_dim = v_cache.shape[1:]
    rows = cu_seqlens_q.shape[0] - 1
    low, high, v_columns = padded_columns(head_dim, v_head_dim)
    tile = tile_for(low + high + v_columns, query.element_size())
    group_size = heads // kv_heads
    # Where nothing is partial, and where there are no sinks, any pointer will do.
    partials = (partial_out, partial_max, partial_sum) if num_splits > 1 else (lse, lse, lse)
    has_sinks = sinks is not None
    plan = (kv_heads, group_size, window, num_splits, min_split_tokens)
    _attend_rows[(tiles_of(tokens, rows, group_size, tile.queries) * kv_heads, num_splits)](
        query,
        query.stride(0),
        query.stride(1),
        k_cache,
        v_cache,
        sinks if has_sinks else lse,
        block_tables,
        block_tables.stride(0),
        seq_lens_decoder,
        cu_seqlens_q,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        *partials,
        softmax_scale,
        tokens,
        rows,
        kv_heads,
        group_size,
        block_size.bit_length() - 1,
        window,
        num_splits,
        min_split_tokens,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        LOW_COLUMNS=low,
        HIGH_COLUMNS=high,
        V_COLUMNS=v_columns,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_B=min(ROWS_AT_A_TIME, triton.next_power_of_2(rows + 1)),
        HAS_SINKS=has_sinks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits == 1:
        return
    _combine_splits[(tokens * heads,)](
        batch_id_per_token,
        seq_lens_decoder,
        cu_seqlens_q,
        *partials,
        sinks if has_sinks else lse,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        softmax_scale,
        *plan,
        V_HEAD_DIM=v_head_dim,
        V_COLUMNS=v_columns,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_S=COMBINE_SPLITS,
        HAS_SINKS=has_sinks,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        if layer.block_size & (layer.block_size - 1):
            return f"block_size must be a power of two, got {layer.block_size}"
        if layer.qk_head_dim < 16:
            return f"qk_head_dim must be at least 16, got {layer.qk_head_dim}"
    return None


def _tile_of(layer: Layer) -> Tile:
    """The tile of one layer."""
    columns = sum(padded_columns(layer.qk_head_dim, layer.v_head_dim))
    return tile_for(columns, 4 if layer.dtype == "fp32" else 2)


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    layer, rows = case.layers[0], [row for row in case.steps[0] if row.is_slot]
    tokens, tile = sum(row.new for row in case.steps[0]), _tile_of(layer)
    num_splits = case.options.splits
    if num_splits is None:
        longest = max((row.length for row in rows), default=0)
        table_tokens = triton.cdiv(longest, layer.block_size) * layer.block_size
        seen = table_tokens if not layer.window else min(table_tokens, layer.window + tile.queries)
        programs = tiles_of(tokens, len(rows), layer.group_size, tile.queries) * layer.num_key_value_heads
        num_splits = splits.plan(programs, tile.queries, seen, splits.processors())
    if num_splits == 1:
        return {}
    shares = (len(rows), layer.num_key_value_heads, num_splits, tile.queries)
    return {
        "partial_out": ((*shares, layer.v_head_dim), "float32"),
        "partial_max": (shares, "float32"),
        "partial_sum": (shares, "float32"),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    query, k_cache, v_cache = inputs["query"], inputs["k_cache"], inputs["v_cache"]
    partial_out = workspace.get("partial_out")
    fewest = 0
    if inputs["splits"] is None:
        tokens, heads, head_dim = query.shape
        kv_heads, rows = k_cache.shape[1], inputs["cu_seqlens_q"].shape[0] - 1
        tile = tile_for(sum(padded_columns(head_dim, v_cache.shape[3])), query.element_size())
        programs = tiles_of(tokens, rows, heads // kv_heads, tile.queries) * kv_heads
        fewest = splits.fewest_tokens(programs, tile.queries, splits.processors())
    gqa_step(
        query,
        k_cache,
        v_cache,
        inputs["sinks"],
        inputs["block_tables"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["out"],
        outputs["lse"],
        softmax_scale=inputs["softmax_scale"],
        window=inputs["window"],
        num_splits=1 if partial_out is None else partial_out.shape[2],
        min_split_tokens=fewest,
        partial_out=partial_out,
        partial_max=workspace.get("partial_max"),
        partial_sum=workspace.get("partial_sum"),
    )


PATHS = (
    KernelPath(
        name="triton/gqa_step",
        operator="gqa_step",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
