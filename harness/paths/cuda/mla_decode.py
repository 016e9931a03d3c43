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
Padding and prefill tokens: out 0, lse -inf. A row's keys are divided among at most S splits in whole tiles,
at least `min_split_tokens` each; splits without a key write nothing and are not read.

(R, D) is (512, 64), (256, 64), (256, 32) or (1024, 64). Any H, any bs, any Tp (none: no launch). bf16, fp16,
fp32. q and the cache begin at and step by multiples of 16 bytes. Caches beyond 2^32 elements. Tensor cores
at mma.sync level; fp32 by three products of tf32. All heads of a token, and of several tokens of a draft
where they fit into one tile, read their keys once. No host synchronisation, and the launch depends on nothing
on the device: a captured graph may be replayed with other lengths and tables.

Not: sliding windows, quantised caches, prefill.
"""

from __future__ import annotations

from cases import Case
from cases.layers import Layer
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths import _splits as splits

KERNELS = kernels_beside(__file__)

WIDTHS = {(512, 64), (256, 64), (256, 32), (1024, 64)}
"""(kv_lora_rank, qk_rope_head_dim) that the kernels are compiled for."""

NARROW_ROWS, WIDE_ROWS = 16, 64
"""Queries a block works on: the heads of one token, or many of them or of several tokens.

Measured on an H100 at width 576: narrow tiles read 2.7 TB/s of cache, wide ones reach 280 TFLOP/s, where what
q K^T loads from shared memory and three barriers a tile leave the tensor cores idle half of the time."""


def rows_for(tokens: int, slots: int, heads: int, latent_width: int, itemsize: int) -> int:
    """Queries of a block, from shapes alone: narrow where few share their keys, wide rows or fp32."""
    if itemsize == 4 or latent_width > 576:
        return NARROW_ROWS
    # More tokens than slots: drafts, whose tokens share their keys too.
    sharing = heads * max(1, tokens // max(1, slots))
    return NARROW_ROWS if sharing <= NARROW_ROWS else WIDE_ROWS


def blocks_of(tokens: int, slots: int, heads: int, rows: int) -> int:
    """Blocks that have work where slots have equally many tokens, as many of which share one as fit."""
    group_tokens = min(max(1, rows // heads), max(1, tokens // max(1, slots)))
    return -(-tokens // group_tokens) * -(-heads // rows)


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        widths = (layer.kv_lora_rank, layer.qk_rope_head_dim)
        if widths not in WIDTHS:
            return f"(kv_lora_rank, qk_rope_head_dim) must be one of {sorted(WIDTHS)}, got {widths}"
    return None


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    layer, rows = case.layers[0], [row for row in case.steps[0] if row.is_slot]
    tokens = sum(row.new for row in case.steps[0])
    longest = max((row.length for row in rows), default=0)
    return partial_results(layer, tokens, longest, len(rows), case.options.splits)


def partial_results(
    layer: Layer, tokens: int, longest: int, slots: int, num_splits: int | None = None
) -> Workspace:
    """The same of some tokens, with a block table for rows of up to `longest` keys."""
    heads, block_size = layer.num_attention_heads, layer.block_size
    if num_splits is None:
        rows = rows_for(tokens, slots, heads, layer.latent_width, 4 if layer.dtype == "fp32" else 2)
        table_tokens = -(-longest // block_size) * block_size
        blocks = blocks_of(tokens, slots, heads, rows)
        num_splits = splits.plan(blocks, rows, table_tokens, splits.processors())
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
    tokens, heads, width = q.shape
    slots = inputs["seq_lens_decoder"].shape[0]
    # Tensors of any library come here; what all of them have is a dtype with this name.
    itemsize = 4 if str(q.dtype).endswith("float32") else 2
    rows = rows_for(tokens, slots, heads, width, itemsize)
    fewest = 0
    if inputs["splits"] is None:
        fewest = splits.fewest_tokens(blocks_of(tokens, slots, heads, rows), rows, splits.processors())
    KERNELS.mla_decode(
        q,
        inputs["latent_cache"],
        inputs["block_tables"],
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["out"],
        outputs["lse"],
        partial_out,
        workspace.get("partial_max"),
        workspace.get("partial_sum"),
        inputs["softmax_scale"],
        1 if partial_out is None else partial_out.shape[2],
        fewest,
        rows,
    )


PATHS = (
    KernelPath(
        name="cuda/mla_decode",
        operator="mla_decode",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
