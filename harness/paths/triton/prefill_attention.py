"""Causal attention of prefill rows of any length over cached and new keys, unabsorbed, with LSE.

Inputs
    q                     [Tp, H, N+D]   model dtype, token and head strides free
    k                     [Tk, H, N+D]   model dtype, token and head strides free
    v                     [Tk, H, V]     model dtype, token and head strides free
    cu_seqlens_q          [B + 1] int32  exclusive prefix sum of the new tokens of every row
    cu_seqlens_k_prefill  [B + 1] int32  the same of cached and new tokens, prefill rows alone
Outputs
    out                   [Tp, H, V]     model dtype, token and head strides free
    lse                   [Tp, H]        fp32, contiguous, natural log

A row with keys has k_len = cached + q_len of them; its query i sees the first cached + i + 1 (causal,
bottom-right). Tokens of rows without keys, and those behind the last row: out 0, lse -inf.

N, D and V are any widths: a tile is the next power of two wide. bf16, fp16, fp32. Any number of rows,
of which one may hold all tokens. No host synchronisation; the launch depends on shapes alone. Lengths,
rows, heads and strides do not recompile.

Not: windows, dropout, keys shared by heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * log2 e)."""

_NOT_SPECIALIZED = ["num_tokens", "num_rows"]


@triton.jit
def find_row(
    tile, cu_seqlens_q, num_rows, num_tokens, group_size, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr
):
    """(row, first query of the tile within the row) of a tile; row > num_rows where there is none.

    Every row has ceil(q_len * group_size / BLOCK_M) tiles, where a token has queries of group_size heads. The
    tokens behind the last row count as row num_rows.
    """
    first_tile = 0
    row = 0
    row_tile = 0
    for start in range(0, num_rows + 1, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        begins = tl.load(cu_seqlens_q + rows, mask=rows <= num_rows, other=0)
        ends = tl.load(cu_seqlens_q + rows + 1, mask=rows < num_rows, other=0)
        ends = tl.where(rows == num_rows, num_tokens, ends)
        tiles = tl.where(rows <= num_rows, tl.cdiv((ends - begins) * group_size, BLOCK_M), 0)
        after = first_tile + tl.cumsum(tiles, 0)
        row += tl.sum((after <= tile).to(tl.int32), 0)
        row_tile += tl.sum(tl.where(after <= tile, tiles, 0), 0)
        first_tile += tl.sum(tiles, 0)
    return row, (tile - row_tile) * BLOCK_M


@triton.jit
def _attend_tiles(
    accumulator,
    total,
    maximum,
    q_nope,
    q_rope,
    k_rows,
    k_stride_token,
    v_rows,
    v_stride_token,
    begin,
    end,
    k_len,
    visible,
    exponent_scale,
    QK_NOPE_HEAD_DIM: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    NOPE_COLUMNS: tl.constexpr,
    ROPE_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Online softmax of a tile of queries over keys begin to end, in tiles of BLOCK_N keys.

    Without IS_MASKED every query sees every key of every tile.
    """
    nope_columns = tl.arange(0, NOPE_COLUMNS)
    rope_columns = tl.arange(0, ROPE_COLUMNS)
    v_columns = tl.arange(0, V_COLUMNS)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = k_rows + keys.to(tl.int64)[:, None] * k_stride_token
        v_tile = v_rows + keys.to(tl.int64)[:, None] * v_stride_token
        # Masked values are 0 and not merely weighted 0: 0 * NaN would reach the output.
        is_key = keys < k_len
        if IS_MASKED | (NOPE_COLUMNS != QK_NOPE_HEAD_DIM):
            mask = is_key[:, None] & (nope_columns < QK_NOPE_HEAD_DIM)[None, :]
            k_nope = tl.load(k_tile + nope_columns[None, :], mask=mask, other=0.0)
        else:
            k_nope = tl.load(k_tile + nope_columns[None, :])
        if IS_MASKED | (ROPE_COLUMNS != QK_ROPE_HEAD_DIM):
            mask = is_key[:, None] & (rope_columns < QK_ROPE_HEAD_DIM)[None, :]
            k_rope = tl.load(k_tile + QK_NOPE_HEAD_DIM + rope_columns[None, :], mask=mask, other=0.0)
        else:
            k_rope = tl.load(k_tile + QK_NOPE_HEAD_DIM + rope_columns[None, :])
        if IS_MASKED | (V_COLUMNS != V_HEAD_DIM):
            mask = is_key[:, None] & (v_columns < V_HEAD_DIM)[None, :]
            values = tl.load(v_tile + v_columns[None, :], mask=mask, other=0.0)
        else:
            values = tl.load(v_tile + v_columns[None, :])
        logits = tl.dot(q_nope, tl.trans(k_nope), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
        if IS_MASKED:
            logits = tl.where(keys[None, :] < visible[:, None], logits, float("-inf"))

        # Key 0 is in the first tile and visible to every query, so the maximum is a number. Subtract
        # before scaling: the difference of two large logits is exact, their scaled values are not.
        larger = tl.maximum(maximum, tl.max(logits, 1))
        keep = tl.exp2((maximum - larger) * exponent_scale)
        weights = tl.exp2((logits - larger[:, None]) * exponent_scale)
        total = total * keep + tl.sum(weights, 1)
        accumulator = accumulator * keep[:, None]
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
        maximum = larger
    return accumulator, total, maximum


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_prefill(
    q,
    q_stride_token,
    q_stride_head,
    k,
    k_stride_token,
    k_stride_head,
    v,
    v_stride_token,
    v_stride_head,
    cu_seqlens_q,
    cu_seqlens_k,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    softmax_scale,
    num_tokens,
    num_rows,
    QK_NOPE_HEAD_DIM: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    NOPE_COLUMNS: tl.constexpr,
    ROPE_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Attention of BLOCK_M successive queries of one row and head. Grid: (tiles of all rows, heads)."""
    # 1. Locate the row. Last tiles first: they have the most keys.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    row, first_query = find_row(tile, cu_seqlens_q, num_rows, num_tokens, 1, BLOCK_M, BLOCK_B)
    if row > num_rows:
        return
    is_row = row < num_rows
    q_begin = tl.load(cu_seqlens_q + row)
    q_end = tl.load(cu_seqlens_q + row + 1, mask=is_row, other=num_tokens)
    k_begin = tl.load(cu_seqlens_k + row)
    k_end = tl.load(cu_seqlens_k + row + 1, mask=is_row, other=k_begin)
    q_len = q_end - q_begin
    k_len = k_end - k_begin

    # 2. Load the queries.
    queries = first_query + tl.arange(0, BLOCK_M)
    is_query = queries < q_len
    tokens = (q_begin + queries).to(tl.int64)
    nope_columns = tl.arange(0, NOPE_COLUMNS)
    rope_columns = tl.arange(0, ROPE_COLUMNS)
    v_columns = tl.arange(0, V_COLUMNS)
    q_rows = q + tokens[:, None] * q_stride_token + head.to(tl.int64) * q_stride_head
    mask = is_query[:, None] & (nope_columns < QK_NOPE_HEAD_DIM)[None, :]
    q_nope = tl.load(q_rows + nope_columns[None, :], mask=mask, other=0.0)
    mask = is_query[:, None] & (rope_columns < QK_ROPE_HEAD_DIM)[None, :]
    q_rope = tl.load(q_rows + QK_NOPE_HEAD_DIM + rope_columns[None, :], mask=mask, other=0.0)

    # 3. Keys that all queries of the tile see, then those that some do not.
    visible = k_len - q_len + queries + 1
    tile_end = tl.minimum(k_len, k_len - q_len + first_query + BLOCK_M)
    common = tl.maximum(tl.minimum(k_len - q_len + first_query + 1, k_len), 0) // BLOCK_N * BLOCK_N
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, V_COLUMNS], tl.float32)
    exponent_scale = softmax_scale * LOG2_E
    k_rows = k + k_begin.to(tl.int64) * k_stride_token + head.to(tl.int64) * k_stride_head
    v_rows = v + k_begin.to(tl.int64) * v_stride_token + head.to(tl.int64) * v_stride_head
    for is_masked in tl.static_range(2):
        begin = common * is_masked
        end = tl.where(is_masked == 1, tile_end, common)
        accumulator, total, maximum = _attend_tiles(
            accumulator,
            total,
            maximum,
            q_nope,
            q_rope,
            k_rows,
            k_stride_token,
            v_rows,
            v_stride_token,
            begin,
            end,
            k_len,
            visible,
            exponent_scale,
            QK_NOPE_HEAD_DIM,
            QK_ROPE_HEAD_DIM,
            V_HEAD_DIM,
            NOPE_COLUMNS,
            ROPE_COLUMNS,
            V_COLUMNS,
            BLOCK_N,
            is_masked == 1,
        )

    # 4. Normalise and store. A row without keys has maximum -inf and total 0: out 0, lse -inf.
    total = tl.where(k_len > 0, total, 1.0)
    log_sum = maximum * softmax_scale + tl.log(total)
    out_rows = out + tokens[:, None] * out_stride_token + head.to(tl.int64) * out_stride_head
    mask = is_query[:, None] & (v_columns < V_HEAD_DIM)[None, :]
    values = accumulator / total[:, None]
    tl.store(out_rows + v_columns[None, :], values.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + tokens * num_heads + head, log_sum, mask=is_query)


