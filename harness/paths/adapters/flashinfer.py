"""FlashInfer's CUDA kernels: MLA decode from a paged cache, ragged prefill, the merge of attention states.

Source: flashinfer.mla, flashinfer.prefill and flashinfer.cascade of the wheel flashinfer-python 0.7.2.post1,
called as their documentation says, a step's metadata in `plan`. The wheel brings CUDA sources: the first
launch of a kernel, dtype and width compiles it with nvcc and ninja and keeps it under ~/.cache/flashinfer.
That, and importing the package, happens in `plan` and counts as compiling.

| path | calls | for |
|------|-------|-----|
| `mla_decode@fa2`, `@fa3` | `BatchMLAPagedAttentionWrapper` | decode and draft rows as they are, padding |
| `prefill_attention@fa2`, `@fa3` | `BatchPrefillWithRaggedKVCacheWrapper` | prefill rows, cached keys first |
| `merge_states` | `merge_state` | every token and head |

`@fa3` is the kernel for Hopper, `@fa2` that for all others, which Hopper runs too.

Conventions
    layouts: the paged cache as [pages, page_size, R + D], and queries as [tokens, heads, R + D]: the library
        takes latent and rope part as two views of each and reads their strides. Pages are named by lists
        (`kv_indices`, those of a row from its `kv_indptr` on): block tables are read here, their tails not at
        all. Keys and values of prefill are [keys, heads, width] with strides; `@fa2` writes its output as if
        dense, so one with gaps is copied. All metadata is int32.
    claims: bf16 and fp16, any number of heads and page size. Decode takes latents of 128, 256 or 512 columns
        and rope parts of a multiple of 64; prefill keys and values of the widths that the library builds
        ahead of time; the merge 64, 128, 256 or 512 columns, and as many heads as a block of threads holds.
    mask: causal to the bottom right. Where all rows have one new token there is none to ask for.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: [tokens, heads], float32. Both attentions compute it to base 2 and give the natural one if asked
        (`return_lse_base_on_e`, `lse_base="ln"`). `merge_state` has base 2 alone: its inputs are converted in
        `plan`, what it gives while it runs. It depends on their difference alone, so they are first taken
        relative to the larger one: a large LSE would lose digits to the conversion, which is not its doing.
    rows without keys: 0 and -inf. Padding tokens of decode are given as rows of one token without keys.
        Other tokens that are not of a path's rows are left out, and the contract's 0 and -inf written here.
    states: [tokens, heads, V] and [tokens, heads], dense. Of an empty one the library's attention says 0 and
        -inf, and so it is made here; +inf is what FlashAttention says. What `merge_state` gives it allocates.
    scratch: 128 MiB of floats, as the library recommends, and its own 8 MiB of integers, which hold the plan.
        Each plan has its own; the floats are poisoned.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.layers import Layer
from harness.buffers import NAN_BYTE
from harness.kernel_path import KernelPath, Tensors
from harness.paths.adapters._loading import Library
from harness.paths.adapters._rows import attend_at, decode_slots, prefix_sum, rows_at, spans
from harness.paths.adapters._states import plan_states
from harness.watchdog import CLOCK

LIBRARY = Library("flashinfer", "flashinfer-python")

NEEDED = {
    "tvm_ffi": "apache-tvm-ffi",
    "filelock": "filelock",
    "jinja2": "jinja2",
    "packaging": "packaging",
    "pynvml": "nvidia-ml-py",
    "requests": "requests",
    "tqdm": "tqdm",
}
"""Modules without which the package cannot be imported, by the distributions that bring them."""

MODULES = ("mla", "prefill", "cascade")
"""Of the package, those that are called."""

FLOAT_WORKSPACE_BYTES = 128 << 20
"""What the wrappers' documentation recommends."""

LATENTS, ROPE_MULTIPLE = (128, 256, 512), 64
"""Widths that both MLA kernels have: `_validate_generated_fa_plan`."""

