"""Rotary position embedding of the query's and the key's rope parts at the tokens' positions.

Inputs
    q_pe_raw            [Tp, H, D]  model dtype, token and head strides free, last axis dense
    k_pe_raw            [Tp, D]     model dtype, token stride free, last axis dense
    position_ids        [Tp] int32  absolute position of each token; of padding, anything
    batch_id_per_token  [Tp] int32  slot of each token, negative for padding
    cos_sin_cache       [P, D]      model dtype or fp32, rows [cos | sin], row stride free, last axis dense;
                                    None: nothing is rotated
Outputs
    q_pe                [Tp, H, D]  model dtype, token and head strides free, last axis dense
    k_pe                [Tp, D]     model dtype, token stride free, last axis dense

With c = cos_sin_cache[p, i] and s = cos_sin_cache[p, D / 2 + i] at a token's position p, pair i becomes
(low c - high s, high c + low s). Pairs are (2i, 2i + 1), interleaved, or with is_neox (i, i + D / 2), half
split. Without a table the parts are copied bit for bit. Padding tokens become 0: neither their parts nor
their positions are followed. Positions of real tokens are in [0, P); the row P - 1 is one like any other.

Products and sums are fp32 and the result is rounded once. With `rounds_products` each product is rounded to
the model dtype before the two are added, as where an engine computes in its tensors' type: path
triton/rope@rounded.

The outputs may be the inputs themselves: a program reads what it rotates before it writes it, and no other
reads it. Any even D, any H, any Tp (none: no launch). Tensors and tables beyond 2^32 elements. No host
synchronisation; numbers of tokens and positions do not recompile, nor heads within a tile.

Not: several positions a token, tables with one cosine for each column, rotation of some of the columns only.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_ELEMENTS = 4096
"""Elements a program, in whole heads: 8 KiB of bf16, four 16-byte accesses a thread each way."""


@triton.jit
def _rotate_pairs(low, high, cos, sin, ROUNDS_PRODUCTS: tl.constexpr):
    """Both halves of each pair, turned, in fp32."""
    # 1. The products.
    low_cos = low.to(tl.float32) * cos
    low_sin = low.to(tl.float32) * sin
    high_cos = high.to(tl.float32) * cos
    high_sin = high.to(tl.float32) * sin
    if ROUNDS_PRODUCTS:
        low_cos = low_cos.to(low.dtype).to(tl.float32)
        low_sin = low_sin.to(low.dtype).to(tl.float32)
        high_cos = high_cos.to(low.dtype).to(tl.float32)
        high_sin = high_sin.to(low.dtype).to(tl.float32)

    # 2. Their sums.
    return low_cos - high_sin, high_cos + low_sin


@triton.jit
def rotate_heads(
    raw,
    raw_stride_head,
    out,
    out_stride_head,
    heads,
    num_heads,
    cos,
    sin,
    is_real,
    ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ROUNDS_PRODUCTS: tl.constexpr,
):
    """Some heads of one token: raw and out point to its first. Of padding nothing is read, 0 written."""
    is_head = heads < num_heads
    if IS_NEOX:
        # The halves of a row are far apart: each is read and written on its own.
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        is_element = is_head & (pairs < ROPE_HEAD_DIM // 2)
        lows = heads * raw_stride_head + pairs
        low = tl.load(raw + lows, mask=is_element & is_real, other=0.0)
        high = tl.load(raw + lows + ROPE_HEAD_DIM // 2, mask=is_element & is_real, other=0.0)
        if HAS_TABLE:
            low, high = _rotate_pairs(low, high, cos, sin, ROUNDS_PRODUCTS)
        targets = out + heads * out_stride_head + pairs
        tl.store(targets, low.to(out.dtype.element_ty), mask=is_element)
        tl.store(targets + ROPE_HEAD_DIM // 2, high.to(out.dtype.element_ty), mask=is_element)
    else:
        # A pair lies side by side: rows are read and written whole, and taken apart in registers.
        columns = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
        is_element = is_head & (columns < ROPE_HEAD_DIM)
        row = tl.load(raw + heads * raw_stride_head + columns, mask=is_element & is_real, other=0.0)
        if HAS_TABLE:
            low, high = tl.split(tl.reshape(row, [BLOCK_H, BLOCK_PAIRS, 2]))
            low, high = _rotate_pairs(low, high, cos, sin, ROUNDS_PRODUCTS)
            row = tl.reshape(tl.join(low, high), [BLOCK_H, 2 * BLOCK_PAIRS])
        tl.store(out + heads * out_stride_head + columns, row.to(out.dtype.element_ty), mask=is_element)


@triton.jit(do_not_specialize=["num_attention_heads"])
def _rotate_tokens(
    q_pe_raw,
    q_raw_stride_token,
    q_raw_stride_head,
    k_pe_raw,
    k_raw_stride_token,
    position_ids,
    batch_id_per_token,
    cos_sin_cache,
    table_stride,
    q_pe,
    q_stride_token,
    q_stride_head,
    k_pe,
    k_stride_token,
    num_attention_heads,
    ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    ROUNDS_PRODUCTS: tl.constexpr,
):
    """BLOCK_H query heads of one token, the first ones its key too. Grid: (tokens, ceil(heads / BLOCK_H))."""
    # 1. Padding has no row of the table: its position may lie anywhere.
    token = tl.program_id(0).to(tl.int64)
    is_real = tl.load(batch_id_per_token + token) >= 0

    # 2. Cosines and sines, the same for all heads.
    cos = 0.0
    sin = 0.0
    if HAS_TABLE:
        position = tl.load(position_ids + token).to(tl.int64)
        pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
        has_angle = is_real & (pairs < ROPE_HEAD_DIM // 2)
        angles = cos_sin_cache + position * table_stride + pairs
        cos = tl.load(angles, mask=has_angle, other=0.0).to(tl.float32)
        sin = tl.load(angles + ROPE_HEAD_DIM // 2, mask=has_angle, other=0.0).to(tl.float32)

    # 3. The query's heads.
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    rotate_heads(
        q_pe_raw + token * q_raw_stride_token,
        q_raw_stride_head,
        q_pe + token * q_stride_token,
        q_stride_head,
        heads,
        num_attention_heads,
        cos,
        sin,
        is_real,
        ROPE_HEAD_DIM,
        BLOCK_H,
        BLOCK_PAIRS,
        IS_NEOX,
        HAS_TABLE,
        ROUNDS_PRODUCTS,
    )

    # 4. The key, which is one head for all.
    if tl.program_id(1) == 0:
        rotate_heads(
            k_pe_raw + token * k_raw_stride_token,
            0,
            k_pe + token * k_stride_token,
            0,
            tl.arange(0, 1)[:, None],
            1,
            cos,
            sin,
            is_real,
            ROPE_HEAD_DIM,
            1,
            BLOCK_PAIRS,
            IS_NEOX,
            HAS_TABLE,
            ROUNDS_PRODUCTS,
        )


def rotate(
    q_pe_raw,
    k_pe_raw,
    position_ids,
    batch_id_per_token,
    cos_sin_cache,
    q_pe,
    k_pe,
    *,
    is_neox: bool,
    rounds_products: bool = False,
) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens, num_heads, width = q_pe.shape
    if num_tokens == 0:
        return
    block_pairs = triton.next_power_of_2(width // 2)
    block_h = min(triton.next_power_of_2(num_heads), max(1, BLOCK_ELEMENTS // (2 * block_pairs)))
    has_table = cos_sin_cache is not None
    _rotate_tokens[(num_tokens, triton.cdiv(num_heads, block_h))](
        q_pe_raw,
        q_pe_raw.stride(0),
        q_pe_raw.stride(1),
        k_pe_raw,
        k_pe_raw.stride(0),
        position_ids,
        batch_id_per_token,
        cos_sin_cache,
        cos_sin_cache.stride(0) if has_table else 0,
        q_pe,
        q_pe.stride(0),
        q_pe.stride(1),
        k_pe,
        k_pe.stride(0),
        num_heads,
        ROPE_HEAD_DIM=width,
        BLOCK_H=block_h,
        BLOCK_PAIRS=block_pairs,
        IS_NEOX=is_neox,
        HAS_TABLE=has_table,
        ROUNDS_PRODUCTS=rounds_products,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take the case."""
    for layer in case.layers:
        if layer.qk_rope_head_dim % 2:
            return (
                f"columns are rotated in pairs: qk_rope_head_dim must be even, got {layer.qk_rope_head_dim}"
            )
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors, *, rounds_products: bool) -> None:
    """The path: the kernel on the harness's tensors."""
    rotate(
        inputs["q_pe_raw"],
        inputs["k_pe_raw"],
        inputs["position_ids"],
        inputs["batch_id_per_token"],
        inputs["cos_sin_cache"],
        outputs["q_pe"],
        outputs["k_pe"],
        is_neox=bool(inputs["is_neox"]),
        rounds_products=rounds_products,
    )


PATHS = tuple(
    KernelPath(
        name=name,
        operator="rope",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=partial(run, rounds_products=rounds_products),
        batch_invariant=True,
        rounds_products=rounds_products,
    )
    for name, rounds_products in (("triton/rope", False), ("triton/rope@rounded", True))
)