@dataclass(frozen=True)
class Tile:
    """Shape of a program: queries and keys it works on at a time, warps and pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


ROWS_AT_A_TIME = 256
"""Rows that the search for a tile's row looks at together."""


def tile_for(qk_columns: int, v_columns: int, itemsize: int) -> Tile:
    """The tile for the widths, padded to powers of two, and the item size.

    Measured on an H100 at widths 128 + 64 and 128, 4,096 tokens, 128 heads: 404 TFLOP/s. 128 keys in two
    stages reach 420 and spill registers; 64 queries lose a tenth on long rows and win a quarter on short
    ones, but a choice by length would need lengths on the host.
    """
    if itemsize == 4:
        return Tile(32, 32, 4, 1)
    if qk_columns + v_columns > 384:
        return Tile(128, 64, 8, 2)
    return Tile(128, 64, 8, 3)


def prefill_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k_prefill, out, lse, *, qk_nope_head_dim: int, softmax_scale: float
) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    tokens, heads, qk_head_dim = q.shape
    if tokens == 0:
        return
    v_head_dim = v.shape[2]
    rows = cu_seqlens_q.shape[0] - 1
    # tl.dot takes no fewer than 16 columns.
    nope_columns, rope_columns, v_columns = (
        max(16, triton.next_power_of_2(width))
        for width in (qk_nope_head_dim, qk_head_dim - qk_nope_head_dim, v_head_dim)
    )
    tile = tile_for(nope_columns + rope_columns, v_columns, q.element_size())
    # Every row may end in a tile that is not full, and padding in one more.
    tiles = min(tokens, triton.cdiv(tokens, tile.queries) + rows + 1)
    _attend_prefill[(tiles, heads)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        cu_seqlens_q,
        cu_seqlens_k_prefill,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        softmax_scale,
        tokens,
        rows,
        QK_NOPE_HEAD_DIM=qk_nope_head_dim,
        QK_ROPE_HEAD_DIM=qk_head_dim - qk_nope_head_dim,
        V_HEAD_DIM=v_head_dim,
        NOPE_COLUMNS=nope_columns,
        ROPE_COLUMNS=rope_columns,
        V_COLUMNS=v_columns,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_B=min(ROWS_AT_A_TIME, triton.next_power_of_2(rows + 1)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def supports(case: Case) -> str | None:
    """None: the kernel takes every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    prefill_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["cu_seqlens_q"],
        inputs["cu_seqlens_k_prefill"],
        outputs["out"],
        outputs["lse"],
        qk_nope_head_dim=inputs["qk_nope_head_dim"],
        softmax_scale=inputs["softmax_scale"],
    )


PATHS = (
    KernelPath(
        name="triton/prefill_attention",
        operator="prefill_attention",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
