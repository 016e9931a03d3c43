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

Products and sums of the rotation are fp32, not fused, and the result is rounded once; what is not rotated is
copied bit for bit. Any even D up to K, any K and V, any number of heads and tokens (none: no launch), any
block size. Tensors beyond 2^32 elements. Fastest where strides, K, V and D / 2 are multiples of 16 bytes,
else an element at a time. No host synchronisation.

Not: quantised caches, norms of queries and keys, several positions a token.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take the case."""
    for layer in case.layers:
        if layer.qk_rope_head_dim % 2:
            return (
                f"columns are rotated in pairs: qk_rope_head_dim must be even, got {layer.qk_rope_head_dim}"
            )
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.write_cache(
        inputs["qkv"],
        inputs["cos_sin_cache"],
        inputs["block_tables"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["query"],
        outputs["k_cache"],
        outputs["v_cache"],
        bool(inputs["is_neox"]),
    )


PATHS = (
    KernelPath(
        name="cuda/gqa_cache_write",
        operator="gqa_cache_write",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
