"""Absorbed attention over listed tokens of the step, with LSE: FastDeploy's O18.

Of token t, entry j of its list indices[t, 0] names a key if 0 <= i < tokens, with i = indices[t, 0, j]: token
i of the step. Any other entry is no key, -1, other negative numbers and larger ones alike, wherever in the
list it stands; nothing is read for it. An index that occurs twice is two keys. With R = kv_lora_rank,

    k_i = [ compressed_kv[i] | k_pe[i] ]
    s_i = softmax_scale * q[t, h] . k_i
    lse = ln sum_i exp(s_i)                             over the list's keys
    out = sum_i exp(s_i - lse) k_i[:R]

A list without a key: out 0, lse -inf, whatever the query holds. All heads share a list. A token is computed
by its list alone: causal is what the list makes so. What is cached is no token of the step, and cannot be
named: only first chunks are whole here, and `sparse_decode` attends to histories (B39).

Engines hand one tensor of lists to both. Entries of decode rows are rows of the cache then, most of them no
token of the step; their outputs are thrown away, but nothing may be read for them (B71). Here the lists of
decode rows and of padding name no key. A list has `index_topk` entries, any number.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer


def work(case: Case, layer: Layer) -> Work:
    """Tokens that some list may name, queries and lists read once, outputs written; q K^T and P V."""
    heads, width, rank = layer.num_attention_heads, layer.latent_width, layer.kv_lora_rank
    tokens = sum(row.new for row in case.steps[0])
    prefills = [row.new for row in case.steps[0] if row.seq_lens_encoder]
    pairs = sum(min(layer.index_topk, token + 1) for new in prefills for token in range(new))
    elements = sum(prefills) * width + tokens * heads * (width + rank)
    ends = tokens * (4 * heads + 4 * layer.index_topk)
    return Work(
        bytes=elements * ITEM_BYTES[layer.dtype] + ends,
        flops=2 * pairs * heads * (width + rank),
    )


OPERATOR = Operator(
    name="sparse_prefill",
    summary="absorbed attention over listed tokens of the step, with LSE",
    source="FastDeploy O18 (FlashMLA's sparse prefill); DeepSeek-V3.2 section 2.1",
    inputs=(
        TensorSpec(
            "q",
            ("tokens", "num_attention_heads", "latent_width"),
            "model",
            "absorbed query; rows of padding tokens hold NaN",
            fill=Fill.STEP_LISTED_QUERY,
            strided=True,
        ),
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each token; rows of padding hold NaN",
            fill=Fill.LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each token; rows of padding hold NaN",
            fill=Fill.ROPE_KEY,
            strided=True,
        ),
        TensorSpec(
            "indices",
            ("tokens", "one", "index_topk"),
            "int32",
            "tokens of the step that are each token's keys; what is outside names none",
            fill=Fill.LISTED_TOKENS,
            strided=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "out",
            ("tokens", "num_attention_heads", "kv_lora_rank"),
            "model",
            "attention over the latents",
            judge=Judge.ATTENTION,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "lse",
            ("tokens", "num_attention_heads"),
            "float32",
            "log-sum-exp of the scaled logits, natural log",
            judge=Judge.LSE,
            when_empty="-inf",
        ),
    ),
    attributes=("softmax_scale", "kv_lora_rank"),
    options=(
        "model",
        "heads",
        "layers",
        "dtype",
        "data",
        "seed",
        "strided",
        "tp",
        "topk",
    ),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
)
