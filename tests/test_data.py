"""Each data mode has the property its table states, and data depend on nothing but what they may."""

from itertools import product

import numpy as np
import pytest
import torch

from cases import parse
from cases.models import latent_model_names, load_model
from harness.data import CODE_COLUMNS, DEEP_LOGIT, Source
from harness.tensors import DTYPES

WIDTHS = {
    288: "minicpm3-4b",
    320: "mistral-small-4",
    576: "deepseek-v3",
    1088: "dots3-note-sliding",
}
LENGTHS = (3, 4, 5, 9, 33, 64, 65, 129, 500, 1024, 4097, 8193)
MODES = ("planted", "randn", "flat", "peaked", "huge", "deep", "tiny")


def source_of(mode, *, model="deepseek-v3", heads=16, dtype="bf16", seed=0):
    text = f"mla_decode/decode:1/model={model},heads={heads},dtype={dtype},data={mode},seed={seed}"
    return Source(parse(text).layers[0], mode, seed)


def as_stored(source, values):
    return values.to(DTYPES[source.layer.dtype]).double()


def rows_and_queries(source, length, query_positions=None, key=0):
    """Cache rows 0 to length, the last one forbidden to the newest query, and queries, all as stored."""
    positions = torch.arange(length + 1)
    keys = torch.full_like(positions, key)
    at = torch.tensor([length - 1] if query_positions is None else query_positions)
    rows = source.cache_rows(keys, positions)
    queries = source.queries(keys[at], keys[at], at, keys[at])
    return as_stored(source, rows), as_stored(source, queries)


def logits_of(source, length, key=0):
    """[H, length + 1] float64: logits of the query at position length - 1; the last is of a forbidden key."""
    rows, queries = rows_and_queries(source, length, key=key)
    return queries[0] @ rows.T * source.layer.softmax_scale


@pytest.mark.parametrize("model", WIDTHS.values(), ids=WIDTHS)
def test_planted_boundary_keys_hold_half_of_the_softmax_mass(model):
    source = source_of("planted", model=model, heads=32)
    rows, queries = rows_and_queries(source, max(LENGTHS), [length - 1 for length in LENGTHS])
    for length, query in zip(LENGTHS, queries, strict=True):
        weights = torch.softmax(query @ rows[:length].T * source.layer.softmax_scale, -1)
        mass = float((weights[:, 0] + weights[:, -1]).mean())
        assert 0.3 < mass < 0.7, f"{length} keys: the boundary keys hold {mass:.2f}"


@pytest.mark.parametrize("model", WIDTHS.values(), ids=WIDTHS)
def test_planted_first_forbidden_key_would_dominate(model):
    source = source_of("planted", model=model, heads=32)
    rows, queries = rows_and_queries(source, max(LENGTHS), [length - 1 for length in LENGTHS])
    for length, query in zip(LENGTHS, queries, strict=True):
        weights = torch.softmax(query @ rows[: length + 1].T * source.layer.softmax_scale, -1)
        assert float(weights[:, -1].mean()) > 0.5, f"{length} keys"


def test_planted_mass_holds_for_every_row_of_a_draft():
    source = source_of("planted")
    rows, queries = rows_and_queries(source, 70, list(range(60, 70)))
    for position, query in zip(range(60, 70), queries, strict=True):
        weights = torch.softmax(query @ rows[: position + 1].T * source.layer.softmax_scale, -1)
        assert 0.3 < float((weights[:, 0] + weights[:, -1]).mean()) < 0.7


@pytest.mark.parametrize("position", [0, 1])
def test_planted_rows_of_one_and_two_keys_are_ordinary_numbers(position):
    source = source_of("planted")
    logits = logits_of(source, position + 1)
    assert float(logits.abs().max()) < 20


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_planted_values_carry_their_position(dtype):
    source = source_of("planted", dtype=dtype)
    positions = torch.tensor([0, 1, 2, 63, 64, 8192, 65535, 65536 + 5])
    rows = as_stored(source, source.cache_rows(torch.zeros_like(positions), positions))
    rank = source.layer.kv_lora_rank
    code = (rows[:, rank - CODE_COLUMNS : rank] > 0).long()
    assert (code << torch.arange(CODE_COLUMNS)).sum(-1).tolist() == [p % 65536 for p in positions.tolist()]


