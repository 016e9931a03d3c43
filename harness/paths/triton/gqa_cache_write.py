"""Rotate queries and keys of a packed projection and write keys and values into their paged caches.

Inputs
    qkv                 [Tp, (H + G) K + G V]  model dtype, token stride free: [queries | keys | values]
    cos_sin_cache       [P, D]                 model dtype or fp32, rows [cos | sin], row stride free; None:
                                               nothing is rotated
    block_tables        [B, max_blocks]        int32, row stride free; entries past a row's length unread
    seq_lens_decoder    [B] int32              tokens cached before this step
    cu_seqlens_q        [B + 1] int32          exclusive prefix sum of the new tokens
    batch_id_per_token  [Tp] int32             slot of each token, negative for padding
Outputs
    query               [Tp, H, K]             model dtype, token and head strides free
    k_cache             [nb, G, bs, K]         model dtype, contiguous; written in place
    v_cache             [nb, G, bs, V]         model dtype, contiguous; written in place

Token t of row b stands at p = seq_lens_decoder[b] + t - cu_seqlens_q[b], whatever the row's kind. The first D
columns of its queries and keys are rotated by row p of the table, in pairs (2i, 2i + 1) or, with is_neox,
(i, i + D / 2); the others are copied. Keys and values go to block block_tables[b, p // bs], offset p % bs. No
other byte of the caches changes. Padding tokens write no cache, and queries of 0.

Products and sums of the rotation are fp32 and the result is rounded once; what is not rotated is copied bit
for bit. Any even D up to an even K, any V, any number of heads and tokens (none: no launch), any block size.
Tensors beyond 2^32 elements. No host synchronisation; numbers of tokens, rows, blocks and heads, and the
block size, do not recompile.

Not: quantised caches, norms of queries and keys, several positions a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.triton.rope import rotate_heads

BLOCK_ELEMENTS = 2048
"""Elements of a program's tile of heads: 4 KiB of bf16, two 16-byte accesses a thread of 4 warps."""


