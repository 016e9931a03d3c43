"""Gather the cached and the new latents of every prefill row into dense tensors, bit for bit.

Inputs
    latent_cache          [nb, 1, bs, R+D]  model dtype, contiguous; the new tokens are not in it yet
    block_tables          [B, max_blocks]   int32, row stride free; entries past a row's cached tokens unread;
                                            None, or of width 0, where no prefill row has cached tokens
    compressed_kv         [Tp, R]           model dtype, token stride free, last axis dense
    k_pe                  [Tp, D]           model dtype, token stride free, last axis dense
    seq_lens_decoder      [B] int32         tokens cached before this step
    cu_seqlens_q          [B + 1] int32     exclusive prefix sum of the new tokens of every row
    cu_seqlens_k_prefill  [B + 1] int32     the same of cached and new tokens, prefill rows alone
Outputs
    full_compressed_kv    [Tk, R]           model dtype, row stride free, last axis dense
    full_k_pe             [Tk, D]           model dtype, row stride free, last axis dense

Row b's keys are rows cu_seqlens_k_prefill[b] to cu_seqlens_k_prefill[b + 1] of the outputs: first its
cached tokens in order of position, then its new ones. Rows of the outputs behind the last key become 0:
a captured graph may be replayed with fewer keys than the outputs have rows.

Any R and D, any bs, B and Tk (none: no launch); caches and outputs beyond 2^32 elements. Fastest where
strides and widths are multiples of 16 bytes. No host synchronisation.

Not: quantised caches, histories of decode rows.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None: the kernel takes every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.read_cache_interleave(
        inputs["latent_cache"],
        inputs["block_tables"],
        inputs["compressed_kv"],
        inputs["k_pe"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["cu_seqlens_k_prefill"],
        outputs["full_compressed_kv"],
        outputs["full_k_pe"],
    )


PATHS = (
    KernelPath(
        name="cuda/read_cache_interleave",
        operator="read_cache_interleave",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
