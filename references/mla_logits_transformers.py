"""Logits of a whole model by HuggingFace transformers, from a config made here: nothing is downloaded.

Each row is one full forward over its ids, eager attention, weights in float64. transformers keeps its norms,
its rotation and its softmax in float32 all the same: 1e-5 is what is left of the agreement, for rows that are
not too long. Stages are left out: transformers orders rotated pairs its own way. Every layer is dense, and
latent attention, in architectures too that have others between.

A version that lacks an architecture, or whose softmax scale is not (N + D)^-0.5 m^2, makes this oracle
unavailable for the model: there are versions in which deepseek_v2 and mistral4 have no m^2, and the first
position, which sees one key, does not show it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cases.models import Model, load_model
from references.oracle import Inputs, Oracle, Outputs, Precision, maybe_tensor, number, tensor, text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OTHER_NAMES = {"kimi_k2": "deepseek_v3"}
"""Architectures that transformers runs with the classes of another one."""

LONGEST = 256
"""Tokens of a row: 40 of them use 8e-7 of the agreement, 200 use 3e-6, 1000 are 3e-5 off, because angles in
float32 are off by more the later the position."""

IN_ATTENTION = (
    *("q_a_proj", "q_a_layernorm", "q_b_proj", "q_proj"),
    *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
)
IN_MLP = ("gate_proj", "up_proj", "down_proj")
IN_LAYER = ("input_layernorm", "post_attention_layernorm")


class Lacking(Exception):
    """What transformers cannot do, in one sentence."""


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Logits [Tp, vocab], float64; padding 0.

    Raises:
        ValueError: an emulation is asked for, which the definition has.
        Lacking: see `unavailable`.
    """
    if precision is not None:
        raise ValueError("logits by transformers are float64 only")
    network = build(inputs)
    ids = tensor(inputs, "history_ids").to(torch.int64)
    starts = tensor(inputs, "cu_seqlens_k").tolist()
    vocab = tensor(inputs, "lm_head").shape[0]
    logits = torch.zeros(len(tensor(inputs, "token_ids")), vocab, dtype=torch.float64, device=ids.device)
    first = 0
    for slot, new in enumerate(tensor(inputs, "seq_lens_this_time").tolist()):
        if new == 0:
            continue
        row = ids[starts[slot] : starts[slot + 1]]
        with torch.no_grad():
            logits[first : first + new] = network(input_ids=row[None], use_cache=False).logits[0, -new:]
        first += new
    return {"logits": logits}


def unavailable(inputs: Inputs) -> str | None:
    """Why transformers cannot compute these logits, or None."""
    try:
        build(inputs)
    except Lacking as lack:
        return str(lack)
    return None


def build(inputs: Inputs) -> PreTrainedModel:
    """The network with the inputs' weights, float64, on their device.

    Raises:
        Lacking: transformers is missing, or has not the architecture, or has it with another softmax scale,
            or does not take these sizes; or a row is too long for its float32.
    """
    model = load_model(text(inputs, "model"))
    made = config(model, inputs)
    longest = max(tensor(inputs, "cu_seqlens_k").diff().tolist(), default=0)
    if longest > LONGEST:
        raise Lacking(f"transformers rotates in float32, exact enough for {LONGEST} tokens, got {longest}")
    import transformers

    library = f"transformers {transformers.__version__}"
    expected, asked = model.softmax_scale, number(inputs, "softmax_scale")
    if not math.isclose(asked, expected, rel_tol=1e-12):
        raise Lacking(
            f"transformers takes no softmax scale of {model.name} but {expected:.7f}, got {asked:.7f}"
        )
    try:
        # Its first weights are random, and of no interest: the caller's random numbers stay as they are.
        with torch.random.fork_rng(devices=[]):
            # By name: not every architecture is among those that its AutoModelForCausalLM knows.
            network = getattr(transformers, type(made).__name__.replace("Config", "ForCausalLM"))(made)
        network.to(device=tensor(inputs, "token_ids").device, dtype=torch.float64).eval()
        # Strict: no weight is left as it was made, and none has nowhere to go.
        network.load_state_dict(_state(inputs), strict=True)
    except Exception as error:
        raise Lacking(f"{library} does not build {made.model_type}: {_one_line(error)}") from None
    for layer in network.model.layers:
        scale = getattr(layer.self_attn, "scaling", math.nan)
        if not math.isclose(scale, expected, rel_tol=1e-12):
            what = f"scales the softmax of {made.model_type} by {scale:.7f}"
            raise Lacking(f"{library} {what}, not by (N + D)^-0.5 m^2 = {expected:.7f}")
    return network


