"""Split a checkpoint's projection of queries, keys, values and gates into one rank's, bit for bit.

Inputs
    weight        [inputs, W]    model dtype, row stride free, last axis dense; layout `paddle`
                  [W, inputs]    the same; layout `torch`
Outputs
    projection    [inputs, F]    model dtype, row stride free, last axis dense
    offsets       [4, 3] int32   contiguous: of q, k, v and gate the first feature in the weight, the first in
                                 the projection, and how many

The W output features of the weight are those of all ranks: K for each query head, K for each KV head, V for
each KV head, V for each query head. The projection has those of one rank's heads, q, k, v and, where it is as
wide as that, the gate. A rank has whole query heads, and its share of the KV heads or one that several
ranks have. All counts are the layer's own: `projection_parts` says what is cut where.

Any widths and any number of inputs. Tensors beyond 2^32 elements. No host synchronisation; counts and widths
do not recompile.

Not: dequantisation, a change of dtype, biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

Layout = Literal["paddle", "torch"]
LAYOUTS: tuple[Layout, ...] = ("paddle", "torch")

BLOCK_FEATURES = 128
"""Output features that a program moves: 256 bytes of bf16 along whichever axis they are dense."""

BLOCK_INPUTS = 64
"""Input features that a program moves: with the others a tile of 16 KiB of bf16, 32 KiB of fp32."""


@dataclass(frozen=True)
class Part:
    """Features of one kind in one rank's projection, in features of the checkpoint and of the projection."""

    source: int
    target: int
    size: int


def projection_parts(
    rank: int, ranks: int, heads: int, total_kv_heads: int, head_dim: int, v_head_dim: int
) -> tuple[Part, Part, Part, Part]:
    """What one rank takes: queries, keys, values and gates of one layer.

    Args:
        heads: query heads of this rank. total_kv_heads: KV heads of the layer, of all ranks.
    """
    kv_heads = max(1, total_kv_heads // ranks)
    # With more ranks than KV heads, neighbours have the same one.
    first_kv = rank * total_kv_heads // ranks
    total_heads = heads * ranks
    key_begin = total_heads * head_dim
    value_begin = key_begin + total_kv_heads * head_dim
    gate_begin = value_begin + total_kv_heads * v_head_dim
    queries = Part(rank * heads * head_dim, 0, heads * head_dim)
    keys = Part(key_begin + first_kv * head_dim, queries.size, kv_heads * head_dim)
    values = Part(value_begin + first_kv * v_head_dim, keys.target + keys.size, kv_heads * v_head_dim)
    gates = Part(gate_begin + rank * heads * v_head_dim, values.target + values.size, heads * v_head_dim)
    return queries, keys, values, gates


_NOT_SPECIALIZED = [
    "num_inputs",
    "num_features",
    *(
        f"{kind}_{what}"
        for kind in ("query", "key", "value", "gate")
        for what in ("source", "target", "size")
    ),
]


@triton.jit
def _store_part(offsets, part, source, target, size):
    """The three numbers of one part."""
    tl.store(offsets + 3 * part, source)
    tl.store(offsets + 3 * part + 1, target)
    tl.store(offsets + 3 * part + 2, size)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _gather_features(
    weight,
    weight_stride,
    projection,
    projection_stride,
    offsets,
    num_inputs,
    num_features,
    query_source,
    query_target,
    query_size,
    key_source,
    key_target,
    key_size,
    value_source,
    value_target,
    value_size,
    gate_source,
    gate_target,
    gate_size,
    INPUTS_FIRST: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Moves a tile of one rank's projection. Grid: (tiles of features, tiles of inputs)."""
    # 1. The checkpoint's feature of each of the projection's: parts follow one another in both.
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_feature = features < num_features
    shift = tl.where(features < key_target, query_source - query_target, key_source - key_target)
    shift = tl.where(features < value_target, shift, value_source - value_target)
    shift = tl.where(features < gate_target, shift, gate_source - gate_target)
    source = (features + shift).to(tl.int64)
    inputs = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    is_input = inputs < num_inputs

    # 2. Read along the checkpoint's dense axis, write along the projection's.
    if INPUTS_FIRST:
        tile = tl.load(
            weight + inputs[:, None] * weight_stride + source[None, :],
            mask=is_input[:, None] & is_feature[None, :],
        )
    else:
        tile = tl.load(
            weight + source[:, None] * weight_stride + inputs[None, :],
            mask=is_feature[:, None] & is_input[None, :],
        )
        tile = tl.trans(tile)
    tl.store(
        projection + inputs[:, None] * projection_stride + features[None, :],
        tile,
        mask=is_input[:, None] & is_feature[None, :],
    )

    # 3. The slices themselves, by the first program.
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _store_part(offsets, 0, query_source, query_target, query_size)
        _store_part(offsets, 1, key_source, key_target, key_size)
        _store_part(offsets, 2, value_source, value_target, value_size)
        _store_part(offsets, 3, gate_source, gate_target, gate_size)


def split_qkv_proj(weight, projection, offsets, parts: tuple[Part, ...], *, layout: Layout) -> None:
    """Launches the split of one rank; shapes and dtypes as in the module's docstring."""
    num_inputs, num_features = projection.shape
    grid = (triton.cdiv(num_features, BLOCK_FEATURES), triton.cdiv(num_inputs, BLOCK_INPUTS))
    _gather_features[grid](
        weight,
        weight.stride(0),
        projection,
        projection.stride(0),
        offsets,
        num_inputs,
        num_features,
        *(number for part in parts for number in (part.source, part.target, part.size)),
        INPUTS_FIRST=layout == "paddle",
        BLOCK_F=BLOCK_FEATURES,
        BLOCK_I=BLOCK_INPUTS,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: every rank's projection, with gates and without, from both layouts."""
    ranks = inputs["tensor_parallel_size"]
    for rank in range(ranks):
        parts = projection_parts(
            rank,
            ranks,
            inputs["num_attention_heads"],
            inputs["total_num_key_value_heads"],
            inputs["qk_head_dim"],
            inputs["v_head_dim"],
        )
        for layout in LAYOUTS:
            for name in ("qkv", "qkvg"):
                split_qkv_proj(
                    inputs[f"qkvg_proj_{layout}"],
                    outputs[f"{name}_proj_weight_{layout}"][rank],
                    outputs["qkv_offsets"][rank],
                    parts,
                    layout=layout,
                )


PATHS = (
    KernelPath(
        name="triton/qkv_split",
        operator="qkv_split",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