HEAD_WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Widths of keys and values that the library's build ahead of time has, `flashinfer/aot.py`."""

MERGED_WIDTHS, MAX_THREADS = (64, 128, 256, 512), 1024
"""Widths of `DISPATCH_HEAD_DIM`, utils.cuh; threads of a block, which has all heads of a token."""

TILE = 64
"""Query rows, each a head of a token, that a block of the MLA kernel has; two blocks share larger rows."""

KEYS_OF_TILE = ((221696, 64), (147968, 32), (0, 16))
"""Bytes of shared memory that a multiprocessor has at least, and keys of a tile of `@fa2` then: mla.cuh."""

HOPPER = (9, 0)
"""What a device is taken to be where there is no GPU."""


def unavailable() -> str | None:
    """None, or what is missing. Nothing is imported: that takes seconds and asks the GPU."""
    folder = LIBRARY.folder
    if folder is None:
        return LIBRARY.lacking
    for module in MODULES:
        if not ((folder / module).is_dir() or (folder / f"{module}.py").exists()):
            return f"flashinfer has no module {module} in this version"
    for module, distribution in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            return f"flashinfer needs {module}, which is not installed: pip install {distribution}"
    return None


def imported(module: str) -> ModuleType:
    """A module of the package."""
    return importlib.import_module(f"flashinfer.{module}")


def float_workspace(device: torch.device) -> Tensor:
    """[FLOAT_WORKSPACE_BYTES] uint8, NaN whatever it is read as."""
    return torch.full((FLOAT_WORKSPACE_BYTES,), NAN_BYTE, dtype=torch.uint8, device=device)


def is_half(layer: Layer) -> bool:
    """Whether the layer's dtype has 16 bits, as all of the library's have that are called here."""
    return layer.dtype in ("bf16", "fp16")


