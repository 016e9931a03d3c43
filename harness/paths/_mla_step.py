"""One layer's attention over a mixed step, from projected queries and latents to what o_proj takes.

Composed of the operators of one family of paths, which `<family>/mla_step.py` names.

Inputs
    q_nope              [Tp, H, N]        model dtype, token and head strides free, last axis dense
    q_pe                [Tp, H, D]        the same; rotated
    compressed_kv       [Tp, R]           model dtype, token stride free, last axis dense; normalised
    k_pe                [Tp, D]           the same; rotated
    w_uk                [H, N, R]         model dtype, contiguous
    w_uv                [H, R, V]         model dtype, contiguous
    latent_cache        [nb, 1, bs, R+D]  model dtype, contiguous; the new tokens' rows are written
                        or, packed, [nb, 1, bs, R + R / 32 + 2 D] uint8; the model dtype is then bf16
    block_tables        [B, MB] int32     row stride free; entries past a row's length unread
    seq_lens_encoder    [B] int32         > 0: a prefill row
    seq_lens_decoder    [B] int32         tokens cached before the step, of any kind of row
    seq_lens_this_time  [B] int32         new tokens
    window                                of a packed cache: keys that a token sees, itself included; 0: all
    scale_fmt                             of a packed cache: "fp32", or "ue8m0": scales are powers of two
Output
    out                 [Tp, H, V]        model dtype, token and head strides free, last axis dense
Workspace
    of the step: cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_prefill [B + 1], batch_id_per_token and
    position_ids [Tp], all int32; slot_mapping [Tp] int64
    of prefill rows, Tk their keys or more: full_compressed_kv [Tk, R], full_k_pe [Tk, D], query [Tp, H, N+D],
    key [Tk, H, N+D], value [Tk, H, V], prefill_lse [Tp, H] fp32
    of decode rows: absorbed [Td, H, R+D], latent_out [Td, H, R], decode_lse [Td, H] fp32, and the partial
    results of mla_decode for Td tokens
    of decode rows beside prefill rows: cu_seqlens_q_decode [B + 1], batch_id_per_decode_token [Td] and
    cache_seqlens [B], all int32; packed_nope [Td, H, N], decode_out [Td, H, V]
    of a packed cache: swa_indices [Tp, 1, K] int32, K a multiple of 128 that holds the window, or the longest
    row where that is less

Prefill rows, first chunks and chunks with a history, are computed unabsorbed from keys and values of each
head; decode rows, drafts too, absorbed from the cache. Histories of decode rows are neither gathered nor
projected, and queries of prefill rows not absorbed: beside prefill rows, decode tokens are packed, Td is
their number or more, and their outputs are put among those of prefill, which are in `out` already. Without
prefill rows tokens are taken as they are, and Td is Tp. A branch whose workspace is empty is not launched:
the step then has no row of its kind. Padding tokens: out 0, nothing written. Tp = 0: no launch.

R, D and bs are those that the family's operators take. No host synchronisation; launches depend on shapes
alone: a captured graph may be replayed with other lengths and tables, as long as it has workspace for the
kinds of rows: the prefill rows' keys are no more than Tk, and the decode tokens no more than Td.

Where the cache is packed, every token is computed as decode tokens are, of prefill rows too: new tokens are
packed into the cache, the rows of the keys that each token sees are listed, cached and new alike, and
absorbed queries attend to what they stand for, rounded to bf16. A token's answer depends on no chunk's
border: what is new is read as it will be read once it is cached. Td is Tp, and prefill rows take no memory
of their own.

Not: a window over a cache in the model dtype, whose kernels attend to all that is cached; a packed cache of
another model dtype than bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.layers import Layer
from harness.kernel_path import TORCH_NAMES, KernelPath, Tensors, Workspace

Launcher = Callable[..., Any]

INDEX_TILE = 128
"""Lists of keys have a multiple of this many entries, as readers of other projects demand."""


@dataclass(frozen=True)
class Operators:
    """The operators of one family that a step is composed of, each under its launcher's name.

    Attributes:
        mla_decode: (inputs, outputs, workspace) -> None, as of a path.
        partial_results: (layer, tokens, longest row, slots) -> the workspace that mla_decode takes for them.
        packed_cache_write, swa_indices, sparse_decode: as mla_decode.
        partial_lists: (layer, tokens) -> the workspace that sparse_decode takes for them.
        supports: None, or why one of the operators does not take a layer whose cache has the model dtype.
        supports_packed: the same of a layer whose cache is packed.
    """

    padding_offset: Launcher
    place_tokens: Launcher
    map_tokens: Launcher
    select_decode_rows: Launcher
    gather_decode_rows: Launcher
    merge_decode_rows: Launcher
    latent_cache_write: Launcher
    read_cache_interleave: Launcher
    prefill_attention: Launcher
    mla_decode: Callable[[Tensors, Tensors, Tensors], None]
    partial_results: Callable[[Layer, int, int, int], Workspace]
    packed_cache_write: Callable[[Tensors, Tensors, Tensors], None]
    swa_indices: Callable[[Tensors, Tensors, Tensors], None]
    sparse_decode: Callable[[Tensors, Tensors, Tensors], None]
    partial_lists: Callable[[Layer, int], Workspace]
    supports: Callable[[Case], str | None]
    supports_packed: Callable[[Case], str | None]


def path_of(family: Operators, name: str, lanes: tuple[str, ...]) -> KernelPath:
    """The path `<name>/mla_step`."""
    return KernelPath(
        name=f"{name}/mla_step",
        operator="mla_step",
        lanes=lanes,
        supports=partial(supports, family),
        run=partial(run, family),
        workspace=partial(workspace, family),
        rounds_keys=True,
    )


def supports(family: Operators, case: Case) -> str | None:
    """None, or why one of the operators does not take one of the layers."""
    for index, layer in enumerate(case.layers):
        alone = case.one_layer(index)
        if layer.cache == "packed":
            reason = family.supports_packed(alone)
        elif layer.window:
            reason = f"a window takes cache=packed, got cache={layer.cache}: there alone keys are listed"
        else:
            reason = family.supports(alone)
        if reason is not None:
            return reason
    return None


def locate_tokens(family: Operators, inputs: Tensors, step: Tensors) -> None:
    """Prefix sums, slots, positions, cache rows and packed places of the step's tokens, for all layers."""
    family.padding_offset(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        step["cu_seqlens_q"],
        step["cu_seqlens_k"],
        step["cu_seqlens_k_prefill"],
        step["batch_id_per_token"],
    )
    family.place_tokens(
        inputs["seq_lens_decoder"], step["cu_seqlens_q"], step["batch_id_per_token"], step["position_ids"]
    )
    family.map_tokens(
        inputs["block_tables"],
        step["batch_id_per_token"],
        step["position_ids"],
        step["slot_mapping"],
        inputs["latent_cache"].shape[2],
    )
    if step["batch_id_per_decode_token"].shape[0] > 0:
        family.select_decode_rows(
            inputs["seq_lens_encoder"],
            inputs["seq_lens_decoder"],
            inputs["seq_lens_this_time"],
            step["cu_seqlens_q"],
            step["batch_id_per_token"],
            step["cu_seqlens_q_decode"],
            step["batch_id_per_decode_token"],
            step["cache_seqlens"],
        )


