"""Attention of query heads in groups over paged keys and values, every row kind in one launch, with LSE.

Inputs
    query               [Tp, H, K]      model dtype, token and head strides free, rotated
    k_cache             [nb, G, bs, K]  model dtype, contiguous; new tokens written
    v_cache             [nb, G, bs, V]  model dtype, contiguous; new tokens written
    sinks               [H]             fp32, logits of no key, scaled; None: there are none
    block_tables        [B, max_blocks] int32, row stride free; entries past a row's length unread
    seq_lens_decoder    [B] int32       tokens cached before this step
    cu_seqlens_q        [B + 1] int32   exclusive prefix sum of the new tokens
    batch_id_per_token  [Tp] int32      slot of each token, negative for padding; read only where S > 1
Outputs
    out                 [Tp, H, V]      model dtype, token and head strides free
    lse                 [Tp, H]         fp32, contiguous, natural log
Workspace
    partial_out         [B, G, S, M, V] fp32, contiguous; only where S > 1
    partial_max         [B, G, S, M]    fp32, contiguous; only where S > 1: largest q . K_j
    partial_sum         [B, G, S, M]    fp32, contiguous; only where S > 1: sum of exp(s_j - max)

Head h reads KV head h // (H / G). Token t of row b stands at p = seq_lens_decoder[b] + t - cu_seqlens_q[b]
and sees keys up to p, the newest `window` of them where window is not 0. Tokens behind the last row are
padding: out 0, lse -inf.

A block works on M query rows of one KV head, numbered token by token and within a token head by head of the
group: a decode row's whole group reads its keys once, and so do neighbouring tokens of a chunk, whatever the
size of the group. Where all tokens of a batch row fit into one block, their keys are divided among at most S
splits in whole tiles of keys, at least `min_split_tokens` each; splits without a key write nothing and are
not read. Longer chunks are not divided: they have blocks enough.

Any H that is a multiple of G, any K and V up to 256 (computed as 128 of 128, 192 of 128 or 256 of 256), any
bs, any Tp (none: no launch). bf16, fp16, fp32. Fastest where addresses, strides and widths are multiples of
16 bytes, else keys are copied an element at a time. Caches beyond 2^32 elements. Tensor cores at mma.sync
level; fp32 by three products of tf32. No host synchronisation, and the launch depends on shapes alone: a
captured graph may be replayed with other lengths and tables.

Not: quantised caches, logit caps, keys that are no prefix of the row's tokens.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths import _splits as splits

KERNELS = kernels_beside(__file__)

MAX_WIDTH = 256
"""Columns of a head that shared memory and registers hold."""

NARROW_ROWS, WIDE_ROWS = 16, 64
"""Query rows that a block works on: of rows of few tokens, and of longer ones."""


def rows_for(tokens: int, slots: int, group_size: int, itemsize: int) -> int:
    """Query rows of a block, from shapes alone: narrow where few of them share their keys, and in fp32."""
    sharing = group_size * -(-tokens // max(1, slots))
    return NARROW_ROWS if itemsize == 4 or sharing <= NARROW_ROWS else WIDE_ROWS


def blocks_of(tokens: int, slots: int, heads: int, kv_heads: int, rows: int) -> int:
    """Blocks that have work, at most, in a launch without splits."""
    group_size = heads // kv_heads
    tiles = min(tokens * -(-group_size // rows), tokens * group_size // rows + slots + 1)
    return tiles * kv_heads


def supports(case: Case) -> str | None:
    """None, or that heads are too wide."""
    for layer in case.layers:
        widest = max(layer.qk_head_dim, layer.v_head_dim)
        if widest > MAX_WIDTH:
            return f"heads are at most {MAX_WIDTH} wide, got {widest}"
    return None


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    layer, slots = case.layers[0], [row for row in case.steps[0] if row.is_slot]
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    tokens, num_splits = sum(row.new for row in case.steps[0]), case.options.splits
    rows = rows_for(tokens, len(slots), heads // kv_heads, 4 if layer.dtype == "fp32" else 2)
    if num_splits is None:
        longest = max((row.length for row in slots), default=0)
        table_tokens = -(-longest // layer.block_size) * layer.block_size
        seen = table_tokens if not layer.window else min(table_tokens, layer.window + rows)
        blocks = blocks_of(tokens, len(slots), heads, kv_heads, rows)
        num_splits = splits.plan(blocks, rows, seen, splits.processors())
    if num_splits == 1:
        return {}
    shares = (len(slots), kv_heads, num_splits, rows)
    return {
        "partial_out": ((*shares, layer.v_head_dim), "float32"),
        "partial_max": (shares, "float32"),
        "partial_sum": (shares, "float32"),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    query, k_cache, partial_out = inputs["query"], inputs["k_cache"], workspace.get("partial_out")
    tokens, heads, _ = query.shape
    kv_heads, slots = k_cache.shape[1], inputs["seq_lens_decoder"].shape[0]
    # Tensors of any library come here; what all of them have is a dtype with this name.
    itemsize = 4 if str(query.dtype).endswith("float32") else 2
    rows, fewest = rows_for(tokens, slots, heads // kv_heads, itemsize), 0
    if inputs["splits"] is None:
        blocks = blocks_of(tokens, slots, heads, kv_heads, rows)
        fewest = splits.fewest_tokens(blocks, rows, splits.processors())
    KERNELS.gqa_step(
        query,
        k_cache,
        inputs["v_cache"],
        inputs["sinks"],
        inputs["block_tables"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["out"],
        outputs["lse"],
        partial_out,
        workspace.get("partial_max"),
        workspace.get("partial_sum"),
        inputs["softmax_scale"],
        inputs["window"],
        1 if partial_out is None else partial_out.shape[2],
        fewest,
        rows,
    )


PATHS = (
    KernelPath(
        name="cuda/gqa_step",
        operator="gqa_step",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