def test_planted_queries_are_zero_on_the_code_columns():
    source = source_of("planted")
    _, queries = rows_and_queries(source, 100, [0, 1, 50, 99])
    rank = source.layer.kv_lora_rank
    assert not queries[..., rank - CODE_COLUMNS : rank].any()
    assert queries[..., : rank - CODE_COLUMNS].any()
    assert queries[..., rank:].any()


@pytest.mark.parametrize(("model", "dtype"), list(product(WIDTHS.values(), DTYPES)))
def test_deep_logits_are_near_the_stated_one(model, dtype):
    logits = logits_of(source_of("deep", model=model, dtype=dtype), 200)
    assert float((logits / DEEP_LOGIT - 1).abs().max()) < 0.01


@pytest.mark.parametrize(("model", "dtype"), list(product(latent_model_names(), DTYPES)))
def test_deep_partial_sums_are_exact_in_float32(model, dtype):
    rows, queries = rows_and_queries(source_of("deep", model=model, heads=2, dtype=dtype), 20)
    products = (queries[0].unsqueeze(1) * rows.unsqueeze(0)).numpy()
    for ordered in (products, products[..., ::-1]):
        # NumPy's cumulative sum adds one element after the other, in the dtype asked for.
        partial = np.cumsum(ordered.astype(np.float32), axis=-1, dtype=np.float32)
        assert np.array_equal(partial, np.cumsum(ordered, axis=-1))


def test_deep_logits_still_tell_keys_apart():
    logits = logits_of(source_of("deep"), 200)
    assert float(logits.std(-1).min()) > 0.05


def test_randn_logits_have_the_stated_deviation():
    logits = logits_of(source_of("randn", heads=64), 500)
    assert 2.7 < float(logits.std()) < 3.3


def test_flat_weights_are_nearly_uniform():
    weights = torch.softmax(logits_of(source_of("flat", heads=64), 500), -1)
    # Logits of standard deviation 3 / 64: four deviations to either side are a factor e^0.19.
    assert float((weights * 501).max()) < 1.3
    assert float((weights * 501).min()) > 0.7


def test_huge_weights_are_one_hot_and_logits_large():
    logits = logits_of(source_of("huge", heads=64), 500)
    assert float(logits.abs().amax(-1).min()) > 300
    assert float(torch.softmax(logits, -1).amax(-1).median()) > 0.999


@pytest.mark.parametrize("model", WIDTHS.values(), ids=WIDTHS)
def test_peaked_lifts_the_newest_or_the_oldest_key(model):
    source = source_of("peaked", model=model, heads=64)
    peaks, heights = set(), []
    for key in range(12):
        visible = logits_of(source, 40, key=key)[:, :40].mean(0)
        at = int(visible.argmax())
        peaks.add(at)
        others = torch.cat([visible[:at], visible[at + 1 :]])
        heights.append(float(visible[at] - others.mean()))
    assert peaks == {0, 39}
    # A row's squared length varies by 8 % or so, and the logit with it.
    assert min(heights) > 17
    assert 23 < sum(heights) / len(heights) < 27


@pytest.mark.parametrize(("dtype", "largest"), [("bf16", 1e-5), ("fp16", 0.2)])
def test_tiny_values_lie_below_absolute_tolerances_and_are_normal(dtype, largest):
    source = source_of("tiny", dtype=dtype)
    rows, queries = rows_and_queries(source, 100)
    smallest_normal = torch.finfo(DTYPES[dtype]).tiny
    for values in (rows, queries):
        sizes = values.abs()
        assert float(sizes.max()) < largest
        assert float(sizes[sizes > 0].min()) >= smallest_normal


