"""Absorbed MLA attention over listed rows of the packed fp8 cache, split over the lists, with LSE.

Inputs
    q             [Tp, H, R+D]         bf16, token and head strides free, last axis dense
    packed_cache  [nb, 1, bs, width]   uint8, contiguous, aligned to 4 bytes: R codes of e4m3fn, R / 128
                                       float32 scales, D bf16; width = R + R / 32 + 2 D
    indices       [Tp, 1, K] int32     token stride free, last axis dense: rows of the cache
Outputs
    out           [Tp, H, R]           bf16, token and head strides free
    lse           [Tp, H]              fp32, contiguous, natural log
Workspace
    partial_out   [Tp, H, S, R]        fp32, contiguous; only where S > 1
    partial_max   [Tp, H, S]           fp32, contiguous; only where S > 1: largest q . k
    partial_sum   [Tp, H, S]           fp32, contiguous; only where S > 1: sum of exp(s - max)

Token t attends to the rows that indices[t, 0] names. Entries outside 0 to nb * bs - 1 name none, wherever
they stand, and nothing is read for them; a row named twice counts twice. A list that names none: out 0, lse
-inf. Lists are divided among S splits in whole tiles of BLOCK_N entries, and every split writes its part.

Codes times scales are rounded to bf16 once, as tensor cores take them; sums are fp32.

R is a power of two from 128 on, D one from 16 on. Any H, any K, any block size, any Tp (none: no launch).
Caches beyond 2^32 bytes. No host synchronisation, and the launch depends on nothing on the device: a captured
graph may be replayed with other lists. Numbers of tokens, rows, entries, heads within a tile and splits do
not recompile. Compiled, it needs compute capability 8.9 or later, for the conversion from e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from cases import Case
from cases.cache_layout import TILE
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths import _splits as splits

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * log2 e)."""

BLOCK_ENTRIES = 1024
"""Entries that a program looks at together to find the last that names a row."""

COMBINE_COLUMNS = 256
COMBINE_SPLITS = 16
"""Columns and splits that a program of the combine holds at a time."""

_SHAPES = ["num_rows", "num_entries", "num_attention_heads", "num_splits"]


@triton.jit
def _split_entries(num_entries, num_splits, BLOCK_N: tl.constexpr):
    """Entries a split: the list divided evenly, in whole tiles."""
    return tl.cdiv(tl.cdiv(num_entries, num_splits), BLOCK_N) * BLOCK_N


@triton.jit
def list_end(entries, begin, end, num_rows, BLOCK_ENTRIES: tl.constexpr):
    """One more than the place of the last entry from begin to end that names a row; begin if none does."""
    behind = begin
    for start in range(begin, end, BLOCK_ENTRIES):
        places = start + tl.arange(0, BLOCK_ENTRIES)
        rows = tl.load(entries + places, mask=places < end, other=-1)
        is_row = (rows >= 0) & (rows < num_rows)
        behind = tl.maximum(behind, tl.max(tl.where(is_row, places + 1, begin), 0))
    return behind