@triton.jit
def _copy_heads(
    raw,
    raw_stride_head,
    out,
    out_stride_head,
    heads,
    num_heads,
    is_real,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Some heads' columns of one token, bit for bit: raw and out point to its first. Of padding 0s."""
    columns = tl.arange(0, BLOCK_W)[None, :]
    is_element = (heads < num_heads) & (columns < WIDTH)
    part = tl.load(raw + heads * raw_stride_head + columns, mask=is_element & is_real, other=0.0)
    tl.store(out + heads * out_stride_head + columns, part, mask=is_element)


@triton.jit
def _place_heads(
    raw,
    out,
    out_stride_head,
    heads,
    num_heads,
    cos,
    sin,
    is_real,
    HEAD_DIM: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Some heads of queries or keys of one token: their first columns rotated, the others copied."""
    rotate_heads(
        raw,
        HEAD_DIM,
        out,
        out_stride_head,
        heads,
        num_heads,
        cos,
        sin,
        is_real,
        ROPE_HEAD_DIM,
        BLOCK_H,
        BLOCK_PAIRS,
        IS_NEOX,
        HAS_TABLE,
        ROUNDS_PRODUCTS=False,
    )
    if HEAD_DIM > ROPE_HEAD_DIM:
        _copy_heads(
            raw + ROPE_HEAD_DIM,
            HEAD_DIM,
            out + ROPE_HEAD_DIM,
            out_stride_head,
            heads,
            num_heads,
            is_real,
            HEAD_DIM - ROPE_HEAD_DIM,
            BLOCK_REST,
        )


@triton.jit(do_not_specialize=["num_attention_heads", "num_key_value_heads", "block_size"])
def _write_heads(
    qkv,
    qkv_stride_token,
    cos_sin_cache,
    table_stride,
    block_tables,
    block_table_stride,
    seq_lens_decoder,
    cu_seqlens_q,
    batch_id_per_token,
    query,
    query_stride_token,
    query_stride_head,
    k_cache,
    v_cache,
    num_attention_heads,
    num_key_value_heads,
    block_size,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """BLOCK_H heads of one token. Grid: (tokens, tiles of query heads, then of KV heads)."""
    # 1. Where the token stands. Padding has no row, and no position.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(batch_id_per_token + token).to(tl.int64)
    is_real = slot >= 0
    cached = tl.load(seq_lens_decoder + slot, mask=is_real, other=0).to(tl.int64)
    first = tl.load(cu_seqlens_q + slot, mask=is_real, other=0).to(tl.int64)
    position = cached + token - first

    # 2. Cosines and sines, the same for all heads.
    cos = 0.0
    sin = 0.0
    if HAS_TABLE:
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        has_angle = is_real & (pairs < ROPE_HEAD_DIM // 2)
        angles = cos_sin_cache + position * table_stride + pairs
        cos = tl.load(angles, mask=has_angle, other=0.0).to(tl.float32)
        sin = tl.load(angles + ROPE_HEAD_DIM // 2, mask=has_angle, other=0.0).to(tl.float32)

    # 3. Query heads.
    row = qkv + token * qkv_stride_token
    query_tiles = tl.cdiv(num_attention_heads, BLOCK_H)
    tile = tl.program_id(1)
    if tile < query_tiles:
        heads = (tile * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        _place_heads(
            row,
            query + token * query_stride_token,
            query_stride_head,
            heads,
            num_attention_heads,
            cos,
            sin,
            is_real,
            HEAD_DIM,
            ROPE_HEAD_DIM,
            BLOCK_H,
            BLOCK_PAIRS,
            BLOCK_REST,
            IS_NEOX,
            HAS_TABLE,
        )

    # 4. KV heads: keys behind the queries, values behind the keys, each cache as wide as its own.
    elif is_real:
        heads = ((tile - query_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        table = block_tables + slot * block_table_stride
        block = tl.load(table + position // block_size).to(tl.int64)
        # Offset of head 0; head g lies g * block_size rows behind it. 64 bits: caches pass 2^32 elements.
        cache_row = block * num_key_value_heads * block_size + position % block_size
        keys = row + num_attention_heads * HEAD_DIM
        _place_heads(
            keys,
            k_cache + cache_row * HEAD_DIM,
            block_size * HEAD_DIM,
            heads,
            num_key_value_heads,
            cos,
            sin,
            is_real,
            HEAD_DIM,
            ROPE_HEAD_DIM,
            BLOCK_H,
            BLOCK_PAIRS,
            BLOCK_REST,
            IS_NEOX,
            HAS_TABLE,
        )
        _copy_heads(
            keys + num_key_value_heads * HEAD_DIM,
            V_HEAD_DIM,
            v_cache + cache_row * V_HEAD_DIM,
            block_size * V_HEAD_DIM,
            heads,
            num_key_value_heads,
            is_real,
            V_HEAD_DIM,
            BLOCK_V,
        )


def gqa_cache_write(
    qkv,
    cos_sin_cache,
    block_tables,
    seq_lens_decoder,
    cu_seqlens_q,
    batch_id_per_token,
    query,
    k_cache,
    v_cache,
    *,
    is_neox: bool,
) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0:
        return
    kv_heads, block_size, v_head_dim = v_cache.shape[1:]
    has_table = cos_sin_cache is not None
    # Without a table all columns pass the same way, as they are.
    rope_head_dim = cos_sin_cache.shape[1] if has_table else head_dim
    block_pairs = triton.next_power_of_2(rope_head_dim // 2)
    block_v = triton.next_power_of_2(v_head_dim)
    block_h = max(1, BLOCK_ELEMENTS // max(2 * block_pairs, block_v))
    tiles = triton.cdiv(num_heads, block_h) + triton.cdiv(kv_heads, block_h)
    _write_heads[(num_tokens, tiles)](
        qkv,
        qkv.stride(0),
        cos_sin_cache,
        cos_sin_cache.stride(0) if has_table else 0,
        block_tables,
        block_tables.stride(0),
        seq_lens_decoder,
        cu_seqlens_q,
        batch_id_per_token,
        query,
        query.stride(0),
        query.stride(1),
        k_cache,
        v_cache,
        num_heads,
        kv_heads,
        block_size,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        ROPE_HEAD_DIM=rope_head_dim,
        BLOCK_H=block_h,
        BLOCK_PAIRS=block_pairs,
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rope_head_dim)),
        BLOCK_V=block_v,
        IS_NEOX=is_neox,
        HAS_TABLE=has_table,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take the case."""
    for layer in case.layers:
        for name in ("qk_rope_head_dim", "qk_head_dim"):
            if getattr(layer, name) % 2:
                return f"columns are taken in pairs: {name} must be even, got {getattr(layer, name)}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    gqa_cache_write(
        inputs["qkv"],
        inputs["cos_sin_cache"],
        inputs["block_tables"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["query"],
        outputs["k_cache"],
        outputs["v_cache"],
        is_neox=bool(inputs["is_neox"]),
    )


PATHS = (
    KernelPath(
        name="triton/gqa_cache_write",
        operator="gqa_cache_write",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
