"""Absorbed MLA decode attention over a paged latent cache, split over the keys, with LSE.

Inputs
    q                   [Tp, H, R+D]       model dtype, token and head strides free
    latent_cache        [nb, 1, bs, R+D]   model dtype, contiguous
    block_tables        [B, max_blocks]    int32, row stride free; entries past a row's length unread
    seq_lens_encoder    [B] int32          > 0: a prefill row, not computed here
    seq_lens_decoder    [B] int32          tokens cached before this step
    cu_seqlens_q        [B + 1] int32      exclusive prefix sum of the new tokens
    batch_id_per_token  [Tp] int32         slot of each token, negative for padding
Outputs
    out                 [Tp, H, R]         model dtype, token and head strides free
    lse                 [Tp, H]            fp32, contiguous, natural log
Workspace
    partial_out         [Tp, H, S, R]      fp32, contiguous; only where S > 1
    partial_max         [Tp, H, S]         fp32, contiguous; only where S > 1: largest q . K_j
    partial_sum         [Tp, H, S]         fp32, contiguous; only where S > 1: sum of exp(s_j - max)

Token t of decode row b sees the first seq_lens_decoder[b] + (t - cu_seqlens_q[b]) + 1 keys of its row.
Padding and prefill tokens: out 0, lse -inf. A row's keys are divided among at most S splits in whole
tiles of BLOCK_N keys, at least `min_split_tokens` each; splits without a key write nothing and are not
read.

Powers of two: R, D, bs. Any H, any Tp (none: no launch). bf16, fp16, fp32. Caches beyond 2^32 elements.
No host synchronisation, and the launch depends on nothing on the device: a captured graph may be
replayed with other lengths and tables. Numbers of tokens, rows, blocks, heads within a tile and
splits do not recompile.

Not: sliding windows, quantised caches, prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from cases import Case
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths import _splits as splits

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x * log2 e)."""

COMBINE_COLUMNS = 256
COMBINE_SPLITS = 16
"""Columns and splits that a program of the combine holds at a time: small enough that one token's heads
spread over the device, large enough that its loads are in flight together."""

_PLAN = ["num_attention_heads", "num_splits", "min_split_tokens"]
_NOT_SPECIALIZED = [*_PLAN, "table_stride", "log2_block_size"]


@triton.jit
def _visible_keys(token, batch_id_per_token, seq_lens_encoder, seq_lens_decoder, cu_seqlens_q):
    """(slot, number of visible keys) of a token; no key for padding and for prefill rows."""
    slot = tl.load(batch_id_per_token + token)
    is_real = slot >= 0
    encoder = tl.load(seq_lens_encoder + slot, mask=is_real, other=1)
    decoder = tl.load(seq_lens_decoder + slot, mask=is_real, other=0)
    first = tl.load(cu_seqlens_q + slot, mask=is_real, other=0)
    visible = tl.where(is_real & (encoder == 0), decoder + token - first + 1, 0)
    return slot, visible


