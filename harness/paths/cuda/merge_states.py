"""Merge two attention states over disjoint keys, outputs with their LSEs, into the state over all of them.

Inputs
    prefix_out                 [Tp, H, V]     model dtype, token and head strides free, last axis dense
    prefix_lse                 [Tp, H] f32    natural log, token stride free; infinite: the state is empty
    suffix_out                 [Tp, H, V]     like prefix_out
    suffix_lse                 [Tp, H] f32    like prefix_lse
Outputs
    out                        [Tp, H, V]     model dtype, token and head strides free, last axis dense
    lse                        [Tp, H] f32    natural log, token stride free, last axis dense

lse = ln(exp(prefix_lse) + exp(suffix_lse)), and out is the sum of both outputs, each times exp(its LSE less
lse); computed in fp32 from differences of LSEs, so that none overflows, and rounded once. An infinite LSE, of
either sign, says that its state has seen no key: its output is not read, NaN even. With two of them out is 0
and lse -inf.

out may be the output of one of the states: every element is read before it is written. lse has memory of its
own. NaN in an LSE is handed on.

Any H, V from 1, any Tp, none included. Tensors beyond 2^32 elements. Fastest where strides and widths are
multiples of 16 bytes. No host synchronisation.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: one launch on the harness's tensors."""
    KERNELS.merge_states(
        inputs["prefix_out"],
        inputs["prefix_lse"],
        inputs["suffix_out"],
        inputs["suffix_lse"],
        outputs["out"],
        outputs["lse"],
    )


PATHS = (
    KernelPath(
        name="cuda/merge_states",
        operator="merge_states",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
