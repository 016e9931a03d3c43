"""What FastDeploy's layers compute in Python and Triton around its operators, from the installed package.

Source, below `fastdeploy.model_executor.layers`: `attention.mla_attention_backend`,
`attention.dsa_attention_backend` and `linear`. As `fastdeploy_ops.py`, all of this was run with a stand-in
alone. `fastdeploy.py` runs the same fused read from a checkout, without an engine.

| path | calls | what it does not take |
|------|-------|-----------------------|
| `read_cache_interleave@layers` | `fused_read_cache_and_interleave_triton` | widths not powers of two |
| `read_cache_interleave@naive` | `fused_read_cache_and_interleave_naive` | |
| `decode_rows@layers` | `extract_decoder_token_from_q`, `insert_decoder_result_back` | drafts |
| `slot_mapping@layers` | `compute_slot_mapping` | |
| `kv_b_split@layers` | `KVBatchLinear` | |

Conventions
    fused read: cu_seqlens_k counts keys of decode rows too, whose rows are left out here. New rows and block
        tables are dense for it: views are copied here.
    decode rows: one token a slot, in the slot's place, whether it is a decode row or not. The decode rows'
        are taken out of them, and put into them, here; other slots get NaN. What is put back is merged by the
        operator of `decode_rows@ops`, so that what that one does not take is not taken.
    kv_b_proj: `KVBatchLinear` of each rank gets that rank's slice, of both layouts if it asks what layout
        the checkpoint has; one that does not is given Paddle's, as the linear layer before it leaves it.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.adapters._fastdeploy_package import about, call, default_dtype, installed
from harness.paths.adapters._rows import decode_slots, prefix_sum, spans
from harness.paths.adapters.fastdeploy import supports_read
from harness.paths.adapters.fastdeploy_ops import MERGE, merged_by_operator, supports_merge

READ = "fused_read_cache_and_interleave_triton"
NAIVE_READ = "fused_read_cache_and_interleave_naive"
EXTRACT = "extract_decoder_token_from_q"
INSERT = "insert_decoder_result_back"
SLOTS = "compute_slot_mapping"
LINEAR = "KVBatchLinear"


# ---- fused read ----------------------------------------------------------------------------------


def supports_all(case: Case) -> str | None:
    """Every case."""
    return None


def plan_read(inputs: Tensors) -> Tensors:
    """The engine's prefix sum over all keys, and which of these are prefill rows'."""
    cu_seqlens_k = prefix_sum(inputs["seq_lens_decoder"] + inputs["cu_seqlens_q"].diff())
    return {
        "cu_seqlens_k": cu_seqlens_k,
        "prefill_keys": spans(cu_seqlens_k[:-1], inputs["cu_seqlens_k_prefill"].diff()),
    }


def run_read(name: str, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """One of the two forms of the fused read, which allocates what it returns."""
    tables, compressed_kv, k_pe = inputs["block_tables"], inputs["compressed_kv"], inputs["k_pe"]
    latents, rope_keys = call(
        name,
        latent_cache=inputs["latent_cache"],
        block_tables=None if tables is None else tables.contiguous(),
        new_compressed_kv=compressed_kv.contiguous(),
        new_k_pe=k_pe.contiguous(),
        cu_seqlens_k=workspace["cu_seqlens_k"],
        cu_seqlens_q=inputs["cu_seqlens_q"],
        kv_lora_rank=compressed_kv.shape[1],
        qk_rope_head_dim=k_pe.shape[1],
        block_size=inputs["latent_cache"].shape[2],
    )
    outputs["full_compressed_kv"].copy_(latents[workspace["prefill_keys"]])
    outputs["full_k_pe"].copy_(rope_keys[workspace["prefill_keys"]])


# ---- decode rows, one a slot ---------------------------------------------------------------------


def supports_slots(case: Case) -> str | None:
    """None, or why a case is not taken."""
    if any(row.is_decode and row.new > 1 for row in case.steps[0]):
        return f"{EXTRACT} has one token a slot, got drafts"
    return supports_merge(case)


def plan_slots(inputs: Tensors) -> Tensors:
    """Slots of decode rows, and padding tokens."""
    padding = (inputs["batch_id_per_token"] < 0).nonzero().flatten()
    return {"decode_slots": decode_slots(inputs), "padding": padding}


def run_slots(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """Queries taken out by one kernel, results put back by another, and merged with prefill's."""
    query, packed, slots = inputs["query"], outputs["packed_query"], workspace["decode_slots"]
    rows: dict[str, Any] = {
        name: inputs[name] for name in ("cu_seqlens_q", "seq_lens_encoder", "seq_lens_decoder")
    }
    extracted, cache_seqlens = call(EXTRACT, q=query.flatten(1).contiguous(), **rows)
    packed.zero_()
    packed[: len(slots)] = extracted.view(len(extracted), *query.shape[1:])[slots]
    outputs["cache_seqlens"].copy_(cache_seqlens)
    results = inputs["decode_out"]
    by_slot = results.new_full((len(cache_seqlens), 1, *results.shape[1:]), torch.nan)
    by_slot[slots, 0] = results[: len(slots)]
    (inserted,) = call(INSERT, decoder_result=by_slot, **rows, mixed_token_num=len(query))
    outputs["merged"].copy_(merged_by_operator(inputs, inserted, workspace["padding"], max_token=1))


