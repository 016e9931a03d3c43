"""FastDeploy's compiled operators of MLA, from the installed package.

Source: `fastdeploy.model_executor.ops.gpu`. No registry that we install from carries FastDeploy: all of this
was run with a stand-in that has its module paths and signatures, never with FastDeploy's own binaries. How
a version's operators are told apart and called is in `_fastdeploy_package.py`.

| path | calls | what it does not take |
|------|-------|-----------------------|
| `position_ids@ops` | `get_position_ids_and_mask_encoder_batch` | no slot, more than 1024 |
| `padding_offset@ops` | `get_padding_offset` | no slot; padding, where `token_num` is the number of tokens |
| `step_plan@ops` | `get_block_shape_and_split_kv_block` | no slot; no cached tokens; not 132 SMs |
| `latent_cache_write@ops` | `prefill_mla_write_cache`, `decode_mla_write_cache` | fp32; odd widths |
| `packed_cache_write@ops` | `dsk_attn_write_cache` | rows of other than 512 + 64; scales of powers of two |
| `mla_decode@ops` | `get_block_shape_and_split_kv_block`, `multi_head_latent_attention` | see below |
| `decode_rows@ops` | `merge_prefill_decode_output` | fp32; heads of other widths than 128, 192 and 256 |

`multi_head_latent_attention` is for compute capability 9 alone, for 8, 16 or 64 heads, rows of 512 + 64,
blocks of 64, bf16 and fp16, and for at most 64 / heads new tokens a row: it raises, or leaves tokens out, for
anything else, so that it is not called.

Conventions
    tensors: Paddle's views of the harness's. What is strided is copied here first, as its engine does.
    position ids: the operator writes the step's tokens and no other: padding's -1 is written here.
    cu_seqlens_k: given by versions that take `seq_lens_decoder`; what older ones give is cu_seqlens_q.
    ids: token ids are ours, any will do. cu_seqlens_k_prefill is not given.
    drafts: a step with a draft row is a speculative engine's: `speculate_decoder` is set for it.
    lists of tiles: made in `plan`, in buffers as long as the engine's; entries behind the last are -1 here.
    attention: at tokens that are not decode rows' the operator gives 0, as the contract asks. LSE: not given.
    merge: `decoder_res` has a row for each token of the step; the packed ones are put there here, and
        padding's 0 into what prefill gave. Of the contract's outputs `merged` alone is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.adapters._fastdeploy_package import about, call, installed

POSITIONS = "get_position_ids_and_mask_encoder_batch"
OFFSETS = "get_padding_offset"
PLAN = "get_block_shape_and_split_kv_block"
WRITES = ("prefill_mla_write_cache", "decode_mla_write_cache")
PACK = "dsk_attn_write_cache"
ATTEND = "multi_head_latent_attention"
MERGE = "merge_prefill_decode_output"

MULTIPROCESSORS = 132
"""Those of an H100 or H200 SXM, for which the contract of step_plan plans."""

MAX_SLOTS = 1024
"""Position ids are one block's, with a thread a slot; nothing looks whether it could be launched."""

ANY_TOKEN_ID = 7


# ---- what a step is ------------------------------------------------------------------------------


def no_slot(case: Case) -> str | None:
    """None, or why a step without a slot is none: a launch of no block is an error that stays unseen."""
    return None if any(row.is_slot for row in case.steps[0]) else "an engine's step has a slot, got none"


def dtype_not_taken(case: Case) -> str | None:
    """None, or why the operator has no form for a model dtype."""
    found = sorted({layer.dtype for layer in case.layers} - {"bf16", "fp16"})
    return f"the operator takes bf16 and fp16, got {found[0]}" if found else None


def compute_capability() -> tuple[int, int] | None:
    """Of the current device, None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as it is written, `9.0`."""
    return f"{capability[0]}.{capability[1]}"


def has_padding(case: Case) -> bool:
    """Whether the step has padding tokens."""
    return any(row.new > 0 and not row.is_slot for row in case.steps[0])


def longest_draft(inputs: Tensors) -> int:
    """Most new tokens of a decode row; 0 without one. Waits for the device."""
    decodes = (inputs["seq_lens_encoder"] == 0) & (inputs["seq_lens_decoder"] > 0)
    new: Tensor = inputs["seq_lens_this_time"] * decodes
    return int(new.max()) if new.numel() > 0 else 0