def is_packed(inputs: Tensors) -> bool:
    """Whether the layer's cache holds packed rows."""
    return bool(inputs["latent_cache"].dtype is torch.uint8)


def write_new_rows(family: Operators, inputs: Tensors, step: Tensors) -> None:
    """The new tokens' rows of the cache, in the model dtype or packed."""
    latent_cache, slot_mapping = inputs["latent_cache"], step["slot_mapping"]
    if not is_packed(inputs):
        family.latent_cache_write(inputs["compressed_kv"], inputs["k_pe"], latent_cache, slot_mapping)
        return
    family.packed_cache_write(
        {
            "compressed_kv": inputs["compressed_kv"],
            "k_pe": inputs["k_pe"],
            "slot_mapping": slot_mapping,
            "scale_fmt": inputs["scale_fmt"],
        },
        {"packed_cache": latent_cache},
        {},
    )


def list_visible_rows(family: Operators, inputs: Tensors, step: Tensors) -> None:
    """The rows of a packed cache that each token attends to, whatever its row's kind."""
    family.swa_indices(
        {
            "block_tables": inputs["block_tables"],
            "cu_seqlens_q": step["cu_seqlens_q"],
            "seq_lens_decoder": inputs["seq_lens_decoder"],
            "batch_id_per_token": step["batch_id_per_token"],
            "block_size": inputs["latent_cache"].shape[2],
            "window": inputs["window"],
        },
        {"swa_indices": step["swa_indices"]},
        {},
    )