def config(model: Model, inputs: Inputs) -> PreTrainedConfig:
    """The config of a small `model`, with the sizes of the inputs' weights.

    Raises:
        Lacking: see `build`.
    """
    try:
        import transformers
    except ImportError as error:
        reason = f"transformers cannot be imported ({_one_line(error)})"
        raise Lacking(f"{reason}: pip install 'mla-harness[transformers]'") from None
    if model.model_type is None:
        raise Lacking(f"{model.name} has no model_type: transformers cannot be asked for its layers")
    name = OTHER_NAMES.get(model.model_type, model.model_type)
    library = f"transformers {transformers.__version__}"
    if name not in transformers.CONFIG_MAPPING:
        raise Lacking(f"{library} has no architecture {name}")
    try:
        made = transformers.AutoConfig.for_model(name, **_arguments(model, inputs, name))
    except Exception as error:
        # Its own checks, which raise errors of several libraries.
        raise Lacking(f"{library} takes no such {name}: {_one_line(error)}") from None
    if name == "minicpm3" and model.dim_model_base is not None:
        # Small, but divided as published. Its checker wants a whole number, which the quotient does not need.
        vars(made)["dim_model_base"] = made.hidden_size / model.logits_divisor
    return made


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _arguments(model: Model, inputs: Inputs, name: str) -> dict[str, Any]:
    """What the config is made with: published constants, small sizes, every layer dense."""
    layers, rows, _ = tensor(inputs, "kv_b_proj").shape
    vocab, hidden = tensor(inputs, "embed_tokens").shape
    heads = rows // (model.qk_nope_head_dim + model.v_head_dim)
    q_a_proj = maybe_tensor(inputs, "q_a_proj")
    arguments: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": tensor(inputs, "gate_proj").shape[1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None if q_a_proj is None else q_a_proj.shape[1],
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        # Defaults lie beyond a small vocabulary.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.rope != "none":
        arguments["rope_parameters"] = _rope_parameters(model)
    if model.rope_scaling is not None:
        length = model.rope_scaling.factor * model.rope_scaling.original_max_position_embeddings
        arguments["max_position_embeddings"] = int(length)
    if name in {"deepseek_v2", "deepseek_v3", "mistral4"}:
        arguments["first_k_dense_replace"] = layers
    if name in {"glm4_moe_lite", "kimi_linear"}:
        arguments["mlp_layer_types"] = ["dense"] * layers
    if name == "kimi_linear":
        arguments["layer_types"] = ["full_attention"] * layers
    if name == "minicpm3":
        arguments["scale_emb"] = model.scale_emb
        # It divides by the root of the number of layers, ours is the published number.
        arguments["scale_depth"] = model.residual_scale * math.sqrt(layers)
    return arguments


def _rope_parameters(model: Model) -> dict[str, Any]:
    """The rotation, in transformers' words."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    parameters: dict[str, Any] = {
        "rope_type": scaling.type,
        "rope_theta": model.rope_theta,
        "factor": float(scaling.factor),
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if scaling.type == "longrope":
        lists = {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        return {**parameters, **lists}
    parameters |= {
        "beta_fast": float(scaling.beta_fast),
        "beta_slow": float(scaling.beta_slow),
        "mscale": float(scaling.mscale),
        "mscale_all_dim": float(scaling.mscale_all_dim),
    }
    if model.model_type == "mistral4":
        parameters["llama_4_scaling_beta"] = scaling.llama_4_scaling_beta
    return parameters


def _state(inputs: Inputs) -> dict[str, Tensor]:
    """The weights by the names of a checkpoint, float64."""
    state = {
        "model.embed_tokens.weight": tensor(inputs, "embed_tokens"),
        "model.norm.weight": tensor(inputs, "norm"),
        "lm_head.weight": tensor(inputs, "lm_head"),
    }
    for folder, names in (("self_attn.", IN_ATTENTION), ("mlp.", IN_MLP), ("", IN_LAYER)):
        for name in names:
            stacked = maybe_tensor(inputs, name)
            for layer, weight in enumerate(() if stacked is None else stacked):
                state[f"model.layers.{layer}.{folder}{name}.weight"] = weight
    return {name: weight.to(torch.float64) for name, weight in state.items()}


ORACLE = Oracle(
    name="mla_logits_transformers",
    operator="mla_logits",
    role="external",
    source="HuggingFace transformers: deepseek_v2 and _v3, glm4_moe_lite, kimi_linear, minicpm3, mistral4",
    run=run,
    agreement=1e-5,
    unavailable=unavailable,
)