def refused_device(backend: str) -> str | None:
    """None, or that a kernel is not for this GPU."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else HOPPER
    if backend == "fa3" and capability != HOPPER:
        return f"FlashInfer's fa3 is for compute capability 9.0, got {capability[0]}.{capability[1]}"
    return None


# ---- decode --------------------------------------------------------------------------------------


def supports_decode(backend: str, case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        if not is_half(layer):
            return f"FlashInfer's MLA kernels are for bf16 and fp16, got {layer.dtype}"
        if layer.kv_lora_rank not in LATENTS or layer.qk_rope_head_dim % ROPE_MULTIPLE:
            return (
                "FlashInfer's MLA kernels take latents of 128, 256 or 512 columns and rope parts of a "
                f"multiple of 64, got {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
            )
        if cuts_a_token(case, layer.num_attention_heads, keys_of_tile(backend)):
            return (
                "FlashInfer refuses a causal batch where a tile of query rows ends within a token whose "
                "newest key begins a tile of keys: its kernel would leave that key out"
            )
    return refused_device(backend)


def keys_of_tile(backend: str) -> int:
    """Keys that a block of the MLA kernel reads at a time."""
    if backend == "fa3" or not torch.cuda.is_available():
        return KEYS_OF_TILE[0][1]
    shared: int = torch.cuda.get_device_properties("cuda").shared_memory_per_multiprocessor
    return next(keys for least, keys in KEYS_OF_TILE if shared >= least)


def cuts_a_token(case: Case, heads: int, keys: int) -> bool:
    """What the library looks for before it plans: `_validate_fa_causal_tile_bound`."""
    step = case.steps[0]
    rows = [(row.new, row.length) for row in step if row.is_decode and row.new]
    if max((new for new, _ in rows), default=0) < 2:
        return False
    padding = sum(row.new for row in step if not row.is_slot)
    mean = (sum(new for new, _ in rows) + padding) * heads // (len(rows) + padding)
    tile = 2 * TILE if mean > TILE else TILE
    for new, length in rows:
        for end in range(tile, new * heads, tile):
            token, begun = divmod(end, heads)
            if begun and (length - new + token) % keys == 0:
                return True
    return False


def plan_decode(backend: str, inputs: Tensors) -> Tensors:
    """Decode and draft rows, then padding: their tokens, and the library's plan of them."""
    cache, rank = inputs["latent_cache"], inputs["kv_lora_rank"]
    slots, page_size = decode_slots(inputs), cache.shape[2]
    new = inputs["cu_seqlens_q"].diff()[slots].long()
    padding = (inputs["batch_id_per_token"] < 0).nonzero().flatten()
    tokens = torch.cat([spans(inputs["cu_seqlens_q"][slots], new), padding])
    if len(tokens) == 0:
        return {"tokens": tokens}
    lengths = torch.cat([inputs["seq_lens_decoder"][slots].long() + new, torch.zeros_like(padding)])
    pages = (lengths + page_size - 1) // page_size
    of_slots = pages[: len(slots)]
    slot, number = torch.repeat_interleave(slots, of_slots), spans(torch.zeros_like(of_slots), of_slots)
    with CLOCK.compiling():
        mla = imported("mla")
        wrapper = mla.BatchMLAPagedAttentionWrapper(float_workspace(cache.device), backend=backend)
        wrapper.plan(
            metadata=mla.MLAPlanMetadata.csr(
                qo_indptr=prefix_sum(torch.cat([new, torch.ones_like(padding)])),
                kv_indptr=prefix_sum(pages),
                kv_indices=inputs["block_tables"][slot, number].int(),
                kv_len_arr=lengths.int(),
            ),
            num_heads=inputs["q"].shape[1],
            head_dim_ckv=rank,
            head_dim_kpe=cache.shape[3] - rank,
            page_size=page_size,
            causal=bool((new > 1).any()),
            sm_scale=inputs["softmax_scale"],
            q_data_type=inputs["q"].dtype,
            kv_data_type=cache.dtype,
            lse_mode="basee",
        )
    return {"tokens": tokens, "wrapper": wrapper}


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`BatchMLAPagedAttentionWrapper.run` on the harness's tensors."""
    tokens = workspace["tokens"]

    def attend(out: Tensor, lse: Tensor) -> None:
        workspace["wrapper"].run(
            query=rows_at(inputs["q"], tokens),
            kv_cache=inputs["latent_cache"].squeeze(1),
            out=out,
            lse=lse,
            return_lse=True,
            return_lse_base_on_e=True,
        )

    attend_at(tokens, outputs, attend)


# ---- prefill -------------------------------------------------------------------------------------


