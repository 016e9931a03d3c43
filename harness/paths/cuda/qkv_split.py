"""Split a checkpoint's projection of queries, keys, values and gates into one rank's, bit for bit.

Inputs
    weight        [inputs, W]    model dtype, row stride free, last axis dense; layout `paddle`
                  [W, inputs]    the same; layout `torch`
Outputs
    projection    [inputs, F]    model dtype, row stride free, last axis dense
    offsets       [4, 3] int32   contiguous: of q, k, v and gate the first feature in the weight, the first in
                                 the projection, and how many

The W output features of the weight are those of all ranks: K for each query head, K for each KV head, V for
each KV head, V for each query head. The projection has those of one rank's heads, q, k, v and, where it is as
wide as that, the gate. A rank has whole query heads, and its share of the KV heads or, with more ranks than
KV heads, one that its neighbours have too. All counts are the layer's own.

Any widths up to 2^31 features and any number of inputs (none: no launch, offsets are not written). Tensors
beyond 2^32 elements. Fastest where strides and parts are multiples of 16 bytes. No host synchronisation.

Not: dequantisation, a change of dtype, biases.
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
    """The path: every rank's projection, with gates and without, from both layouts."""
    for rank in range(inputs["tensor_parallel_size"]):
        for layout in ("paddle", "torch"):
            for name in ("qkv", "qkvg"):
                KERNELS.split_qkv_proj(
                    inputs[f"qkvg_proj_{layout}"],
                    outputs[f"{name}_proj_weight_{layout}"][rank],
                    outputs["qkv_offsets"][rank],
                    layout == "paddle",
                    rank,
                    inputs["tensor_parallel_size"],
                    inputs["num_attention_heads"],
                    inputs["total_num_key_value_heads"],
                    inputs["qk_head_dim"],
                    inputs["v_head_dim"],
                )


PATHS = (
    KernelPath(
        name="cuda/qkv_split",
        operator="qkv_split",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
