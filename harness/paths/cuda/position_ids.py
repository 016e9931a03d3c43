"""Absolute positions of a step's tokens.

Inputs
    seq_lens_decoder    [B] int32        tokens cached before the step
    cu_seqlens_q        [B + 1] int32    exclusive prefix sum of the slots' new tokens
    batch_id_per_token  [Tp] int32       slot of each token, negative for padding

Output
    position_ids        [Tp] int32

Token t of slot b gets seq_lens_decoder[b] + t - cu_seqlens_q[b], whatever the row's kind: continued chunks
and prefix hits begin behind their cached tokens. Padding gets -1, so nothing stale is left in the buffer.

Any number of slots and tokens (none: no launch). No host synchronisation.
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
    KERNELS.place_tokens(
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["position_ids"],
    )


PATHS = (
    KernelPath(
        name="cuda/position_ids",
        operator="position_ids",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
