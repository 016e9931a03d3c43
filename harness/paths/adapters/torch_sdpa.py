"""PyTorch's scaled_dot_product_attention as prefill attention: what comes with torch, and a speed reference.

| path | lanes | what it does not take |
|------|-------|-----------------------|
| `prefill_attention@math` | `host`, `compiled` | |
| `prefill_attention@flash` | `compiled` | what `torch.backends.cuda.can_use_flash_attention` refuses |
| `prefill_attention@cudnn` | `compiled` | what `can_use_cudnn_attention` refuses; rows with a history |

`math` is torch's own matrix products, which any machine has; in lane `host` nothing of it is built by g++.

Conventions
    layouts: [B, H, N, W], here views of the contract's tensors: prefill rows of equal lengths that follow one
        another are one call, so a batch of ragged rows is as many calls.
    widths: flash takes values as wide as keys; they are padded with zeros for it and the output is cut, in
        every call, as an engine does.
    mask: `is_causal` is aligned to the top left, so rows with a history get `causal_lower_right`, for math
        a mask of truth values; cuDNN takes neither.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: not given.
    tokens: torch gets prefill rows alone; at all other tokens the contract's 0 is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from cases import Case
from harness.kernel_path import TORCH_NAMES, KernelPath, Tensors

Group = tuple[int, int, int, int, int]
"""Rows of equal lengths: first token, first key, number of rows, new tokens and keys of each."""


def plan(inputs: Tensors) -> Tensors:
    """The prefill rows as groups, in order."""
    queries, keys = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k_prefill"].tolist()
    rows = [
        (queries[row], keys[row], queries[row + 1] - queries[row], keys[row + 1] - keys[row])
        for row in range(len(queries) - 1)
        if keys[row + 1] > keys[row]
    ]
    groups: list[Group] = []
    # A row that follows the last of its group with the same lengths starts where that one ends.
    for (new, length, _), found in groupby(rows, key=lambda row: (row[2], row[3], _origin(*row))):
        members = list(found)
        groups.append((members[0][0], members[0][1], len(members), new, length))
    return {"groups": groups}


def _origin(token: int, key: int, new: int, length: int) -> tuple[int, int]:
    """Equal for rows of equal lengths that are a whole number of rows apart in tokens and keys alike."""
    return token % new, token // new - key // length


def run(backend: SDPBackend, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The step on the harness's tensors."""
    query, key, value, out = inputs["query"], inputs["key"], inputs["value"], outputs["out"]
    groups: list[Group] = workspace["groups"]
    if sum(rows * new for _, _, rows, new, _ in groups) < len(out):
        out.zero_()
    for token, first, rows, new, length in groups:
        tokens, keys = slice(token, token + rows * new), slice(first, first + rows * length)
        attended = attend(
            backend,
            _heads(query[tokens], rows),
            _heads(key[keys], rows),
            _heads(value[keys], rows),
            inputs["softmax_scale"],
        )
        _heads(out[tokens], rows).copy_(attended)


def attend(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, H, N, V], causal to the bottom right. query [B, H, N, W], key [B, H, L, W], value [B, H, L, V]."""
    new, length, width = query.shape[2], key.shape[2], value.shape[3]
    mask: Any = None
    if 1 < new < length and backend is SDPBackend.MATH:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    elif 1 < new < length:
        # It brings torch's compiler along, which takes every worker longer to import than torch itself.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(new, length)
    if backend is SDPBackend.FLASH_ATTENTION:
        value = pad(value, (0, key.shape[3] - width))
    with sdpa_kernel(backend):
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=new == length, scale=scale
        )
    cut: Tensor = attended[..., :width]
    return cut


def _heads(rows: Tensor, count: int) -> Tensor:
    """[B N, H, W] -> [B, H, N, W], a view."""
    return rows.view(count, -1, *rows.shape[1:]).transpose(1, 2)


# ---- what torch claims ---------------------------------------------------------------------------


def supports_all(case: Case) -> str | None:
    """Every case: plain matrix products."""
    return None


def supports_flash(case: Case) -> str | None:
    """None, or that torch says the backend is not for such tensors."""
    return _refusal(case, "flash", torch.backends.cuda.can_use_flash_attention, pads=True)


def supports_cudnn(case: Case) -> str | None:
    """None, or that torch says the backend is not for such tensors, or that it has no mask for a history."""
    if any(row.seq_lens_encoder and 1 < row.new < row.length for row in case.steps[0]):
        return "cuDNN's causal mask is aligned to the top left: it is not for rows with a history"
    return _refusal(case, "cuDNN", torch.backends.cuda.can_use_cudnn_attention, pads=False)


def _refusal(case: Case, name: str, can_use: Callable[..., bool], *, pads: bool) -> str | None:
    layer = case.layers[0]
    dtype = getattr(torch, TORCH_NAMES[layer.dtype])
    for row in case.steps[0]:
        if not row.seq_lens_encoder:
            continue
        lengths, heads, width = (row.new, row.length), layer.num_attention_heads, layer.qk_head_dim
        query, key = (torch.empty(1, heads, n, width, dtype=dtype, device="cuda") for n in lengths)
        value = key if pads else key[..., : layer.v_head_dim]
        is_causal, is_grouped, dropout, says_why = row.new == row.length, False, 0.0, False
        asked = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, is_causal, is_grouped)
        if not can_use(asked, says_why):
            widths = f"keys {width} and values {value.shape[3]} wide, {layer.dtype}"
            return f"torch's {name} backend is not for {row.new} queries and {row.length} keys, {widths}"
    return None


def _path(variant: str, backend: SDPBackend, supports: Callable[[Case], str | None]) -> KernelPath:
    has_host = backend is SDPBackend.MATH
    return KernelPath(
        name=f"adapters/torch_sdpa/prefill_attention@{variant}",
        operator="prefill_attention",
        lanes=("host", "compiled") if has_host else ("compiled",),
        supports=supports,
        run=partial(run, backend),
        plan=plan,
        allocates=True,
        omits=("lse",),
        libraries={"torch_sdpa": torch.__version__.partition("+")[0]},
    )


PATHS = (
    _path("math", SDPBackend.MATH, supports_all),
    _path("flash", SDPBackend.FLASH_ATTENTION, supports_flash),
    _path("cudnn", SDPBackend.CUDNN_ATTENTION, supports_cudnn),
)
