"""Compiles every Triton kernel for an NVIDIA GPU of compute capability 9.0, which need not be there.

Run by `test_compile.py` in a process of its own, without TRITON_INTERPRET: one JSON object a compilation.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.paths.triton import latent_cache_write, mla_decode

POINTERS = {
    "batch_id_per_token": "*i32",
    "block_tables": "*i32",
    "cu_seqlens_q": "*i32",
    "seq_lens_decoder": "*i32",
    "seq_lens_encoder": "*i32",
    "slot_mapping": "*i64",
    "lse": "*fp32",
    "partial_max": "*fp32",
    "partial_sum": "*fp32",
    "partial_out": "*fp32",
}
MODEL_POINTERS = ("q", "latent_cache", "out", "compressed_kv", "k_pe")
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


if __name__ == "__main__":
    latent_rank, rope_dim, model_dtype, *head_counts = sys.argv[1:]
    for result in main(int(latent_rank), int(rope_dim), model_dtype, [int(count) for count in head_counts]):
        print(json.dumps(result), flush=True)