@triton.jit
def attend_keys(q_latent, q_rope, latent, rope, is_key, maximum, total, accumulator, softmax_scale):
    """One step of the online softmax: maximum, total and accumulator with BLOCK_N more keys.

    q_latent [BLOCK_H, R], q_rope [BLOCK_H, D], latent [BLOCK_N, R], rope [BLOCK_N, D] in the model dtype;
    maximum, total [BLOCK_H] and accumulator [BLOCK_H, R] in fp32. Logits are not yet scaled. Where is_key
    [BLOCK_N] is not, latent and rope are 0.
    """
    # A tile without a key changes nothing. The branch serves tiles with keys too, as do the two products
    # apart: of one that goes straight on into another, each group of warps would compute all.
    exponent_scale = softmax_scale * LOG2_E
    keep = tl.full(maximum.shape, 1.0, tl.float32)
    weights = tl.zeros([q_latent.shape[0], latent.shape[0]], latent.dtype)
    if tl.max(is_key.to(tl.int32), 0) > 0:
        rope_share = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        rope_share = tl.where(is_key[None, :], rope_share, float("-inf"))
        latent_share = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        logits = rope_share + tl.where(is_key[None, :], latent_share, 0.0)
        # A maximum that is a number. Subtract before scaling: the difference of two large logits is exact,
        # their scaled values are not.
        larger = tl.maximum(maximum, tl.max(logits, 1))
        keep = tl.exp2((maximum - larger) * exponent_scale)
        exponentials = tl.exp2((logits - larger[:, None]) * exponent_scale)
        total = total * keep + tl.sum(exponentials, 1)
        weights = exponentials.to(latent.dtype)
        maximum = larger
    accumulator = accumulator * keep[:, None]
    accumulator = tl.dot(weights, latent, accumulator, input_precision="ieee")
    return maximum, total, accumulator


