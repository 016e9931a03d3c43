"""FastDeploy's Triton kernels of MLA: decode attention, cache write and fused read, from a checkout's files.

Source: fastdeploy/model_executor/layers/attention/{triton_ops/{unified_extend_attention,decode_attention,
mla_cache_kernel},mla_attention_backend}.py below the folder that the environment variable FASTDEPLOY_SOURCE
names, unchanged. The files are written for Paddle's tensors. Of Paddle they get a stand-in: torch tensors
with `strides` and `astype`, and a few functions on them. `enable_compat_on_triton_kernel`, which lets Triton
take Paddle's tensors, is left out. Functions are called by the names of their arguments, those that this
version of them has; a file that is missing, or asks for more, makes its own paths unavailable alone.

| path | calls | for |
|------|-------|-----|
| `mla_decode` | `build_kv_indices_from_block_tables`, `decode_attention_fwd` | decode rows |
| `latent_cache_write` | `mla_write_cache_triton` | every token |
| `read_cache_interleave` | `fused_read_cache_and_interleave_triton` | every row, prefill rows' keys kept |
| `mla_step` | the first two | our step around them |

Conventions
    layouts: the paged cache as it is; V is its first R columns. The library finds keys by lists of their
        rows, int32, which it makes of the block tables. Block tables, and new rows that the fused read takes,
        are dense for it: views are copied here. Without block tables the fused read is called all the same.
    rows: a decode row has one query; drafts are not claimed. As in the engine's decode-only steps, padding
        tokens are rows without keys, for which the library writes what it likes. Tokens of prefill rows are
        left out, and the contract's 0 is written here, as the engine's mixed steps do.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: not given: each split's stays in a buffer of the engine's.
    cu_seqlens_k: of the fused read, over cached and new keys of every slot, of decode rows too.
    slots: int64, a negative one is not to be written.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace
from harness.paths._mla_step import path_of
from harness.paths.adapters._loading import Kernels, Library, empty_module, restored_modules
from harness.paths.adapters._rows import decode_and_padding_rows, prefix_sum, spans, split_results
from harness.paths.triton import mla_step as step

VARIABLE = "FASTDEPLOY_SOURCE"
"""Environment variable with the path of a checkout of PaddlePaddle/FastDeploy."""

MAX_KV_SPLITS = 32
"""As TritonMLAAttentionBackend sets it."""

# Which lane this worker is of: the files allocate on Paddle's current device.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"


# ---- Paddle, as far as the files use it ----------------------------------------------------------


class PaddleTensor(torch.Tensor):
    """A torch tensor with what the files ask of Paddle's beyond."""

    @property
    def strides(self) -> list[int]:
        """Of each axis, in elements."""
        return list(self.stride())

    def astype(self, dtype: str) -> Tensor:
        """Converted to a dtype by name."""
        return self.to(getattr(torch, dtype))


def paddle_tensor(values: Tensor) -> Tensor:
    """The same memory as Paddle's tensor."""
    return values.as_subclass(PaddleTensor)


def _made_by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, called as Paddle's: (shape or length, dtype or its name)."""

    def made(shape: Sequence[int] | int, dtype: torch.dtype | str) -> Tensor:
        known = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return paddle_tensor(function(shape, dtype=known, device=DEVICE))

    return made


PADDLE: Mapping[str, Mapping[str, object]] = {
    "paddle": {
        "Tensor": PaddleTensor,
        "bfloat16": torch.bfloat16,
        "enable_compat": lambda **_: None,
        "empty": _made_by(torch.empty),
        "zeros": _made_by(torch.zeros),
        "arange": _made_by(torch.arange),
        "concat": torch.cat,
        "cumsum": lambda values: torch.cumsum(values, 0),
        "sum": torch.sum,
    },
    "paddle.nn.functional.flash_attention": {"flash_attn_unpadded": None, "flash_attention_v3_varlen": None},
    "paddleformers.utils.log": {"logger": SimpleNamespace()},
}
"""Names by module. Attention of prefill rows is imported beside the fused read and not called."""


@contextmanager
def _paddle() -> Iterator[None]:
    """The stand-ins in `sys.modules`, whether Paddle is installed or not."""
    with restored_modules("paddle"), restored_modules("paddleformers"):
        for module, names in PADDLE.items():
            vars(empty_module(module)).update(names)
        yield


