"""SGLang's Triton attention: MLA decode, extend attention and their merge, from the wheel's kernel files.

Source: sglang/kernels/ops/attention/{decode_attention,extend_attention,merge_state}.py of the version in
`SEEN_WORKING`, called as sglang/srt/layers/attention/triton_backend.py calls them on an NVIDIA GPU: page
size 1, scales of keys and values 1, no cap, no sinks, the number of splits from the engine's own kernel, 8 at
most. The merge is called as sglang/srt/layers/attention/merge_state.py does where it does not take CUDA's.

| path | calls | for |
|------|-------|-----|
| `mla_decode` | `decode_attention_fwd(has_mla=True)` | tokens of decode and draft rows, a row each |
| `mla_decode@extend` | `extend_attention_fwd` | decode and draft rows as they are: how drafts are verified |
| `prefill_attention` | `extend_attention_fwd` | cached keys by index, new ones packed beside the queries |
| `prefill_attention@dense` | `dense_prefill_attention_fwd` | cached and new keys side by side |
| `merge_states` | `merge_state_triton` | every token and head |
| `merge_states@with_keys` | `merge_state_triton` | those with a key in either state, as its test has |
| `mla_step` | the first and the third | our step around them |

Conventions
    layouts: the paged cache as [slots, 1, R + D]; V is its first R columns. The library finds keys by lists
        of their rows (`kv_indices`): block tables are read here, their tails and unread rows not at all.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: natural, -inf where there is no key. Of decode it is given split by split, and put together here as
        the engine does for its context parallelism: log-sum-exp over the splits of a buffer filled with -inf.
    tokens: the library gets those of its kind of rows alone, gathered where there are others, else the
        step's own tensors. At all others the contract's 0 and -inf are written here: the library says
        nothing of rows without keys.
    states: [tokens, heads, V] and [tokens, heads], dense: the merge has no argument for strides, and the
        engine says that it "reads its inputs as contiguous" (aiter_backend.py). Of an empty state it reads
        the output: the engine has "output=0 and LSE=-inf so merge_state ignores it exactly"
        (extend_attention.py). Both are made here, +inf left as it is; an output with gaps is copied.
        `@with_keys` gives an LSE of 0 for both states where neither has a key, and writes the contract's
        -inf there.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths._mla_step import path_of
from harness.paths.adapters._loading import Library
from harness.paths.adapters._rows import (
    attend_at,
    cache_rows,
    decode_slots,
    decode_tokens,
    prefix_sum,
    rows_at,
    spans,
    split_results,
)
from harness.paths.adapters._states import dense_output, merge_workspace, plan_states, supports_states
from harness.paths.triton import mla_step as step

MAX_KV_SPLITS = 8
"""The engine's default of --triton-attention-num-kv-splits."""

SPLIT_LATENTS = {576: 512, 288: 256}
"""Widths of [latent | rope] rows that MLA decode takes apart, and of their latents. Of others it takes the
keys' tile, as wide as the next power of two, for that of the values: it does not compile."""

LIBRARY = Library("sglang")
KERNELS = LIBRARY.load(
    {
        "kernels.ops.attention.score_mod": (),
        "kernels.ops.attention.metadata": ("get_num_kv_splits_triton",),
        "kernels.ops.attention.decode_attention": ("decode_attention_fwd",),
        "kernels.ops.attention.extend_attention": ("extend_attention_fwd", "dense_prefill_attention_fwd"),
        "kernels.ops.attention.merge_state": ("merge_state_triton",),
    },
    {
        # Switches, read on AMD's GPUs alone.
        "srt.environ": {"envs": SimpleNamespace()},
        "srt.utils": {
            "is_cuda": lambda: torch.cuda.is_available() and torch.version.cuda is not None,
            "is_hip": lambda: False,
            "is_gfx95_supported": lambda: False,
            "is_gfx1250_supported": lambda: False,
            "get_device_core_count": lambda index=0: multiprocessors(torch.device("cuda", index)),
        },
    },
)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 of a host, as the engine counts."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---- decode --------------------------------------------------------------------------------------