@triton.jit(do_not_specialize=_SHAPES)
def _attend_list(
    q,
    q_stride_token,
    q_stride_head,
    packed_cache,
    indices,
    indices_stride,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    partial_out,
    partial_max,
    partial_sum,
    softmax_scale,
    num_rows,
    num_entries,
    num_attention_heads,
    num_splits,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Attention of one token's BLOCK_H heads over one split of its list.

    Grid: (tokens * ceil(heads / BLOCK_H), splits), head tiles fastest: those of one token read the same
    rows at the same time, once from memory and then from L2. Writes the final result where there is one
    split, else its share into the workspace.
    """
    NUM_TILES: tl.constexpr = KV_LORA_RANK // TILE
    PACKED_WIDTH: tl.constexpr = KV_LORA_RANK + 4 * NUM_TILES + 2 * QK_ROPE_HEAD_DIM

    # 1. Locate the token's list and this split's share of it, without what names no row behind it.
    head_tiles = tl.cdiv(num_attention_heads, BLOCK_H)
    token = tl.program_id(0) // head_tiles
    head_tile = tl.program_id(0) % head_tiles
    split = tl.program_id(1)
    row = token.to(tl.int64)
    entries = indices + row * indices_stride
    split_entries = _split_entries(num_entries, num_splits, BLOCK_N)
    begin = split * split_entries
    end = tl.minimum(begin + split_entries, num_entries)
    end = list_end(entries, begin, end, num_rows, BLOCK_ENTRIES)

    # 2. Load the queries of the head tile, latent and rope part apart.
    heads = head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < num_attention_heads
    latent_columns = tl.arange(0, KV_LORA_RANK)
    rope_columns = tl.arange(0, QK_ROPE_HEAD_DIM)
    q_rows = q + row * q_stride_token + heads.to(tl.int64)[:, None] * q_stride_head
    q_latent = tl.load(q_rows + latent_columns[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_rows + KV_LORA_RANK + rope_columns[None, :], mask=is_head[:, None], other=0.0)

    # 3. Online softmax over tiles of BLOCK_N entries.
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    accumulator = tl.zeros([BLOCK_H, KV_LORA_RANK], tl.float32)
    tiles = tl.arange(0, NUM_TILES)
    tile_columns = tiles[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    for start in range(begin, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        listed = tl.load(entries + places, mask=places < end, other=-1)
        # Whoever wrote the list may have meant rows of something larger.
        is_key = (listed >= 0) & (listed < num_rows)
        # int64 before the product: row * width passes 2^32 in large caches. What is no key reads 0.
        keys = packed_cache + listed.to(tl.int64)[:, None] * PACKED_WIDTH
        codes = tl.load(keys[:, :, None] + tile_columns, mask=is_key[:, None, None], other=0)
        scales = tl.load(
            (keys + KV_LORA_RANK).to(tl.pointer_type(tl.float32)) + tiles[None, :],
            mask=is_key[:, None],
            other=0.0,
        )
        rope = tl.load(
            (keys + KV_LORA_RANK + 4 * NUM_TILES).to(tl.pointer_type(q.dtype.element_ty)) + rope_columns,
            mask=is_key[:, None],
            other=0.0,
        )
        # By way of fp16, which holds every number of e4m3: no other conversion from it is fast.
        latent = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32) * scales[:, :, None]
        latent = tl.reshape(latent.to(q.dtype.element_ty), [BLOCK_N, KV_LORA_RANK])
        maximum, total, accumulator = attend_keys(
            q_latent, q_rope, latent, rope, is_key, maximum, total, accumulator, softmax_scale
        )

    # 4. Normalise. Without a key the maximum is -inf and all sums are 0: out 0, lse -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    values = accumulator / divisor[:, None]

    # 5. Store: straight to the outputs where the list is not split.
    lse_index = row * num_attention_heads + heads
    if num_splits == 1:
        out_rows = out + row * out_stride_token + heads.to(tl.int64)[:, None] * out_stride_head
        tl.store(
            out_rows + latent_columns[None, :],
            values.to(out.dtype.element_ty),
            mask=is_head[:, None],
        )
        tl.store(lse + lse_index, maximum * softmax_scale + tl.log(divisor), mask=is_head)
    else:
        partial = lse_index * num_splits + split
        # Not their LSE: of logits near -6e4 its ulp is 4e-3, and so would be the error of a weight.
        tl.store(partial_max + partial, maximum, mask=is_head)
        tl.store(partial_sum + partial, total, mask=is_head)
        tl.store(
            partial_out + partial[:, None] * KV_LORA_RANK + latent_columns[None, :],
            values,
            mask=is_head[:, None],
        )


@triton.jit(do_not_specialize=["num_attention_heads", "num_splits"])
def _combine_lists(
    partial_out,
    partial_max,
    partial_sum,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    softmax_scale,
    num_attention_heads,
    num_splits,
    KV_LORA_RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges the splits of one (token, head) in BLOCK_C columns. Grid: (tokens * heads, R / BLOCK_C).

    With the maximum m of partial_max over the splits s, those without a key at -inf:

        w_s = partial_sum[s] * e^(softmax_scale * (partial_max[s] - m))
        out = sum_s w_s partial_out[s] / sum_s w_s,    lse = softmax_scale * m + ln sum_s w_s
    """
    # 1. Merge BLOCK_S splits at a time, rescaling as the maximum grows. All of it in fp32.
    token = tl.program_id(0) // num_attention_heads
    head = tl.program_id(0) % num_attention_heads
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lse_index = token.to(tl.int64) * num_attention_heads + head
    # Scalars as blocks of one: they are carried through the loop.
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([BLOCK_C], tl.float32)
    exponent_scale = softmax_scale * LOG2_E
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        is_split = splits < num_splits
        partial = lse_index * num_splits + splits
        split_max = tl.load(partial_max + partial, mask=is_split, other=float("-inf"))
        split_sum = tl.load(partial_sum + partial, mask=is_split, other=0.0)
        split_out = tl.load(
            partial_out + partial[:, None] * KV_LORA_RANK + columns[None, :],
            mask=is_split[:, None],
            other=0.0,
        )
        larger = tl.maximum(maximum, tl.max(split_max, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        keep = tl.exp2((maximum - base) * exponent_scale)
        weight = split_sum * tl.exp2((split_max - base) * exponent_scale)
        total = total * keep + tl.sum(weight, 0)
        accumulator = accumulator * keep + tl.sum(weight[:, None] * split_out, 0)
        maximum = larger

    # 2. Store; the columns' first program stores the LSE too.
    divisor = tl.where(total == 0.0, 1.0, total)
    out_row = out + token.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
    tl.store(out_row + columns, (accumulator / divisor).to(out.dtype.element_ty))
    is_first = (tl.program_id(1) == 0) & (tl.arange(0, 1) == 0)
    tl.store(lse + lse_index + tl.arange(0, 1), maximum * softmax_scale + tl.log(divisor), mask=is_first)


@dataclass(frozen=True)
class Tile:
    """Shape of a program: heads and keys it works on at a time, warps and pipeline stages."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(heads: int, rank: int) -> Tile:
    """The tile for a head count and rank, within the registers and the 227 KiB of shared memory of an SM.

    Shared memory holds queries and keys in bf16 and, with stages, what the next keys are made from.
    """
    if rank > 512:
        return Tile(16, 32, 8, 1)
    if heads <= 16:
        return Tile(16, 32, 4, 3)
    return Tile(64, 64, 8, 3)


def sparse_decode(
    q,
    packed_cache,
    indices,
    out,
    lse,
    *,
    softmax_scale: float,
    num_splits: int,
    partial_out=None,
    partial_max=None,
    partial_sum=None,
) -> None:
    """Launches the two kernels; shapes and dtypes as in the module's docstring."""
    tokens, heads, latent_width = q.shape
    if tokens == 0:
        return
    rank = out.shape[2]
    tile = tile_for(heads, rank)
    # Where nothing is partial any pointer will do.
    partials = (partial_out, partial_max, partial_sum) if num_splits > 1 else (lse, lse, lse)
    _attend_list[(tokens * triton.cdiv(heads, tile.heads), num_splits)](
        q,
        q.stride(0),
        q.stride(1),
        packed_cache,
        indices,
        indices.stride(0),
        out,
        out.stride(0),
        out.stride(1),
        lse,
        *partials,
        softmax_scale,
        packed_cache.shape[0] * packed_cache.shape[2],
        indices.shape[2],
        heads,
        num_splits,
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=latent_width - rank,
        TILE=TILE,
        BLOCK_H=tile.heads,
        BLOCK_N=tile.keys,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits == 1:
        return
    columns = min(rank, COMBINE_COLUMNS)
    _combine_lists[(tokens * heads, rank // columns)](
        *partials,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        softmax_scale,
        heads,
        num_splits,
        KV_LORA_RANK=rank,
        BLOCK_C=columns,
        BLOCK_S=COMBINE_SPLITS,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        sizes = {"kv_lora_rank": (layer.kv_lora_rank, TILE), "qk_rope_head_dim": (layer.qk_rope_head_dim, 16)}
        for name, (value, least) in sizes.items():
            if value < least or value & (value - 1):
                return f"{name} must be a power of two from {least} on, got {value}"
    return None


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    tokens = sum(row.new for row in case.steps[0])
    return partial_results(case.layers[0], tokens, case.options.splits)


def partial_results(layer: Layer, tokens: int, num_splits: int | None = None) -> Workspace:
    """The same of some tokens."""
    heads, rank = layer.num_attention_heads, layer.kv_lora_rank
    if num_splits is None:
        tile = tile_for(heads, rank)
        programs = tokens * triton.cdiv(heads, tile.heads)
        num_splits = splits.plan(programs, tile.heads, layer.index_topk, splits.processors())
    if num_splits == 1:
        return {}
    return {
        "partial_out": ((tokens, heads, num_splits, rank), "float32"),
        "partial_max": ((tokens, heads, num_splits), "float32"),
        "partial_sum": ((tokens, heads, num_splits), "float32"),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    partial_out = workspace.get("partial_out")
    sparse_decode(
        inputs["q"],
        inputs["packed_cache"],
        inputs["indices"],
        outputs["out"],
        outputs["lse"],
        softmax_scale=inputs["softmax_scale"],
        num_splits=1 if partial_out is None else partial_out.shape[2],
        partial_out=partial_out,
        partial_max=workspace.get("partial_max"),
        partial_sum=workspace.get("partial_sum"),
    )


PATHS = (
    KernelPath(
        name="triton/sparse_decode",
        operator="sparse_decode",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
        rounds_keys=True,
    ),
)