# ---- the checkout --------------------------------------------------------------------------------

ATTENTION = "model_executor.layers.attention"

INDICES = f"{ATTENTION}.triton_ops.unified_extend_attention"
DECODE = f"{ATTENTION}.triton_ops.decode_attention"
WRITE = f"{ATTENTION}.triton_ops.mla_cache_kernel"
READ = f"{ATTENTION}.mla_attention_backend"

ARGUMENTS = {
    "build_kv_indices_from_block_tables": ("block_tables", "seq_lens", "block_size", "bs"),
    "compute_num_kv_splits": ("seq_lens", "num_seq", "max_kv_splits"),
    "decode_attention_fwd": (
        "q",
        "k_buffer",
        "v_buffer",
        "o",
        "kv_indptr",
        "kv_indices",
        "attn_logits",
        "attn_lse",
        "num_kv_splits",
        "max_kv_splits",
        "sm_scale",
        "logit_cap",
        "kv_block_size",
    ),
    "mla_write_cache_triton": ("compressed_kv", "k_pe", "latent_cache", "slot_mapping"),
    "fused_read_cache_and_interleave_triton": (
        "latent_cache",
        "block_tables",
        "new_compressed_kv",
        "new_k_pe",
        "cu_seqlens_k",
        "cu_seqlens_q",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "block_size",
    ),
}
"""The arguments that the adapter has a value for; a function that needs another is not called."""

STAND_INS: Mapping[str, Mapping[str, object]] = {
    "config": {"FDConfig": object},
    "platforms": {"current_platform": SimpleNamespace(is_cuda=lambda: False)},
    "spec_decode": {"SpecMethod": object},
    f"{ATTENTION}.attention": {"Attention": object},
    f"{ATTENTION}.base_attention_backend": {"AttentionBackend": object, "AttentionMetadata": object},
    f"{ATTENTION}.ops": dict.fromkeys(
        (
            "get_block_shape_and_split_kv_block",
            "init_kv_signal_per_query",
            "init_signal_layerwise",
            "open_shm_and_get_meta_signal",
        )
    ),
    f"{ATTENTION}.utils": {"init_rank_and_device_id": None},
    "model_executor.ops.triton_ops.triton_utils": {"enable_compat_on_triton_kernel": lambda kernel: kernel},
}
"""What the files import of the engine. Without a GPU platform no compiled operator is imported."""


@dataclass(frozen=True)
class Checkout(Library):
    """A library that is not installed: its package lies in a checkout."""

    @property
    def folder(self) -> Path | None:
        """Where the package lies, None where the variable names no checkout."""
        package = Path(os.environ.get(VARIABLE, "")) / self.name
        return package if VARIABLE in os.environ and package.is_dir() else None

    @property
    def lacking(self) -> str | None:
        """None, or what to set."""
        if self.folder is not None:
            return None
        named = os.environ.get(VARIABLE)
        found = "is not set" if named is None else f"= {named} has no folder {self.name}"
        return f"{VARIABLE} {found}: set it to a checkout of github.com/PaddlePaddle/FastDeploy"

    @property
    def versions(self) -> dict[str, str]:
        """The version by a digest of the files that are called, of those that are there."""
        if self.folder is None:
            return {}
        digest = hashlib.sha256()
        for module in (INDICES, DECODE, WRITE, READ):
            file = self.folder.joinpath(*module.split(".")).with_suffix(".py")
            digest.update(file.read_bytes() if file.exists() else b"")
        return {self.name: digest.hexdigest()[:10]}

    def load(
        self, wanted: Mapping[str, Sequence[str]], stand_ins: Mapping[str, Mapping[str, object]]
    ) -> Kernels:
        """As of a library, with Paddle's stand-in; unavailable too if an argument is not known."""
        with _paddle():
            kernels = super().load(wanted, stand_ins)
        for name, function in kernels.functions.items():
            asked = inspect.signature(function).parameters.values()
            needed = [one.name for one in asked if one.default is one.empty]
            unknown = [one for one in needed if one not in ARGUMENTS[name]]
            if unknown:
                return Kernels({}, f"{name} of {self.folder} asks for {unknown[0]}, which is not known here")
        return kernels