# ---- cache rows ----------------------------------------------------------------------------------


def run_slot_mapping(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`compute_slot_mapping`, which returns a tensor of its own."""
    (slots,) = call(
        SLOTS,
        block_tables=inputs["block_tables"].contiguous(),
        positions=inputs["position_ids"],
        batch_id_per_token=inputs["batch_id_per_token"],
        block_size=inputs["block_size"],
    )
    outputs["slot_mapping"].copy_(slots)


# ---- kv_b_proj -----------------------------------------------------------------------------------

PREFIX = "kv_b_proj"

LAYOUTS = ("paddle", "torch") if installed().takes(LINEAR, "kv_b_proj") else ("paddle",)
"""Of checkpoints. Versions that get no layer load from a checkpoint's state, which is in Paddle's alone."""


def run_kv_b_split(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """Both halves of each rank, as `KVBatchLinear` has them when it has loaded."""
    ranks, heads = inputs["tensor_parallel_size"], inputs["num_attention_heads"]
    for layout in LAYOUTS:
        weights = inputs[f"kv_b_proj_{layout}"]
        for rank, weight in enumerate(weights.chunk(ranks, dim=1 if layout == "paddle" else 0)):
            key, value = loaded(weight.contiguous(), layout, rank, ranks, heads, inputs)
            outputs[f"k_b_proj_weight_{layout}"][rank].copy_(key)
            outputs[f"v_b_proj_weight_{layout}"][rank].copy_(value)


def loaded(
    weight: Tensor, layout: str, rank: int, ranks: int, heads: int, inputs: Tensors
) -> tuple[Tensor, Tensor]:
    """A rank's halves from its slice of a checkpoint: [H, N, R] and [H, R, V]."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, tensor_parallel_rank=rank),
        load_config=SimpleNamespace(load_choices="default_v1", dynamic_load_weight=False),
        model_config=SimpleNamespace(model_format=layout),
    )
    key, value = call(
        LINEAR,
        load,
        {"weight": weight},
        fd_config=config,
        kv_b_proj=SimpleNamespace(weight=None),
        prefix=PREFIX,
        kv_lora_rank=weight.shape[0 if layout == "paddle" else 1],
        num_attention_heads=heads * ranks,
        qk_nope_head_dim=inputs["qk_nope_head_dim"],
        v_head_dim=inputs["v_head_dim"],
    )
    return key, value


def load(kind: Any, arguments: Tensors, beside: Tensors) -> tuple[Any, Any]:
    """The two halves of a layer of this kind that has loaded, as Paddle's tensors."""
    weight = beside["weight"]
    with default_dtype(str(weight.dtype).rpartition(".")[2]):
        layer = kind(**arguments)
        if "kv_b_proj" in arguments:
            asks = "model_format" in kind.process_weights_after_loading.__code__.co_names
            is_torch = arguments["fd_config"].model_config.model_format == "torch"
            arguments["kv_b_proj"].weight = weight.transpose([1, 0]) if is_torch and not asks else weight
            layer.process_weights_after_loading()
        else:
            layer.load_state_dict({f"{PREFIX}.weight": weight})
    return layer.k_b_proj_weight.detach().contiguous(), layer.v_b_proj_weight.detach().contiguous()


# ---- paths ---------------------------------------------------------------------------------------

PATHS = (
    KernelPath(
        name="adapters/fastdeploy/read_cache_interleave@layers",
        operator="read_cache_interleave",
        supports=supports_read,
        run=partial(run_read, READ),
        plan=plan_read,
        allocates=True,
        **about(READ),
    ),
    KernelPath(
        name="adapters/fastdeploy/read_cache_interleave@naive",
        operator="read_cache_interleave",
        supports=supports_all,
        run=partial(run_read, NAIVE_READ),
        plan=plan_read,
        allocates=True,
        **about(NAIVE_READ),
    ),
    KernelPath(
        name="adapters/fastdeploy/decode_rows@layers",
        operator="decode_rows",
        supports=supports_slots,
        run=run_slots,
        plan=plan_slots,
        allocates=True,
        omits=("cu_seqlens_q_decode", "batch_id_per_decode_token"),
        **about(EXTRACT, INSERT, MERGE),
    ),
    KernelPath(
        name="adapters/fastdeploy/slot_mapping@layers",
        operator="slot_mapping",
        supports=supports_all,
        run=run_slot_mapping,
        allocates=True,
        **about(SLOTS),
    ),
    KernelPath(
        name="adapters/fastdeploy/kv_b_split@layers",
        operator="kv_b_split",
        supports=supports_all,
        run=run_kv_b_split,
        allocates=True,
        omits=() if "torch" in LAYOUTS else ("k_b_proj_weight_torch", "v_b_proj_weight_torch"),
        **about(LINEAR),
    ),
)