@triton.jit
def _split_tokens(visible, num_splits, min_split_tokens, BLOCK_N: tl.constexpr):
    """Keys a split: the visible ones divided evenly, not fewer than are worth a split, in whole tiles."""
    # Rounded last: knowing that tiles begin at multiples of BLOCK_N saves the compiler registers.
    tokens = tl.maximum(tl.cdiv(visible, num_splits), min_split_tokens)
    return tl.cdiv(tokens, BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _attend_split(
    q,
    q_stride_token,
    q_stride_head,
    latent_cache,
    block_tables,
    table_stride,
    batch_id_per_token,
    seq_lens_encoder,
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
    num_attention_heads,
    log2_block_size,
    num_splits,
    min_split_tokens,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one token's BLOCK_H heads over one split of its keys.

    Grid: (tokens * ceil(heads / BLOCK_H), splits), head tiles fastest: those of one token read the same
    keys at the same time, once from memory and then from L2. Writes the final result where the row
    has one split, else its share into the workspace.
    """
    LATENT_WIDTH: tl.constexpr = KV_LORA_RANK + QK_ROPE_HEAD_DIM

    # 1. Locate the token's keys and this split's share of them.
    head_tiles = tl.cdiv(num_attention_heads, BLOCK_H)
    token = tl.program_id(0) // head_tiles
    head_tile = tl.program_id(0) % head_tiles
    split = tl.program_id(1)
    slot, visible = _visible_keys(token, batch_id_per_token, seq_lens_encoder, seq_lens_decoder, cu_seqlens_q)
    split_tokens = _split_tokens(visible, num_splits, min_split_tokens, BLOCK_N)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, visible)
    is_whole_row = split_tokens >= visible
    if (begin >= end) & (split > 0):
        return

    # 2. Load the queries of the head tile, latent and rope part apart.
    heads = head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < num_attention_heads
    latent_columns = tl.arange(0, KV_LORA_RANK)
    rope_columns = KV_LORA_RANK + tl.arange(0, QK_ROPE_HEAD_DIM)
    row = token.to(tl.int64)
    q_rows = q + row * q_stride_token + heads.to(tl.int64)[:, None] * q_stride_head
    q_latent = tl.load(q_rows + latent_columns[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_rows + rope_columns[None, :], mask=is_head[:, None], other=0.0)

    # 3. Online softmax over tiles of BLOCK_N keys, read through the block table.
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    accumulator = tl.zeros([BLOCK_H, KV_LORA_RANK], tl.float32)
    table = block_tables + slot.to(tl.int64) * table_stride
    offset_mask = (1 << log2_block_size) - 1
    exponent_scale = softmax_scale * LOG2_E
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        is_key = positions < end
        block = tl.load(table + (positions >> log2_block_size), mask=is_key, other=0)
        # int64 before the product: block * block_size * width passes 2^32 in large caches.
        cache_row = (block.to(tl.int64) << log2_block_size) + (positions & offset_mask)
        keys = latent_cache + cache_row[:, None] * LATENT_WIDTH
        # Masked rows are 0 and not merely weighted 0: 0 * NaN would reach the values.
        latent = tl.load(keys + latent_columns[None, :], mask=is_key[:, None], other=0.0)
        rope = tl.load(keys + rope_columns[None, :], mask=is_key[:, None], other=0.0)
        logits = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(rope), logits, input_precision="ieee")
        logits = tl.where(is_key[None, :], logits, float("-inf"))

        # Every tile has a key, so the maximum is a number. Subtract before scaling: the difference
        # of two large logits is exact, their scaled values are not.
        larger = tl.maximum(maximum, tl.max(logits, 1))
        keep = tl.exp2((maximum - larger) * exponent_scale)
        weights = tl.exp2((logits - larger[:, None]) * exponent_scale)
        total = total * keep + tl.sum(weights, 1)
        accumulator = accumulator * keep[:, None]
        accumulator = tl.dot(weights.to(latent.dtype), latent, accumulator, input_precision="ieee")
        maximum = larger

    # 4. Normalise. A row without a key has maximum -inf and total 0: out 0, lse -inf.
    total = tl.where(end > begin, total, 1.0)
    values = accumulator / total[:, None]
    log_sum = maximum * softmax_scale + tl.log(total)

    # 5. Store: straight to the outputs where this split is the whole row.
    lse_index = row * num_attention_heads + heads
    if is_whole_row:
        out_rows = out + row * out_stride_token + heads.to(tl.int64)[:, None] * out_stride_head
        tl.store(
            out_rows + latent_columns[None, :],
            values.to(out.dtype.element_ty),
            mask=is_head[:, None],
        )
        tl.store(lse + lse_index, log_sum, mask=is_head)
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


@triton.jit(do_not_specialize=_PLAN)
def _combine_splits(
    batch_id_per_token,
    seq_lens_encoder,
    seq_lens_decoder,
    cu_seqlens_q,
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
    min_split_tokens,
    KV_LORA_RANK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges the splits of one (token, head) in BLOCK_C columns. Grid: (tokens * heads, R / BLOCK_C).

    Over the splits s that have a key, with the maximum m of their partial_max:

        w_s = partial_sum[s] * e^(softmax_scale * (partial_max[s] - m))
        out = sum_s w_s partial_out[s] / sum_s w_s,    lse = softmax_scale * m + ln sum_s w_s
    """
    # 1. How many splits wrote something; with one, it already wrote the outputs.
    token = tl.program_id(0) // num_attention_heads
    head = tl.program_id(0) % num_attention_heads
    _, visible = _visible_keys(token, batch_id_per_token, seq_lens_encoder, seq_lens_decoder, cu_seqlens_q)
    split_tokens = _split_tokens(visible, num_splits, min_split_tokens, BLOCK_N)
    if split_tokens >= visible:
        return
    used_splits = tl.cdiv(visible, split_tokens)

    # 2. Merge BLOCK_S splits at a time, rescaling as the maximum grows. All of it in fp32.
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lse_index = token.to(tl.int64) * num_attention_heads + head
    # Scalars as blocks of one: they are carried through the loop.
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([BLOCK_C], tl.float32)
    exponent_scale = softmax_scale * LOG2_E
    for start in range(0, used_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        is_used = splits < used_splits
        partial = lse_index * num_splits + splits
        split_max = tl.load(partial_max + partial, mask=is_used, other=float("-inf"))
        split_sum = tl.load(partial_sum + partial, mask=is_used, other=0.0)
        split_out = tl.load(
            partial_out + partial[:, None] * KV_LORA_RANK + columns[None, :],
            mask=is_used[:, None],
            other=0.0,
        )
        larger = tl.maximum(maximum, tl.max(split_max, 0))
        keep = tl.exp2((maximum - larger) * exponent_scale)
        weight = split_sum * tl.exp2((split_max - larger) * exponent_scale)
        total = total * keep + tl.sum(weight, 0)
        accumulator = accumulator * keep + tl.sum(weight[:, None] * split_out, 0)
        maximum = larger

    # 3. Store; the columns' first program stores the LSE too.
    out_row = out + token.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
    tl.store(out_row + columns, (accumulator / total).to(out.dtype.element_ty))
    is_first = (tl.program_id(1) == 0) & (tl.arange(0, 1) == 0)
    tl.store(lse + lse_index + tl.arange(0, 1), maximum * softmax_scale + tl.log(total), mask=is_first)


@dataclass(frozen=True)
class Tile:
    """Shape of a program: heads and keys it works on at a time, warps and pipeline stages."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(heads: int, latent_width: int, itemsize: int) -> Tile:
    """The tile for a head count and row width, within the 227 KiB of shared memory of an SM.

    Measured on an H100 at width 576: 16 heads read 2.88 TB/s with 128 keys, 128 heads reach 250 TFLOP/s
    with 64 keys and three stages. There Triton lays the warps of q K^T along the heads, so that both
    warp groups compute the same 64 rows: what is left to win.
    """
    if itemsize == 4:
        return Tile(16, 16, 4, 1)
    if latent_width > 576:
        return Tile(16, 32, 8, 1)
    if heads <= 16:
        return Tile(16, 128, 4, 2)
    if heads <= 32:
        return Tile(32, 64, 8, 2)
    return Tile(64, 64, 8, 3)


def programs_of(tokens: int, heads: int, tile: Tile) -> int:
    """Programs of a launch without splits. A program's tiles fill a multiprocessor's shared memory."""
    return int(tokens * triton.cdiv(heads, tile.heads))


def mla_decode(
    q,
    latent_cache,
    block_tables,
    seq_lens_encoder,
    seq_lens_decoder,
    cu_seqlens_q,
    batch_id_per_token,
    out,
    lse,
    *,
    softmax_scale: float,
    num_splits: int,
    min_split_tokens: int = 0,
    partial_out=None,
    partial_max=None,
    partial_sum=None,
) -> None:
    """Launches the two kernels; shapes and dtypes as in the module's docstring."""
    tokens, heads, latent_width = q.shape
    if tokens == 0:
        return
    rank = out.shape[2]
    tile = tile_for(heads, latent_width, q.element_size())
    head_tiles = triton.cdiv(heads, tile.heads)
    rows = (batch_id_per_token, seq_lens_encoder, seq_lens_decoder, cu_seqlens_q)
    # Where nothing is partial any pointer will do.
    partials = (partial_out, partial_max, partial_sum) if num_splits > 1 else (lse, lse, lse)
    _attend_split[(tokens * head_tiles, num_splits)](
        q,
        q.stride(0),
        q.stride(1),
        latent_cache,
        block_tables,
        block_tables.stride(0),
        *rows,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        *partials,
        softmax_scale,
        heads,
        latent_cache.shape[2].bit_length() - 1,
        num_splits,
        min_split_tokens,
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=latent_width - rank,
        BLOCK_H=tile.heads,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits == 1:
        return
    columns = min(rank, COMBINE_COLUMNS)
    _combine_splits[(tokens * heads, rank // columns)](
        *rows,
        *partials,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        softmax_scale,
        heads,
        num_splits,
        min_split_tokens,
        KV_LORA_RANK=rank,
        BLOCK_C=columns,
        BLOCK_N=tile.keys,
        BLOCK_S=COMBINE_SPLITS,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        sizes = {
            "kv_lora_rank": layer.kv_lora_rank,
            "qk_rope_head_dim": layer.qk_rope_head_dim,
            "block_size": layer.block_size,
        }
        for name, value in sizes.items():
            if value & (value - 1):
                return f"{name} must be a power of two, got {value}"
    return None


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    layer, tokens = case.layers[0], sum(row.new for row in case.steps[0])
    longest = max((row.length for row in case.steps[0] if row.is_slot), default=0)
    return partial_results(layer, tokens, longest, case.options.splits)


def partial_results(layer: Layer, tokens: int, longest: int, num_splits: int | None = None) -> Workspace:
    """The same of some tokens, with a block table for rows of up to `longest` keys."""
    heads, block_size = layer.num_attention_heads, layer.block_size
    if num_splits is None:
        tile = tile_for(heads, layer.latent_width, 4 if layer.dtype == "fp32" else 2)
        table_tokens = triton.cdiv(longest, block_size) * block_size
        programs = programs_of(tokens, heads, tile)
        num_splits = splits.plan(programs, tile.heads, table_tokens, splits.processors())
    if num_splits == 1:
        return {}
    return {
        "partial_out": ((tokens, heads, num_splits, layer.kv_lora_rank), "float32"),
        "partial_max": ((tokens, heads, num_splits), "float32"),
        "partial_sum": ((tokens, heads, num_splits), "float32"),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    q, partial_out = inputs["q"], workspace.get("partial_out")
    fewest = 0
    if inputs["splits"] is None:
        tile = tile_for(q.shape[1], q.shape[2], q.element_size())
        programs = programs_of(q.shape[0], q.shape[1], tile)
        fewest = splits.fewest_tokens(programs, tile.heads, splits.processors())
    mla_decode(
        q,
        inputs["latent_cache"],
        inputs["block_tables"],
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["out"],
        outputs["lse"],
        softmax_scale=inputs["softmax_scale"],
        num_splits=1 if partial_out is None else partial_out.shape[2],
        min_split_tokens=fewest,
        partial_out=partial_out,
        partial_max=workspace.get("partial_max"),
        partial_sum=workspace.get("partial_sum"),
    )


PATHS = (
    KernelPath(
        name="triton/mla_decode",
        operator="mla_decode",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
