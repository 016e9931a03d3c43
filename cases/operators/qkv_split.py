"""What every rank makes of a layer's projection of queries, keys and values at loading: P7, #8037.

The checkpoint's output features, of all ranks, are those of q_proj, k_proj, v_proj and a gate, in this order:
blocks of K for each of the H_total query heads, of K for each of the G_total KV heads, of V for each of them,
of V for each query head. A checkpoint that keeps them apart is the same, read tensor by tensor. A Paddle
checkpoint stores w = [inputs, outputs], a torch checkpoint its transpose. All counts and widths are those of
the layer itself: no other layer's, and no global ones.

Rank p of TP has the H = H_total / TP query heads from p H on, and G KV heads from p G_total // TP on, where
G = G_total / TP or, with more ranks than KV heads, 1: then TP / G_total ranks in a row have a copy of the
same one. Its projection is as wide as its own heads are together,

    qkv_proj_weight[p]  = w[:, heads of q | heads of k | heads of v]             H K + G K + G V features
    qkvg_proj_weight[p] = w[:, heads of q | heads of k | heads of v | gates]     and H V more

and qkv_offsets[p, i] = (first feature in the checkpoint, first in the rank's projection, how many) for the
parts i = q, k, v, gate, as a loader slices them. Every rank's result is judged, from both layouts, with and
without a gate: axis 0 of an output is the rank. A bit-exact copy: negative zeros and subnormal weights stay
what they are. It is no part of a step: rows of a case change nothing.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer

HIDDEN_SIZE = 256
"""Input features that are loaded: their number is a factor of everything and decides nothing."""


def work(case: Case, layer: Layer) -> Work:
    """Of two layouts every rank's weights read and written once, with and without the gate."""
    features = (layer.qkv_width + layer.qkvg_width) * layer.tensor_parallel_size
    return Work(bytes=4 * features * HIDDEN_SIZE * ITEM_BYTES[layer.dtype], flops=0)


def _output(name: str, layout: str, width: str) -> TensorSpec:
    return TensorSpec(
        f"{name}_proj_weight_{layout}",
        ("tensor_parallel_size", "hidden_size", width),
        "model",
        f"of each rank, its projection from the {layout} layout, input features first",
        judge=Judge.EXACT,
        strided=True,
    )


OPERATOR = Operator(
    name="qkv_split",
    summary="bit-exact split of a checkpoint's projections of q, k, v and gates into each rank's",
    source="FastDeploy P7, #8037: QKVParallelLinear, QKVGateParallelLinear and their loaders, REQUIRED form",
    inputs=(
        TensorSpec(
            "qkvg_proj_paddle",
            ("hidden_size", "qkvg_checkpoint_width"),
            "model",
            "weights of q_proj, k_proj, v_proj and the gate side by side as Paddle stores them, inputs first",
            fill=Fill.QKV_WEIGHT,
            strided=True,
        ),
        TensorSpec(
            "qkvg_proj_torch",
            ("qkvg_checkpoint_width", "hidden_size"),
            "model",
            "the same weights as torch stores them, output features first",
            fill=Fill.QKV_WEIGHT,
            strided=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "qkv_offsets",
            ("tensor_parallel_size", "qkv_parts", "offset_numbers"),
            "int32",
            "of each rank and part: first feature in the checkpoint, first in the projection, how many",
            judge=Judge.EXACT,
        ),
        *(_output("qkv", layout, "qkv_width") for layout in ("paddle", "torch")),
        *(_output("qkvg", layout, "qkvg_width") for layout in ("paddle", "torch")),
    ),
    attributes=(
        "num_attention_heads",
        "total_num_key_value_heads",
        "qk_head_dim",
        "v_head_dim",
        "tensor_parallel_size",
    ),
    options=("model", "heads", "kv_heads", "v_dim", "layers", "dtype", "seed", "strided", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "neighbours": "weights do not depend on the rows of a step: no row has contents to change",
        "permute": "weights do not depend on the rows of a step: there is nothing to reorder",
    },
)