LIBRARY = Checkout("fastdeploy")
DECODE_KERNELS = LIBRARY.load(
    {
        INDICES: ("build_kv_indices_from_block_tables",),
        DECODE: ("compute_num_kv_splits", "decode_attention_fwd"),
    },
    STAND_INS,
)
WRITE_KERNELS = LIBRARY.load({WRITE: ("mla_write_cache_triton",)}, STAND_INS)
READ_KERNELS = LIBRARY.load({READ: ("fused_read_cache_and_interleave_triton",)}, STAND_INS)


def signatures(*kernels: Kernels) -> str:
    """Functions and the numbers of their arguments, `f/4 g/2`: what this version is called with."""
    functions = {name: function for some in kernels for name, function in some.functions.items()}
    return " ".join(
        f"{name}/{len(inspect.signature(functions[name]).parameters)}" for name in sorted(functions)
    )


def called(kernels: Kernels, name: str, **given: object) -> Any:
    """A function's result; of the arguments it gets those that its version has, tensors as Paddle's."""
    asked = inspect.signature(getattr(kernels, name)).parameters
    taken = {key: value for key, value in given.items() if key in asked}
    return kernels.functions[name](
        **{key: paddle_tensor(value) if isinstance(value, Tensor) else value for key, value in taken.items()}
    )


# ---- decode --------------------------------------------------------------------------------------


