"""Logits of a small whole model over one step of a batch, through its paged latent cache.

The model has the widths and the arithmetic of the one that option `model` names, `layers` dense layers, and
weights from the seed. For every new token of every row, from its id to its logits:

    x    = scale_emb embed_tokens[id]
    each layer: latent attention over the row's history and an MLP, as references/mla_logits.py has them
    logits = norm(x) / logits_divisor lm_head^T

All histories are computed by the steps of the case itself: a row begins with cached tokens only where rows of
its tag have computed them. The cache of layer l holds [compressed_kv | k_pe] of every token, l outermost.

Stages are outputs too, so that a failure tells where numbers first depart: q before the rotation, q_pe and
k_pe after it, compressed_kv after its norm, the cache's rows, attention before o_proj and behind it, and the
layer's output. At padding they are finite.
"""

from cases.contract import Fill, Judge, Operator, TensorSpec
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    BLOCK_TABLES,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def _weight(name: str, *axes: str) -> TensorSpec:
    return TensorSpec(name, axes, "model", "named as in HuggingFace's model", fill=Fill.MODEL_WEIGHT)


def _stage(name: str, doc: str, *axes: str) -> TensorSpec:
    return TensorSpec(name, ("num_layers", "tokens", *axes), "model", doc, judge=Judge.STAGE)


_CACHE = ("num_layers", "num_blocks", "one", "block_size", "cache_width")

OPERATOR = Operator(
    name="mla_logits",
    summary="logits of a small whole model over the steps of a schedule, and the stages before them",
    source="HuggingFace's deepseek_v3 and its kin; FastDeploy P1, O22, review of #7727",
    inputs=(
        TensorSpec("token_ids", ("tokens",), "int32", "ids of the new tokens; padding 0", fill=Fill.NEW_IDS),
        TensorSpec(
            "history_ids",
            ("history_tokens",),
            "int32",
            "ids of every token that a slot holds after the step, slot after slot: for the oracles",
            fill=Fill.HISTORY_IDS,
        ),
        _weight("embed_tokens", "vocab_size", "hidden_size"),
        _weight("input_layernorm", "num_layers", "hidden_size"),
        _weight("q_a_proj", "num_layers", "q_lora_rank", "hidden_size"),
        _weight("q_a_layernorm", "num_layers", "q_lora_rank"),
        _weight("q_b_proj", "num_layers", "q_width", "q_lora_rank"),
        _weight("q_proj", "num_layers", "q_width", "hidden_size"),
        _weight("kv_a_proj_with_mqa", "num_layers", "latent_width", "hidden_size"),
        _weight("kv_a_layernorm", "num_layers", "kv_lora_rank"),
        _weight("kv_b_proj", "num_layers", "kv_b_proj_width", "kv_lora_rank"),
        _weight("o_proj", "num_layers", "hidden_size", "attention_width"),
        _weight("post_attention_layernorm", "num_layers", "hidden_size"),
        _weight("gate_proj", "num_layers", "intermediate_size", "hidden_size"),
        _weight("up_proj", "num_layers", "intermediate_size", "hidden_size"),
        _weight("down_proj", "num_layers", "hidden_size", "intermediate_size"),
        _weight("norm", "hidden_size"),
        _weight("lm_head", "vocab_size", "hidden_size"),
        TensorSpec(
            "cos_sin_cache",
            ("table_positions", "qk_rope_head_dim"),
            "float32",
            "rows [cos | sin] by position, poison where no token is; absent where nothing is rotated",
            fill=Fill.ROPE_TABLE,
        ),
        TensorSpec("latent_cache", _CACHE, "cache", "every layer's paged cache", fill=Fill.COMPUTED_CACHE),
        BLOCK_TABLES,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        TensorSpec(
            "cu_seqlens_k",
            ("slots_plus_one",),
            "int32",
            "exclusive prefix sum of cached and new tokens",
            fill=Fill.METADATA,
        ),
        BATCH_ID_PER_TOKEN,
        TensorSpec("position_ids", ("tokens",), "int32", "position of each token", fill=Fill.POSITIONS),
    ),
    outputs=(
        _stage("q", "queries before the rotation", "q_width"),
        _stage("q_pe", "queries' rotated parts", "num_attention_heads", "qk_rope_head_dim"),
        _stage("k_pe", "keys' rotated part", "qk_rope_head_dim"),
        _stage("compressed_kv", "latents after their norm", "kv_lora_rank"),
        TensorSpec(
            "latent_cache",
            _CACHE,
            "cache",
            "the caches with the new tokens' rows written",
            judge=Judge.STAGE,
        ),
        _stage("attention", "attention over the values, before o_proj", "attention_width"),
        _stage("o_proj_out", "what the attention adds to the residual stream, unscaled", "hidden_size"),
        _stage("hidden", "the layer's output", "hidden_size"),
        TensorSpec("logits", ("tokens", "vocab_size"), "model", "logits of each token", judge=Judge.STAGE),
    ),
    attributes=(
        "model",
        "softmax_scale",
        "qk_nope_head_dim",
        "is_neox",
        "rms_norm_eps",
        "scale_emb",
        "residual_scale",
        "logits_divisor",
        "query_scale_beta",
        "query_scale_length",
    ),
    options=("model", "heads", "layers", "block", "dtype", "seed", "pool", "pages", "tail", "poison"),
    checks=("inputs", "guard", "values"),
    exempt={
        "neighbours": "a row's history is what it has computed: its key cannot change from step to step",
        "recompute": "every history is computed by the case itself",
    },
    plays_schedules=True,
    is_stack=True,
)