def attend_prefill_rows(family: Operators, inputs: Tensors, step: Tensors, out: Tensor) -> None:
    """Prefill rows' outputs: their histories gathered, keys and values of each head made, attention.

    Writes all of out [Tp, H, V]: 0 at every other token.
    """
    q_nope, w_uk, w_uv = inputs["q_nope"], inputs["w_uk"], inputs["w_uv"]
    query, key, value, nope = step["query"], step["key"], step["value"], q_nope.shape[2]
    family.read_cache_interleave(
        inputs["latent_cache"],
        inputs["block_tables"],
        inputs["compressed_kv"],
        inputs["k_pe"],
        inputs["seq_lens_decoder"],
        step["cu_seqlens_q"],
        step["cu_seqlens_k_prefill"],
        step["full_compressed_kv"],
        step["full_k_pe"],
    )
    # [H, Tk, R], one latent for all heads: nothing is copied.
    latents = step["full_compressed_kv"].expand(w_uk.shape[0], -1, -1)
    torch.bmm(latents, w_uk.transpose(1, 2), out=key[:, :, :nope].transpose(0, 1))
    key[:, :, nope:].copy_(step["full_k_pe"].unsqueeze(1).expand(-1, key.shape[1], -1))
    torch.bmm(latents, w_uv, out=value.transpose(0, 1))
    query[:, :, :nope].copy_(q_nope)
    query[:, :, nope:].copy_(inputs["q_pe"])
    family.prefill_attention(
        query,
        key,
        value,
        step["cu_seqlens_q"],
        step["cu_seqlens_k_prefill"],
        out,
        step["prefill_lse"],
        qk_nope_head_dim=nope,
        softmax_scale=inputs["softmax_scale"],
    )


def attend_decode_rows(family: Operators, inputs: Tensors, step: Tensors, out: Tensor) -> None:
    """Outputs of a step whose tokens are taken as they are: all of out [Tp, H, V].

    Of one without prefill rows, and of any from a packed cache.
    """
    step["absorbed"][:, :, inputs["w_uk"].shape[2] :].copy_(inputs["q_pe"])
    begins, ids = step["cu_seqlens_q"], step["batch_id_per_token"]
    attend_tokens(family, inputs["q_nope"], begins, ids, inputs, step, out)


def attend_packed_decode_rows(family: Operators, inputs: Tensors, step: Tensors, out: Tensor) -> None:
    """Decode rows' outputs beside prefill rows, whose tokens of out [Tp, H, V] are not written."""
    begins, decode_begins = step["cu_seqlens_q"], step["cu_seqlens_q_decode"]
    decode_ids, rotated = step["batch_id_per_decode_token"], step["absorbed"][:, :, inputs["w_uk"].shape[2] :]
    family.gather_decode_rows(inputs["q_nope"], begins, decode_begins, decode_ids, step["packed_nope"])
    family.gather_decode_rows(inputs["q_pe"], begins, decode_begins, decode_ids, rotated)
    attend_tokens(family, step["packed_nope"], decode_begins, decode_ids, inputs, step, step["decode_out"])
    family.merge_decode_rows(None, step["decode_out"], begins, decode_begins, step["batch_id_per_token"], out)


def attend_tokens(
    family: Operators,
    q_nope: Tensor,
    cu_seqlens_q: Tensor,
    batch_id_per_token: Tensor,
    inputs: Tensors,
    step: Tensors,
    out: Tensor,
) -> None:
    """Decode tokens' outputs: queries absorbed, attention over the cache, values projected.

    Args:
        q_nope: [Td, H, N], the tokens; their rotated parts are in `absorbed` already.
        cu_seqlens_q: [B + 1] int32, their prefix sum.
        batch_id_per_token: [Td] int32, their slots; negative: out 0.
        out: [Td, H, V], token and head strides free, last axis dense.
    """
    w_uk, w_uv = inputs["w_uk"], inputs["w_uv"]
    absorbed, latent_out, rank = step["absorbed"], step["latent_out"], w_uk.shape[2]
    torch.bmm(q_nope.transpose(0, 1), w_uk, out=absorbed[:, :, :rank].transpose(0, 1))
    outputs = {"out": latent_out, "lse": step["decode_lse"]}
    if is_packed(inputs):
        listed = {
            "q": absorbed,
            "packed_cache": inputs["latent_cache"],
            "indices": step["swa_indices"],
            "softmax_scale": inputs["softmax_scale"],
            "splits": None,
        }
        family.sparse_decode(listed, outputs, step)
    else:
        family.mla_decode(
            {
                "q": absorbed,
                "latent_cache": inputs["latent_cache"],
                "block_tables": inputs["block_tables"],
                "seq_lens_encoder": inputs["seq_lens_encoder"],
                "seq_lens_decoder": inputs["seq_lens_decoder"],
                "cu_seqlens_q": cu_seqlens_q,
                "batch_id_per_token": batch_id_per_token,
                "softmax_scale": inputs["softmax_scale"],
                "splits": None,
            },
            outputs,
            step,
        )
    torch.bmm(latent_out.transpose(0, 1), w_uv, out=out.transpose(0, 1))


