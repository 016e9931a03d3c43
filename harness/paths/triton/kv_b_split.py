"""Split a checkpoint's kv_b_proj into one rank's halves for keys and for values, bit for bit.

Inputs
    weight              [R, W]            model dtype, row stride free, last axis dense; layout `paddle`
                        [W, R]            the same; layout `torch`
Outputs
    k_b_proj_weight     [H, N, R]         model dtype, head and row strides free, last axis dense
    v_b_proj_weight     [H, R, V]         model dtype, head and row strides free, last axis dense

The W output features are blocks of N + V, one a head, keys first; W may be the features of all ranks' heads
or of some. The H heads of the outputs are those from `first_head` on. One of the two halves is a
transposition, which of them depends on the layout: a tile is read along the dense axis of the checkpoint and
written along that of the output.

Any R, N and V, any H (none: no launch). Tensors beyond 2^32 elements. No host synchronisation; the number of
heads and the first of them do not recompile.

Not: dequantisation, a change of dtype.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

Layout = Literal["paddle", "torch"]
LAYOUTS: tuple[Layout, ...] = ("paddle", "torch")

BLOCK_FEATURES = 128
"""Features of a head that a program moves: 256 bytes of bf16 along whichever axis they are dense."""

BLOCK_RANK = 64
"""Latent columns that a program moves: with the features a tile of 16 KiB of bf16, 32 KiB of fp32."""


@triton.jit
def _load_features(
    weight, weight_stride, first, features, is_feature, columns, is_column, INPUTS_FIRST: tl.constexpr
):
    """[features, columns] of the checkpoint, read along its dense axis; features count from `first`."""
    places = first + features
    if INPUTS_FIRST:
        tile = tl.load(
            weight + columns[:, None] * weight_stride + places[None, :],
            mask=is_column[:, None] & is_feature[None, :],
        )
        tile = tl.trans(tile)
    else:
        tile = tl.load(
            weight + places[:, None] * weight_stride + columns[None, :],
            mask=is_feature[:, None] & is_column[None, :],
        )
    return tile


@triton.jit(do_not_specialize=["first_head"])
def _split_heads(
    weight,
    weight_stride,
    k_b_proj_weight,
    k_stride_head,
    k_stride_row,
    v_b_proj_weight,
    v_stride_head,
    v_stride_row,
    first_head,
    KV_LORA_RANK: tl.constexpr,
    QK_NOPE_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    INPUTS_FIRST: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Moves a tile of one head's keys or values. Grid: (tiles of keys, then of values; tiles of R; heads)."""
    # 1. The head's first feature, and the latent columns.
    head = tl.program_id(2).to(tl.int64)
    first = (first_head + head) * (QK_NOPE_HEAD_DIM + V_HEAD_DIM)
    columns = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    is_column = columns < KV_LORA_RANK
    key_tiles = tl.cdiv(QK_NOPE_HEAD_DIM, BLOCK_F)
    tile = tl.program_id(0)

    # 2. Keys keep their features outside: [features, columns].
    if tile < key_tiles:
        features = (tile * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
        is_feature = features < QK_NOPE_HEAD_DIM
        keys = _load_features(
            weight, weight_stride, first, features, is_feature, columns, is_column, INPUTS_FIRST
        )
        tl.store(
            k_b_proj_weight + head * k_stride_head + features[:, None] * k_stride_row + columns[None, :],
            keys,
            mask=is_feature[:, None] & is_column[None, :],
        )

    # 3. Values have them inside: [columns, features]. They begin behind the head's keys.
    else:
        features = ((tile - key_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
        is_feature = features < V_HEAD_DIM
        values = _load_features(
            weight,
            weight_stride,
            first + QK_NOPE_HEAD_DIM,
            features,
            is_feature,
            columns,
            is_column,
            INPUTS_FIRST,
        )
        tl.store(
            v_b_proj_weight + head * v_stride_head + columns[:, None] * v_stride_row + features[None, :],
            tl.trans(values),
            mask=is_column[:, None] & is_feature[None, :],
        )


def split_kv_b_proj(weight, k_b_proj_weight, v_b_proj_weight, *, first_head: int, layout: Layout) -> None:
    """Launches the split of one rank; shapes and dtypes as in the module's docstring."""
    heads, nope, rank = k_b_proj_weight.shape
    width = v_b_proj_weight.shape[2]
    if heads == 0:
        return
    tiles = triton.cdiv(nope, BLOCK_FEATURES) + triton.cdiv(width, BLOCK_FEATURES)
    _split_heads[(tiles, triton.cdiv(rank, BLOCK_RANK), heads)](
        weight,
        weight.stride(0),
        k_b_proj_weight,
        k_b_proj_weight.stride(0),
        k_b_proj_weight.stride(1),
        v_b_proj_weight,
        v_b_proj_weight.stride(0),
        v_b_proj_weight.stride(1),
        first_head,
        KV_LORA_RANK=rank,
        QK_NOPE_HEAD_DIM=nope,
        V_HEAD_DIM=width,
        INPUTS_FIRST=layout == "paddle",
        BLOCK_F=BLOCK_FEATURES,
        BLOCK_R=BLOCK_RANK,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: every rank's split, from both layouts, on the harness's tensors."""
    for layout in LAYOUTS:
        k_b_proj_weight, v_b_proj_weight = (outputs[f"{half}_b_proj_weight_{layout}"] for half in "kv")
        ranks, heads = k_b_proj_weight.shape[:2]
        for rank in range(ranks):
            split_kv_b_proj(
                inputs[f"kv_b_proj_{layout}"],
                k_b_proj_weight[rank],
                v_b_proj_weight[rank],
                first_head=rank * heads,
                layout=layout,
            )


PATHS = (
    KernelPath(
        name="triton/kv_b_split",
        operator="kv_b_split",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
