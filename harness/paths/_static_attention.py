"""Attention over lists of every row kind: tokens packed into the cache, two kinds of rows, one output.

Composed of the operators of one family of paths, which `<family>/static_attention.py` names.

Inputs
    q                   [Tp, H, R+D]        bf16, token and head strides free, last axis dense
    compressed_kv       [Tp, R]             bf16, token stride free, last axis dense
    k_pe                [Tp, D]             the same
    indices             [Tp, 1, K] int32    token stride free, last axis dense: tokens of the step, or rows of
                                            the cache where the token's row has something cached
    packed_cache        [nb, 1, bs, width]  uint8, contiguous, aligned to 4 bytes; new rows are written
    slot_mapping        [Tp] int64          block * bs + offset; negative: the token is not written
    scale_fmt                               "fp32" or "ue8m0", as of packed_cache_write
    seq_lens_decoder    [B] int32           tokens cached before the step, of any kind of row
    seq_lens_this_time  [B] int32           new tokens
    cu_seqlens_q        [B + 1] int32       their exclusive prefix sum
    batch_id_per_token  [Tp] int32          slot of each token, negative for padding
Outputs
    out                 [Tp, H, R]          bf16, token and head strides free
    lse                 [Tp, H]             fp32, contiguous, natural log
Workspace
    has_first_chunks, has_histories  [1] or [0] uint8, neither read nor written: which kinds of rows there are
    beside both kinds: seq_lens_encoder, cache_seqlens [B], cu_seqlens_q_packed [B + 1], batch_id_per_packed
    and is_nobody [Td], step_indices [Tp, 1, K], packed_indices [Td, 1, K], no_key [1, 1, K], all int32;
    packed_q [Td, H, R+D], packed_out [Td, H, R], packed_lse [Td, H] fp32
    of rows with a history: the partial results of sparse_decode for Tp tokens, beside first chunks for Td

Rows with nothing cached attend to tokens of the step, all others to rows of the cache, which holds the step's
tokens by then. Rows of one kind alone are computed where they lie, by that kind's operator alone. Beside one
another, tokens of rows with a history are packed, Td is their number or more, and their outputs put among
the others'; lists are divided, so that no operator follows those that mean something else to it. A list
without a key: out 0, lse -inf; padding's lists name no key in either meaning. Tp = 0: no launch.

R, D, bs and K are those that the family's operators take. No host synchronisation, no allocation; launches
depend on shapes alone: a captured graph may be replayed with other lengths and lists, as long as it has
workspace for the kinds of rows, and tokens of rows with a history are no more than Td.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cases import Case
from cases.layers import Layer
from harness.kernel_path import TORCH_NAMES, KernelPath, Tensors, Workspace

Launcher = Callable[..., Any]
Run = Callable[[Tensors, Tensors, Tensors], None]


@dataclass(frozen=True)
class Operators:
    """The operators of one family that attention over lists is composed of.

    Attributes:
        select_rows, gather_rows, merge_rows: launchers of decode_rows.
        packed_cache_write, sparse_prefill, sparse_decode: (inputs, outputs, workspace) -> None, as of a path.
        partial_results: (layer, tokens) -> the workspace that sparse_decode takes for them.
        supports: None, or why one of the operators does not take a case.
    """

    select_rows: Launcher
    gather_rows: Launcher
    merge_rows: Launcher
    packed_cache_write: Run
    sparse_prefill: Run
    sparse_decode: Run
    partial_results: Callable[[Layer, int], Workspace]
    supports: Callable[[Case], str | None]


def path_of(family: Operators, name: str, lanes: tuple[str, ...]) -> KernelPath:
    """The path `<name>/static_attention`."""
    return KernelPath(
        name=f"{name}/static_attention",
        operator="static_attention",
        lanes=lanes,
        supports=family.supports,
        run=partial(run, family),
        workspace=partial(workspace, family),
        rounds_keys=True,
    )


def pack_rows(family: Operators, inputs: Tensors, step: Tensors) -> None:
    """Packs queries and lists of rows with a history; `step_indices` keeps the others' lists alone."""
    begins, ids, indices = inputs["cu_seqlens_q"], inputs["batch_id_per_token"], inputs["indices"]
    packed_begins, packed_ids = step["cu_seqlens_q_packed"], step["batch_id_per_packed"]
    # Chunks with a history are packed with decode rows: no row counts as prefill.
    step["seq_lens_encoder"].zero_()
    family.select_rows(
        step["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        begins,
        ids,
        packed_begins,
        packed_ids,
        step["cache_seqlens"],
    )
    family.gather_rows(inputs["q"], begins, packed_begins, packed_ids, step["packed_q"])
    family.gather_rows(indices, begins, packed_begins, packed_ids, step["packed_indices"])
    # Behind the last packed token ids are -1 and lists 0, which is a row: all bits set, they name none.
    torch.clamp(packed_ids, max=0, out=step["is_nobody"])
    step["packed_indices"].bitwise_or_(step["is_nobody"].view(-1, 1, 1))
    step["no_key"].fill_(-1)
    step["step_indices"].copy_(indices)
    no_keys = step["no_key"].expand(len(packed_ids), -1, -1)
    family.merge_rows(None, no_keys, begins, packed_begins, ids, step["step_indices"])


def attend_step(family: Operators, inputs: Tensors, outputs: Tensors) -> None:
    """Outputs of lists that name tokens of the step: all of out and lse, 0 and -inf without a key."""
    names = ("q", "compressed_kv", "k_pe", "indices", "softmax_scale")
    family.sparse_prefill({name: inputs[name] for name in names}, outputs, {})


def attend_cache(family: Operators, inputs: Tensors, outputs: Tensors, step: Tensors) -> None:
    """The same of lists that name rows of the cache."""
    names = ("q", "packed_cache", "indices", "softmax_scale")
    family.sparse_decode({**{name: inputs[name] for name in names}, "splits": None}, outputs, step)


def attend_packed(family: Operators, inputs: Tensors, outputs: Tensors, step: Tensors) -> None:
    """Outputs of packed tokens, put where the step has these; no other token's is written."""
    packed = {"q": step["packed_q"], "indices": step["packed_indices"]}
    packed_outputs = {"out": step["packed_out"], "lse": step["packed_lse"]}
    attend_cache(family, {**inputs, **packed}, packed_outputs, step)
    begins, ids = inputs["cu_seqlens_q"], inputs["batch_id_per_token"]
    for name, result in packed_outputs.items():
        # An LSE is one head as wide as there are heads.
        source, target = (
            values.unsqueeze(1) if values.dim() == 2 else values for values in (result, outputs[name])
        )
        family.merge_rows(None, source, begins, step["cu_seqlens_q_packed"], ids, target)


def workspace(family: Operators, case: Case) -> Workspace:
    """Scratch tensors of a one-layer case; those for kinds of rows beside one another may be empty."""
    layer, rows = case.layers[0], [row for row in case.steps[0] if row.is_slot]
    model, heads, topk = TORCH_NAMES[layer.dtype], layer.num_attention_heads, layer.index_topk
    tokens = sum(row.new for row in case.steps[0])
    first_chunks = sum(row.new for row in rows if not row.cached)
    histories = sum(row.seq_lens_this_time for row in rows if row.cached)
    packed = histories if first_chunks else 0
    in_step, slots = (tokens, len(rows)) if packed else (0, 0)
    attended = packed if first_chunks else tokens
    partials = family.partial_results(layer, attended) if histories else {}
    return {
        "has_first_chunks": ((min(first_chunks, 1),), "uint8"),
        "has_histories": ((min(histories, 1),), "uint8"),
        "seq_lens_encoder": ((slots,), "int32"),
        "cache_seqlens": ((slots,), "int32"),
        "cu_seqlens_q_packed": ((slots + 1 if packed else 0,), "int32"),
        "batch_id_per_packed": ((packed,), "int32"),
        "is_nobody": ((packed,), "int32"),
        "step_indices": ((in_step, 1, topk), "int32"),
        "packed_indices": ((packed, 1, topk), "int32"),
        "no_key": ((min(packed, 1), 1, topk), "int32"),
        "packed_q": ((packed, heads, layer.latent_width), model),
        "packed_out": ((packed, heads, layer.kv_lora_rank), model),
        "packed_lse": ((packed, heads), "float32"),
        **partials,
    }


def run(family: Operators, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The step on the harness's tensors."""
    if inputs["q"].shape[0] == 0:
        return
    # Lists of rows may name this step's tokens.
    family.packed_cache_write(inputs, outputs, {})
    has_first_chunks, has_histories = (
        workspace[name].shape[0] > 0 for name in ("has_first_chunks", "has_histories")
    )
    if has_first_chunks and has_histories:
        pack_rows(family, inputs, workspace)
        attend_step(family, {**inputs, "indices": workspace["step_indices"]}, outputs)
        attend_packed(family, inputs, outputs, workspace)
    elif has_first_chunks:
        attend_step(family, inputs, outputs)
    elif has_histories:
        attend_cache(family, inputs, outputs, workspace)
    else:
        outputs["out"].zero_()
        outputs["lse"].fill_(-torch.inf)