def lengths(inputs: Tensors) -> dict[str, Tensor]:
    """The lengths of every slot, as every operator gets them."""
    return {name: inputs[name] for name in ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")}


# ---- positions and padding -----------------------------------------------------------------------


def supports_positions(case: Case) -> str | None:
    """None, or why the operator cannot be launched for so many slots."""
    slots = sum(row.is_slot for row in case.steps[0])
    if slots > MAX_SLOTS:
        return f"{POSITIONS} has a thread for each of at most {MAX_SLOTS:,} slots, got {slots:,}"
    return no_slot(case)


def run_positions(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`get_position_ids_and_mask_encoder_batch`; older versions write a mask too, which is left alone."""
    position_ids = outputs["position_ids"]
    position_ids.fill_(-1)
    mask = position_ids.new_zeros((len(position_ids), 1))
    call(POSITIONS, **lengths(inputs), position_ids=position_ids, mask_encoder_batch=mask)


def supports_offsets(case: Case) -> str | None:
    """None, or why the installed version does not take a case."""
    if has_padding(case) and not installed().takes(OFFSETS, "cpu_token_num"):
        return f"{OFFSETS} of this version gives as many tokens as the rows have, got padding"
    return no_slot(case)


def run_offsets(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`get_padding_offset`, which returns tensors of its own."""
    new, tokens = inputs["seq_lens_this_time"], inputs["num_tokens"]
    longest = max(int(new.max()), 1)
    ids = torch.full((len(new), longest), ANY_TOKEN_ID, dtype=torch.int64, device=new.device)
    results = call(
        OFFSETS,
        input_ids=ids,
        # Of a slot and all before it, the ids that are no tokens.
        cum_offsets=(longest - new).cumsum(0).int(),
        token_num=torch.tensor([tokens], device=new.device),
        seq_len=new,
        seq_lens_encoder=None,
        seq_lens_decoder=inputs["seq_lens_decoder"],
        cpu_token_num=tokens,
    )
    if len(results) != 4:
        raise RuntimeError(f"{OFFSETS} must return 4 tensors, got {len(results)}: this version is not known")
    _, batch_id_per_token, cu_seqlens_q, cu_seqlens_k = results
    outputs["batch_id_per_token"].copy_(batch_id_per_token)
    outputs["cu_seqlens_q"].copy_(cu_seqlens_q)
    if "cu_seqlens_k" in outputs:
        outputs["cu_seqlens_k"].copy_(cu_seqlens_k)


# ---- tiles of decode rows ------------------------------------------------------------------------


def launch_buffers(inputs: Tensors, heads: int) -> dict[str, Tensor]:
    """Buffers of the engine's for a step's tiles, by the names of the operators' arguments: zeros.

    Waits for the device.
    """
    new = inputs["seq_lens_this_time"]
    slots, step_tokens = len(new), max(longest_draft(inputs), 1)
    keys = int((inputs["seq_lens_decoder"] + new).max())
    # As the engine allocates them: a tile list of decode rows, and for what its other backends list of
    # prefill rows, which some versions clear for this one too, two entries more than a row has keys.
    decode_tiles = 1024 * slots * -(-step_tokens * heads // 16)
    other_tiles = slots * (keys + 2)

    def buffer(size: int, *, on_host: bool = False) -> Tensor:
        if on_host:
            # Pinned, as the engine's: a kernel may read it.
            return torch.zeros(size, dtype=torch.int32, pin_memory=new.is_cuda)
        return torch.zeros(size, dtype=torch.int32, device=new.device)

    return {
        "decoder_batch_ids": buffer(decode_tiles),
        "decoder_tile_ids_per_batch": buffer(decode_tiles),
        "decoder_num_blocks_cpu": buffer(1, on_host=True),
        "decoder_num_blocks_device": buffer(1),
        "decoder_chunk_size_device": buffer(1),
        "max_len_tensor_cpu": buffer(9, on_host=True),
        "encoder_batch_ids": buffer(other_tiles),
        "encoder_tile_ids_per_batch": buffer(other_tiles),
        "encoder_num_blocks_x_cpu": buffer(1, on_host=True),
        "kv_batch_ids": buffer(other_tiles),
        "kv_tile_ids_per_batch": buffer(other_tiles),
        "kv_num_blocks_x_cpu": buffer(1, on_host=True),
    }


def tile_lists(inputs: Tensors, heads: int, block_size: int) -> dict[str, Tensor]:
    """Buffers of the engine's with the step's tiles, by the names of the operators' arguments.

    Waits for the device, as the operator does itself.
    """
    lists = launch_buffers(inputs, heads)
    # Versions that are told the tokens of a step are told the heads too; the others get what says "none".
    is_told = installed().takes(PLAN, "decoder_step_token_num")
    returned = call(
        PLAN,
        **lengths(inputs),
        **lists,
        decoder_num_blocks_x_cpu=lists["decoder_num_blocks_cpu"],
        encoder_block_shape_q=-1,
        decoder_block_shape_q=-1,
        group_size=heads if is_told else -1,
        block_size=block_size,
        decoder_step_token_num=max(longest_draft(inputs), 1),
    )
    lists["kv_num_blocks"] = lists["kv_num_blocks_x_cpu"]
    lists["max_len_kv"] = lists["max_len_tensor_cpu"][5:6]
    if is_told:
        # The engine passes its own count on, not the one that is returned.
        lists |= zip(RETURNED, returned, strict=True)
        lists["decoder_num_blocks"] = lists["decoder_num_blocks_cpu"]
    return lists


RETURNED = (
    "encoder_batch_ids",
    "encoder_tile_ids_per_batch",
    "encoder_num_blocks",
    "kv_batch_ids",
    "kv_tile_ids_per_batch",
    "kv_num_blocks",
    "decoder_num_blocks",
    "decoder_chunk_size_cpu",
    "max_len_kv",
)
"""What versions that are told the tokens of a step return, in order."""


def supports_plan(case: Case) -> str | None:
    """None, or why the operator says nothing of a step, or another thing than the contract."""
    if not any(row.cached > 0 for row in case.steps[0]):
        return f"{PLAN} writes no tile list in a step in which no slot has cached tokens"
    found = multiprocessors()
    if found not in (None, MULTIPROCESSORS):
        return f"{PLAN} plans for this device's {found} multiprocessors, the contract for {MULTIPROCESSORS}"
    return no_slot(case)


def multiprocessors() -> int | None:
    """Of the current device, None where there is none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def run_plan(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`get_block_shape_and_split_kv_block` in its MLA branch; heads have no influence there."""
    lists = tile_lists(inputs, heads=1, block_size=inputs["block_size"])
    device = outputs["max_lens"].device
    tiles = lists.get("decoder_num_blocks", lists["decoder_num_blocks_device"]).to(device).reshape(1)
    chunk = lists.get("decoder_chunk_size_cpu", lists["decoder_chunk_size_device"]).to(device).reshape(1)
    outputs["max_lens"].copy_(lists["max_len_tensor_cpu"][: len(outputs["max_lens"])])
    outputs["decoder_num_tiles"].copy_(tiles)
    outputs["decoder_chunk_size"].copy_(chunk)
    for name, listed in (
        ("decoder_batch_ids", "decoder_batch_ids"),
        ("decoder_tile_ids", "decoder_tile_ids_per_batch"),
    ):
        entries = torch.arange(len(outputs[name]), device=device)
        outputs[name].copy_(torch.where(entries < tiles, lists[listed][: len(entries)], -1))


# ---- cache write ---------------------------------------------------------------------------------


def supports_write(case: Case) -> str | None:
    """None, or why the operators do not take a case."""
    for layer in case.layers:
        widths = layer.kv_lora_rank, layer.qk_rope_head_dim
        if any(width % 8 for width in widths):
            return f"the operators copy 16 bytes at a time, got rows of {widths[0]} + {widths[1]}"
    if has_padding(case) and any(installed().takes(name, "padding_offsets") for name in WRITES):
        return "the operators of this version find tokens by padding offsets, got padding tokens"
    return dtype_not_taken(case)


def plan_write(inputs: Tensors) -> Tensors:
    """Whether the step is a speculative engine's."""
    return {"speculate_decoder": longest_draft(inputs) > 1}


def run_write(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`prefill_mla_write_cache` and `decode_mla_write_cache`, as a mixed step calls both."""
    tables, slots = inputs["block_tables"].contiguous(), inputs["batch_id_per_token"]
    longest = max(tables.shape[1] * outputs["latent_cache"].shape[2], 1)
    starts = inputs["cu_seqlens_q"][:-1]
    # Of a slot: how many ids of those before it are no tokens, if each has room for the longest row.
    offsets = torch.arange(len(starts), device=starts.device, dtype=torch.int32) * longest - starts
    given = {
        "kv_nope": inputs["compressed_kv"].contiguous(),
        "kv_pe": inputs["k_pe"].contiguous(),
        "kv_cache": outputs["latent_cache"],
        "batch_id_per_token": slots,
        "cu_seqlens_q": inputs["cu_seqlens_q"],
        "block_tables": tables,
        "slot_mapping": inputs["slot_mapping"],
        "padding_offsets": offsets[slots.long().clamp_min(0)] if len(offsets) > 0 else offsets,
        "cum_offsets": offsets,
        "cache_quant_type_str": "none",
        "max_seq_len": longest,
        "speculate_decoder": workspace["speculate_decoder"],
    }
    encoder, decoder = inputs["seq_lens_encoder"], inputs["seq_lens_decoder"]
    prefill, decode = WRITES
    call(prefill, **given, seq_lens=encoder, seq_lens_decoder=decoder)
    call(decode, **given, seq_lens=decoder, seq_lens_encoder=encoder)


# ---- packed cache write --------------------------------------------------------------------------


def supports_packing(case: Case) -> str | None:
    """None, or why the operator does not take a case."""
    for layer in case.layers:
        if (layer.kv_lora_rank, layer.qk_rope_head_dim) != (512, 64):
            return f"{PACK} takes rows of 512 + 64, got {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
    if case.options.scale_fmt != "fp32":
        return f"{PACK} writes scales as they come, got scale_fmt={case.options.scale_fmt}"
    capability = compute_capability()
    if capability is not None and capability < (8, 9):
        return f"{PACK} converts to fp8 from compute capability 8.9 on, this device has {dotted(capability)}"
    return None


def run_packing(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`dsk_attn_write_cache`; older versions are told more, which has no influence on this format."""
    tables = inputs["block_tables"].contiguous()
    call(
        PACK,
        kv_nope=inputs["compressed_kv"].contiguous(),
        kv_pe=inputs["k_pe"].contiguous(),
        kv_cache=outputs["packed_cache"],
        slot_mapping=inputs["slot_mapping"],
        seq_lens=inputs["seq_lens_encoder"],
        seq_lens_decoder=inputs["seq_lens_decoder"],
        batch_id_per_token=inputs["batch_id_per_token"],
        cu_seqlens_q=inputs["cu_seqlens_q"],
        block_tables=tables,
        cache_quant_type_str="fp8_ds_mla",
        max_seq_len=tables.shape[1] * outputs["packed_cache"].shape[2],
        is_prefill=True,
    )


# ---- decode attention ----------------------------------------------------------------------------


def supports_decode(case: Case) -> str | None:
    """None, or why the operator would raise, or leave tokens out."""
    capability = compute_capability()
    if capability is not None and capability[0] != 9:
        return f"{ATTEND} is for compute capability 9.0, this device has {dotted(capability)}"
    for layer in case.layers:
        if (layer.kv_lora_rank, layer.qk_rope_head_dim) != (512, 64):
            return f"{ATTEND} takes rows of 512 + 64, got {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
        if layer.num_attention_heads not in (8, 16, 64):
            return f"{ATTEND} takes 8, 16 or 64 heads, got {layer.num_attention_heads}"
        if layer.block_size != 64:
            return f"{ATTEND} takes blocks of 64 tokens, got {layer.block_size}"
        most = 64 // layer.num_attention_heads
        longest = max((row.new for row in case.steps[0] if row.is_decode), default=0)
        if longest > most:
            return (
                f"{ATTEND} takes {most} new tokens a row at {layer.num_attention_heads} heads, got {longest}"
            )
    return no_slot(case) or dtype_not_taken(case)


def plan_decode(inputs: Tensors) -> Tensors:
    """The step's tiles, and how many tokens its longest draft has."""
    heads, block_size = inputs["q"].shape[1], inputs["latent_cache"].shape[2]
    return {**tile_lists(inputs, heads, block_size), "drafts": longest_draft(inputs)}


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`multi_head_latent_attention`, which allocates what it returns."""
    q, cache, tables, out = inputs["q"], inputs["latent_cache"], inputs["block_tables"], outputs["out"]
    drafts, max_lens = workspace["drafts"], workspace["max_len_tensor_cpu"]
    given: dict[str, Any] = {
        **workspace,
        **lengths(inputs),
        "query": q.reshape(len(q), q.shape[1] * q.shape[2]).contiguous(),
        "key_cache": cache,
        "value_cache": cache,
        "cu_seqlens_q": inputs["cu_seqlens_q"],
        "batch_id_per_token": inputs["batch_id_per_token"],
        "block_tables": tables.contiguous(),
        "max_enc_len_this_time": max_lens[1:2],
        "max_dec_len_this_time": max_lens[2:3],
        "compute_dtype": {torch.bfloat16: "bf16", torch.float16: "fp16"}[q.dtype],
        "cache_quant_type_str": "none",
        "nope_size": out.shape[2],
        "max_input_length": tables.shape[1] * cache.shape[2],
        "softmax_scale": inputs["softmax_scale"],
        "quant_max_bound": 0.0,
        "quant_min_bound": 0.0,
        "out_linear_in_scale": 0.0,
        "speculate_max_draft_token_num": max(drafts - 1, 0),
        "causal": True,
        "speculate_decoder": drafts > 1,
    }
    (attended,) = call(ATTEND, **given)
    out.copy_(attended.view(out.shape))


# ---- prefill's and decode's outputs --------------------------------------------------------------


def supports_merge(case: Case) -> str | None:
    """None, or why the operator does not take a case."""
    for layer in case.layers:
        if layer.v_head_dim not in (128, 192, 256):
            return f"{MERGE} takes heads of 128, 192 or 256 columns, got {layer.v_head_dim}"
    return no_slot(case) or dtype_not_taken(case)


def plan_merge(inputs: Tensors) -> Tensors:
    """Tokens of decode rows and of padding, and how many the longest draft has."""
    slots = inputs["batch_id_per_token"].long()
    decodes = (inputs["seq_lens_encoder"] == 0) & (inputs["seq_lens_decoder"] > 0)
    is_decode = (slots >= 0) & decodes[slots.clamp_min(0)]
    return {
        "decode_tokens": is_decode.nonzero().flatten(),
        "padding": (slots < 0).nonzero().flatten(),
        "max_token": max(longest_draft(inputs), 1),
    }


def run_merge(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`merge_prefill_decode_output` of what prefill and decode gave."""
    prefill, tokens = inputs["prefill_out"], workspace["decode_tokens"]
    decoded = torch.full_like(prefill, torch.nan, memory_format=torch.contiguous_format)
    decoded[tokens] = inputs["decode_out"][: len(tokens)]
    outputs["merged"].copy_(merged_by_operator(inputs, decoded, workspace["padding"], workspace["max_token"]))


def merged_by_operator(inputs: Tensors, decoded: Tensor, padding: Tensor, max_token: int) -> Tensor:
    """[T, H, V]: `merge_prefill_decode_output` in place on a copy of what prefill gave, 0 at padding.

    Args:
        decoded: [T, H, V] or [T, H V], what decode gave at the tokens of its rows, anything elsewhere.
        max_token: tokens of the longest decode row.
    """
    prefill: Tensor = inputs["prefill_out"]
    tokens, heads, width = prefill.shape
    merged = prefill.reshape(tokens, heads * width).clone()
    merged[padding] = 0
    call(
        MERGE,
        **lengths(inputs),
        encoder_res=merged,
        decoder_res=decoded.reshape(tokens, heads * width),
        cu_seq_q=inputs["cu_seqlens_q"],
        head_num=heads,
        head_dim=width,
        max_token=max_token,
    )
    return merged.view(prefill.shape)


# ---- paths ---------------------------------------------------------------------------------------


PATHS = (
    KernelPath(
        name="adapters/fastdeploy/position_ids@ops",
        operator="position_ids",
        supports=supports_positions,
        run=run_positions,
        **about(POSITIONS),
    ),
    KernelPath(
        name="adapters/fastdeploy/padding_offset@ops",
        operator="padding_offset",
        supports=supports_offsets,
        run=run_offsets,
        allocates=True,
        omits=("cu_seqlens_k_prefill",)
        if installed().takes(OFFSETS, "seq_lens_decoder")
        else ("cu_seqlens_k", "cu_seqlens_k_prefill"),
        **about(OFFSETS),
    ),
    KernelPath(
        name="adapters/fastdeploy/step_plan@ops",
        operator="step_plan",
        supports=supports_plan,
        run=run_plan,
        allocates=True,
        **about(PLAN),
    ),
    KernelPath(
        name="adapters/fastdeploy/latent_cache_write@ops",
        operator="latent_cache_write",
        supports=supports_write,
        run=run_write,
        plan=plan_write,
        **about(*WRITES),
    ),
    KernelPath(
        name="adapters/fastdeploy/packed_cache_write@ops",
        operator="packed_cache_write",
        supports=supports_packing,
        run=run_packing,
        **about(PACK),
    ),
    KernelPath(
        name="adapters/fastdeploy/mla_decode@ops",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        allocates=True,
        omits=("lse",),
        **about(PLAN, ATTEND),
    ),
    KernelPath(
        name="adapters/fastdeploy/decode_rows@ops",
        operator="decode_rows",
        supports=supports_merge,
        run=run_merge,
        plan=plan_merge,
        allocates=True,
        omits=("cu_seqlens_q_decode", "batch_id_per_decode_token", "packed_query", "cache_seqlens"),
        **about(MERGE),
    ),
)
