"""Compiles every Triton kernel for an NVIDIA GPU of compute capability 9.0, which need not be there.

Run by `test_compile.py` in a process of its own, without TRITON_INTERPRET: one JSON object a compilation.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.paths.triton import (
    decode_rows,
    gqa_cache_write,
    gqa_step,
    kv_b_split,
    latent_cache_write,
    launch_buffers,
    merge_states,
    mla_decode,
    packed_cache_write,
    padding_offset,
    position_ids,
    prefill_attention,
    qkv_split,
    read_cache_interleave,
    slot_mapping,
    sparse_decode,
    sparse_prefill,
    step_plan,
    swa_indices,
)
from harness.paths.triton import rope as rotation

POINTERS = {
    "batch_id_per_decode_token": "*i32",
    "batch_ids": "*i32",
    "batch_id_per_token": "*i32",
    "block_tables": "*i32",
    "cache_seqlens": "*i32",
    "capacity": "*i32",
    "cu_seqlens_k": "*i32",
    "cu_seqlens_k_prefill": "*i32",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_q_decode": "*i32",
    "decoder_batch_ids": "*i32",
    "decoder_chunk_size": "*i32",
    "decoder_num_tiles": "*i32",
    "decoder_tile_ids": "*i32",
    "indices": "*i32",
    "max_lens": "*i32",
    "num_tiles": "*i32",
    "offsets": "*i32",
    "packed_cache": "*u8",
    "position_ids": "*i32",
    "seq_lens_decoder": "*i32",
    "seq_lens_encoder": "*i32",
    "seq_lens_this_time": "*i32",
    "sinks": "*fp32",
    "slot_mapping": "*i64",
    "swa_indices": "*i32",
    "tile_ids": "*i32",
    "tile_starts": "*i32",
    "lse": "*fp32",
    "partial_max": "*fp32",
    "prefix_lse": "*fp32",
    "suffix_lse": "*fp32",
    "partial_sum": "*fp32",
    "partial_out": "*fp32",
}
MODEL_POINTERS = (
    *("q", "k", "v", "latent_cache", "out", "compressed_kv", "k_pe", "full_compressed_kv", "full_k_pe"),
    *("weight", "k_b_proj_weight", "v_b_proj_weight", "projection"),
    *("prefix_out", "suffix_out", "prefill_out", "decode_out", "merged", "query", "packed_query"),
    *("qkv", "k_cache", "v_cache"),
    *("q_pe_raw", "k_pe_raw", "cos_sin_cache", "q_pe"),
)
ITEM_SIZES = {"bf16": 2, "fp32": 4}


def type_of(name, dtype):
    """The type of a kernel's argument: constexprs are in capitals, numbers are integers but for the scale."""
    if name.isupper():
        return "constexpr"
    if name in MODEL_POINTERS:
        return f"*{dtype}"
    return POINTERS.get(name, "fp32" if name == "softmax_scale" else "i32")