def supports_decode(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        if SPLIT_LATENTS.get(layer.latent_width) != layer.kv_lora_rank:
            return (
                "SGLang's MLA decode takes latents of 512 + 64 or 256 + 32 columns, "
                f"got {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
            )
    return None


def plan_decode(inputs: Tensors) -> Tensors:
    """Decode tokens as rows: their keys' cache rows, and the number of splits of each."""
    tokens, lengths = decode_tokens(inputs)
    slots = inputs["batch_id_per_token"].long()[tokens]
    return {
        "tokens": tokens,
        "kv_indptr": prefix_sum(lengths),
        "kv_indices": cache_rows(inputs, slots, lengths),
        "num_kv_splits": _splits(inputs, lengths),
    }


def _splits(inputs: Tensors, lengths: Tensor) -> Tensor:
    """[Td] int32: as TritonAttnBackend.get_num_kv_splits counts them; all of them, if the case says so."""
    cores, asked = multiprocessors(lengths.device), inputs["splits"]
    splits = torch.full_like(lengths, asked or MAX_KV_SPLITS, dtype=torch.int32)
    if asked is None and cores > 0 and len(lengths) > 0:
        heads, kv_heads, a_row = inputs["q"].shape[1], 1, 1
        room = max(256, 1 << (len(lengths) - 1).bit_length())
        KERNELS.get_num_kv_splits_triton[(1,)](
            splits, lengths, len(lengths), a_row, heads, kv_heads, MAX_KV_SPLITS, cores, MAX_NUM_SEQ=room
        )
    return splits


def decode_workspace(case: Case) -> Workspace:
    """Outputs and LSE of every split."""
    tokens = sum(row.new for row in case.steps[0])
    return split_results(case.layers[0], tokens, case.options.splits or MAX_KV_SPLITS)


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`decode_attention_fwd` on the harness's tensors."""
    q, tokens, rank = inputs["q"], workspace["tokens"], outputs["out"].shape[2]
    keys = inputs["latent_cache"].view(-1, 1, q.shape[2])
    partial_lse = workspace["attn_lse"][: len(tokens)].fill_(-torch.inf)

    def attend(out: Tensor, lse: Tensor) -> None:
        KERNELS.decode_attention_fwd(
            rows_at(q, tokens),
            keys,
            keys[..., :rank],
            out,
            workspace["kv_indptr"],
            workspace["kv_indices"],
            workspace["attn_logits"],
            workspace["attn_lse"],
            workspace["num_kv_splits"],
            max_kv_splits=workspace["attn_logits"].shape[2],
            sm_scale=inputs["softmax_scale"],
            k_scale=1.0,
            v_scale=1.0,
            has_mla=True,
        )
        lse.copy_(torch.logsumexp(partial_lse, dim=2))

    attend_at(tokens, outputs, attend)


# ---- extend --------------------------------------------------------------------------------------


def plan_verify(inputs: Tensors) -> Tensors:
    """Decode and draft rows: their tokens, cached keys by cache row, and the new ones' rows."""
    slots = decode_slots(inputs)
    starts, cached = inputs["cu_seqlens_q"][slots], inputs["seq_lens_decoder"][slots].long()
    new = inputs["cu_seqlens_q"].diff()[slots].long()
    rows, lengths = cache_rows(inputs, slots, cached + new), cached + new
    first = lengths.cumsum(0) - lengths
    return {
        "tokens": spans(starts, new),
        "qo_indptr": prefix_sum(new),
        "kv_indptr": prefix_sum(cached),
        "kv_indices": rows[spans(first, cached)],
        "new_rows": rows[spans(first + cached, new)],
        "max_len_extend": int(new.max()) if len(new) else 0,
    }


def run_verify(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`extend_attention_fwd` on decode and draft rows: one latent for all heads."""
    keys = inputs["latent_cache"].view(-1, 1, inputs["q"].shape[2])
    values = keys[..., : outputs["out"].shape[2]]
    _extend(inputs["q"], keys, values, inputs["softmax_scale"], outputs, workspace)


def plan_prefill(inputs: Tensors) -> Tensors:
    """Prefill rows: their tokens, and where cached and new keys lie among the keys."""
    lengths = inputs["cu_seqlens_k_prefill"].diff()
    slots = (lengths > 0).nonzero().flatten()
    lengths, first = lengths[slots].long(), inputs["cu_seqlens_k_prefill"][slots].long()
    new = inputs["cu_seqlens_q"].diff()[slots].long()
    cached = lengths - new
    return {
        "tokens": spans(inputs["cu_seqlens_q"][slots], new),
        "qo_indptr": prefix_sum(new),
        "kv_indptr": prefix_sum(cached),
        "kv_indices": spans(first, cached),
        "new_rows": spans(first + cached, new),
        "max_len_extend": int(new.max()) if len(new) else 0,
        "kv_indptr_all": prefix_sum(lengths),
    }


def run_prefill(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`extend_attention_fwd` on prefill rows."""
    _extend(inputs["query"], inputs["key"], inputs["value"], inputs["softmax_scale"], outputs, workspace)


def _extend(
    query: Tensor, keys: Tensor, values: Tensor, softmax_scale: float, outputs: Tensors, plan: Tensors
) -> None:
    """Rows of keys [n, Hk, W] and values [n, Hk, V]: cached ones found by index, new ones packed."""
    tokens, new_rows = plan["tokens"], plan["new_rows"]

    def attend(out: Tensor, lse: Tensor) -> None:
        KERNELS.extend_attention_fwd(
            rows_at(query, tokens),
            rows_at(keys, new_rows),
            rows_at(values, new_rows),
            out,
            keys,
            values,
            plan["qo_indptr"],
            plan["kv_indptr"],
            plan["kv_indices"],
            custom_mask=None,
            is_causal=True,
            mask_indptr=None,
            max_len_extend=plan["max_len_extend"],
            k_scale=1.0,
            v_scale=1.0,
            sm_scale=softmax_scale,
            lse_extend=lse,
        )

    attend_at(tokens, outputs, attend)


def run_dense(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`dense_prefill_attention_fwd` on prefill rows."""
    tokens = workspace["tokens"]

    def attend(out: Tensor, lse: Tensor) -> None:
        KERNELS.dense_prefill_attention_fwd(
            rows_at(inputs["query"], tokens),
            inputs["key"],
            inputs["value"],
            out,
            workspace["qo_indptr"],
            workspace["kv_indptr_all"],
            workspace["max_len_extend"],
            sm_scale=inputs["softmax_scale"],
            lse=lse,
        )

    attend_at(tokens, outputs, attend)


def supports_extend(case: Case) -> str | None:
    """Every case: widths are rounded up to powers of two."""
    return None


# ---- merge ---------------------------------------------------------------------------------------


def run_merge(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`merge_state_triton` on states as the library's attention leaves them."""
    merged = dense_output(outputs, workspace)
    KERNELS.merge_state_triton(
        workspace["prefix_out"],
        workspace["prefix_lse"],
        workspace["suffix_out"],
        workspace["suffix_lse"],
        merged,
        outputs["lse"],
    )
    if merged is not outputs["out"]:
        outputs["out"].copy_(merged)


def plan_with_keys(inputs: Tensors) -> Tensors:
    """`plan_states` without two empty ones in one place, and where these were: [Tp, H] bool."""
    states = plan_states(inputs)
    empty: Tensor = states["prefix_lse"].isinf() & states["suffix_lse"].isinf()
    kept = {name: states[name].masked_fill(empty, 0) for name in ("prefix_lse", "suffix_lse")}
    return {**states, **kept, "empty": empty}


def run_with_keys(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`run_merge` where either state has a key."""
    run_merge(inputs, outputs, workspace)
    outputs["lse"].masked_fill_(workspace["empty"], -torch.inf)


# ---- a whole step --------------------------------------------------------------------------------


def supports_step(case: Case) -> str | None:
    """None, or why a step's decode rows, or ours around them, are not taken."""
    if "packed" in case.options.cache:
        return "the kernels of a packed cache are not SGLang's Triton attention"
    return supports_decode(case) or step.supports(case)


def decode_in_step(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`run_decode`, planned on the step's own metadata."""
    run_decode(inputs, outputs, {**workspace, **plan_decode(inputs)})


def prefill_in_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k_prefill: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    qk_nope_head_dim: int,
    softmax_scale: float,
) -> None:
    """`run_prefill` in the place of our launcher."""
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k_prefill": cu_seqlens_k_prefill,
        "softmax_scale": softmax_scale,
    }
    run_prefill(inputs, {"out": out, "lse": lse}, plan_prefill(inputs))


def partial_results(layer: Layer, tokens: int, longest: int, slots: int) -> Workspace:
    """What decode takes of scratch."""
    return split_results(layer, tokens, MAX_KV_SPLITS)


STEP = replace(
    step.OPERATORS,
    mla_decode=decode_in_step,
    partial_results=partial_results,
    prefill_attention=prefill_in_step,
    supports=supports_step,
)


ABOUT: dict[str, Any] = {
    "lanes": ("interpreted", "compiled"),
    "libraries": LIBRARY.versions,
    "unavailable": KERNELS.unavailable,
}
"""What all paths of the library have in common."""

PATHS = (
    KernelPath(
        name="adapters/sglang/mla_decode",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        workspace=decode_workspace,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/sglang/mla_decode@extend",
        operator="mla_decode",
        supports=supports_extend,
        run=run_verify,
        plan=plan_verify,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/sglang/prefill_attention",
        operator="prefill_attention",
        supports=supports_extend,
        run=run_prefill,
        plan=plan_prefill,
        allocates=True,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/sglang/prefill_attention@dense",
        operator="prefill_attention",
        supports=supports_extend,
        run=run_dense,
        plan=plan_prefill,
        allocates=True,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/sglang/merge_states",
        operator="merge_states",
        supports=supports_states,
        run=run_merge,
        plan=plan_states,
        workspace=merge_workspace,
        batch_invariant=True,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/sglang/merge_states@with_keys",
        operator="merge_states",
        supports=supports_states,
        run=run_with_keys,
        plan=plan_with_keys,
        workspace=merge_workspace,
        batch_invariant=True,
        **ABOUT,
    ),
    replace(path_of(STEP, "adapters/sglang", lanes=ABOUT["lanes"]), allocates=True, **ABOUT),
)
