"""What every rank makes of a checkpoint's kv_b_proj at loading: FastDeploy's O22.

kv_b_proj makes keys and values of all heads from a latent. Its H_total (N + V) output features are blocks of
N + V, one a head in the model's order, keys first. A Paddle checkpoint stores w = [R, H_total (N + V)], input
features first; a torch checkpoint stores its transpose. H_total = TP x H heads are divided among TP ranks in
blocks of H. For rank p and its head h, with c = (p H + h) (N + V) the first feature of the head:

    k_b_proj_weight[p, h, n, r] = w[r, c + n]             n < N:  k_nope = k_b_proj_weight[h] latent
    v_b_proj_weight[p, h, r, v] = w[r, c + N + v]         v < V:  value = latent v_b_proj_weight[h]

Every rank's result is judged, from both layouts: axis 0 of an output is the rank. A bit-exact copy: negative
zeros and subnormal weights stay what they are. It is no part of a step: rows of a case change nothing.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer


def work(case: Case, layer: Layer) -> Work:
    """Of two layouts every weight read and written once."""
    return Work(bytes=4 * layer.kv_b_proj_width * layer.kv_lora_rank * ITEM_BYTES[layer.dtype], flops=0)


def _outputs(layout: str) -> tuple[TensorSpec, TensorSpec]:
    ranks = ("tensor_parallel_size", "num_attention_heads")
    return (
        TensorSpec(
            f"k_b_proj_weight_{layout}",
            (*ranks, "qk_nope_head_dim", "kv_lora_rank"),
            "model",
            f"of each rank, the half for keys, W_UK, from the {layout} layout",
            judge=Judge.EXACT,
            strided=True,
        ),
        TensorSpec(
            f"v_b_proj_weight_{layout}",
            (*ranks, "kv_lora_rank", "v_head_dim"),
            "model",
            f"of each rank, the half for values, W_UV, from the {layout} layout",
            judge=Judge.EXACT,
            strided=True,
        ),
    )


OPERATOR = Operator(
    name="kv_b_split",
    summary="bit-exact split of a checkpoint's kv_b_proj into each rank's two halves, from both layouts",
    source="FastDeploy O22; DeepSeek-V2's kv_b_proj, arXiv:2405.04434 section 2.1",
    inputs=(
        TensorSpec(
            "kv_b_proj_paddle",
            ("kv_lora_rank", "kv_b_proj_width"),
            "model",
            "kv_b_proj.weight of all ranks' heads as Paddle stores it, input features first",
            fill=Fill.KV_B_WEIGHT,
            strided=True,
        ),
        TensorSpec(
            "kv_b_proj_torch",
            ("kv_b_proj_width", "kv_lora_rank"),
            "model",
            "the same weights as torch stores them, output features first",
            fill=Fill.KV_B_WEIGHT,
            strided=True,
        ),
    ),
    outputs=(*_outputs("paddle"), *_outputs("torch")),
    attributes=("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "tensor_parallel_size"),
    options=("model", "heads", "layers", "dtype", "seed", "strided", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "neighbours": "weights do not depend on the rows of a step: no row has contents to change",
        "permute": "weights do not depend on the rows of a step: there is nothing to reorder",
    },
)
