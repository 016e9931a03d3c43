"""Absorbed MLA attention over listed tokens of the step, with LSE.

Inputs
    q              [Tp, H, R+D]      model dtype, token and head strides free, last axis dense
    compressed_kv  [Tp, R]           model dtype, token stride free, last axis dense
    k_pe           [Tp, D]           model dtype, token stride free, last axis dense
    indices        [Tp, 1, K] int32  token stride free, last axis dense: tokens of the step
Outputs
    out            [Tp, H, R]        model dtype, token and head strides free
    lse            [Tp, H]           fp32, contiguous, natural log

Token t attends to the tokens that indices[t, 0] names. Entries outside 0 to Tp - 1 name none, wherever they
stand, and no address is made of them; a token named twice counts twice. A list that names none: out 0, lse
-inf. Nothing is computed behind a list's last key. Nothing is rounded but weights and outputs; sums are fp32.

(R, D) is (512, 64), (256, 64), (256, 32) or (1024, 64). Any H, any K up to 2^30, any Tp (none: no launch).
bf16, fp16, fp32. q, compressed_kv and k_pe begin at and step by multiples of 16 bytes, out by multiples of
8. Offsets beyond 2^32 elements. Tensor cores at mma.sync level; fp32 by three products of tf32. Heads of a
token share the keys that they gather: up to 64 where there are so many, 16 in fp32 or of 1024 columns. No
host synchronisation, and the launch depends on nothing on the device: a captured graph may be replayed with
other lists.

Compiled, (512, 64) in bf16 and fp16 takes 166 KiB of shared memory a block, with more than 16 heads 226 KiB,
as devices from compute capability 9.0 on have.

Not: splits. A prefill has tokens enough to fill the device.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)

WIDTHS = {(512, 64), (256, 64), (256, 32), (1024, 64)}
"""(kv_lora_rank, qk_rope_head_dim) that the kernel is compiled for."""


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        widths = (layer.kv_lora_rank, layer.qk_rope_head_dim)
        if widths not in WIDTHS:
            return f"(kv_lora_rank, qk_rope_head_dim) must be one of {sorted(WIDTHS)}, got {widths}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.sparse_prefill(
        inputs["q"],
        inputs["compressed_kv"],
        inputs["k_pe"],
        inputs["indices"],
        outputs["out"],
        outputs["lse"],
        inputs["softmax_scale"],
    )


PATHS = (
    KernelPath(
        name="cuda/sparse_prefill",
        operator="sparse_prefill",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
