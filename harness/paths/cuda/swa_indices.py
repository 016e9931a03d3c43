"""Physical cache rows of the keys that each token sees through a sliding window.

Inputs
    block_tables        [B, MB] int32      physical blocks of each slot; slot stride free, last axis dense
    cu_seqlens_q        [B + 1] int32      exclusive prefix sum of the slots' new tokens
    seq_lens_decoder    [B] int32          tokens of each slot that are cached
    batch_id_per_token  [Tp] int32         slot of each token, negative for padding
    block_size                             tokens a block
    window                                 keys that a token sees, itself included; 0: all

Output
    swa_indices         [Tp, 1, N] int32   token stride free, last axis dense

Token t of slot b stands at position p = seq_lens_decoder[b] + t - cu_seqlens_q[b] and sees the positions from
max(0, p - window + 1) to p, cached or new. Entry j of its row is the physical row of the j-th of them, the
oldest first: block_tables[b, k // block_size] * block_size + k % block_size. Entries behind the newest are
-1, and so are all of padding, those whose column the table does not have, and those whose block is negative.

Every entry is written. N must hold the window, or the longest sequence where that is less; caches have fewer
than 2^31 rows. Any block size, any window, any number of tokens (none: no launch), at most 2^30 indices a
token. No host synchronisation.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)

MAX_ROWS = 2**31
"""Rows of cache that an int32 can tell apart."""


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        rows = (case.options.pool or 0) * layer.block_size
        if rows > MAX_ROWS:
            return f"indices are int32: a cache has at most {MAX_ROWS:,} rows, got {rows:,}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.swa_indices(
        inputs["block_tables"],
        inputs["cu_seqlens_q"],
        inputs["seq_lens_decoder"],
        inputs["batch_id_per_token"],
        outputs["swa_indices"],
        inputs["block_size"],
        inputs["window"],
    )


PATHS = (
    KernelPath(
        name="cuda/swa_indices",
        operator="swa_indices",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