@pytest.mark.parametrize(("mode", "dtype"), list(product(MODES, ("bf16", "fp16"))))
def test_every_value_of_every_model_is_finite(mode, dtype):
    for model in latent_model_names():
        source = source_of(mode, model=model, heads=load_model(model).num_attention_heads // 8, dtype=dtype)
        rows, queries = rows_and_queries(source, 130, [0, 1, 2, 64, 129])
        assert bool(rows.isfinite().all()), model
        assert bool(queries.isfinite().all()), model


def test_modes_and_seeds_differ():
    rows = {
        (mode, seed): source_of(mode, seed=seed).cache_rows(torch.zeros(3).long(), torch.arange(3))
        for mode, seed in product(("planted", "randn", "deep", "tiny"), (0, 1))
    }
    assert len({values.numpy().tobytes() for values in rows.values()}) == len(rows)


# ---- what data depend on -------------------------------------------------------------------------


def slot_contents(batch, slot):
    """The cache rows of a slot in order of position, and its queries: bytes."""
    layer = batch.layers[0]
    cache = layer.inputs["latent_cache"].view
    count = int(batch.metadata.seq_lens_decoder[slot] + batch.metadata.seq_lens_this_time[slot])
    blocks = torch.from_numpy(layer.pages.blocks[slot])
    rows = cache[blocks].reshape(-1, cache.shape[-1])[:count]
    start, end = batch.metadata.cu_seqlens_q[slot : slot + 2].tolist()
    queries = layer.inputs["q"].view[start:end]
    return [part.contiguous().view(torch.uint8).numpy().tobytes() for part in (rows, queries)]


def test_rows_keep_their_bytes_in_another_slot(make_batch):
    before = make_batch("mla_decode/decode:70,draft:30+3,hit:5+9/heads=2")
    after = make_batch("mla_decode/hit:5+9.k2,decode:70.k0,draft:30+3.k1/heads=2,pages=reversed")
    for slot, other in ((0, 1), (1, 2), (2, 0)):
        assert slot_contents(before, slot) == slot_contents(after, other)


def test_rows_keep_their_bytes_between_idle_slots(make_batch):
    before = make_batch("mla_decode/decode:70,draft:30+3/heads=2")
    after = make_batch("mla_decode/idle,decode:70.k0,idlex2,draft:30+3.k1,paused:9,pad:2/heads=2")
    for slot, other in ((0, 1), (1, 4)):
        assert slot_contents(before, slot) == slot_contents(after, other)


def test_rows_of_other_keys_hold_other_bytes(make_batch):
    batch = make_batch("mla_decode/decode:70,decode:70,decode:70.k0/heads=2")
    first, second, third = (slot_contents(batch, slot) for slot in range(3))
    assert first == third
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_rows_of_one_tag_share_their_prefix_and_nothing_behind(make_batch):
    batch = make_batch("mla_decode/decode:130@sys,decode:200@sys,decode:130@other/heads=2")
    width = batch.layers[0].layer.latent_width * 2
    first, second, third = (slot_contents(batch, slot)[0] for slot in range(3))
    # 130 cached tokens in blocks of 64: two full blocks are the prefix.
    same = [
        first[at : at + width] == second[at : at + width]
        for at in range(0, min(len(first), len(second)), width)
    ]
    assert same == [True] * 128 + [False] * 3
    assert first[:width] != third[:width]


def test_tagged_prefix_does_not_depend_on_key_or_slot(make_batch):
    before = make_batch("mla_decode/decode:130@sys/heads=2")
    after = make_batch("mla_decode/idle,decode:130@sys.k9/heads=2")
    width = before.layers[0].layer.latent_width * 2
    old, new = slot_contents(before, 0)[0], slot_contents(after, 1)[0]
    assert old[: 128 * width] == new[: 128 * width]
    assert old[128 * width :] != new[128 * width :]


def test_layers_hold_different_data(make_batch):
    layers = make_batch("mla_decode/decode:9/heads=2,layers=2,pages=sequential").layers
    first, second = (layer.inputs["latent_cache"].view[0, 0, :10] for layer in layers)
    assert not torch.equal(first, second)
