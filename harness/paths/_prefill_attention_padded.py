"""Prefill attention for kernels that demand values as wide as keys: zeros on the right of every head's value.

Around the kernel of one family of paths, which `<family>/prefill_attention_padded.py` names. Inputs and
outputs are those of its prefill_attention.py:

    q                     [Tp, H, N+D]   model dtype, token and head strides free
    k                     [Tk, H, N+D]   model dtype, token and head strides free
    v                     [Tk, H, V]     model dtype, token and head strides free, V <= N+D
    cu_seqlens_q          [B + 1] int32  exclusive prefix sum of the new tokens of every row
    cu_seqlens_k_prefill  [B + 1] int32  the same of cached and new tokens, prefill rows alone
    out                   [Tp, H, V]     model dtype, token and head strides free
    lse                   [Tp, H]        fp32, contiguous, natural log
Workspace, where V < N+D
    padded_value          [Tk, H, N+D]   model dtype, token and head strides free: [v | 0]
    padded_out            [Tp, H, N+D]   the same: [out | 0]

A column of the output depends on that column of the values alone. So padding changes no column of out and
not lse, and columns V to N+D of padded_out are exactly 0.

Where V = N+D (GLM-4.7-Flash, Mistral-Small-4) there is no workspace and nothing is copied: the kernel gets
the tensors as they are. A V wider than the keys is refused: its padding would be negative.

No host synchronisation, no allocation; launches depend on shapes alone. Strides do not recompile.

Not: keys padded to the width of values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases import Case
from harness.kernel_path import TORCH_NAMES, KernelPath, Tensors, Workspace

Attend = Callable[..., Any]
"""A family's prefill_attention: (q, k, v, two prefix sums, out, lse, *, qk_nope_head_dim, softmax_scale)."""


def path_of(
    attend: Attend, refuses: Callable[[Case], str | None], name: str, lanes: tuple[str, ...]
) -> KernelPath:
    """The path `<name>/prefill_attention@padded`; `refuses` says why the kernel does not take a case."""
    return KernelPath(
        name=f"{name}/prefill_attention@padded",
        operator="prefill_attention",
        lanes=lanes,
        supports=partial(supports, refuses),
        run=partial(run, attend),
        workspace=workspace,
        batch_invariant=True,
    )


def refusal(qk_head_dim: int, v_head_dim: int) -> str | None:
    """None, or one sentence why values of a width cannot be padded to the width of the keys."""
    if v_head_dim <= qk_head_dim:
        return None
    return f"values are padded to the width of keys, got v_head_dim {v_head_dim} > qk_head_dim {qk_head_dim}"


def prefill_attention_padded(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k_prefill: Tensor,
    out: Tensor,
    lse: Tensor,
    padded_value: Any,
    padded_out: Any,
    *,
    qk_nope_head_dim: int,
    softmax_scale: float,
) -> None:
    """Pads, launches the kernel and slices; shapes and dtypes as in the module's docstring.

    `padded_value` and `padded_out` are not looked at where values are as wide as keys; None will do.

    Raises:
        ValueError: values are wider than keys.
    """
    width = v.shape[2]
    reason = refusal(k.shape[2], width)
    if reason is not None:
        raise ValueError(reason)
    is_padded = width < k.shape[2]
    if is_padded:
        padded_value[:, :, :width].copy_(v)
        # At every launch: engines share scratch memory between layers and kernels.
        padded_value[:, :, width:].zero_()
    attend(
        q,
        k,
        padded_value if is_padded else v,
        cu_seqlens_q,
        cu_seqlens_k_prefill,
        padded_out if is_padded else out,
        lse,
        qk_nope_head_dim=qk_nope_head_dim,
        softmax_scale=softmax_scale,
    )
    if is_padded:
        out.copy_(padded_out[:, :, :width])


def supports(refuses: Callable[[Case], str | None], case: Case) -> str | None:
    """None, or that values are wider than keys, or why the kernel does not take a case."""
    layer = case.layers[0]
    return refusal(layer.qk_head_dim, layer.v_head_dim) or refuses(case)


def workspace(case: Case) -> Workspace:
    """Values and output as wide as keys, of a one-layer case; nothing where they are so already."""
    layer = case.layers[0]
    width = layer.qk_head_dim
    if layer.v_head_dim == width:
        return {}
    model, heads = TORCH_NAMES[layer.dtype], layer.num_attention_heads
    tokens = sum(row.new for row in case.steps[0])
    keys = sum(row.length for row in case.steps[0] if row.seq_lens_encoder)
    return {
        "padded_value": ((keys, heads, width), model),
        "padded_out": ((tokens, heads, width), model),
    }


def run(attend: Attend, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The kernel on the harness's tensors, padded where widths differ."""
    prefill_attention_padded(
        attend,
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["cu_seqlens_q"],
        inputs["cu_seqlens_k_prefill"],
        outputs["out"],
        outputs["lse"],
        workspace.get("padded_value"),
        workspace.get("padded_out"),
        qk_nope_head_dim=inputs["qk_nope_head_dim"],
        softmax_scale=inputs["softmax_scale"],
    )