def compiled(kernel, dtype, constants, **options):
    """What is known of a kernel after compiling it; tensors and strides are multiples of 16."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: type_of(name, dtype) for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tensor_cores = any(name in binary.asm["ptx"] for name in ("wgmma.mma_async", "mma.sync"))
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "constants": constants,
        "shared": binary.metadata.shared,
        "tensor_cores": tensor_cores,
        "cubin_bytes": len(binary.asm["cubin"]),
    }


def main(rank, rope, dtype, heads):
    """Every kernel of one latent width."""
    widths = {"KV_LORA_RANK": rank, "QK_ROPE_HEAD_DIM": rope}
    for count in heads:
        tile = mla_decode.tile_for(count, rank + rope, ITEM_SIZES[dtype])
        constants = {**widths, "BLOCK_H": tile.heads, "BLOCK_N": tile.keys}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield compiled(mla_decode._attend_split, dtype, constants, **options)
    constants = {
        "KV_LORA_RANK": rank,
        "BLOCK_C": min(rank, mla_decode.COMBINE_COLUMNS),
        "BLOCK_N": tile.keys,
        "BLOCK_S": mla_decode.COMBINE_SPLITS,
    }
    yield compiled(mla_decode._combine_splits, dtype, constants)
    constants = {**widths, "BLOCK_TOKENS": latent_cache_write.BLOCK_TOKENS}
    yield compiled(latent_cache_write._write_rows, dtype, constants)
    for is_ue8m0 in (False, True):
        constants = {
            **widths,
            "IS_UE8M0": is_ue8m0,
            "TILE": packed_cache_write.TILE,
            "BLOCK_TILES": triton.next_power_of_2(rank // packed_cache_write.TILE),
            "BLOCK_D": triton.next_power_of_2(rope),
            "BLOCK_TOKENS": packed_cache_write.BLOCK_TOKENS,
        }
        # Whatever the others' dtype: what is packed is bf16.
        yield compiled(packed_cache_write._pack_rows, "bf16", constants)
    yield from sparse_kernels(widths, dtype, heads)
    constants = {
        **widths,
        "BLOCK_R": triton.next_power_of_2(rank),
        "BLOCK_D": triton.next_power_of_2(rope),
        "BLOCK_KEYS": read_cache_interleave.BLOCK_KEYS,
    }
    yield compiled(read_cache_interleave._gather_keys, dtype, constants)
    # The copies know no latent width: one width of heads a latent width will do.
    constants = {"V_HEAD_DIM": 2 * rope, "BLOCK_H": 16, "BLOCK_V": triton.next_power_of_2(2 * rope)}
    for in_place in (False, True):
        yield compiled(decode_rows._merge_tokens, dtype, {**constants, "IN_PLACE": in_place})
    for inputs_first in (True, False):
        constants = {
            "KV_LORA_RANK": rank,
            "QK_NOPE_HEAD_DIM": 3 * rope,
            "V_HEAD_DIM": 2 * rope,
            "INPUTS_FIRST": inputs_first,
            "BLOCK_F": kv_b_split.BLOCK_FEATURES,
            "BLOCK_R": kv_b_split.BLOCK_RANK,
        }
        yield compiled(kv_b_split._split_heads, dtype, constants)
    constants = {"WIDTH": 3 * rope, "BLOCK_H": 16, "BLOCK_W": triton.next_power_of_2(3 * rope)}
    yield compiled(decode_rows._gather_tokens, dtype, constants)
    yield compiled(decode_rows._list_tokens, dtype, {"BLOCK_TOKENS": decode_rows.BLOCK_TOKENS})
    yield compiled(decode_rows._count_tokens, dtype, {"BLOCK_SLOTS": decode_rows.BLOCK_SLOTS})
    # States of heads of latents, and of heads whose width is no power of two.
    for width in (rank, 3 * rope):
        block_rows, block_v = merge_states.tile_for(width)
        constants = {"V_HEAD_DIM": width, "BLOCK_ROWS": block_rows, "BLOCK_V": block_v}
        yield compiled(merge_states._merge_rows, dtype, constants)
    yield from metadata_kernels(dtype)
    yield from prefill_kernels(dtype)
    yield from rope_kernels(rope, dtype)
    yield from gqa_kernels(dtype)


def prefill_kernels(dtype):
    """Prefill attention as wide as DeepSeek-V3, MiniCPM3 and GLM-4.7-Flash, and the first two padded."""
    for nope, rope, value in ((128, 64, 128), (64, 32, 64), (192, 64, 256), (128, 64, 192), (64, 32, 96)):
        columns, v_columns = triton.next_power_of_2(nope), triton.next_power_of_2(value)
        tile = prefill_attention.tile_for(columns + rope, v_columns, ITEM_SIZES[dtype])
        constants = {
            "QK_NOPE_HEAD_DIM": nope,
            "QK_ROPE_HEAD_DIM": rope,
            "V_HEAD_DIM": value,
            "NOPE_COLUMNS": columns,
            "ROPE_COLUMNS": rope,
            "V_COLUMNS": v_columns,
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "BLOCK_B": prefill_attention.ROWS_AT_A_TIME,
        }
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield compiled(prefill_attention._attend_prefill, dtype, constants, **options)


def gqa_kernels(dtype):
    """Attention in groups of the widths 128 and 64, 192 and 128 and 96 and 64; the write in both pairings."""
    for head_dim, value, has_sinks in ((128, 64, False), (192, 128, True), (96, 64, True)):
        low, high, v_columns = gqa_step.padded_columns(head_dim, value)
        tile = gqa_step.tile_for(low + high + v_columns, ITEM_SIZES[dtype])
        constants = {
            "HEAD_DIM": head_dim,
            "V_HEAD_DIM": value,
            "LOW_COLUMNS": low,
            "HIGH_COLUMNS": high,
            "V_COLUMNS": v_columns,
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "BLOCK_B": gqa_step.ROWS_AT_A_TIME,
            "HAS_SINKS": has_sinks,
        }
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield compiled(gqa_step._attend_rows, dtype, constants, **options)
        merged = {
            name: constants[name] for name in ("V_HEAD_DIM", "V_COLUMNS", "BLOCK_M", "BLOCK_N", "HAS_SINKS")
        }
        merged["BLOCK_S"] = gqa_step.COMBINE_SPLITS
        yield compiled(gqa_step._combine_splits, dtype, merged)
        for is_neox in (False, True):
            constants = {
                "HEAD_DIM": head_dim,
                "V_HEAD_DIM": value,
                "ROPE_HEAD_DIM": 64,
                "BLOCK_H": 16,
                "BLOCK_PAIRS": 32,
                "BLOCK_REST": triton.next_power_of_2(head_dim - 64),
                "BLOCK_V": value,
                "IS_NEOX": is_neox,
                "HAS_TABLE": has_sinks,
            }
            yield compiled(gqa_cache_write._write_heads, dtype, constants)
    for inputs_first in (True, False):
        tile = {"BLOCK_F": qkv_split.BLOCK_FEATURES, "BLOCK_I": qkv_split.BLOCK_INPUTS}
        yield compiled(qkv_split._gather_features, dtype, {"INPUTS_FIRST": inputs_first, **tile})
    for number in range(3):
        constants = {"LIST": number, "BLOCK_SLOTS": launch_buffers.BLOCK_SLOTS}
        yield compiled(launch_buffers._count_tiles, dtype, constants)
        constants = {"LIST": number, "BLOCK_TILES": launch_buffers.BLOCK_TILES}
        yield compiled(launch_buffers._write_tiles, dtype, constants)


def sparse_kernels(widths, dtype, heads):
    """Attention over lists, of each tile; over those of the packed cache in bf16 whatever the dtype."""
    rank, rope = widths["KV_LORA_RANK"], widths["QK_ROPE_HEAD_DIM"]
    for count in heads:
        tile = sparse_decode.tile_for(count, rank)
        constants = {**widths, "TILE": sparse_decode.TILE, **tile_constants(tile)}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield compiled(sparse_decode._attend_list, "bf16", constants, **options)
    constants = {
        "KV_LORA_RANK": rank,
        "BLOCK_C": min(rank, sparse_decode.COMBINE_COLUMNS),
        "BLOCK_S": sparse_decode.COMBINE_SPLITS,
    }
    yield compiled(sparse_decode._combine_lists, "bf16", constants)
    for count in heads:
        tile = sparse_prefill.tile_for(count, rank + rope, ITEM_SIZES[dtype])
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        constants = {**widths, **tile_constants(tile)}
        yield compiled(sparse_prefill._attend_step, dtype, constants, **options)


def tile_constants(tile):
    """What a tile is to a kernel over lists."""
    entries = sparse_decode.BLOCK_ENTRIES
    return {"BLOCK_H": tile.heads, "BLOCK_N": tile.keys, "BLOCK_ENTRIES": entries}


def rope_kernels(width, dtype):
    """Rotation in both pairings, rounded once and often, and the copy where nothing is rotated."""
    for is_neox, has_table, rounds_products in (
        (False, True, False),
        (False, True, True),
        (True, True, False),
        (True, True, True),
        (False, False, False),
    ):
        constants = {
            "ROPE_HEAD_DIM": width,
            "BLOCK_H": rotation.BLOCK_ELEMENTS // width,
            "BLOCK_PAIRS": width // 2,
            "IS_NEOX": is_neox,
            "HAS_TABLE": has_table,
            "ROUNDS_PRODUCTS": rounds_products,
        }
        yield compiled(rotation._rotate_tokens, dtype, constants)


def metadata_kernels(dtype):
    """The kernels of step metadata, which depend on neither width nor dtype."""
    yield compiled(padding_offset._find_slots, dtype, {"BLOCK_TOKENS": padding_offset.BLOCK_TOKENS})
    yield compiled(padding_offset._sum_lengths, dtype, {"BLOCK_SLOTS": padding_offset.BLOCK_SLOTS})
    yield compiled(position_ids._place_tokens, dtype, {"BLOCK_TOKENS": position_ids.BLOCK_TOKENS})
    yield compiled(slot_mapping._map_tokens, dtype, {"BLOCK_TOKENS": slot_mapping.BLOCK_TOKENS})
    yield compiled(step_plan._list_tiles, dtype, {"BLOCK_TILES": step_plan.BLOCK_TILES})
    tile = {"BLOCK_TOKENS": swa_indices.BLOCK_TOKENS, "BLOCK_INDICES": swa_indices.BLOCK_INDICES}
    yield compiled(swa_indices._list_keys, dtype, tile)
    yield compiled(step_plan._plan, dtype, {"BLOCK_SLOTS": step_plan.BLOCK_SLOTS})


if __name__ == "__main__":
    latent_rank, rope_dim, model_dtype, *head_counts = sys.argv[1:]
    for result in main(int(latent_rank), int(rope_dim), model_dtype, [int(count) for count in head_counts]):
        print(json.dumps(result), flush=True)
