"""Exclusive prefix sums of a step's lengths, and the slot of every token.

Inputs
    seq_lens_encoder      [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder      [B] int32      tokens cached before the step, set for any kind of row
    seq_lens_this_time    [B] int32      tokens that the slot adds to the token axis

Outputs
    cu_seqlens_q          [B + 1] int32  sums of seq_lens_this_time
    cu_seqlens_k          [B + 1] int32  sums of seq_lens_this_time + seq_lens_decoder of every slot
    cu_seqlens_k_prefill  [B + 1] int32  the same of prefill rows alone
    batch_id_per_token    [Tp] int32     slot of each token, -1 for the Tp - T behind the last

Any number of slots and tokens, none included: the sums are written even if there is neither. The sums must
fit into int32, and Tp must not be below T. O(B) work for the sums, in one block; O(log B) a token. No host
synchronisation: T is never read back, Tp comes from the shape.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None: the kernels take every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    KERNELS.padding_offset(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        outputs["cu_seqlens_q"],
        outputs["cu_seqlens_k"],
        outputs["cu_seqlens_k_prefill"],
        outputs["batch_id_per_token"],
    )


PATHS = (
    KernelPath(
        name="cuda/padding_offset",
        operator="padding_offset",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
