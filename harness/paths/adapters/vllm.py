"""vLLM's Triton kernels of MLA: decode attention and the merge of attention states, from the wheel's files.

Source: vllm/v1/attention/ops/{triton_decode_attention,triton_merge_attn_states}.py of the version in
`SEEN_WORKING`, called as vllm/v1/attention/backends/mla/triton_mla.py (`TritonMLAImpl.forward_mqa`) and
vllm/model_executor/layers/attention/mla_attention.py call them: scales of keys and values 1, no cap, the
number of splits from the longest row and the device.

| path | calls | for |
|------|-------|-----|
| `mla_decode` | `decode_attention_fwd(is_mla=True)` | tokens of decode and draft rows, padding; a row each |
| `merge_states` | `merge_attn_states` | every token and head |

Conventions
    layouts: the paged cache as [nb, bs, 1, R + D]; V is its first R columns. A row of the call has its own
        line of the block table, whose tail is not read, and its own number of keys: drafts are causal so.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: natural; of decode in the dtype of the tensor that is given, float32 here and the queries' dtype in
        the engine.
    tokens: padding tokens are rows without keys, as in a CUDA graph of decode rows. Tokens of prefill rows
        are left out, and the contract's 0 and -inf are written here.
    dtypes, blocks: those that `TritonMLABackend` says it has: bf16 and fp16, multiples of 16 tokens.
    states: [tokens, heads, V], and LSEs as [heads, tokens], views by their strides. Both outputs have one
        stride for heads and none for tokens, so they are made dense here; a merged one with gaps is copied.
        Of an empty state the output is read: the engine makes it 0 with an LSE of -inf
        (`neutralize_empty_context_partials`), and so it is made here; +inf is left as it is.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cases import Case
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths.adapters._loading import Library
from harness.paths.adapters._rows import attend_at, decode_and_padding_rows, rows_at
from harness.paths.adapters._states import dense_output, merge_workspace, plan_states, supports_states

BLOCK_MULTIPLE = 16
"""`TritonMLABackend.get_supported_kernel_block_sizes`."""

KEYS_OF_SPLIT, SPLITS_OF_SM = 512, 2
"""A split's keys at least, and splits at most for each multiprocessor: `_compute_num_kv_splits`."""

H100_MULTIPROCESSORS = 132
"""What a device is taken to have where there is no GPU."""

# Which lane this worker is of.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()

LIBRARY = Library("vllm")
KERNELS = LIBRARY.load(
    {
        "v1.attention.ops.triton_decode_attention": ("decode_attention_fwd",),
        "v1.attention.ops.triton_merge_attn_states": ("merge_attn_states",),
    },
    {
        "platforms": {
            "current_platform": SimpleNamespace(is_rocm=lambda: False, fp8_dtype=lambda: torch.float8_e4m3fn)
        },
        "triton_utils": {"tl": tl, "triton": triton},
    },
)


# ---- decode --------------------------------------------------------------------------------------


def supports_decode(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        if layer.dtype == "fp32":
            return "vLLM's Triton MLA backend is for bf16 and fp16, got fp32"
        if layer.block_size % BLOCK_MULTIPLE:
            return f"vLLM's Triton MLA backend takes blocks of multiples of 16 tokens, got {layer.block_size}"
    return None


def plan_decode(inputs: Tensors) -> Tensors:
    """Decode and padding tokens as rows: their numbers of keys, block tables and scale of keys."""
    rows, seq_lens, block_table = decode_and_padding_rows(inputs)
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    return {"rows": rows, "seq_lens": seq_lens, "block_table": block_table, "one": one}


def num_kv_splits(longest: int) -> int:
    """As `_compute_num_kv_splits` counts them for a step whose longest row has so many keys."""
    cores = H100_MULTIPROCESSORS
    if not IS_INTERPRETED:
        cores = torch.cuda.get_device_properties("cuda").multi_processor_count
    ideal = 1 << (max(1, longest // KEYS_OF_SPLIT) - 1).bit_length()
    return min(ideal, cores * SPLITS_OF_SM)


def decode_workspace(case: Case) -> Workspace:
    """Output and LSE of every split, side by side."""
    layer, rows = case.layers[0], case.steps[0]
    longest = max((row.length for row in rows if row.new), default=0)
    splits = case.options.splits or num_kv_splits(longest)
    shape = (sum(row.new for row in rows), layer.num_attention_heads, splits, layer.kv_lora_rank + 1)
    return {"attn_logits": (shape, "float32")}


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`decode_attention_fwd` on the harness's tensors."""
    rows, one = workspace["rows"], workspace["one"]
    keys = inputs["latent_cache"].transpose(1, 2)

    def attend(out: Tensor, lse: Tensor) -> None:
        partial = workspace["attn_logits"][: len(rows)]
        KERNELS.decode_attention_fwd(
            rows_at(inputs["q"], rows),
            keys,
            keys[..., : out.shape[2]],
            out,
            lse,
            workspace["block_table"],
            workspace["seq_lens"],
            partial,
            partial.shape[2],
            inputs["softmax_scale"],
            keys.shape[1],
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )

    attend_at(rows, outputs, attend)


# ---- merge ---------------------------------------------------------------------------------------


def run_merge(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`merge_attn_states` on states as the library's attention leaves them."""
    merged = dense_output(outputs, workspace)
    KERNELS.merge_attn_states(
        merged,
        workspace["prefix_out"],
        workspace["prefix_lse"].T,
        workspace["suffix_out"],
        workspace["suffix_lse"].T,
        outputs["lse"].T,
    )
    if merged is not outputs["out"]:
        outputs["out"].copy_(merged)


ABOUT: dict[str, Any] = {
    "lanes": ("interpreted", "compiled"),
    "libraries": LIBRARY.versions,
    "unavailable": KERNELS.unavailable,
}
"""What all paths of the library have in common."""

PATHS = (
    KernelPath(
        name="adapters/vllm/mla_decode",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        workspace=decode_workspace,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/vllm/merge_states",
        operator="merge_states",
        supports=supports_states,
        run=run_merge,
        plan=plan_states,
        workspace=merge_workspace,
        batch_invariant=True,
        **ABOUT,
    ),
)