def workspace(family: Operators, case: Case) -> Workspace:
    """Scratch tensors of a one-layer case; those of a branch without a row are empty."""
    layer, rows = case.layers[0], [row for row in case.steps[0] if row.is_slot]
    model, heads, slots = TORCH_NAMES[layer.dtype], layer.num_attention_heads, len(rows)
    tokens = sum(row.new for row in case.steps[0])
    # From a packed cache all rows are computed as decode rows are.
    lists = layer.cache == "packed"
    keys = sum(row.length for row in rows if row.seq_lens_encoder and not lists)
    decode_tokens = sum(row.new for row in rows if row.is_decode or lists)
    prefilled, packed = (tokens, decode_tokens) if keys else (0, 0)
    decoded = tokens if decode_tokens and not keys else packed
    longest = max((row.length for row in rows), default=0)
    entries = list_entries(layer, longest) if lists else 0
    partial: Workspace = {}
    if decoded and lists:
        partial = family.partial_lists(replace(layer, index_topk=entries), decoded)
    elif decoded:
        partial = family.partial_results(layer, decoded, longest, slots)
    return {
        "cu_seqlens_q": ((slots + 1,), "int32"),
        "cu_seqlens_k": ((slots + 1,), "int32"),
        "cu_seqlens_k_prefill": ((slots + 1,), "int32"),
        "batch_id_per_token": ((tokens,), "int32"),
        "position_ids": ((tokens,), "int32"),
        "slot_mapping": ((tokens,), "int64"),
        "full_compressed_kv": ((keys, layer.kv_lora_rank), model),
        "full_k_pe": ((keys, layer.qk_rope_head_dim), model),
        "query": ((prefilled, heads, layer.qk_head_dim), model),
        "key": ((keys, heads, layer.qk_head_dim), model),
        "value": ((keys, heads, layer.v_head_dim), model),
        "prefill_lse": ((prefilled, heads), "float32"),
        "absorbed": ((decoded, heads, layer.latent_width), model),
        "latent_out": ((decoded, heads, layer.kv_lora_rank), model),
        "decode_lse": ((decoded, heads), "float32"),
        "cu_seqlens_q_decode": ((slots + 1 if packed else 0,), "int32"),
        "batch_id_per_decode_token": ((packed,), "int32"),
        "cache_seqlens": ((slots if packed else 0,), "int32"),
        "packed_nope": ((packed, heads, layer.qk_nope_head_dim), model),
        "decode_out": ((packed, heads, layer.v_head_dim), model),
        "swa_indices": ((tokens if lists else 0, 1, entries), "int32"),
        **partial,
    }


def list_entries(layer: Layer, longest: int) -> int:
    """Entries of a token's list of keys: room for what it sees of the longest row, in whole tiles."""
    return -(-min(layer.window or longest, longest) // INDEX_TILE) * INDEX_TILE


def run(family: Operators, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The step on the harness's tensors."""
    if inputs["q_nope"].shape[0] == 0:
        return
    locate_tokens(family, inputs, workspace)
    # Decode rows, and all rows of a packed cache, find their new tokens there; prefill rows in the inputs.
    write_new_rows(family, inputs, workspace)
    if is_packed(inputs):
        list_visible_rows(family, inputs, workspace)
    out = outputs["out"]
    has_prefill, has_decode = workspace["key"].shape[0] > 0, workspace["absorbed"].shape[0] > 0
    if has_prefill:
        attend_prefill_rows(family, inputs, workspace, out)
    if has_decode and has_prefill:
        attend_packed_decode_rows(family, inputs, workspace, out)
    elif has_decode:
        attend_decode_rows(family, inputs, workspace, out)
    elif not has_prefill:
        out.zero_()
