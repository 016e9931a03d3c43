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
they stand, and no address is made of them; a row named twice counts twice. A list that names none: out 0, lse
-inf. Lists are divided among at most S splits in whole tiles, at least `min_split_entries` each; a split
without a key writes its maximum, -inf, and its sum, 0, alone. Nothing is computed behind a list's last key.

Keys are dequantised once for all heads of a block, and rounded to bf16 before they are multiplied.

(R, D) is (512, 64), (256, 64), (256, 32) or (1024, 64). Any H, any K up to 2^30, any block size, any Tp
(none: no launch). q and the cache begin at multiples of 16 bytes, and q steps by them. Caches beyond 2^32
bytes. Tensor cores at mma.sync level. No host synchronisation, and the launch depends on nothing on the
device: a captured graph may be replayed with other lists.

Compiled, more than 16 heads take 211 KiB of shared memory a block at (512, 64), as devices from compute
capability 9.0 on have.
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
"""Heads that a block works on, where there are so few or rows are wide, and elsewhere."""


def rows_for(heads: int, rank: int) -> int:
    """Heads of a block, from shapes alone."""
    return NARROW_ROWS if heads <= NARROW_ROWS or rank > 512 else WIDE_ROWS


def blocks_of(tokens: int, heads: int, rank: int) -> int:
    """Blocks of a launch without splits."""
    return tokens * -(-heads // rows_for(heads, rank))


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        widths = (layer.kv_lora_rank, layer.qk_rope_head_dim)
        if widths not in WIDTHS:
            return f"(kv_lora_rank, qk_rope_head_dim) must be one of {sorted(WIDTHS)}, got {widths}"
    return None


def workspace(case: Case) -> Workspace:
    """The partial results of a one-layer case; nothing where there is one split."""
    tokens = sum(row.new for row in case.steps[0])
    return partial_results(case.layers[0], tokens, case.options.splits)


def partial_results(layer: Layer, tokens: int, num_splits: int | None = None) -> Workspace:
    """The same of some tokens."""
    heads, rank = layer.num_attention_heads, layer.kv_lora_rank
    if num_splits is None:
        blocks, rows = blocks_of(tokens, heads, rank), rows_for(heads, rank)
        num_splits = splits.plan(blocks, rows, layer.index_topk, splits.processors())
    if num_splits == 1:
        return {}
    return {
        "partial_out": ((tokens, heads, num_splits, rank), "float32"),
        "partial_max": ((tokens, heads, num_splits), "float32"),
        "partial_sum": ((tokens, heads, num_splits), "float32"),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    q, out, partial_out = inputs["q"], outputs["out"], workspace.get("partial_out")
    tokens, heads, _ = q.shape
    rank = out.shape[2]
    rows, fewest = rows_for(heads, rank), 0
    if inputs["splits"] is None:
        fewest = splits.fewest_tokens(blocks_of(tokens, heads, rank), rows, splits.processors())
    KERNELS.sparse_decode(
        q,
        inputs["packed_cache"],
        inputs["indices"],
        out,
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
        name="cuda/sparse_decode",
        operator="sparse_decode",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
        rounds_keys=True,
    ),
)
