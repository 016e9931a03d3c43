"""Query heads in groups: caches, attention and rotation by hand, on the harness's batches, and refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CaseError, parse
from cases.cache_layout import key_value_caches, layer_caches
from cases.contract import contract_of, operators
from harness.checks import checks
from harness.footprint import required_bytes
from harness.gqa_data import SINK_STEPS, SINK_UNIT, GroupSource
from harness.judge import _require_agreement
from harness.kernel_path import path_named
from harness.picture import draw
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
NAN = float("nan")
ERNIE = "model=ernie-4.5-21b-a3b"
ZOO = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def metadata(cached, new, encoder, padding=0):
    """The metadata of rows by hand."""
    slots = [slot for slot, count in enumerate(new) for _ in range(count)]
    starts = [sum(new[:slot]) for slot in range(len(new) + 1)]
    return {
        "seq_lens_encoder": int32(*encoder),
        "seq_lens_decoder": int32(*cached),
        "seq_lens_this_time": int32(*new),
        "cu_seqlens_q": int32(*starts),
        "batch_id_per_token": int32(*slots, *[-1] * padding),
    }


def path_of(request):
    """The path that a fixture's parameter names, if this process can run it."""
    if request.param.startswith("cuda/"):
        request.getfixturevalue("cuda_on_the_processor")
    else:
        pytest.importorskip("triton")
    return path_named(request.param)


# ---- gqa_step by hand ----------------------------------------------------------------------------


@pytest.fixture(params=[*ROLES, "triton/gqa_step", "cuda/gqa_step"])
def attend(request):
    """Inputs by name -> (out, lse); the kernel's in float32, with everything poisoned before."""

    def run(**inputs):
        inputs = {"splits": 1, "softmax_scale": 1.0, "window": 0, "sinks": None, **inputs}
        if request.param in ROLES:
            outputs = oracle_for("gqa_step", request.param).run(inputs, None)
        else:
            (tokens, heads), width = inputs["query"].shape[:2], inputs["v_cache"].shape[3]
            outputs = {
                "out": torch.full((tokens, heads, width), NAN),
                "lse": torch.full((tokens, heads), NAN),
            }
            path_of(request).run(inputs, outputs, {})
        return outputs["out"].double(), outputs["lse"].double()

    return run


