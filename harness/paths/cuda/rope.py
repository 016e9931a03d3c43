"""Rotary position embedding of the query's and the key's rope parts at the tokens' positions.

Inputs
    q_pe_raw            [Tp, H, D]  model dtype, token and head strides free, last axis dense
    k_pe_raw            [Tp, D]     model dtype, token stride free, last axis dense
    position_ids        [Tp] int32  absolute position of each token; of padding, anything
    batch_id_per_token  [Tp] int32  slot of each token, negative for padding
    cos_sin_cache       [P, D]      model dtype or fp32, rows [cos | sin], row stride free, last axis dense;
                                    None: nothing is rotated
Outputs
    q_pe                [Tp, H, D]  model dtype, token and head strides free, last axis dense
    k_pe                [Tp, D]     model dtype, token stride free, last axis dense

With c = cos_sin_cache[p, i] and s = cos_sin_cache[p, D / 2 + i] at a token's position p, pair i becomes
(low c - high s, high c + low s). Pairs are (2i, 2i + 1), interleaved, or with is_neox (i, i + D / 2), half
split. Without a table the parts are copied bit for bit. Padding tokens become 0: neither their parts nor
their positions are followed. Positions of real tokens are in [0, P); the row P - 1 is one like any other.

Products and sums are fp32 and the result is rounded once. With `rounds_products` each product is rounded to
the model dtype before the two are added, as where an engine computes in its tensors' type: path
cuda/rope@rounded.

Products and sums are not fused: the bits are the same wherever the kernel runs.

The outputs may be the inputs themselves: a thread reads what it rotates before it writes it, and no other
reads it. Any even D, any H, any Tp (none: no launch). Tensors and tables beyond 2^32 elements. Fastest where
strides and D / 2 are multiples of 16 bytes. No host synchronisation.

Not: several positions a token, tables with one cosine for each column, rotation of some of the columns only.
"""

from __future__ import annotations

from functools import partial

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take the case."""
    for layer in case.layers:
        if layer.qk_rope_head_dim % 2:
            return (
                f"columns are rotated in pairs: qk_rope_head_dim must be even, got {layer.qk_rope_head_dim}"
            )
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors, *, rounds_products: bool) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.rotate(
        inputs["q_pe_raw"],
        inputs["k_pe_raw"],
        inputs["position_ids"],
        inputs["batch_id_per_token"],
        inputs["cos_sin_cache"],
        outputs["q_pe"],
        outputs["k_pe"],
        bool(inputs["is_neox"]),
        rounds_products,
    )


PATHS = tuple(
    KernelPath(
        name=name,
        operator="rope",
        lanes=("host", "compiled"),
        supports=supports,
        run=partial(run, rounds_products=rounds_products),
        batch_invariant=True,
        rounds_products=rounds_products,
    )
    for name, rounds_products in (("cuda/rope", False), ("cuda/rope@rounded", True))
)
