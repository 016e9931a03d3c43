"""The three computations of a whole model's logits: against each other, and where they must differ."""

import importlib.metadata
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from cases.models import load_model, model_names
from harness.budgets import row_errors
from references import mla_logits, mla_logits_by_token, mla_logits_transformers
from references.oracle import AGREEMENT, Precision, oracle_for, oracles

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    *("deepseek-v2-lite", "deepseek-v3", "glm-4.7-flash", "kimi-k2"),
    *("kimi-linear-48b", "minicpm3-4b", "mistral-small-4"),
)
ROLES = ("definition", "derivation", "external")
OURS = ROLES[:2]
STAGES = ("q", "q_pe", "k_pe", "compressed_kv", "attention", "o_proj_out", "hidden")
HIDDEN, VOCAB, Q_RANK, LAYERS, BLOCK = 256, 512, 128, 2, 16

# Rows (kind, cached, new, sequence): every kind, and two slots in different places of one sequence.
MIXED = (
    ("prefill", 0, 7, 0),
    ("prefill", 20, 5, 1),
    ("idle", 0, 0, 2),
    ("decode", 33, 1, 3),
    ("paused", 6, 0, 4),
    ("decode", 9, 3, 5),
    ("prefill", 0, 1, 3),
)
WHOLE = (("prefill", 0, 40, 3),)
"""Sequence 3 from its beginning, past the 34 tokens that the mixed batch has of it."""


# ---- inputs --------------------------------------------------------------------------------------


def sequence(key, length):
    """Ids of a sequence, the same however much of it is asked for."""
    return [(131 * key + 17 * place + 31 * place * place) % VOCAB for place in range(length)]