def flat_batch(cached, new, *, heads, kv_heads, padding=0, block_size=2, blocks=9):
    """Queries of 0, which see all keys alike, and values that say KV head and position: 100 head + position.

    Block tables go backwards through the pool; what no row holds is NaN, padding's queries too.
    """
    tokens = sum(new)
    query = torch.zeros(tokens + padding, heads, 16)
    query[tokens:] = NAN
    k_cache = torch.full((blocks, kv_heads, block_size, 16), NAN)
    v_cache = torch.full((blocks, kv_heads, block_size, 16), NAN)
    tables = torch.full((len(cached), 4), 2**30, dtype=torch.int32)
    free = iter(range(blocks - 1, -1, -1))
    for slot, (old, count) in enumerate(zip(cached, new, strict=True)):
        for position in range(old + count):
            if position % block_size == 0:
                tables[slot, position // block_size] = next(free)
            block = tables[slot, position // block_size]
            k_cache[block, :, position % block_size] = 1.0
            v_cache[block, :, position % block_size] = 100.0 * torch.arange(kv_heads).view(-1, 1) + position
    encoder = [count if count > 1 or not old else 0 for old, count in zip(cached, new, strict=True)]
    return {
        "query": query,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_tables": tables,
        **metadata(cached, new, encoder, padding),
    }


def test_a_group_reads_its_own_kv_head(attend):
    # Two KV heads for six heads: heads 0 to 2 see positions 0 to 3 of the first, 3 to 5 of the second.
    out, lse = attend(**flat_batch([3], [1], heads=6, kv_heads=2))
    assert torch.allclose(out[0, :, 0], torch.tensor([1.5, 1.5, 1.5, 101.5, 101.5, 101.5]).double())
    assert torch.allclose(lse, torch.tensor(math.log(4)).double())


def test_every_row_kind_sees_what_is_cached_and_its_own_tokens(attend):
    # A decode row, a paused one, a chunk with a history and a first chunk: means of 0 to p.
    batch = flat_batch([4, 3, 1, 0], [1, 0, 3, 2], heads=3, kv_heads=1, padding=2)
    out, lse = attend(**batch)
    positions = torch.tensor([4, 1, 2, 3, 0, 1]).double()
    assert torch.allclose(out[:6, :, 5], (positions / 2).view(-1, 1).expand(-1, 3))
    assert torch.allclose(lse[:6], (positions + 1).log().view(-1, 1).expand(-1, 3))
    assert bool((out[6:] == 0).all())
    assert bool((lse[6:] == -math.inf).all())


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_counts_the_token_itself(attend, window):
    batch = flat_batch([4, 2], [1, 3], heads=3, kv_heads=1)
    # What no token sees may hold anything: the first rows of either are NaN.
    first = {0: 4 - window + 1, 1: 2 - window + 1}
    for slot, oldest in first.items():
        for position in range(max(0, oldest)):
            block = batch["block_tables"][slot, position // 2]
            for name in ("k_cache", "v_cache"):
                batch[name][block, :, position % 2] = NAN
    out, lse = attend(**batch, window=window)
    positions = torch.tensor([4, 2, 3, 4]).double()
    seen = torch.minimum(positions + 1, torch.tensor(float(window)).double())
    assert torch.allclose(out[:, 0, 0], positions - (seen - 1) / 2)
    assert torch.allclose(lse[:, 0], seen.log())


def test_a_sink_takes_its_share_and_has_no_value(attend):
    # Position 1 sees values 0 and 1; a sink of ln 2 weighs as much as both.
    sinks = torch.tensor([math.log(2.0), 0.0, -100.0])
    batch = flat_batch([1], [1], heads=3, kv_heads=1, padding=1)
    out, lse = attend(**batch, sinks=sinks)
    assert torch.allclose(out[0, :, 0], torch.tensor([1 / 4, 1 / 3, 1 / 2]).double())
    assert torch.allclose(lse[0], torch.tensor([4.0, 3.0, 2.0]).log().double())
    assert bool((lse[1] == -math.inf).all())


def test_logits_are_scaled_and_their_lse_is_natural(attend):
    batch = flat_batch([1], [1], heads=1, kv_heads=1)
    batch["query"] = torch.ones(1, 1, 16)
    block = batch["block_tables"][0, 0]
    batch["k_cache"][block, 0] = torch.tensor([[0.0], [1.0]]).expand(2, 16)
    out, lse = attend(**batch, softmax_scale=math.log(3.0) / 16)
    # Weights 1 and 3.
    assert torch.allclose(out[0, 0], torch.tensor(0.75).double())
    assert torch.allclose(lse, torch.tensor(math.log(4.0)).double())


# ---- gqa_cache_write by hand ---------------------------------------------------------------------


@pytest.fixture(params=[*ROLES, "triton/gqa_cache_write", "cuda/gqa_cache_write"])
def write(request):
    """(inputs) -> (query, k_cache, v_cache) afterwards, written into copies of the caches."""

    def run(**inputs):
        caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
        if request.param in ROLES:
            outputs = oracle_for("gqa_cache_write", request.param).run(inputs, None)
            for name, cache in caches.items():
                writes = outputs[name]
                cache.view(-1, cache.shape[-1])[writes.rows] = writes.values.to(cache.dtype)
            return outputs["query"].float(), *caches.values()
        kv_heads, _, width = caches["k_cache"].shape[1:]
        columns = inputs["qkv"].shape[1] - kv_heads * (width + caches["v_cache"].shape[3])
        query = torch.full((len(inputs["qkv"]), columns // width, width), NAN)
        path_of(request).run(inputs, {"query": query, **caches}, {})
        return query, *caches.values()

    return run


def quarter_turns(is_neox):
    """A decode row with two tokens cached, a first chunk of one, padding: 3 heads and 1, of 4 and 2 columns.

    The table turns the first two columns by a quarter at position 2 and by a half at position 0.
    """
    row = torch.arange(1.0, 19.0)
    table = torch.full((3, 2), NAN)
    table[2], table[0] = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0])
    return {
        "qkv": torch.stack([row, 100 + row, torch.full((18,), NAN)]),
        "cos_sin_cache": table,
        "k_cache": torch.full((3, 1, 2, 4), -1.0),
        "v_cache": torch.full((3, 1, 2, 2), -1.0),
        "block_tables": torch.tensor([[1, 2], [0, 2**30]], dtype=torch.int32),
        "is_neox": is_neox,
        **metadata([2, 0], [1, 1], [0, 1], padding=1),
    }


@pytest.mark.parametrize("is_neox", [0, 1])
def test_a_decode_row_beside_a_first_chunk_is_written_behind_its_history(write, is_neox):
    # B48. Of one pair both styles are the same.
    query, k_cache, v_cache = write(**quarter_turns(is_neox))
    assert query.tolist() == [
        [[-2, 1, 3, 4], [-6, 5, 7, 8], [-10, 9, 11, 12]],
        [[-101, -102, 103, 104], [-105, -106, 107, 108], [-109, -110, 111, 112]],
        [[0, 0, 0, 0]] * 3,
    ]
    # Position 2 is the first of the row's second block, block 2; position 0 that of block 0.
    expected = torch.full((3, 1, 2, 4), -1.0)
    expected[2, 0, 0] = torch.tensor([-14.0, 13, 15, 16])
    expected[0, 0, 0] = torch.tensor([-113.0, -114, 115, 116])
    assert torch.equal(k_cache, expected)
    expected = torch.full((3, 1, 2, 2), -1.0)
    expected[2, 0, 0], expected[0, 0, 0] = torch.tensor([17.0, 18]), torch.tensor([117.0, 118])
    assert torch.equal(v_cache, expected)


@pytest.mark.parametrize(("is_neox", "turned"), [(0, [-2, 1, -4, 3]), (1, [-3, -4, 1, 2])])
def test_pairs_lie_side_by_side_or_half_a_head_apart(write, is_neox, turned):
    inputs = {
        **quarter_turns(is_neox),
        "cos_sin_cache": torch.tensor([[0.0, 0, 1, 1]] * 3),
    }
    query, k_cache, _ = write(**inputs)
    assert query[0, 0].tolist() == turned
    assert k_cache[2, 0, 0].tolist() == [
        12 + abs(column) if column > 0 else -12 - abs(column) for column in turned
    ]


def test_without_a_table_all_columns_are_copied(write):
    query, k_cache, v_cache = write(**{**quarter_turns(0), "cos_sin_cache": None})
    assert query[0].flatten().tolist() == list(range(1, 13))
    assert k_cache[2, 0, 0].tolist() == [13, 14, 15, 16]
    assert v_cache[0, 0, 0].tolist() == [117, 118]


def test_heads_of_a_cache_lie_before_its_tokens(write):
    # One query head, two KV heads, K = 2, V = 1; a token at position 1 of block 1.
    inputs = {
        "qkv": torch.arange(8.0).view(1, 8),
        "cos_sin_cache": None,
        "k_cache": torch.full((2, 2, 2, 2), -1.0),
        "v_cache": torch.full((2, 2, 2, 1), -1.0),
        "block_tables": torch.tensor([[1]], dtype=torch.int32),
        "is_neox": 0,
        **metadata([1], [1], [0]),
    }
    _, k_cache, v_cache = write(**inputs)
    assert k_cache[1].tolist() == [[[-1, -1], [2, 3]], [[-1, -1], [4, 5]]]
    assert v_cache[1].tolist() == [[[-1], [6]], [[-1], [7]]]


# ---- on the harness's batches --------------------------------------------------------------------

ROWS = st.sampled_from(
    [
        "decode:9,prefill:5",
        "hit:64+3,draft:15+2,idle",
        "paused:7,decode:1,pad:2",
        "prefill:1",
        "draft:30+5,hit:1+1",
    ]
)
SHAPES = st.sampled_from(
    [
        "heads=3,kv_heads=1",
        "heads=10,kv_heads=2,v_dim=24",
        "heads=6,kv_heads=6,v_dim=64",
        "heads=6,kv_heads=2,tp=4",
    ]
)


@settings(max_examples=25, deadline=None)
@given(
    ROWS,
    SHAPES,
    st.sampled_from(["ernie-4.5-21b-a3b", "mimo-v2-flash"]),
    st.sampled_from(["planted", "randn", "peaked", "huge", "deep", "tiny"]),
    st.sampled_from(["", ",window=1", ",window=7", ",window=64"]),
    st.sampled_from(["", ",sink=learned"]),
)
def test_the_references_of_attention_agree(make_batch, rows, shape, model, data, window, sink):
    batch = make_batch(f"gqa_step/{rows}/model={model},{shape},data={data},block=16{window}{sink}")
    (layer,) = batch.layers
    inputs = {**layer.tensors, **layer.attributes}
    one, other = (oracle_for("gqa_step", role).run(inputs, None) for role in ROLES)
    assert not bool(one["out"].isnan().any())
    scale = one["out"].abs().amax(-1, keepdim=True).clamp_min(1e-300) if one["out"].numel() else 1
    assert bool(((one["out"] - other["out"]).abs() <= 1e-10 * scale).all())
    both = one["lse"] == other["lse"]
    assert bool((both | ((one["lse"] - other["lse"]).abs() <= 1e-10 * one["lse"].abs().clamp_min(1))).all())


CASES = [
    f"gqa_step/{ZOO}/{ERNIE},heads=6,kv_heads=2,v_dim=64,block=16",
    f"gqa_step/{ZOO}/{ERNIE},heads=10,kv_heads=2,v_dim=40,block=16,window=9,splits=2,sink=learned,dtype=fp16",
    f"gqa_step/hit:31+2,decode:64/{ERNIE},heads=6,kv_heads=1+2+3,v_dim=64+128+16,layers=3,block=16+32+64,strided=0",
    "gqa_step/decode:9,draft:5+3,pad:1/model=mimo-v2-flash,heads=4,kv_heads=1,block=1,dtype=fp32",
    f"gqa_cache_write/{ZOO}/{ERNIE},heads=6,kv_heads=2,v_dim=64,block=16",
    "gqa_cache_write/hit:31+2,decode:64,pad:1/model=mimo-v2-flash,heads=6,kv_heads=1+3,layers=2,block=3+32,strided=0",
    "gqa_cache_write/decode:9,prefill:2/model=kimi-linear-48b,heads=2,dtype=fp32",
]


@pytest.mark.parametrize("text", CASES)
def test_the_kernels_pass_every_check(text, launched, every_result):
    pytest.importorskip("triton")
    launch = launched(text, path_named(f"triton/{parse(text).operator}"))
    for index in range(len(launch.layers)):
        _require_agreement(launch, index)
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds", "repeat", "pages", "poison"} <= {
        result.name for result in results if result.status is Status.PASSED
    }


@pytest.mark.parametrize("operator", ["gqa_step", "gqa_cache_write"])
@pytest.mark.parametrize("rows", ["", "idlex3", "paused:5", "pad:3", "idle,pad:9"])
def test_steps_without_a_token_are_no_trouble(operator, rows, launched, every_result):
    pytest.importorskip("triton")
    launch = launched(f"{operator}/{rows}/{ERNIE},heads=3,kv_heads=1", path_named(f"triton/{operator}"))
    assert [result for result in every_result(launch) if result.status is Status.FAILED] == []


def test_every_layer_of_a_stack_has_caches_of_its_own(make_batch):
    text = f"gqa_step/decode:70,idle/{ERNIE},heads=24,kv_heads=8+4+2,v_dim=64+128+96,layers=3,block=16+32+64"
    layers = make_batch(text).layers
    for layer, (heads, width, size) in zip(layers, [(8, 64, 16), (4, 128, 32), (2, 96, 64)], strict=True):
        assert layer.tensors["k_cache"].shape[1:] == (heads, size, 128)
        assert layer.tensors["v_cache"].shape[1:] == (heads, size, width)
        assert layer.tensors["block_tables"].shape == (2, -(-71 // size) + 1)
        assert layer.layer.group_size == 24 // heads
    # Layers hold other numbers.
    first = [layer.tensors["query"][0, 0] for layer in layers]
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("tp", "kv_heads", "expected"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (4, 2, 1), (4, 1, 1)]
)
def test_a_rank_has_its_share_of_the_kv_heads_and_at_least_one(tp, kv_heads, expected):
    (layer,) = parse(f"gqa_step//{ERNIE},heads=12,kv_heads={kv_heads},tp={tp}").layers
    assert layer.num_key_value_heads == expected
    assert layer.group_size == 12 // expected


def test_what_no_token_sees_is_poison(make_batch):
    text = f"gqa_step/hit:40+3,paused:9/{ERNIE},heads=3,kv_heads=1,block=16,window=5"
    (layer,) = make_batch(text).layers
    blocks, others = layer.pages.blocks
    cache = layer.tensors["k_cache"][torch.from_numpy(blocks), 0].flatten(0, 1)
    # The first new token stands at 40 and sees 36 to 40; the last new one is 42.
    held = [position for position in range(48) if bool(cache[position].isfinite().all())]
    assert held == list(range(36, 43))
    assert bool(layer.tensors["v_cache"][torch.from_numpy(others)].isnan().all())
    (layer,) = make_batch(text.replace(",window=5", ",poison=finite")).layers
    assert bool(layer.tensors["k_cache"].isfinite().all())


@pytest.mark.parametrize("window", [0, 4])
def test_newest_and_oldest_visible_keys_hold_about_half_of_the_weight(make_batch, window):
    (layer,) = make_batch(f"gqa_step/prefill:300/{ERNIE},heads=6,kv_heads=2,window={window}").layers
    source = GroupSource(layer.layer, "planted", 0)
    tokens = torch.arange(300)
    keys = source.keys(torch.zeros_like(tokens), tokens)[:, 1].double()
    query = layer.tensors["query"][299, 4].double()
    oldest = 300 - window if window else 0
    weights = torch.softmax(layer.layer.softmax_scale * (keys[oldest:] @ query), 0)
    assert 0.3 < float(weights[0] + weights[-1]) < 0.8
    # The other group's keys are others: nothing stands out there.
    other = source.keys(torch.zeros_like(tokens), tokens)[:, 0].double()
    assert float(torch.softmax(layer.layer.softmax_scale * (other @ query), 0).max()) < 0.2


def test_sinks_differ_by_head_and_lie_within_reach_of_an_lse(make_batch):
    sinks = make_batch(f"gqa_step/decode:9/{ERNIE},heads=20,sink=learned").layers[0].tensors["sinks"]
    assert sinks.dtype is torch.float32
    assert len(sinks.unique()) > 10
    assert bool(((sinks >= -2) & (sinks <= -2 + SINK_STEPS * SINK_UNIT)).all())
    assert make_batch(f"gqa_step/decode:9/{ERNIE},heads=20").layers[0].attributes["sinks"] is None


def test_a_wrong_row_of_a_cache_is_reported_by_token_and_kv_head(launched):
    pytest.importorskip("triton")
    path = path_named("triton/gqa_cache_write")

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        # Position 9 of row 1, which is token 2.
        block = inputs["block_tables"][1, 0]
        outputs["k_cache"][block, 1, 9, 100] += 1
        outputs["v_cache"][block, 2, 9, 3] = NAN

    launch = launched(f"gqa_cache_write/hit:6+2,decode:9/{ERNIE},heads=9,kv_heads=3", replace(path, run=run))
    keys, values = (item for item in checks()["values"].run(launch) if item.status is Status.FAILED)
    assert (keys.tensor, keys.worst.index) == ("k_cache", (2, 1, 100))
    assert (keys.where.tokens, keys.where.rows, keys.where.heads, keys.where.dims) == ("2", "1", "1", "100")
    assert (values.tensor, values.where.tokens, values.where.heads) == ("v_cache", "2", "2")
    assert values.where.blocks == str(int(launch.layers[0].inputs["block_tables"][1, 0]))


def test_memory_is_foreseen(launched):
    pytest.importorskip("triton")
    for text in CASES:
        launch = launched(text, path_named(f"triton/{parse(text).operator}"))
        held = sum(
            len(buffer.raw)
            for layer in launch.layers
            for buffer in (*layer.batch.inputs.values(), *layer.outputs.values())
        )
        assert required_bytes(parse(text), launch.operator, "cpu") > 2 * held


# ---- the contract --------------------------------------------------------------------------------

REFUSED = [
    ("gqa_step/decode:9/heads=5,«kv_heads»=2", "KV heads divide the 5 query heads of all ranks"),
    ("gqa_step/decode:9/model=ernie-4.5-21b-a3b,«heads»=6", "into equal groups, got 4 in layer 0"),
    ("gqa_step/decode:9/heads=6,«kv_heads»=3+2+4,layers=3", "into equal groups, got 4 in layer 2"),
    ("gqa_cache_write/decode:9/heads=6,«kv_heads»=6,tp=4", "each of 4 ranks has equally many KV heads"),
    ("mla_decode/decode:9/«model»=mimo-v2-flash", "mimo-v2-flash keeps keys and values and no latents"),
    ("gqa_step/decode:9/heads=4,«cache»=fp8", "gqa_step has no option cache"),
    ("mla_step/decode:9/heads=4,«kv_heads»=4", "mla_step has no option kv_heads"),
    ("gqa_cache_write/decode:9/heads=4,«window»=4", "gqa_cache_write has no option window"),
]


@pytest.mark.parametrize(("marked", "reason"), REFUSED)
def test_what_no_group_is_made_of_is_refused_and_underlined(marked, reason):
    before, rest = marked.split("«")
    part, after = rest.split("»")
    text = before + part + after
    with pytest.raises(CaseError) as caught:
        contract_of(parse(text), text)
    assert caught.value.text[caught.value.start : caught.value.end] == part
    assert reason in caught.value.message


def test_what_a_model_has_anyway_is_not_printed():
    assert str(parse(f"gqa_step/decode:9/{ERNIE},kv_heads=4,v_dim=128")) == f"gqa_step/decode:9/{ERNIE}"
    text = f"gqa_step/decode:9/{ERNIE},kv_heads=4+2,v_dim=128+64,layers=2"
    assert parse(str(parse(text))) == parse(text)


def test_caches_of_a_layer_are_those_that_are_counted(make_batch):
    (layer,) = make_batch(f"gqa_step/decode:9/{ERNIE},heads=6,kv_heads=2,v_dim=64,block=16").layers
    caches = key_value_caches(layer.layer)
    for cache in caches:
        assert tuple(layer.tensors[cache.name].shape) == cache.shape(layer.pages.num_blocks)
        assert layer.tensors[cache.name].dtype is getattr(torch, cache.dtype)
    # 2 bytes * 2 heads * (128 + 64).
    assert sum(cache.row_bytes for cache in caches) == 768
    assert layer_caches(layer.layer) == caches


def test_a_picture_shows_both_caches():
    shown = draw(parse(f"gqa_step/decode:9/{ERNIE},heads=6,kv_heads=2,v_dim=64"))
    assert "6 heads, 2 KV heads of 128 and 64 bf16" in shown
    assert "k_cache              [4, 2, 64, 128] bfloat16, 512 bytes a token" in shown
    assert "v_cache              [4, 2, 64, 64] bfloat16, 256 bytes a token" in shown


def test_work_counts_every_byte_once():
    case = parse(f"gqa_cache_write/decode:9,hit:6+2,pad:1/{ERNIE},heads=6,kv_heads=2,v_dim=64")
    work = operators()[case.operator].work(case, case.layers[0])
    # 3 tokens of 8 * 128 + 2 * 64 columns twice, their 128 cosines and sines, one padding token's queries.
    assert work.bytes == (3 * (2 * 1152 + 128) + 6 * 128) * 2 + 4 * 4
    # Four products and two sums a pair.
    assert work.flops == 3 * 8 * 64 * 6
    case = parse(f"gqa_step/decode:9,hit:6+2,paused:5,pad:1/{ERNIE},heads=6,kv_heads=2,v_dim=64")
    work = operators()[case.operator].work(case, case.layers[0])
    assert work.bytes == ((10 + 8) * 2 + 4 * 6) * 192 * 2 + 4 * 6 * 4
    assert work.flops == 2 * (10 + 7 + 8) * 6 * 192
    case = parse(f"gqa_step/decode:9,hit:6+2/{ERNIE},heads=6,kv_heads=2,v_dim=64,window=3")
    work = operators()[case.operator].work(case, case.layers[0])
    assert work.bytes == ((3 + 4) * 2 + 3 * 6) * 192 * 2 + 3 * 6 * 4
    assert work.flops == 2 * (3 + 3 + 3) * 6 * 192
