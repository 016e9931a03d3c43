"""FlagGems' MLA kernels in Triton: decode attention and the cache write, from the wheel's kernel files.

Source: flag_gems/fused/{flash_mla,concat_and_cache_mla}.py of the version in `SEEN_WORKING`. `libentry`, its
cache of launchers, is left out: a launch goes through Triton's own. Where there is no GPU the kernels get the
tiles that they have on an H100.

| path | calls | for |
|------|-------|-----|
| `mla_decode` | `flash_mla` | decode rows, and drafts that all have as many new tokens |
| `latent_cache_write` | `concat_and_cache_mla(kv_cache_dtype="auto")` | every token |
| `mla_step` | both | our step around them |

Conventions
    layouts: the paged cache as [nb, bs, R + D] to write and as [nb, bs, 1, R + D] to read; block tables as
        they are, one line a row of the call. Nothing is done about tails and unread rows.
    scale: `flash_mla` has no argument for it and takes 1 / sqrt(R + D), where models have 1 / sqrt(N + D) or
        more. Queries are multiplied by what is between, as a user of it must, and rounded once more.
    lengths: `cache_seqlens` counts the new tokens too.
    LSE: not given.
    tokens: the library gets decode rows alone; at all other tokens the contract's 0 is written here.
    slots: a negative one is not written.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.layers import Layer
from harness.kernel_path import KernelPath, Tensors, Workspace, to_scale
from harness.paths._mla_step import path_of
from harness.paths.adapters._loading import Library
from harness.paths.adapters._rows import decode_slots, spans
from harness.paths.triton import mla_step as step

HOPPER = (9, 0)
"""Compute capability whose tiles are taken where there is no GPU."""

# Which lane this worker is of: the library asks for a device's name, and allocates there.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()

LIBRARY = Library("flag_gems")
KERNELS = LIBRARY.load(
    {
        "utils.triton_lang_extension": (),
        "fused.flash_mla": ("flash_mla",),
        "fused.concat_and_cache_mla": ("concat_and_cache_mla",),
    },
    {
        "utils": {"libentry": lambda: lambda kernel: kernel},
        "utils.triton_lang_helper": {"use_tl_extra": lambda function: function},
        "utils.device_info": {
            "get_device_capability": lambda: HOPPER if IS_INTERPRETED else torch.cuda.get_device_capability()
        },
        "runtime": {
            "device": SimpleNamespace(name="cpu" if IS_INTERPRETED else "cuda", vendor_name="nvidia"),
            "error": SimpleNamespace(),
            "torch_device_fn": SimpleNamespace(device=lambda _: nullcontext()),
        },
    },
)


# ---- decode --------------------------------------------------------------------------------------


def supports_decode(case: Case) -> str | None:
    """None, or why the library does not take a case."""
    new = {row.new for row in case.steps[0] if row.is_decode}
    if len(new) > 1:
        counts = " and ".join(str(count) for count in sorted(new))
        return f"flash_mla takes one number of new tokens a call, got rows of {counts}"
    return None


def scale(case: Case) -> float:
    """What flash_mla divides by: the root of the absorbed query's width."""
    return 1 / math.sqrt(case.layers[0].latent_width)


def plan_decode(inputs: Tensors) -> Tensors:
    """Decode and draft rows: their tokens, lengths and tables."""
    slots = decode_slots(inputs)
    new = inputs["cu_seqlens_q"].diff()[slots].long()
    return {
        "tokens": spans(inputs["cu_seqlens_q"][slots], new),
        "cache_seqlens": inputs["seq_lens_decoder"][slots] + new.int(),
        "tables": inputs["block_tables"][slots],
    }


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`flash_mla` on the harness's tensors. It allocates what it returns."""
    q, cache, out = inputs["q"], inputs["latent_cache"], outputs["out"]
    tokens, lengths = workspace["tokens"], workspace["cache_seqlens"]
    rows, width, rank = len(lengths), q.shape[2], out.shape[2]
    out.zero_()
    if rows == 0:
        return
    query = to_scale(q[tokens], inputs["softmax_scale"] * width**0.5).unflatten(0, (rows, -1))
    attended = KERNELS.flash_mla(
        query,
        workspace["tables"],
        cache.transpose(1, 2),
        max_seqlen_pad=cache.shape[2] * workspace["tables"].shape[1],
        block_size=cache.shape[2],
        b=rows,
        s_q=query.shape[1],
        cache_seqlens=lengths,
        h_q=q.shape[1],
        h_kv=1,
        d=width,
        dv=rank,
        causal=True,
    )
    out[tokens] = attended.flatten(0, 1)


# ---- cache write ---------------------------------------------------------------------------------


def supports_write(case: Case) -> str | None:
    """Every case of a cache in the model dtype."""
    return None


def write_workspace(case: Case) -> Workspace:
    """The scale of an fp8 cache, which one in the model dtype does not read."""
    return {"scale": ((1,), "float32")}


def run_write(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`concat_and_cache_mla` on the harness's tensors."""
    KERNELS.concat_and_cache_mla(
        inputs["compressed_kv"],
        inputs["k_pe"],
        outputs["latent_cache"].squeeze(1),
        inputs["slot_mapping"],
        "auto",
        workspace["scale"],
    )


# ---- a whole step --------------------------------------------------------------------------------


def supports_step(case: Case) -> str | None:
    """None, or why a step's decode rows, or ours around them, are not taken."""
    if "packed" in case.options.cache:
        return "a packed cache is not what FlagGems' kernels are for"
    return supports_decode(case) or step.supports(case)


def decode_in_step(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`run_decode`, planned on the step's own metadata."""
    run_decode(inputs, outputs, plan_decode(inputs))


def write_in_step(compressed_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """`run_write` in the place of our launcher."""
    unread = torch.empty(1, device=latent_cache.device)
    KERNELS.concat_and_cache_mla(compressed_kv, k_pe, latent_cache.squeeze(1), slot_mapping, "auto", unread)


def partial_results(layer: Layer, tokens: int, longest: int, slots: int) -> Workspace:
    """Decode takes no scratch."""
    return {}


STEP = replace(
    step.OPERATORS,
    latent_cache_write=write_in_step,
    mla_decode=decode_in_step,
    partial_results=partial_results,
    supports=supports_step,
)

ABOUT: dict[str, Any] = {
    "lanes": ("interpreted", "compiled"),
    "allocates": True,
    "libraries": LIBRARY.versions,
    "unavailable": KERNELS.unavailable,
}
"""What all paths of the library have in common."""

PATHS = (
    KernelPath(
        name="adapters/flag_gems/mla_decode",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        omits=("lse",),
        scale=scale,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/flag_gems/latent_cache_write",
        operator="latent_cache_write",
        supports=supports_write,
        run=run_write,
        workspace=write_workspace,
        batch_invariant=True,
        **{**ABOUT, "allocates": False},
    ),
    replace(path_of(STEP, "adapters/flag_gems", lanes=ABOUT["lanes"]), **ABOUT),
)
