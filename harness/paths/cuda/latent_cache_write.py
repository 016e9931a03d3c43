"""Write new latents and rotated keys into the paged latent cache, bit for bit.

Inputs
    compressed_kv  [Tp, R]            model dtype, token stride free, last axis dense
    k_pe           [Tp, D]            model dtype, token stride free, last axis dense
    latent_cache   [nb, 1, bs, R+D]   model dtype, contiguous; written in place
    slot_mapping   [Tp] int64         block * bs + offset; negative: the token is not written

For every token t with 0 <= slot_mapping[t] < nb * bs, cache row slot_mapping[t] becomes
[compressed_kv[t] | k_pe[t]]. No other byte changes. Two tokens must not share a slot.

Any R, D and block size, any number of tokens (none: no launch), caches beyond 2^32 elements. Fastest where
strides and widths are multiples of 16 bytes. No host synchronisation.

Not: quantised caches.
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
    KERNELS.latent_cache_write(
        inputs["compressed_kv"], inputs["k_pe"], inputs["latent_cache"], inputs["slot_mapping"]
    )


PATHS = (
    KernelPath(
        name="cuda/latent_cache_write",
        operator="latent_cache_write",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
