"""Causal attention of prefill rows of any length over cached and new keys, unabsorbed, with LSE.

Inputs
    q                     [Tp, H, N+D]   model dtype, token and head strides free
    k                     [Tk, H, N+D]   model dtype, token and head strides free
    v                     [Tk, H, V]     model dtype, token and head strides free
    cu_seqlens_q          [B + 1] int32  exclusive prefix sum of the new tokens of every row
    cu_seqlens_k_prefill  [B + 1] int32  the same of cached and new tokens, prefill rows alone
Outputs
    out                   [Tp, H, V]     model dtype, token and head strides free
    lse                   [Tp, H]        fp32, contiguous, natural log

A row with keys has k_len = cached + q_len of them; its query i sees the first cached + i + 1 (causal,
bottom-right). Tokens of rows without keys, and those behind the last row: out 0, lse -inf.

N+D and V are any widths up to 256. bf16, fp16, fp32. Any number of rows, of which one may hold all tokens.
Fastest where addresses, strides and widths are multiples of 16 bytes. No host synchronisation; the launch
depends on shapes alone.

Not: windows, dropout, keys shared by heads, heads wider than 256.
"""

from __future__ import annotations

from torch import Tensor

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)

MAX_WIDTH = 256
"""Columns of a head that shared memory and registers hold."""


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k_prefill: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    qk_nope_head_dim: int,
    softmax_scale: float,
) -> None:
    """Launches the kernel, for which the two parts of a key are one; shapes as in the module's docstring."""
    KERNELS.prefill_attention(q, k, v, cu_seqlens_q, cu_seqlens_k_prefill, out, lse, softmax_scale)


def supports(case: Case) -> str | None:
    """None, or that heads are too wide."""
    layer = case.layers[0]
    widest = max(layer.qk_head_dim, layer.v_head_dim)
    if widest > MAX_WIDTH:
        return f"heads are at most {MAX_WIDTH} wide, got {widest}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    prefill_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["cu_seqlens_q"],
        inputs["cu_seqlens_k_prefill"],
        outputs["out"],
        outputs["lse"],
        qk_nope_head_dim=inputs["qk_nope_head_dim"],
        softmax_scale=inputs["softmax_scale"],
    )


PATHS = (
    KernelPath(
        name="cuda/prefill_attention",
        operator="prefill_attention",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