def supports_decode(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    if any(row.is_decode and row.new > 1 for row in case.steps[0]):
        return "decode_attention_fwd has one query a row, got drafts"
    return None


def plan_decode(inputs: Tensors) -> Tensors:
    """Decode and padding tokens as rows: their keys' cache rows, and the number of splits of each."""
    rows, lengths, own = decode_and_padding_rows(inputs)
    if len(rows) == 0:
        return {"tokens": rows}
    indptr, indices = called(
        DECODE_KERNELS,
        "build_kv_indices_from_block_tables",
        block_tables=own,
        seq_lens=lengths,
        block_size=inputs["latent_cache"].shape[2],
        bs=len(rows),
    )
    return {
        "tokens": rows,
        "kv_indptr": indptr,
        "kv_indices": indices,
        "num_kv_splits": _splits(inputs, lengths),
    }


def _splits(inputs: Tensors, lengths: Tensor) -> Tensor:
    """[n] int32: as the library counts them; all of them, if the case says so."""
    if inputs["splits"] is not None:
        return torch.full_like(lengths, inputs["splits"])
    splits: Tensor = called(
        DECODE_KERNELS,
        "compute_num_kv_splits",
        seq_lens=lengths,
        num_seq=len(lengths),
        max_kv_splits=MAX_KV_SPLITS,
    )
    return splits


def decode_workspace(case: Case) -> Workspace:
    """Outputs and LSE of every split."""
    tokens = sum(row.new for row in case.steps[0])
    return split_results(case.layers[0], tokens, case.options.splits or MAX_KV_SPLITS)


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`decode_attention_fwd` on the harness's tensors."""
    q, cache, out, rows = inputs["q"], inputs["latent_cache"], outputs["out"], workspace["tokens"]
    # The library writes to the engine's tensor where all tokens are its rows.
    is_whole = len(rows) == len(out)
    attended = out if is_whole else out.new_empty((len(rows), *out.shape[1:]))
    if len(rows) > 0:
        called(
            DECODE_KERNELS,
            "decode_attention_fwd",
            q=q if is_whole else q[rows],
            k_buffer=cache,
            v_buffer=cache[..., : out.shape[2]],
            o=attended,
            kv_indptr=workspace["kv_indptr"],
            kv_indices=workspace["kv_indices"],
            attn_logits=workspace["attn_logits"][: len(rows)],
            attn_lse=workspace["attn_lse"][: len(rows)],
            num_kv_splits=workspace["num_kv_splits"],
            max_kv_splits=workspace["attn_logits"].shape[2],
            sm_scale=inputs["softmax_scale"],
            logit_cap=0.0,
            kv_block_size=cache.shape[2],
        )
    if not is_whole:
        out.zero_()
        out[rows] = attended


# ---- cache write ---------------------------------------------------------------------------------


def supports_write(case: Case) -> str | None:
    """Every case of a cache in the model dtype."""
    return None


def write(compressed_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """`mla_write_cache_triton`, also in the place of our launcher."""
    called(
        WRITE_KERNELS,
        "mla_write_cache_triton",
        compressed_kv=compressed_kv,
        k_pe=k_pe,
        latent_cache=latent_cache,
        slot_mapping=slot_mapping,
    )


def run_write(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`write` on the harness's tensors."""
    write(inputs["compressed_kv"], inputs["k_pe"], outputs["latent_cache"], inputs["slot_mapping"])


# ---- fused read ----------------------------------------------------------------------------------


def supports_read(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    for layer in case.layers:
        widths = layer.kv_lora_rank, layer.qk_rope_head_dim
        if any(width & (width - 1) for width in widths):
            return f"the fused read takes widths that are powers of two, got {widths[0]} + {widths[1]}"
    return None


def plan_read(inputs: Tensors) -> Tensors:
    """The engine's prefix sum over all keys, which of these are prefill rows', and dense block tables."""
    lengths = inputs["seq_lens_decoder"] + inputs["cu_seqlens_q"].diff()
    cu_seqlens_k = prefix_sum(lengths)
    return {
        "cu_seqlens_k": cu_seqlens_k,
        "prefill_keys": spans(cu_seqlens_k[:-1], inputs["cu_seqlens_k_prefill"].diff()),
        "tables": None if inputs["block_tables"] is None else inputs["block_tables"].contiguous(),
    }


def run_read(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`fused_read_cache_and_interleave_triton` on the harness's tensors. It allocates what it returns."""
    latents, rope_keys = called(
        READ_KERNELS,
        "fused_read_cache_and_interleave_triton",
        latent_cache=inputs["latent_cache"],
        block_tables=workspace["tables"],
        new_compressed_kv=inputs["compressed_kv"].contiguous(),
        new_k_pe=inputs["k_pe"].contiguous(),
        cu_seqlens_k=workspace["cu_seqlens_k"],
        cu_seqlens_q=inputs["cu_seqlens_q"],
        kv_lora_rank=inputs["compressed_kv"].shape[1],
        qk_rope_head_dim=inputs["k_pe"].shape[1],
        block_size=inputs["latent_cache"].shape[2],
    )
    outputs["full_compressed_kv"].copy_(latents[workspace["prefill_keys"]])
    outputs["full_k_pe"].copy_(rope_keys[workspace["prefill_keys"]])


# ---- a whole step --------------------------------------------------------------------------------


def supports_step(case: Case) -> str | None:
    """None, or why a step's decode rows, or ours around them, are not taken."""
    if "packed" in case.options.cache:
        return "a packed cache is not what FastDeploy's Triton kernels are for"
    return supports_decode(case) or step.supports(case)


def decode_in_step(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`run_decode`, planned on the step's own metadata."""
    run_decode(inputs, outputs, {**workspace, **plan_decode(inputs)})


def partial_results(layer: Layer, tokens: int, longest: int, slots: int) -> Workspace:
    """What decode takes of scratch."""
    return split_results(layer, tokens, MAX_KV_SPLITS)


STEP = replace(
    step.OPERATORS,
    latent_cache_write=write,
    mla_decode=decode_in_step,
    partial_results=partial_results,
    supports=supports_step,
)


def about(*kernels: Kernels) -> dict[str, Any]:
    """What all paths of the library have in common, and what their own files are called with."""
    told = {name: f"{digest}, {signatures(*kernels)}" for name, digest in LIBRARY.versions.items()}
    reasons = [some.unavailable for some in kernels if some.unavailable is not None]
    return {
        "lanes": ("interpreted", "compiled"),
        "libraries": told,
        "unavailable": reasons[0] if reasons else None,
    }


PATHS = (
    KernelPath(
        name="adapters/fastdeploy/mla_decode",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        workspace=decode_workspace,
        omits=("lse",),
        **about(DECODE_KERNELS),
    ),
    KernelPath(
        name="adapters/fastdeploy/latent_cache_write",
        operator="latent_cache_write",
        supports=supports_write,
        run=run_write,
        batch_invariant=True,
        **about(WRITE_KERNELS),
    ),
    KernelPath(
        name="adapters/fastdeploy/read_cache_interleave",
        operator="read_cache_interleave",
        supports=supports_read,
        run=run_read,
        plan=plan_read,
        allocates=True,
        **about(READ_KERNELS),
    ),
    replace(
        path_of(STEP, "adapters/fastdeploy", lanes=("interpreted", "compiled")),
        allocates=True,
        **about(DECODE_KERNELS, WRITE_KERNELS),
    ),
)
