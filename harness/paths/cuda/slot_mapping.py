"""Physical cache row of every token of a step.

Inputs
    block_tables        [B, MB] int32   physical blocks of each slot; slot stride free, last axis dense
    batch_id_per_token  [Tp] int32      slot of each token, negative for padding
    position_ids        [Tp] int32      absolute position of each token; anything for padding
    block_size                          tokens a block

Output
    slot_mapping        [Tp] int64

Token t of slot b at position p gets block_tables[b, p // block_size] * block_size + p % block_size, in int64.
It gets -1 where b or p is negative, where the table has no column p // block_size, and where the entry is
negative; what the table holds elsewhere is not read.

Any block size, any number of tokens (none: no launch). No host synchronisation.
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
    KERNELS.map_tokens(
        inputs["block_tables"],
        inputs["batch_id_per_token"],
        inputs["position_ids"],
        outputs["slot_mapping"],
        inputs["block_size"],
    )


PATHS = (
    KernelPath(
        name="cuda/slot_mapping",
        operator="slot_mapping",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
