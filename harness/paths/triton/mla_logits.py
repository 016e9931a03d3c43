"""A small whole model on the kernels of this folder: linear layers and norms by torch, the rest by Triton.

Inputs, L layers, model dtype unless said; weights named and laid out as HuggingFace's, layers outermost
    token_ids            [Tp] int32
    weights              embed_tokens, input_layernorm, q_a_proj, q_a_layernorm, q_b_proj or q_proj,
                         kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj, post_attention_layernorm,
                         gate_proj, up_proj, down_proj, norm, lm_head
    cos_sin_cache        [positions, D] fp32 or None: nothing is rotated
    latent_cache         [L, nb, 1, bs, R+D], the new tokens' rows are written
    block_tables, seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, batch_id_per_token and position_ids
                         as for mla_step and rope
Outputs
    logits [Tp, vocab]; by layer, in the order they are computed: q [L, Tp, H (N+D)], q_pe [L, Tp, H, D],
    k_pe [L, Tp, D], compressed_kv [L, Tp, R], attention [L, Tp, H V], o_proj_out and hidden
    [L, Tp, hidden]

Norms compute in fp32 and round once. kv_b_proj is split by kv_b_split.py, q_pe and k_pe are turned by
rope.py, attention and cache writes are mla_step.py. Activations are allocated by torch: this is the stack
around the kernels, not one of them. No host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cases import Case
from harness.kernel_path import TORCH_NAMES, KernelPath, Tensors, Workspace
from harness.paths.triton import mla_step
from harness.paths.triton.kv_b_split import split_kv_b_proj
from harness.paths.triton.rope import rotate

LATENT_NORM_EPS = 1e-6
"""Of the norms within latent attention, in every architecture; the others have the config's rms_norm_eps."""

OF_A_STEP = ("block_tables", "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "softmax_scale")


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: statistics and product in fp32, rounded once."""
    wide = values.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(values.dtype)


def project_queries(inputs: Tensors, layer: int, normed: Tensor) -> Tensor:
    """[Tp, hidden] -> [Tp, H (N+D)], through the compressed query where the architecture has one."""
    if inputs["q_proj"] is not None:
        return functional.linear(normed, inputs["q_proj"][layer])
    compressed = functional.linear(normed, inputs["q_a_proj"][layer])
    compressed = rms_norm(compressed, inputs["q_a_layernorm"][layer], LATENT_NORM_EPS)
    return functional.linear(compressed, inputs["q_b_proj"][layer])


def scaled_queries(inputs: Tensors, *parts: Tensor) -> list[Tensor]:
    """Mistral-4 multiplies queries by 1 + beta ln(1 + floor(position / length)); others leave them."""
    beta, length = inputs["query_scale_beta"], inputs["query_scale_length"]
    if beta == 0:
        return list(parts)
    # Stale positions of padding may be negative.
    positions = inputs["position_ids"].clamp(min=0).to(torch.float32)
    factors = 1 + beta * torch.log1p(torch.floor(positions / length))
    return [(part.float() * factors[:, None, None]).to(part.dtype) for part in parts]


def attend(inputs: Tensors, outputs: Tensors, workspace: Tensors, layer: int, normed: Tensor) -> Tensor:
    """Latent attention of one layer: [Tp, hidden] -> [Tp, hidden], stages and cache rows written."""
    nope = inputs["qk_nope_head_dim"]
    q, q_pe, k_pe = (outputs[name][layer] for name in ("q", "q_pe", "k_pe"))
    compressed_kv, attention = outputs["compressed_kv"][layer], outputs["attention"][layer]
    heads, width = q_pe.shape[1], attention.shape[1] // q_pe.shape[1]

    # 1. Queries, and the latent with the key part that all heads share.
    q.copy_(project_queries(inputs, layer, normed))
    q_nope, q_pe_raw = q.view(len(q), heads, -1).tensor_split([nope], dim=-1)
    both = functional.linear(normed, inputs["kv_a_proj_with_mqa"][layer])
    latent, k_pe_raw = both.tensor_split([compressed_kv.shape[1]], dim=-1)
    compressed_kv.copy_(rms_norm(latent, inputs["kv_a_layernorm"][layer], LATENT_NORM_EPS))

    # 2. Rotation by position.
    rotate(
        q_pe_raw,
        k_pe_raw,
        inputs["position_ids"],
        inputs["batch_id_per_token"],
        inputs["cos_sin_cache"],
        q_pe,
        k_pe,
        is_neox=bool(inputs["is_neox"]),
    )

    # 3. Attention over histories and new tokens, whose rows go to the cache.
    split_kv_b_proj(
        inputs["kv_b_proj"][layer], workspace["w_uk"], workspace["w_uv"], first_head=0, layout="torch"
    )
    scaled_nope, scaled_pe = scaled_queries(inputs, q_nope, q_pe)
    step = {
        **{name: inputs[name] for name in OF_A_STEP},
        "q_nope": scaled_nope,
        "q_pe": scaled_pe,
        "compressed_kv": compressed_kv,
        "k_pe": k_pe,
        "w_uk": workspace["w_uk"],
        "w_uv": workspace["w_uv"],
        "latent_cache": inputs["latent_cache"][layer],
    }
    mla_step.run(step, {"out": attention.view(len(attention), heads, width)}, workspace)
    out: Tensor = outputs["o_proj_out"][layer]
    return out.copy_(functional.linear(attention, inputs["o_proj"][layer]))


def run_mlp(inputs: Tensors, layer: int, normed: Tensor) -> Tensor:
    """The gated MLP of one layer: [Tp, hidden] -> [Tp, hidden]."""
    gate = functional.silu(functional.linear(normed, inputs["gate_proj"][layer]))
    active = gate * functional.linear(normed, inputs["up_proj"][layer])
    return functional.linear(active, inputs["down_proj"][layer])


def supports(case: Case) -> str | None:
    """None, or why one of the kernels does not take a case."""
    return mla_step.supports(case)


def workspace(case: Case) -> Workspace:
    """The scratch tensors of one layer's step, which the layers share, and its two halves of kv_b_proj."""
    layer = case.layers[0]
    model, heads = TORCH_NAMES[layer.dtype], layer.num_attention_heads
    return {
        "w_uk": ((heads, layer.qk_nope_head_dim, layer.kv_lora_rank), model),
        "w_uv": ((heads, layer.kv_lora_rank, layer.v_head_dim), model),
        **mla_step.workspace(case),
    }


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: one step of the whole model."""
    if len(inputs["token_ids"]) == 0:
        return
    residual_scale, eps = inputs["residual_scale"], inputs["rms_norm_eps"]
    hidden = inputs["embed_tokens"][inputs["token_ids"].long()] * inputs["scale_emb"]
    for layer in range(len(inputs["input_layernorm"])):
        normed = rms_norm(hidden, inputs["input_layernorm"][layer], eps)
        hidden = hidden + attend(inputs, outputs, workspace, layer, normed) * residual_scale
        normed = rms_norm(hidden, inputs["post_attention_layernorm"][layer], eps)
        hidden = hidden + run_mlp(inputs, layer, normed) * residual_scale
        outputs["hidden"][layer].copy_(hidden)
    last = rms_norm(hidden, inputs["norm"], eps) / inputs["logits_divisor"]
    outputs["logits"].copy_(functional.linear(last, inputs["lm_head"]))


PATHS = (
    KernelPath(
        name="triton/mla_logits",
        operator="mla_logits",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