def supports_prefill(backend: str, case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        if not is_half(layer):
            return f"FlashInfer's prefill kernels are for bf16 and fp16, got {layer.dtype}"
        if (layer.qk_head_dim, layer.v_head_dim) not in HEAD_WIDTHS:
            return (
                "FlashInfer's prefill kernels take keys and values of 64 and 64, 128 and 128, 192 and 128 or "
                f"256 and 256 columns, got {layer.qk_head_dim} and {layer.v_head_dim}"
            )
    return refused_device(backend)


def plan_prefill(backend: str, inputs: Tensors) -> Tensors:
    """Prefill rows: their tokens, and the library's plan of them."""
    query, value = inputs["query"], inputs["value"]
    lengths = inputs["cu_seqlens_k_prefill"].diff()
    slots = (lengths > 0).nonzero().flatten()
    new = inputs["cu_seqlens_q"].diff()[slots]
    tokens = spans(inputs["cu_seqlens_q"][slots], new)
    if len(tokens) == 0:
        return {"tokens": tokens}
    with CLOCK.compiling():
        wrapper = imported("prefill").BatchPrefillWithRaggedKVCacheWrapper(
            float_workspace(query.device), kv_layout="NHD", backend=backend
        )
        wrapper.plan(
            qo_indptr=prefix_sum(new),
            kv_indptr=prefix_sum(lengths[slots]),
            num_qo_heads=query.shape[1],
            num_kv_heads=value.shape[1],
            head_dim_qk=query.shape[2],
            head_dim_vo=value.shape[2],
            causal=True,
            sm_scale=inputs["softmax_scale"],
            q_data_type=query.dtype,
            kv_data_type=value.dtype,
        )
    return {"tokens": tokens, "wrapper": wrapper}


def run_prefill(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`BatchPrefillWithRaggedKVCacheWrapper.run` on the harness's tensors."""
    tokens = workspace["tokens"]

    def attend(out: Tensor, lse: Tensor) -> None:
        dense = out if out.is_contiguous() else out.new_empty(out.shape)
        workspace["wrapper"].run(
            rows_at(inputs["query"], tokens),
            inputs["key"],
            inputs["value"],
            out=dense,
            lse=lse,
            return_lse=True,
            lse_base="ln",
        )
        if dense is not out:
            out.copy_(dense)

    attend_at(tokens, outputs, attend)


# ---- merge ---------------------------------------------------------------------------------------


def supports_merge(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        if not is_half(layer):
            return f"FlashInfer's merge_state is for bf16 and fp16, got {layer.dtype}"
        width, heads = layer.v_head_dim, layer.num_attention_heads
        if width not in MERGED_WIDTHS:
            return f"FlashInfer's merge_state takes outputs of 64, 128, 256 or 512 columns, got {width}"
        # A thread has 8 columns of a head, more where that would take over 32 threads.
        most = MAX_THREADS // min(width // 8, 32)
        if heads > most:
            return f"FlashInfer's merge_state takes at most {most} heads of {width} columns, got {heads}"
    return None


def plan_merge(inputs: Tensors) -> Tensors:
    """Both states, dense, their LSEs to base 2 below the larger one, -inf where empty; that one, [Tp, H]."""
    states = plan_states(inputs)
    lses = [states[part] for part in ("prefix_lse", "suffix_lse")]
    prefix, suffix = (lse.masked_fill(lse.isinf(), -torch.inf) for lse in lses)
    largest = torch.maximum(prefix, suffix)
    largest.masked_fill_(largest.isinf(), 0)
    with CLOCK.compiling():
        cascade = imported("cascade")
        cascade.get_cascade_module()
    return {
        **states,
        "prefix_lse": (prefix - largest) * math.log2(math.e),
        "suffix_lse": (suffix - largest) * math.log2(math.e),
        "largest": largest,
        "merge_state": cascade.merge_state,
    }


def run_merge(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`merge_state` on states as the library's attention leaves them. It allocates what it returns."""
    if len(outputs["out"]) == 0:
        return
    states = [workspace[name] for name in ("prefix_out", "prefix_lse", "suffix_out", "suffix_lse")]
    merged, lse = workspace["merge_state"](*states)
    outputs["out"].copy_(merged)
    torch.add(workspace["largest"], lse, alpha=math.log(2), out=outputs["lse"])


ABOUT: dict[str, Any] = {
    "lanes": ("compiled",),
    "libraries": LIBRARY.versions,
    "unavailable": unavailable(),
}
"""What all paths of the library have in common."""


def _attention(
    operator: str,
    backend: str,
    supports: Callable[[str, Case], str | None],
    plan: Callable[[str, Tensors], Tensors],
    run: Callable[[Tensors, Tensors, Tensors], None],
) -> KernelPath:
    return KernelPath(
        name=f"adapters/flashinfer/{operator}@{backend}",
        operator=operator,
        supports=partial(supports, backend),
        run=run,
        plan=partial(plan, backend),
        **ABOUT,
    )


PATHS = (
    *(_attention("mla_decode", name, supports_decode, plan_decode, run_decode) for name in ("fa2", "fa3")),
    *(
        _attention("prefill_attention", name, supports_prefill, plan_prefill, run_prefill)
        for name in ("fa2", "fa3")
    ),
    KernelPath(
        name="adapters/flashinfer/merge_states",
        operator="merge_states",
        supports=supports_merge,
        run=run_merge,
        plan=plan_merge,
        batch_invariant=True,
        allocates=True,
        **ABOUT,
    ),
)
