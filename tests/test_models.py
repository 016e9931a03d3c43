"""The models: what their files state is what their dimensions give, and what was published."""

import re

import pytest

from cases import CaseError, parse
from cases.models import grouped_model_names, latent_model_names, load_model, model_names

# hidden, heads, q_lora, R, N, D, V, layers, theta, m, softmax scale, rope: from the published configs.
PUBLISHED = {
    "deepseek-v2-lite": (2048, 16, None, 512, 128, 64, 128, 27, 1e4, 1.2608038, 0.1147214, "interleaved"),
    "deepseek-v2": (5120, 128, 1536, 512, 128, 64, 128, 60, 1e4, 1.3688879, 0.1352338, "interleaved"),
    "deepseek-v3": (7168, 128, 1536, 512, 128, 64, 128, 61, 1e4, 1.3688879, 0.1352338, "interleaved"),
    "deepseek-v3.2": (7168, 128, 1536, 512, 128, 64, 128, 61, 1e4, 1.3688879, 0.1352338, "interleaved"),
    "kimi-k2": (7168, 64, 1536, 512, 128, 64, 128, 61, 5e4, 1.3465736, 0.1308608, "interleaved"),
    "kimi-k2-thinking": (7168, 64, 1536, 512, 128, 64, 128, 61, 5e4, 1.4158883, 0.1446796, "interleaved"),
    "glm-4.7-flash": (2048, 20, 768, 512, 192, 64, 256, 47, 1e6, 1, 0.0625, "interleaved"),
    "glm-5": (6144, 64, 2048, 512, 192, 64, 256, 78, 1e6, 1, 0.0625, "interleaved"),
    "minicpm3-4b": (2560, 40, 768, 256, 64, 32, 64, 62, 1e4, 1, 0.1020621, "half-split"),
    "mistral-small-4": (4096, 32, 1024, 256, 64, 64, 128, 36, 1e4, 1.4852030, 0.1949695, "interleaved"),
    "mistral-large-3": (7168, 128, 1536, 512, 128, 64, 128, 61, 1e4, 1, 0.0721688, "interleaved"),
    "moonlight-16b-a3b": (2048, 16, None, 512, 128, 64, 128, 27, 5e4, 1, 0.0721688, "interleaved"),
    "kimi-linear-48b": (2304, 32, None, 512, 128, 64, 128, 27, 1e4, 1, 0.0721688, "none"),
    "longcat-flash": (6144, 64, 1536, 512, 128, 64, 128, 56, 1e7, 1, 0.0721688, "interleaved"),
    "dots3-note": (5120, 128, 1024, 512, 128, 64, 128, 13, 8e7, 1, 0.0721688, "interleaved"),
    "dots3-note-sliding": (5120, 64, 1024, 1024, 192, 64, 128, 33, 5e4, 1, 0.0625, "interleaved"),
}


# hidden, heads, KV heads, K, rotated, V, layers, theta, softmax scale, rope: from the published configs.
PUBLISHED_IN_GROUPS = {
    "ernie-4.5-21b-a3b": (2560, 20, 4, 128, 128, 128, 28, 5e5, 0.0883883, "interleaved"),
    "mimo-v2-flash": (4096, 64, 4, 192, 64, 128, 48, 5e6, 0.0721688, "half-split"),
}


def test_every_model_s_published_dimensions_are_known():
    assert set(PUBLISHED) == set(latent_model_names())
    assert set(PUBLISHED_IN_GROUPS) == set(grouped_model_names())


@pytest.mark.parametrize("name", PUBLISHED_IN_GROUPS)
def test_a_model_without_latents_has_its_published_dimensions(name):
    model = load_model(name)
    assert not model.has_latents
    assert (
        model.hidden_size,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.qk_head_dim,
        model.qk_rope_head_dim,
        model.v_head_dim,
        model.num_hidden_layers,
        model.rope_theta,
        round(model.softmax_scale, 7),
        model.rope,
    ) == PUBLISHED_IN_GROUPS[name]


@pytest.mark.parametrize("name", model_names())
def test_the_stated_softmax_scale_is_what_the_dimensions_give(name):
    model = load_model(name)
    assert round(model.softmax_scale, 7) == model.stated_softmax_scale


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_its_published_dimensions(name):
    model = load_model(name)
    assert (
        model.hidden_size,
        model.num_attention_heads,
        model.q_lora_rank,
        model.kv_lora_rank,
        model.qk_nope_head_dim,
        model.qk_rope_head_dim,
        model.v_head_dim,
        model.num_hidden_layers,
        model.rope_theta,
        round(model.yarn_mscale, 7),
        round(model.softmax_scale, 7),
        model.rope,
    ) == PUBLISHED[name]


@pytest.mark.parametrize("name", latent_model_names())
def test_a_model_can_be_named_in_a_case(name):
    case = parse(f"mla_decode/decode:5/model={name},block=16")
    layer = case.layers[0]
    assert layer.model.name == name
    assert layer.num_attention_heads == layer.model.num_attention_heads
    assert layer.latent_width == layer.model.kv_lora_rank + layer.model.qk_rope_head_dim
    assert round(layer.softmax_scale, 7) == layer.model.stated_softmax_scale


def test_every_latent_width_in_use_occurs():
    cases = [parse(f"mla_decode//model={name}") for name in latent_model_names()]
    assert {case.layers[0].latent_width for case in cases} >= {288, 320, 576, 1088}


def test_mscale_needs_yarn_with_a_factor_above_one():
    assert load_model("minicpm3-4b").rope_scaling.type == "longrope"
    assert load_model("minicpm3-4b").yarn_mscale == 1
    assert load_model("mistral-large-3").rope_scaling.mscale_all_dim == 0
    assert load_model("mistral-large-3").yarn_mscale == 1


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=re.escape(f"one of {', '.join(model_names())}, got 'gpt-2'")):
        load_model("gpt-2")
    with pytest.raises(CaseError) as caught:
        parse("mla_decode/decode:1/heads=4,model=gpt-2")
    assert caught.value.text[caught.value.start : caught.value.end] == "gpt-2"
