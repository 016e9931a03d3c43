"""A step over a packed cache and through windows: worked by hand, against dense steps, layers that differ."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CaseError, parse
from cases.contract import contract_of, operators
from harness.budgets import judge_rows, lse_budgets, row_errors
from harness.checks import checks
from harness.data import ProjectedSource, Source
from harness.footprint import required_bytes
from harness.verdict import Status
from references._packed_rows import dequantised
from references.oracle import AGREEMENT, Precision, oracle_for

ROLES = ("definition", "derivation")
SMALL = "model=minicpm3-4b,heads=2"
PACKED = f"{SMALL},cache=packed"
RANK, ROPE = 128, 2


def step(inputs, role="definition", precision=None):
    return oracle_for("mla_step", role).run(inputs, precision)


def inputs_of(batch, layer=0):
    return {**batch.layers[layer].tensors, **batch.layers[layer].attributes}


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


def one_row(latents, cached, *, window, scale_fmt="ue8m0", is_packed=True):
    """Inputs of a chunk in blocks of two tokens: latents are multiples of ones, all queries are 0.

    W_UV hands on the first two columns, so that an output is the mean of what the visible tokens hold there.
    """
    new, length = len(latents) - cached, len(latents)
    rows = torch.zeros(length, RANK + ROPE, dtype=torch.bfloat16)
    rows[:, :RANK] = bf16(*latents)[:, None]
    blocks = -(-length // 2)
    if is_packed:
        cache = torch.full((blocks, 1, 2, RANK + 4 + 2 * ROPE), 0xFF, dtype=torch.uint8)
        # A power of two is its own code under the scale 2^-8 of a tile whose amax is 1.
        for token in range(cached):
            code = torch.tensor(latents[token] * 256).to(torch.float8_e4m3fn).view(torch.uint8)
            scale = torch.tensor([2.0**-8]).view(torch.uint8)
            cache[token // 2, 0, token % 2] = torch.cat([code.expand(RANK), scale, torch.zeros(4).byte()])
    else:
        cache = torch.full((blocks, 1, 2, RANK + ROPE), math.nan, dtype=torch.bfloat16)
        cache.view(-1, RANK + ROPE)[:cached] = rows[:cached]
    return {
        "q_nope": torch.zeros(new, 1, 2, dtype=torch.bfloat16),
        "q_pe": torch.zeros(new, 1, ROPE, dtype=torch.bfloat16),
        "compressed_kv": rows[cached:, :RANK],
        "k_pe": rows[cached:, RANK:],
        "w_uk": torch.zeros(1, 2, RANK, dtype=torch.bfloat16),
        "w_uv": torch.eye(RANK, 2, dtype=torch.bfloat16)[None],
        "latent_cache": cache,
        "block_tables": torch.arange(blocks, dtype=torch.int32)[None],
        "seq_lens_encoder": torch.tensor([new], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([cached], dtype=torch.int32),
        "seq_lens_this_time": torch.tensor([new], dtype=torch.int32),
        "softmax_scale": 1.0,
        "window": window,
        "scale_fmt": scale_fmt,
    }


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("window", "expected"),
    # Tokens hold 1, 1, 1/2, 1/4 and 1; the last two are new. A window counts the token itself.
    [
        (0, [11 / 16, 3 / 4]),
        (1, [1 / 4, 1]),
        (2, [3 / 8, 5 / 8]),
        (3, [7 / 12, 7 / 12]),
        (4, [11 / 16, 11 / 16]),
        (5, [11 / 16, 3 / 4]),
        (100, [11 / 16, 3 / 4]),
    ],
)
def test_a_token_sees_as_many_keys_as_its_window_has(window, expected, role, is_packed):
    got = step(one_row([1, 1, 0.5, 0.25, 1], 3, window=window, is_packed=is_packed), role)["out"]
    assert got[:, 0].tolist() == [pytest.approx([value, value]) for value in expected]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("scale_fmt", "stored"), [("ue8m0", 1.0), ("fp32", 1.0625)])
def test_a_new_token_is_answered_as_it_is_stored(scale_fmt, stored, role):
    # 17/16 lies half way between 1 and 9/8, the numbers of e4m3 under the scale 2^-8: ties go to the even
    # code. Under the scale amax / 448 it is the largest number there is.
    inputs = one_row([1.0625], 0, window=0, scale_fmt=scale_fmt)
    got = step(inputs, role)
    assert got["out"].flatten().tolist() == pytest.approx([stored, stored], rel=2e-7)
    assert got["latent_cache"].rows.tolist() == [0]
    row = got["latent_cache"].values[0]
    assert row[:RANK].unique().tolist() == ([0x78] if scale_fmt == "ue8m0" else [0x7E])
    scale = row[RANK : RANK + 4].view(torch.float32).item()
    assert scale == (2.0**-8 if scale_fmt == "ue8m0" else pytest.approx(1.0625 / 448, rel=1e-7))


@pytest.mark.parametrize("role", ROLES)
def test_keys_are_rounded_where_the_path_rounds_them(role):
    # 15/16 of an amax of 3 is no number of bf16 once it is multiplied by 3 / 448.
    inputs = one_row([2.8125], 0, window=0, scale_fmt="fp32")
    inputs["compressed_kv"][0, 64] = 3.0
    exact = step(inputs, role)["out"].flatten()
    rounded = step({**inputs, "rounds_keys": True}, role)["out"].flatten()
    assert exact[0] == pytest.approx(416 * torch.tensor(3 / 448).item(), rel=1e-7)
    assert torch.equal(rounded, exact.float().bfloat16().double())
    assert not torch.equal(rounded, exact)


# ---- the references ------------------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5", "paused:16"]),
    st.integers(1, 20).map("prefill:{}".format),
    st.integers(1, 40).map("decode:{}".format),
    st.tuples(st.integers(1, 40), st.integers(1, 20)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=4).map(",".join), st.sampled_from(["", ",pad:3"])
)
WINDOWS = st.one_of(st.integers(0, 3), st.integers(4, 70))


def largest_difference(inputs):
    one, other = (step(inputs, role)["out"] for role in ROLES)
    return float(row_errors(one, other).largest.amax()) if one.numel() else 0.0


@settings(max_examples=25, deadline=None)
@given(
    ROWS, WINDOWS, st.integers(1, 17), st.sampled_from(["same", "packed"]), st.sampled_from(["fp32", "ue8m0"])
)
def test_the_references_agree(make_batch, rows, window, block, cache, scale_fmt):
    options = f"{SMALL},block={block},window={window},cache={cache},scale_fmt={scale_fmt}"
    inputs = {**inputs_of(make_batch(f"mla_step/{rows}/{options}")), "rounds_keys": True}
    assert largest_difference(inputs) <= AGREEMENT
    one, other = (step(inputs, role)["latent_cache"] for role in ROLES)
    order, their_order = one.rows.argsort(), other.rows.argsort()
    assert torch.equal(one.rows[order], other.rows[their_order])
    ours, theirs = one.values[order], other.values[their_order]
    assert ours.dtype is theirs.dtype is inputs["latent_cache"].dtype
    assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("mode", ["planted", "randn", "flat", "peaked", "huge", "deep", "tiny"])
@pytest.mark.parametrize("model", ["deepseek-v3", "minicpm3-4b"])
def test_the_references_agree_in_every_mode(model, mode, make_batch):
    text = f"mla_step/draft:30+3,hit:40+3,prefill:5/heads=2,model={model},data={mode},window=33,cache=packed"
    assert largest_difference(inputs_of(make_batch(text))) <= AGREEMENT


@settings(max_examples=20, deadline=None)
@given(ROWS, WINDOWS)
def test_a_packed_step_is_the_dense_step_over_what_its_rows_stand_for(make_batch, rows, window):
    inputs = inputs_of(make_batch(f"mla_step/{rows}/{PACKED},block=16,window={window}"))
    packed, cache = step(inputs), inputs["latent_cache"]
    written = packed["latent_cache"]
    rank = inputs["w_uk"].shape[2]
    stored = dequantised(cache.view(-1, cache.shape[3]), rank, rounded=False)
    new = torch.zeros(len(inputs["k_pe"]), stored.shape[1], dtype=torch.float64)
    new[: len(written.rows)] = dequantised(written.values, rank, rounded=False)
    dense = {
        **inputs,
        "latent_cache": stored.view(*cache.shape[:3], -1),
        "compressed_kv": new[:, :rank],
        "k_pe": new[:, rank:],
    }
    assert torch.equal(step(dense)["out"], packed["out"])


@pytest.mark.parametrize("cache", ["same", "packed"])
@pytest.mark.parametrize("window", [1, 7, 16, 33])
def test_a_window_is_the_row_without_what_lies_before_it(cache, window, make_batch):
    # In blocks of one token a table may begin anywhere.
    inputs = inputs_of(make_batch(f"mla_step/hit:20+15/{SMALL},block=1,cache={cache},window={window}"))
    whole = step(inputs)["out"]
    flat = inputs["latent_cache"].view(-1, inputs["latent_cache"].shape[3])
    writes = step(inputs)["latent_cache"]
    flat[writes.rows] = writes.values
    for token in range(15):
        position = 20 + token
        begin = max(0, position - window + 1)
        alone = {
            **inputs,
            **{name: inputs[name][token : token + 1] for name in ("q_nope", "q_pe", "compressed_kv", "k_pe")},
            "block_tables": inputs["block_tables"][:, begin:],
            "seq_lens_decoder": torch.tensor([position - begin], dtype=torch.int32),
            "seq_lens_this_time": torch.tensor([1], dtype=torch.int32),
            "window": 0,
        }
        assert float(row_errors(step(alone)["out"], whole[token : token + 1]).largest.max()) <= AGREEMENT


@pytest.mark.parametrize("chunks", [(40,), (1, 39), (7, 9, 24), (15, 1, 16, 8)])
@pytest.mark.parametrize("role", ROLES)
def test_a_prompt_in_chunks_equals_one_prefill(chunks, role, make_batch):
    whole = inputs_of(make_batch(f"mla_step/prefill:40/{PACKED},block=16,window=9"))
    exact = step(whole)
    flat = whole["latent_cache"].view(-1, whole["latent_cache"].shape[3])
    outs, begin = [], 0
    for length in chunks:
        part = {
            **whole,
            **{
                name: whole[name][begin : begin + length]
                for name in ("q_nope", "q_pe", "compressed_kv", "k_pe")
            },
            "seq_lens_decoder": torch.tensor([begin], dtype=torch.int32),
            "seq_lens_this_time": torch.tensor([length], dtype=torch.int32),
        }
        got = step(part, role)
        outs.append(got["out"])
        flat[got["latent_cache"].rows] = got["latent_cache"].values
        begin += length
    assert float(row_errors(torch.cat(outs), exact["out"]).largest.max()) <= AGREEMENT
    assert torch.equal(flat[exact["latent_cache"].rows], exact["latent_cache"].values)


# ---- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "window"), [("deepseek-v3", 33), ("minicpm3-4b", 1), ("minicpm3-4b", 100)])
def test_planted_keys_stand_out_at_both_ends_of_a_window(model, window, make_batch):
    # Of tokens far behind the beginning: the newest and the oldest visible key hold about half of the mass,
    # and either the key before the window or the one after the token would hold more than half.
    text = f"mla_step/hit:150+12/model={model},heads=2,window={window},cache=packed"
    batch = make_batch(text)
    inputs, layer = inputs_of(batch), batch.layers[0].layer
    logits = logits_of(inputs, layer)
    leaks, masses = {"before": 0, "after": 0}, []
    for token in range(12):
        position = 150 + token
        first = position - window + 1
        visible = logits[token, :, first : position + 1]
        masses.append(torch.softmax(visible, -1)[:, [0, -1]].sum(-1).mean())
        for name, other in (("before", first - 1), ("after", position + 1)):
            if other < logits.shape[2]:
                with_other = torch.cat([visible, logits[token, :, other : other + 1]], -1)
                leaks[name] += float(torch.softmax(with_other, -1)[:, -1].mean()) > 0.5
    assert window <= 2 or 0.3 < sum(masses) / 12 < 0.7
    assert leaks["before"] >= 2
    assert leaks["after"] >= 2
    assert leaks["before"] + leaks["after"] >= 10


def logits_of(inputs, layer):
    """[tokens, H, keys] of one chunk, of every key of its row as it is stored, visible or not."""
    rank = layer.kv_lora_rank
    positions = torch.arange(162)
    source = Source(layer, "planted", 0)
    rows = source.cache_rows(torch.zeros_like(positions), positions).double()
    w_uk = ProjectedSource(layer, "planted", 0).w_uk(torch.device("cpu")).double()
    keys = torch.einsum("hnr,kr->hkn", w_uk, rows[:, :rank])
    logits = torch.einsum("qhn,hkn->qhk", inputs["q_nope"].double(), keys)
    return (logits + inputs["q_pe"].double() @ rows[:, rank:].T) * layer.softmax_scale


def test_deep_logits_stay_equal_where_they_were(make_batch):
    inputs = inputs_of(make_batch(f"mla_step/prefill:20/{PACKED},data=deep"))
    rows = dequantised(step(inputs)["latent_cache"].values, inputs["w_uk"].shape[2], rounded=False)
    assert torch.equal(rows[:, : inputs["w_uk"].shape[2]], inputs["compressed_kv"].double())


# ---- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["planted", "randn"])
@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("model", ["deepseek-v3", "minicpm3-4b"])
def test_both_forms_emulated_stay_within_the_budget(model, window, mode, make_batch):
    options = f"heads=4,model={model},window={window},cache=packed,data={mode}"
    inputs = {**inputs_of(make_batch(f"mla_step/hit:64+17,decode:100/{options}")), "rounds_keys": True}
    exact = step(inputs)
    precision = Precision(weights=torch.bfloat16, output=torch.bfloat16)
    errors = [row_errors(step(inputs, role, precision)["out"], exact["out"]) for role in ROLES]
    for error in errors:
        judged = judge_rows(
            "bf16",
            error,
            errors[0].relative_l2,
            logit_error=lse_budgets(exact["logit_magnitude"]),
            logit_spread=exact["logit_spread"],
        )
        assert float((judged.error / judged.budget).max()) < 0.76


def test_memory_is_foreseen(make_batch):
    text = f"mla_step/draft:30+3,hit:64+17,prefill:5,decode:100/{PACKED}"
    held = sum(len(buffer.raw) for buffer in make_batch(text).layers[0].inputs.values())
    assert required_bytes(parse(text), contract_of(parse(text)), "cpu") > 2 * held


# ---- the path ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton_path():
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    return mla_step.PATHS[0]


CASES = [
    f"mla_step/draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2/{PACKED},block=16,window=9",
    *(f"mla_step/{rows}/{PACKED},window=9" for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
    f"mla_step/hit:9+2,decode:9,pad:1/{PACKED},strided=0",
]


@pytest.mark.parametrize("text", CASES)
def test_the_path_passes_every_check(text, launched, every_result, triton_path):
    results = every_result(launched(text, triton_path))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


STACK = "layers=4,window=0+7+40+0,cache=same+packed+packed+same,block=64+32+16+64,heads=2+1+3+2"


def test_every_layer_of_a_stack_has_the_cache_that_is_counted(launched, triton_path):
    # Full, sliding, sliding, full (L33).
    launch = launched(f"mla_step/hit:31+4,decode:50/model=deepseek-v3,{STACK}", triton_path)
    tensors = [layer.batch.tensors["latent_cache"] for layer in launch.layers]
    assert [(cache.dtype, tuple(cache.shape[1:])) for cache in tensors] == [
        (torch.bfloat16, (1, 64, 576)),
        (torch.uint8, (1, 32, 656)),
        (torch.uint8, (1, 16, 656)),
        (torch.bfloat16, (1, 64, 576)),
    ]
    assert [layer.workspace["swa_indices"].view.shape[2] for layer in launch.layers] == [0, 128, 128, 0]
    failed = [result for result in checks()["values"].run(launch) if result.status is Status.FAILED]
    assert failed == []


def test_a_list_has_room_for_the_window_or_for_the_longest_row(triton_path):
    def entries(rows, window):
        shapes = triton_path.workspace(parse(f"mla_step/{rows}/{PACKED},window={window}"))
        return shapes["swa_indices"][0][2]

    assert [entries("decode:1000", window) for window in (0, 1, 128, 129, 513, 5000)] == [
        *(1024, 128, 128, 256, 640, 1024)
    ]
    assert entries("decode:5,hit:100+40", 513) == 256


def test_prefill_rows_of_a_packed_cache_take_no_keys(triton_path):
    shapes = triton_path.workspace(parse(f"mla_step/hit:6+4,prefill:3,decode:9,pad:1/{PACKED},window=5"))
    for name in ("key", "value", "query", "full_compressed_kv", "packed_nope", "decode_out"):
        assert math.prod(shapes[name][0]) == 0, name
    assert shapes["absorbed"][0][0] == 9
    assert math.prod(triton_path.workspace(parse(f"mla_step/paused:4,pad:3/{PACKED}"))["absorbed"][0]) == 0


def attends_to(change):
    """A path that answers by the definition, from changed inputs, but writes what is right."""

    def run(inputs, outputs, workspace):
        right = step(inputs)
        outputs["out"].copy_(step({**inputs, **change(inputs)})["out"])
        rows = outputs["latent_cache"].view(-1, outputs["latent_cache"].shape[3])
        rows[right["latent_cache"].rows] = right["latent_cache"].values

    return run


def new_tokens_as_they_came(inputs):
    """Packed rows of the cache read back as bf16; the new tokens as they are."""
    cache = inputs["latent_cache"]
    rank = inputs["w_uk"].shape[2]
    stored = dequantised(cache.view(-1, cache.shape[3]), rank, rounded=True).bfloat16()
    return {"latent_cache": stored.view(*cache.shape[:3], -1)}


def twice_the_scales(inputs):
    """Every stored scale as if it were twice as large, as a wrong exponent makes it; new tokens are right."""
    changed = inputs["latent_cache"].clone()
    rank = inputs["w_uk"].shape[2]
    rows = changed.view(-1, changed.shape[3])
    rows[:, rank : rank + rank // 32] = (
        rows[:, rank : rank + rank // 32].contiguous().view(torch.float32) * 2
    ).view(torch.uint8)
    return {"latent_cache": changed}


@pytest.mark.parametrize(
    ("rows", "change", "times"),
    [
        ("prefill:30", new_tokens_as_they_came, 2),
        # Three of 33 keys that are off by half an ulp of e4m3.
        ("hit:40+3,decode:60", new_tokens_as_they_came, 1),
        ("hit:40+3,decode:60", twice_the_scales, 2),
        ("hit:40+3,decode:60", lambda inputs: {"window": inputs["window"] + 1}, 2),
        ("hit:40+3,decode:60", lambda inputs: {"window": inputs["window"] - 1}, 2),
        ("hit:40+3,decode:60", lambda _: {"window": 0}, 2),
        ("hit:40+3,decode:60", lambda inputs: {"seq_lens_decoder": inputs["seq_lens_decoder"] * 0}, 2),
    ],
)
def test_what_engines_got_wrong_is_beyond_the_budget(rows, change, times, launched, triton_path):
    broken = replace(triton_path, run=attends_to(change))
    launch = launched(f"mla_step/{rows}/{PACKED},window=33", broken)
    (out,) = [result for result in checks()["values"].run(launch) if result.tensor == "out"]
    assert out.status is Status.FAILED
    assert out.error > times * out.budget
    whole = replace(triton_path, run=attends_to(lambda _: {}))
    right = launched(f"mla_step/{rows}/{PACKED},window=33", whole)
    assert all(result.status is Status.PASSED for result in checks()["values"].run(right))


# ---- what is asked, and of whom ------------------------------------------------------------------


def test_a_window_over_a_cache_in_the_model_dtype_is_refused_by_the_path(triton_path):
    reason = triton_path.supports(parse(f"mla_step/decode:5/{SMALL},window=9"))
    assert reason == "a window takes cache=packed, got cache=same: there alone keys are listed"
    assert triton_path.supports(parse(f"mla_step/decode:5/{PACKED},window=9")) is None


def test_every_layer_is_asked_for_its_own_kernels(triton_path):
    def refusal(options):
        return triton_path.supports(parse(f"mla_step/decode:5/{SMALL},layers=2,{options}"))

    # Blocks of 48 tokens are none of Triton's decode kernel, and any are of lists.
    assert refusal("cache=packed+same,block=48+64,window=5+0") is None
    assert "block_size" in refusal("cache=packed+same,block=64+48")
    assert "cache=same" in refusal("cache=packed+same,window=0+5")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("cache=fp8", "mla_step takes cache=same or cache=packed"),
        ("layers=2,cache=packed+fp8", "mla_step takes cache=same or cache=packed"),
        ("cache=packed,dtype=fp16", "dtype=bf16, got fp16"),
        ("cache=packed,dtype=fp32", "dtype=bf16, got fp32"),
    ],
)
def test_caches_that_no_step_has_are_refused(options, said):
    case = parse(f"mla_step/decode:5/{SMALL},{options}")
    with pytest.raises(CaseError, match=said) as caught:
        contract_of(case)
    assert caught.value.text[caught.value.start : caught.value.end] == "cache="


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 50))
def test_work_counts_the_pairs_that_a_window_leaves(rows, window):
    case = parse(f"mla_step/{rows}/{PACKED},window={window}")
    pairs = sum(
        min(position + 1, window or position + 1)
        for row in case.steps[0]
        if row.seq_lens_this_time
        for position in range(row.cached, row.cached + row.new)
    )
    tokens = sum(row.seq_lens_this_time for row in case.steps[0])
    # Absorbed, R = 256 and N = V = 64, and both products over the latents.
    flops = 2 * 2 * (tokens * 256 * 128 + pairs * (288 + 256))
    assert operators()["mla_step"].work(case, case.layers[0]).flops == flops


def test_work_counts_packed_bytes_by_hand():
    case = parse("mla_step/hit:100+2/model=minicpm3-4b,heads=1,window=9,cache=packed")
    work = operators()["mla_step"].work(case, case.layers[0])
    # Weights; queries and outputs; new latents read, packed and read back; eight rows that the first sees.
    assert work.bytes == 2 * (128 * 256 + 2 * (64 + 32 + 64) + 2 * 288) + (2 + 2 + 8) * 328