@cache
def weights(name, heads=4):
    """Weights of a small model in bf16, such that attention's logits have a deviation of 2 to 3.

    Outputs of linear layers have deviation 1 where not said otherwise; norms' weights are not 1.
    """
    model = load_model(name)
    rank, width = model.kv_lora_rank, model.qk_rope_head_dim
    # Of logits q.k (N + D)^-0.5 m^2, with k of deviation 1.
    q_deviation = 2.5 / model.yarn_mscale**2
    keys_values = heads * (model.qk_nope_head_dim + model.v_head_dim)

    def drawn(tag, *shape, deviation=1.0):
        generator = torch.Generator().manual_seed(tag)
        values = torch.randn(*shape, generator=generator)
        return (values * deviation / math.sqrt(shape[-1])).to(torch.bfloat16)

    def norm(tag, *shape):
        generator = torch.Generator().manual_seed(tag)
        return (1 + 0.1 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    q_rows, compressed = heads * model.qk_head_dim, model.q_lora_rank is not None
    return {
        "embed_tokens": drawn(1, VOCAB, HIDDEN, deviation=math.sqrt(HIDDEN) / model.scale_emb),
        "input_layernorm": norm(2, LAYERS, HIDDEN),
        "q_a_proj": drawn(3, LAYERS, Q_RANK, HIDDEN) if compressed else None,
        "q_a_layernorm": norm(4, LAYERS, Q_RANK) if compressed else None,
        "q_b_proj": drawn(5, LAYERS, q_rows, Q_RANK, deviation=q_deviation) if compressed else None,
        "q_proj": None if compressed else drawn(6, LAYERS, q_rows, HIDDEN, deviation=q_deviation),
        "kv_a_proj_with_mqa": drawn(7, LAYERS, rank + width, HIDDEN),
        "kv_a_layernorm": norm(8, LAYERS, rank),
        "kv_b_proj": drawn(9, LAYERS, keys_values, rank),
        "o_proj": drawn(10, LAYERS, HIDDEN, heads * model.v_head_dim, deviation=2.0),
        "post_attention_layernorm": norm(11, LAYERS, HIDDEN),
        "gate_proj": drawn(12, LAYERS, HIDDEN, HIDDEN),
        "up_proj": drawn(13, LAYERS, HIDDEN, HIDDEN),
        "down_proj": drawn(14, LAYERS, HIDDEN, HIDDEN, deviation=2.0),
        "norm": norm(15, HIDDEN),
        "lm_head": drawn(16, VOCAB, HIDDEN),
    }


def make(name, rows=MIXED, *, heads=4, padding=2, changed=None):
    """Inputs of a step; `changed` maps (slot, position) to another id. The cache is NaN: nobody reads it."""
    model = load_model(name)
    histories = [sequence(key, cached + new) for _, cached, new, key in rows]
    for (slot, position), token in (changed or {}).items():
        histories[slot][position] = token
    cached = [row[1] for row in rows]
    new = [row[2] for row in rows]
    blocks = [-(-len(history) // BLOCK) for history in histories]
    ids = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(0))
    tables = torch.full((len(rows), max(blocks, default=0) + 1), 2**30)
    for slot, count in enumerate(blocks):
        tables[slot, :count] = ids[sum(blocks[:slot]) :][:count]
    owners = [slot for slot, count in enumerate(new) for _ in range(count)]
    positions = [c + i for c, count in zip(cached, new, strict=True) for i in range(count)]
    token_ids = [histories[slot][position] for slot, position in zip(owners, positions, strict=True)]

    def of(values):
        return torch.tensor(values, dtype=torch.int32)

    def sums(counts):
        return of([sum(counts[:slot]) for slot in range(len(counts) + 1)])

    shape = (LAYERS, len(ids), 1, BLOCK, model.kv_lora_rank + model.qk_rope_head_dim)
    return {
        "model": name,
        "softmax_scale": model.softmax_scale,
        "token_ids": of(token_ids + [0] * padding),
        "history_ids": of([token for history in histories for token in history]),
        "cu_seqlens_q": sums(new),
        "cu_seqlens_k": sums([len(history) for history in histories]),
        "seq_lens_encoder": of([row[2] if row[0] == "prefill" else 0 for row in rows]),
        "seq_lens_decoder": of(cached),
        "seq_lens_this_time": of(new),
        "batch_id_per_token": of(owners + [-1] * padding),
        "position_ids": of(positions + [-7] * padding),
        "block_tables": tables.to(torch.int32),
        "latent_cache": torch.full(shape, torch.nan, dtype=torch.bfloat16),
        **weights(name, heads),
    }


def logits(role, inputs, precision=None):
    return run(role, inputs, precision)["logits"]


def run(role, inputs, precision=None):
    if role == "external":
        pytest.importorskip("transformers")
    return oracle_for("mla_logits", role).run(inputs, precision)


@cache
def mixed(role, name):
    """Outputs for the mixed batch."""
    return run(role, make(name))


def whole(role, name):
    """Outputs for sequence 3 as one prefill of 40 tokens. Not while a model is replaced: they are kept."""
    for module in (mla_logits, mla_logits_by_token, mla_logits_transformers):
        assert module.load_model is load_model
    return _whole(role, name)


@cache
def _whole(role, name):
    return run(role, make(name, WHOLE, padding=0))


def difference(one, other):
    """The largest error of a row relative to the row's largest element."""
    return float(row_errors(one, other).largest.amax())


# ---- the two of ours -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_definition_and_derivation_agree_in_every_stage(name):
    one, other = (mixed(role, name) for role in OURS)
    assert set(one) == set(other) == {"logits", "latent_cache", *STAGES}
    for stage in ("logits", *STAGES):
        assert one[stage].shape == other[stage].shape
        assert one[stage].dtype == other[stage].dtype == torch.float64
        assert difference(one[stage], other[stage]) <= AGREEMENT, stage
    assert one["latent_cache"].rows.tolist() == other["latent_cache"].rows.tolist()
    assert difference(one["latent_cache"].values, other["latent_cache"].values) <= AGREEMENT


@pytest.mark.parametrize("name", MODELS)
def test_stages_have_the_shapes_of_the_model(name):
    model, got = load_model(name), mixed("definition", name)
    shapes = {
        "q": (4 * model.qk_head_dim,),
        "q_pe": (4, model.qk_rope_head_dim),
        "k_pe": (model.qk_rope_head_dim,),
        "compressed_kv": (model.kv_lora_rank,),
        "attention": (4 * model.v_head_dim,),
        "o_proj_out": (HIDDEN,),
        "hidden": (HIDDEN,),
    }
    tokens = sum(row[2] for row in MIXED) + 2
    assert got["logits"].shape == (tokens, VOCAB)
    assert {stage: tuple(got[stage].shape) for stage in STAGES} == {
        stage: (LAYERS, tokens, *shape) for stage, shape in shapes.items()
    }


@pytest.mark.parametrize("role", OURS)
def test_padding_is_zero_and_nothing_else_is(role):
    got = mixed(role, "deepseek-v3")
    for stage in ("logits", *STAGES):
        by_token = got[stage] if stage == "logits" else got[stage].movedim(1, 0)
        assert not by_token[-2:].any()
        assert bool(by_token[:-2].flatten(1).any(1).all())


@pytest.mark.parametrize("role", OURS)
def test_the_rows_written_are_those_of_the_new_tokens_in_every_layer(role):
    inputs, got = make("minicpm3-4b"), mixed(role, "minicpm3-4b")
    tables, blocks = inputs["block_tables"].tolist(), inputs["latent_cache"].shape[1]
    expected = [
        (layer * blocks + tables[slot][place // BLOCK]) * BLOCK + place % BLOCK
        for layer in range(LAYERS)
        for slot, (_, cached, new, _) in enumerate(MIXED)
        for place in range(cached, cached + new)
    ]
    writes = got["latent_cache"]
    assert writes.rows.tolist() == expected
    rows = torch.cat([got["compressed_kv"], got["k_pe"]], dim=-1)[:, :-2]
    assert torch.equal(writes.values, rows.flatten(0, 1))


@pytest.mark.parametrize("role", OURS)
@pytest.mark.parametrize("rows", [(), (("idle", 0, 0, 0), ("paused", 5, 0, 1))])
def test_a_step_without_tokens_gives_zeros_for_its_padding(role, rows):
    got = run(role, make("minicpm3-4b", rows, padding=3))
    assert got["logits"].shape == (3, VOCAB)
    assert got["hidden"].shape == (LAYERS, 3, HIDDEN)
    assert not any(bool(got[stage].any()) for stage in ("logits", *STAGES))
    assert got["latent_cache"].rows.shape == (0,)
    assert got["latent_cache"].values.shape == (0, 288)


def test_transformers_gives_zeros_for_padding_too():
    got = logits("external", make("minicpm3-4b", (("idle", 0, 0, 0),), padding=3))
    assert got.shape == (3, VOCAB)
    assert not got.any()


@pytest.mark.parametrize("name", MODELS)
def test_the_softmax_of_these_inputs_is_not_flat(name):
    # Mask, scale and position do not show where all keys weigh the same.
    model, inputs, got = load_model(name), make(name, WHOLE, padding=0), whole("definition", name)
    nope, heads = model.qk_nope_head_dim, 4
    for layer in range(LAYERS):
        up = inputs["kv_b_proj"][layer].double().view(heads, -1, model.kv_lora_rank)[:, :nope]
        q_nope = got["q"][layer].view(40, heads, -1)[..., :nope]
        scores = torch.einsum("ihn,hnr,jr->hij", q_nope, up, got["compressed_kv"][layer])
        scores += torch.einsum("ihd,jd->hij", got["q_pe"][layer], got["k_pe"][layer])
        assert 2.0 < float((scores * model.softmax_scale).std()) < 4.0


@pytest.mark.parametrize("role", OURS)
def test_inputs_of_another_kind_are_refused(role):
    inputs = make("deepseek-v3")
    with pytest.raises(TypeError, match="model must be a string, got float"):
        run(role, {**inputs, "model": 3.0})
    with pytest.raises(TypeError, match="norm must be a tensor, got int"):
        run(role, {**inputs, "norm": 3})


@pytest.mark.parametrize("role", OURS)
@pytest.mark.parametrize("name", ["dots3-note", "longcat-flash"])
def test_a_model_with_other_layers_is_refused(role, name):
    inputs = {**make("deepseek-v3", padding=0), "model": name}
    with pytest.raises(ValueError, match=f"{name} has no model_type"):
        run(role, inputs)


# ---- against transformers ------------------------------------------------------------------------


def later(name):
    """Of sequence 3 of 40 tokens: the definition's logits and transformers'."""
    return whole("definition", name)["logits"], whole("external", name)["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_definition_and_transformers_agree_beyond_the_first_position(name):
    oracle = oracle_for("mla_logits", "external")
    assert oracle.unavailable(make(name)) is None
    one, other = mixed("definition", name)["logits"], mixed("external", name)["logits"]
    assert difference(one, other) <= oracle.agreement == 1e-5
    one, other = later(name)
    assert difference(one[1:], other[1:]) <= oracle.agreement


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_what_the_modules_of_transformers_give(name):
    pytest.importorskip("transformers")
    inputs, expected = make(name, WHOLE, padding=0), whole("definition", name)
    network = mla_logits_transformers.build(inputs)
    seen = {stage: [] for stage in ("q", "compressed_kv", "attention", "o_proj_out", "hidden")}
    for layer in network.model.layers:
        attention = layer.self_attn
        query = attention.q_proj if load_model(name).q_lora_rank is None else attention.q_b_proj
        for stage, module in {
            "q": query,
            "compressed_kv": attention.kv_a_layernorm,
            "o_proj_out": attention.o_proj,
            "hidden": layer,
        }.items():
            module.register_forward_hook(lambda _, __, out, stage=stage: seen[stage].append(out))
        attention.o_proj.register_forward_pre_hook(lambda _, given: seen["attention"].append(given[0]))
    with torch.no_grad():
        network(input_ids=inputs["history_ids"].long()[None], use_cache=False)
    for stage, values in seen.items():
        assert difference(torch.stack(values).reshape(expected[stage].shape), expected[stage]) <= 1e-5, stage


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_softmax_scale_shows_from_the_second_position_on(name):
    # Without m^2 where there is one, else (R + D)^-0.5: the classic mistakes.
    model = load_model(name)
    wrong = model.qk_head_dim**-0.5
    if model.yarn_mscale == 1:
        wrong = (model.kv_lora_rank + model.qk_rope_head_dim) ** -0.5
    inputs = {**make(name, WHOLE, padding=0), "softmax_scale": wrong}
    _, expected = later(name)
    for role in OURS:
        got = logits(role, inputs)
        assert difference(got[:1], expected[:1]) <= 1e-5
        assert difference(got[1:], expected[1:]) > 0.01


@pytest.mark.parametrize("name", [name for name in MODELS if load_model(name).rope != "none"])
def test_a_wrong_rope_style_shows_from_the_second_position_on(name, monkeypatch):
    model = load_model(name)
    wrong = replace(model, rope="half-split" if model.rope == "interleaved" else "interleaved")
    _, expected = later(name)
    for module in (mla_logits, mla_logits_by_token):
        monkeypatch.setattr(module, "load_model", lambda _: wrong)
        got = module.run(make(name, WHOLE, padding=0))["logits"]
        assert difference(got[:1], expected[:1]) <= 1e-5
        assert difference(got[1:], expected[1:]) > 0.01


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kimi-linear-48b", {"rope": "interleaved"}),
        ("deepseek-v3", {"rope": "none"}),
        ("deepseek-v3", {"rope_theta": 5e4}),
        ("deepseek-v3", {"rope_scaling": None}),
        ("glm-4.7-flash", {"rope_theta": 1e4}),
        ("minicpm3-4b", {"rope_scaling": None}),
    ],
)
def test_a_wrong_rotation_shows_from_the_second_position_on(name, wrong, monkeypatch):
    model, (_, expected) = replace(load_model(name), **wrong), later(name)
    monkeypatch.setattr(mla_logits, "load_model", lambda _: model)
    got = logits("definition", make(name, WHOLE, padding=0))
    assert difference(got[:1], expected[:1]) <= 1e-5
    assert difference(got[1:], expected[1:]) > 1e-3


@pytest.mark.parametrize(
    "wrong", [{"scale_emb": 1.0}, {"scale_depth": None}, {"num_hidden_layers": 2}, {"dim_model_base": None}]
)
def test_every_factor_of_minicpm_shows(wrong, monkeypatch):
    model, (_, expected) = replace(load_model("minicpm3-4b"), **wrong), later("minicpm3-4b")
    monkeypatch.setattr(mla_logits, "load_model", lambda _: model)
    got = logits("definition", make("minicpm3-4b", WHOLE, padding=0))
    assert difference(got, expected) > 0.01


def test_queries_grow_with_every_original_length(monkeypatch):
    # 8192 tokens are many: here the original length is 16, and positions 16 and 32 begin a new one.
    real = load_model("mistral-small-4")
    model = replace(real, rope_scaling=replace(real.rope_scaling, original_max_position_embeddings=16))
    plain = replace(model, rope_scaling=replace(model.rope_scaling, llama_4_scaling_beta=0.0))
    inputs = make("mistral-small-4", WHOLE, padding=0)
    for module in (mla_logits, mla_logits_by_token, mla_logits_transformers):
        monkeypatch.setattr(module, "load_model", lambda _: model)
    expected = logits("external", inputs)
    for role in OURS:
        assert difference(logits(role, inputs), expected) <= 1e-5
    monkeypatch.setattr(mla_logits, "load_model", lambda _: plain)
    got = logits("definition", inputs)
    assert difference(got[:16], expected[:16]) <= 1e-5
    assert float(row_errors(got[16:], expected[16:]).largest.amin()) > 1e-4
    ones = mla_logits.query_scale(real, torch.tensor([0, 8191, 8192, 16384]))
    assert ones.tolist() == pytest.approx([1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)], rel=1e-14)


def test_the_table_is_scaled_by_the_ratio_of_mscales(monkeypatch):
    # No model of ours has two different ones: 1.0 over 0.707, which is not the softmax's m.
    real = load_model("deepseek-v2-lite")
    model = replace(real, rope_scaling=replace(real.rope_scaling, mscale=1.0))
    inputs = make("deepseek-v2-lite", WHOLE, padding=0)
    plain = whole("definition", "deepseek-v2-lite")["logits"]
    for module in (mla_logits, mla_logits_by_token, mla_logits_transformers):
        monkeypatch.setattr(module, "load_model", lambda _: model)
    one, other, external = (logits(role, inputs) for role in ROLES)
    assert difference(one, other) <= AGREEMENT
    assert difference(one, external) <= 1e-5
    assert difference(one[1:], plain[1:]) > 1e-3


@pytest.mark.parametrize("name", ["glm-4.7-flash", "kimi-linear-48b", "minicpm3-4b"])
def test_small_latents_and_small_streams_show_which_epsilon_a_norm_has(name):
    # Where rms_norm_eps is 1e-5 and the latents' norms have 1e-6: values of about 0.01 feel the difference.
    inputs = make(name, WHOLE, padding=0)
    shrunk = ("embed_tokens", "kv_a_proj_with_mqa", *(["q_a_proj"] if inputs["q_a_proj"] is not None else []))
    inputs |= {part: inputs[part] / 64 for part in shrunk}
    expected = logits("external", inputs)
    for role in OURS:
        assert difference(logits(role, inputs), expected) <= 1e-5


@pytest.mark.parametrize("eps", ["rms_norm_eps", "LATENT_NORM_EPS"])
def test_a_wrong_epsilon_shows(eps, monkeypatch):
    inputs = make("glm-4.7-flash", WHOLE, padding=0)
    inputs |= {part: inputs[part] / 64 for part in ("embed_tokens", "kv_a_proj_with_mqa", "q_a_proj")}
    expected = logits("derivation", inputs)
    if eps == "rms_norm_eps":
        model = replace(load_model("glm-4.7-flash"), rms_norm_eps=1e-6)
        monkeypatch.setattr(mla_logits, "load_model", lambda _: model)
    else:
        monkeypatch.setattr(mla_logits, "LATENT_NORM_EPS", 1e-5)
    assert difference(logits("definition", inputs), expected) > 1e-4


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_future_token_moves_no_logit_before_it(role, name):
    inputs = make(name, WHOLE, padding=0, changed={(0, 25): 3})
    got, expected = logits(role, inputs), whole(role, name)["logits"]
    # Rows of a matrix product may be summed in another order, no more.
    assert difference(got[:25], expected[:25]) <= (1e-5 if role == "external" else 1e-12)
    assert float(row_errors(got[25:], expected[25:]).largest.amin()) > 1e-4


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_what_the_whole_gives(role, name):
    # The same sequence as three chunks and a decode, each the history of the next; then three drafts.
    pieces = [("prefill", 0, 7, 3), ("prefill", 7, 17, 3), ("decode", 24, 1, 3), ("decode", 25, 4, 3)]
    got = logits(role, make(name, pieces, padding=0))
    expected = whole(role, name)["logits"][:29]
    assert difference(got, expected) <= (1e-5 if role == "external" else 1e-12)


@pytest.mark.parametrize("role", OURS)
def test_a_row_is_alone(role):
    # Slot 3 of the mixed batch decodes position 33 of sequence 3, slot 6 is its first token.
    got, expected = mixed(role, "mistral-small-4"), whole(role, "mistral-small-4")
    assert difference(got["logits"][12], expected["logits"][33]) <= 1e-12
    assert difference(got["logits"][16], expected["logits"][0]) <= 1e-12
    for stage in STAGES:
        assert difference(got[stage][:, 12].flatten(1), expected[stage][:, 33].flatten(1)) <= 1e-12


@pytest.mark.parametrize("heads", [2, 16])
def test_any_number_of_heads_will_do(heads):
    inputs = make("deepseek-v3", (("prefill", 3, 4, 0),), heads=heads)
    one, other, external = (logits(role, inputs) for role in ROLES)
    assert difference(one, other) <= AGREEMENT
    assert difference(one, external) <= 1e-5


# ---- rotated pairs -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", OURS)
@pytest.mark.parametrize("name", MODELS)
def test_pairs_stay_where_the_model_has_them(role, name):
    # At position 0 nothing turns; at others each pair keeps its length. A permutation would show in both.
    model, got, inputs = load_model(name), whole(role, name), make(name, WHOLE, padding=0)
    width = model.qk_rope_head_dim
    raw = got["q"].view(LAYERS, 40, 4, -1)[..., -width:]
    assert difference(got["q_pe"][:, 0], raw[:, 0]) <= 1e-12

    def lengths(part):
        if model.rope == "half-split":
            return part[..., : width // 2] ** 2 + part[..., width // 2 :] ** 2
        return part[..., 0::2] ** 2 + part[..., 1::2] ** 2

    assert difference(lengths(got["q_pe"]), lengths(raw)) <= 1e-12
    if model.rope == "none":
        assert torch.equal(got["q_pe"], raw)
    # k_pe of the first layer again, from the embedding on.
    stream = inputs["embed_tokens"][inputs["history_ids"].long()].double() * model.scale_emb
    stream = stream / (stream.square().mean(-1, keepdim=True) + model.rms_norm_eps).sqrt()
    down = (stream * inputs["input_layernorm"][0].double()) @ inputs["kv_a_proj_with_mqa"][0].double().mT
    raw = down[:, -width:]
    assert difference(got["k_pe"][0, 0], raw[0]) <= 1e-12
    assert difference(lengths(got["k_pe"][0]), lengths(raw)) <= 1e-12
    if model.rope != "none":
        # Pair 0 turns by a radian a position, save for what longrope slows it down by.
        speed = 1 / model.rope_scaling.short_factor[0] if model.rope == "half-split" else 1
        angle = torch.arange(40) * speed
        low, high = (0, width // 2) if model.rope == "half-split" else (0, 1)
        turned = raw[:, low] * angle.cos() - raw[:, high] * angle.sin()
        assert torch.allclose(got["k_pe"][0, :, low], turned, atol=1e-5)


# Frequencies that were worked out from the published configs: by pair.
GOLDEN = {
    "deepseek-v3": {0: 1, 9: 0.074989421, 10: 0.056234133, 11: 0.039006927, 16: 0.0055, 22: 0.000177828},
    "kimi-k2": {18: 0.0022742038, 19: 0.0016217600, 20: 3.61405e-5},
    "kimi-linear-48b": {},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_are_the_published_ones(name):
    of_definition = mla_logits.frequencies(load_model(name))
    of_derivation, scale = mla_logits_by_token._rotation(load_model(name))
    assert scale == mla_logits.table_scale(load_model(name)) == 1
    for pair, expected in GOLDEN[name].items():
        assert float(of_definition[pair]) == pytest.approx(expected, rel=1e-5)
        assert float(of_derivation[pair]) == pytest.approx(expected, rel=1e-5)
    if name == "kimi-linear-48b":
        assert not of_derivation.any()


@pytest.mark.parametrize("name", [name for name in model_names() if load_model(name).rope != "none"])
def test_both_of_ours_turn_alike_in_every_model(name):
    model = load_model(name)
    speeds, scale = mla_logits_by_token._rotation(model)
    assert mla_logits.frequencies(model).tolist() == pytest.approx(speeds.tolist(), rel=1e-12)
    assert mla_logits.table_scale(model) == pytest.approx(scale, rel=1e-14)


def test_longrope_beyond_the_original_length():
    # 1 + ln 4 / ln 32768 = 1.1333: its root; and the long factors instead of the short ones.
    real = load_model("minicpm3-4b")
    long = tuple(2 * factor for factor in real.rope_scaling.long_factor)
    model = replace(real, rope_scaling=replace(real.rope_scaling, factor=4.0, long_factor=long))
    speeds, scale = mla_logits_by_token._rotation(model)
    assert scale == mla_logits.table_scale(model) == pytest.approx(math.sqrt(1 + 2 / 15), rel=1e-14)
    halves = mla_logits.frequencies(real) / 2
    assert mla_logits.frequencies(model).tolist() == pytest.approx(halves.tolist(), rel=1e-12)
    assert speeds.tolist() == pytest.approx(halves.tolist(), rel=1e-12)


@pytest.mark.parametrize("work_out", [mla_logits.frequencies, mla_logits_by_token._rotation])
def test_an_unknown_scaling_is_refused(work_out):
    model = load_model("deepseek-v3")
    other = replace(model, rope_scaling=replace(model.rope_scaling, type="linear"))
    with pytest.raises(ValueError, match="yarn or longrope, got 'linear'"):
        work_out(other)


# ---- the emulation -------------------------------------------------------------------------------

DTYPES = {torch.bfloat16: (1e-3, 0.1), torch.float16: (1e-4, 0.01), torch.float32: (1e-8, 1e-4)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_emulation_is_off_by_what_its_dtype_rounds(name, dtype):
    exact = whole("definition", name)
    got = run("definition", make(name, WHOLE, padding=0), Precision(weights=dtype, output=dtype))
    smallest, largest = DTYPES[dtype]
    for stage in ("logits", *STAGES):
        assert torch.equal(got[stage], got[stage].to(dtype).double()), stage
        assert difference(got[stage].flatten(-1), exact[stage].flatten(-1)) < largest, stage
    assert smallest < float(row_errors(got["logits"], exact["logits"]).relative_l2.mean())
    assert torch.equal(got["latent_cache"].values, got["latent_cache"].values.to(dtype).double())


def test_weights_and_outputs_are_rounded_apart():
    inputs, exact = make("deepseek-v3", WHOLE, padding=0), whole("definition", "deepseek-v3")

    def error(weights, output):
        got = run("definition", inputs, Precision(weights, output))
        return float(row_errors(got["attention"], exact["attention"]).relative_l2[:, 1:].mean())

    half, single = torch.bfloat16, torch.float32
    assert error(single, single) < 1e-5
    assert 1e-4 < error(half, single) < error(single, half) < 0.1


@pytest.mark.parametrize("role", ["derivation", "external"])
def test_only_the_definition_emulates(role):
    half = Precision(weights=torch.bfloat16, output=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 only"):
        run(role, make("deepseek-v3"), half)


# ---- configs, and what transformers lacks --------------------------------------------------------

# model_type, rms_norm_eps and the rotation as published in the models' configs.
YARN = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
DEEPSEEK = {**YARN, "rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 4096}
PUBLISHED = {
    "deepseek-v2-lite": ("deepseek_v2", 1e-6, {**DEEPSEEK, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek-v3": ("deepseek_v3", 1e-6, DEEPSEEK),
    "glm-4.7-flash": ("glm4_moe_lite", 1e-5, {"rope_type": "default", "rope_theta": 1e6}),
    "kimi-k2": ("deepseek_v3", 1e-6, {**DEEPSEEK, "rope_theta": 5e4, "factor": 32, "beta_fast": 1}),
    "kimi-linear-48b": ("kimi_linear", 1e-5, None),
    "minicpm3-4b": (
        "minicpm3",
        1e-5,
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 1.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "mistral-small-4": (
        "mistral4",
        1e-6,
        {
            **YARN,
            "rope_theta": 1e4,
            "factor": 128,
            "original_max_position_embeddings": 8192,
            "llama_4_scaling_beta": 0.1,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_config_says_what_was_published(name):
    pytest.importorskip("transformers")
    model_type, eps, rotation = PUBLISHED[name]
    model = load_model(name)
    made = mla_logits_transformers.config(model, make(name))
    assert (made.model_type, made.rms_norm_eps) == (model_type, eps)
    if rotation is not None:
        parameters = made.rope_parameters
        assert {key: parameters[key] for key in rotation} == rotation
    assert (made.q_lora_rank is None) == (model.q_lora_rank is None)
    for dimension in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert getattr(made, dimension) == getattr(model, dimension)


@pytest.mark.parametrize("name", ["glm-4.7-flash", "kimi-linear-48b", "minicpm3-4b", "mistral-small-4"])
def test_model_files_say_what_transformers_has_as_defaults(name):
    # Where the architecture was made for one model, its defaults are that model's.
    transformers = pytest.importorskip("transformers")
    model = load_model(name)
    default = transformers.AutoConfig.for_model(model.model_type)
    for key in (
        *("hidden_size", "num_attention_heads", "num_hidden_layers", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "rms_norm_eps"),
    ):
        assert getattr(default, key) == getattr(model, key), key
    assert default.v_head_dim == model.v_head_dim
    assert not default.attention_bias
    if name == "minicpm3-4b":
        assert (default.scale_emb, default.scale_depth, default.dim_model_base) == (12, 1.4, 256)
        assert (model.scale_emb, model.scale_depth, model.dim_model_base) == (12, 1.4, 256)
        assert default.logits_scaling == model.logits_divisor == 10
    if name == "mistral-small-4":
        beta = default.rope_parameters["llama_4_scaling_beta"]
        assert beta == model.rope_scaling.llama_4_scaling_beta == 0.1


def test_a_small_minicpm_is_scaled_as_the_published_one():
    pytest.importorskip("transformers")
    network = mla_logits_transformers.build(make("minicpm3-4b"))
    assert network.config.logits_scaling == pytest.approx(10, rel=1e-14)
    assert network.model.layers[1].residual_scale == pytest.approx(1.4 / math.sqrt(62), rel=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_biases_nowhere(name):
    pytest.importorskip("transformers")
    parameters = dict(mla_logits_transformers.build(make(name)).named_parameters())
    assert not [parameter for parameter in parameters if "bias" in parameter]
    assert {str(parameter.dtype) for parameter in parameters.values()} == {"torch.float64"}


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "mistral-small-4"])
def test_a_version_without_m_squared_is_unavailable(name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    inputs, oracle = make(name), oracle_for("mla_logits", "external")
    attention = type(mla_logits_transformers.build(inputs).model.layers[0].self_attn)
    monkeypatch.setattr(sys.modules[attention.__module__], "yarn_apply_mscale", lambda _, scaling: scaling)
    reason = oracle.unavailable(inputs)
    model_type, model = PUBLISHED[name][0], load_model(name)
    assert reason == (
        f"transformers {transformers.__version__} scales the softmax of {model_type} by"
        f" {model.qk_head_dim**-0.5:.7f}, not by (N + D)^-0.5 m^2 = {model.stated_softmax_scale:.7f}"
    )
    with pytest.raises(mla_logits_transformers.Lacking, match="scales the softmax"):
        oracle.run(inputs, None)


def test_another_softmax_scale_is_not_asked_of_transformers():
    pytest.importorskip("transformers")
    inputs = {**make("deepseek-v3"), "softmax_scale": 0.5}
    reason = oracle_for("mla_logits", "external").unavailable(inputs)
    assert reason == "transformers takes no softmax scale of deepseek-v3 but 0.1352338, got 0.5000000"


def test_an_architecture_that_transformers_lacks_is_unavailable(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = replace(load_model("deepseek-v3"), model_type="deepseek_v99")
    monkeypatch.setattr(mla_logits_transformers, "load_model", lambda _: model)
    reason = oracle_for("mla_logits", "external").unavailable(make("deepseek-v3"))
    assert reason == f"transformers {transformers.__version__} has no architecture deepseek_v99"


@pytest.mark.parametrize(
    ("name", "said"), [("glm-5", "has no model_type"), ("longcat-flash", "has no model_type")]
)
def test_a_model_without_an_architecture_is_unavailable(name, said):
    pytest.importorskip("transformers")
    inputs = {**make("deepseek-v3"), "model": name}
    assert said in oracle_for("mla_logits", "external").unavailable(inputs)


def test_rows_too_long_for_float32_angles_are_unavailable():
    pytest.importorskip("transformers")
    oracle = oracle_for("mla_logits", "external")
    assert oracle.unavailable(make("deepseek-v3", (("decode", 255, 1, 0),))) is None
    reason = oracle.unavailable(make("deepseek-v3", (("prefill", 0, 3, 1), ("decode", 256, 1, 0))))
    assert reason == "transformers rotates in float32, exact enough for 256 tokens, got 257"


def test_at_the_longest_row_there_is_agreement_left():
    inputs = make("kimi-k2", (("decode", 244, 12, 0),), heads=2, padding=0)
    assert difference(logits("definition", inputs), logits("external", inputs)) <= 1e-5


def test_sizes_that_transformers_does_not_take_are_unavailable():
    # Three heads do not divide a hidden size of 256, which its DeepSeek-V2 wants.
    pytest.importorskip("transformers")
    reason = oracle_for("mla_logits", "external").unavailable(make("deepseek-v2-lite", heads=3))
    assert "takes no such deepseek_v2: " in reason
    assert "\n" not in reason


def test_a_weight_of_another_shape_is_unavailable():
    pytest.importorskip("transformers")
    inputs = {**make("deepseek-v3"), "norm": torch.ones(7)}
    assert "does not build deepseek_v3: " in oracle_for("mla_logits", "external").unavailable(inputs)


def test_without_transformers_only_its_oracle_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    inputs, external = make("minicpm3-4b", (("prefill", 0, 2, 0),)), oracle_for("mla_logits", "external")
    reason = external.unavailable(inputs)
    assert reason.startswith("transformers cannot be imported (")
    assert reason.endswith("): pip install 'mla-harness[transformers]'")
    with pytest.raises(mla_logits_transformers.Lacking, match="cannot be imported"):
        external.run(inputs, None)
    assert all(oracle_for("mla_logits", role).unavailable(inputs) is None for role in OURS)


def test_listing_the_oracles_does_not_import_transformers():
    code = (
        "import sys; from references.oracle import oracles; oracles(); print('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_callers_random_numbers_stay_as_they_are():
    pytest.importorskip("transformers")
    torch.manual_seed(5)
    mla_logits_transformers.build(make("minicpm3-4b"))
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3))


def test_there_are_three_oracles_with_their_sources():
    mine = [oracle for oracle in oracles() if oracle.operator == "mla_logits"]
    assert sorted(oracle.role for oracle in mine) == sorted(ROLES)
    assert {oracle.role: oracle.agreement for oracle in mine} == {
        "definition": AGREEMENT,
        "derivation": AGREEMENT,
        "external": 1e-5,
    }


def test_the_version_of_transformers_is_pinned():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = next(line.split("==")[1] for line in pins if line.startswith("transformers=="))
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("transformers is not installed")
    assert int(installed.split(".")[0]) == int(pinned.split(".")[0])
