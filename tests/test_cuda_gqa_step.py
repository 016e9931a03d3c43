"""cuda/gqa_step on the host: what the suites do not state."""

from types import SimpleNamespace

import pytest
import torch

from harness.lanes import lanes
from harness.paths.cuda import gqa_step as path
from references.oracle import oracle_for

LACK = lanes()["host"].unavailable()

pytestmark = [
    pytest.mark.skipif(LACK is not None, reason=str(LACK)),
    pytest.mark.usefixtures("cuda_on_the_processor"),
]

ERNIE = "model=ernie-4.5-21b-a3b"
NAMES = ("query", "k_cache", "v_cache", "sinks", "block_tables", "seq_lens_decoder", "cu_seqlens_q")


@pytest.fixture
def batch_of(make_batch):
    """Text -> inputs of its one layer."""

    def batch(text):
        layer = make_batch(text).layers[0]
        return {**layer.tensors, **layer.attributes}

    return batch


def launched(inputs, *, rows=16, splits=1, fewest=0, **changed):
    """(out, lse) of the launcher itself, some arguments changed."""
    (tokens, heads, _), v_width = inputs["query"].shape, inputs["v_cache"].shape[3]
    slots, kv_heads = len(inputs["seq_lens_decoder"]), inputs["k_cache"].shape[1]
    shares = (slots, kv_heads, splits, rows)
    partial = [torch.full(shape, torch.nan) for shape in ((*shares, v_width), shares, shares)]
    given = {name: inputs[name] for name in (*NAMES, "batch_id_per_token")}
    given["out"] = torch.full((tokens, heads, v_width), torch.nan, dtype=inputs["query"].dtype)
    given["lse"] = torch.full((tokens, heads), torch.nan)
    names = ("partial_out", "partial_max", "partial_sum")
    given |= dict(zip(names, partial if splits > 1 else [None] * 3, strict=True)) | changed
    window = changed.get("window", inputs["window"])
    given.pop("window", None)
    path.KERNELS.gqa_step(*given.values(), inputs["softmax_scale"], window, splits, fewest, rows)
    return given["out"], given["lse"]


@pytest.mark.parametrize("splits", [1, 3])
def test_narrow_and_wide_tiles_agree(batch_of, splits):
    inputs = batch_of(
        f"gqa_step/draft:130+3,decode:70,idle,hit:9+20,pad:2/{ERNIE},heads=5,kv_heads=1,window=90,sink=learned"
    )
    narrow, wide = (launched(inputs, rows=rows, splits=splits) for rows in (16, 64))
    assert torch.allclose(narrow[0].float(), wide[0].float(), rtol=0, atol=0.02)
    assert torch.allclose(narrow[1], wide[1], rtol=0, atol=1e-5)
    assert not narrow[1].isnan().any()


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size_beside_widths_that_are_no_whole_words(group):
    generator = torch.Generator().manual_seed(group)
    k_width, v_width, block_size = 20 + group, 37 - group, 3
    cached, new = torch.tensor([7, 0, 30]), torch.tensor([1, 9, 4])
    slots = torch.repeat_interleave(torch.arange(3), new)
    inputs = {
        "query": torch.randn(14, 2 * group, k_width, generator=generator),
        "k_cache": torch.randn(40, 2, block_size, k_width, generator=generator),
        "v_cache": torch.randn(40, 2, block_size, v_width, generator=generator),
        "sinks": torch.randn(2 * group, generator=generator),
        "block_tables": torch.randperm(40, generator=generator)[:36].view(3, 12).int(),
        "seq_lens_encoder": torch.tensor([0, 9, 0]).int(),
        "seq_lens_decoder": cached.int(),
        "seq_lens_this_time": new.int(),
        "cu_seqlens_q": torch.tensor([0, 1, 10, 14]).int(),
        "batch_id_per_token": slots.int(),
        "softmax_scale": k_width**-0.5,
        "window": 6 * (group % 2),
        "splits": None,
    }
    expected = oracle_for("gqa_step", "definition").run(inputs, None)
    for splits in (1, 2):
        out, lse = launched(inputs, splits=splits)
        assert float((out.double() - expected["out"]).abs().max()) < 1e-5
        assert float((lse.double() - expected["lse"]).abs().max()) < 1e-5


def moved(tensor, offset, gap=0):
    """A copy `offset` elements behind an aligned address, with `gap` elements between its rows."""
    *rows, width = tensor.shape
    flat = torch.zeros(offset + tensor[..., 0].numel() * (width + gap), dtype=tensor.dtype)
    copy = flat[offset:].view(*rows, width + gap)[..., :width]
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("place", [(1, 0), (4, 4), (0, 1), (3, 5)])
def test_outputs_have_the_same_bits_at_any_address(batch_of, place, rows):
    text = f"gqa_step/draft:130+3,decode:70,hit:9+20/{ERNIE},heads=5,kv_heads=1,v_dim=64"
    inputs = batch_of(text)
    expected = launched(inputs, rows=rows, splits=2)
    caches = {name: moved(inputs[name], place[0]) for name in ("k_cache", "v_cache")}
    out = moved(torch.zeros_like(expected[0]), *place)
    got = launched(inputs | caches | {"query": moved(inputs["query"], *place)}, rows=rows, splits=2, out=out)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ["query", "out"])
def test_tokens_may_lie_more_than_2_to_the_31_elements_behind_the_first(batch_of, name):
    inputs = batch_of(f"gqa_step/decode:5,prefill:2/{ERNIE},heads=2,kv_heads=1")
    expected = launched(inputs)
    dense = inputs["query"] if name == "query" else torch.zeros_like(expected[0])
    stride = 2**30 + 8
    # Pages that nobody touches take no memory.
    raw = torch.empty(2 * stride + dense[0].numel(), dtype=dense.dtype)
    far = raw.as_strided(dense.shape, (stride, *dense[0].contiguous().stride()))
    far.copy_(dense)
    out, lse = launched(inputs, **{name: far})
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("query", lambda query: query.double(), "query must be bfloat16, float16 or float32, got float64"),
        ("query", lambda query: query[:, 1:], r"out must be \[10, 5, 128\], got \[10, 6, 128\]"),
        ("k_cache", lambda cache: cache.half(), "k_cache must be bfloat16, got float16"),
        ("v_cache", lambda cache: cache[1:], r"v_cache must be \[\d+, 2, 64, \*\], got"),
        ("sinks", lambda _: torch.zeros(5), r"sinks must be \[6\], got \[5\]"),
        ("block_tables", lambda tables: tables[1:], r"block_tables must be \[2, \*\], got \[1, \d+\]"),
        ("cu_seqlens_q", lambda starts: starts.long(), "cu_seqlens_q must be int32, got int64"),
        ("lse", lambda lse: lse[:, 1:], r"lse must be \[10, 6\], got \[10, 5\]"),
        ("window", lambda _: -1, "window must be 0 to 2147483647, got -1"),
    ],
)
def test_a_wrong_argument_is_one_sentence(batch_of, name, changed, sentence):
    inputs = batch_of(f"gqa_step/decode:5,prefill:9/{ERNIE},heads=6,kv_heads=2")
    out, lse = torch.zeros(10, 6, 128).bfloat16(), torch.zeros(10, 6)
    given = inputs | {"out": out, "lse": lse}
    with pytest.raises(ValueError, match=sentence):
        launched(inputs, **{name: changed(given[name])})


def test_heads_that_no_groups_are_made_of_are_refused(batch_of):
    inputs = batch_of(f"gqa_step/decode:5/{ERNIE},heads=6,kv_heads=2")
    changed = {
        "query": inputs["query"][:, 1:],
        "out": torch.zeros(1, 5, 128).bfloat16(),
        "lse": torch.zeros(1, 5),
    }
    with pytest.raises(ValueError, match="query must have a multiple of the 2 KV heads, got 5"):
        launched(inputs, **changed)


@pytest.mark.parametrize(("dtype", "rows"), [("bf16", 32), ("fp32", 64)])
def test_tiles_of_other_sizes_are_refused(batch_of, dtype, rows):
    inputs = batch_of(f"gqa_step/decode:5/{ERNIE},heads=6,kv_heads=2,dtype={dtype}")
    with pytest.raises(ValueError, match=f"rows must be 16 or, but in fp32, 64, got {rows}"):
        launched(inputs, rows=rows)


def test_splits_without_a_workspace_and_no_split_at_all_are_refused(batch_of):
    inputs = batch_of(f"gqa_step/decode:5/{ERNIE},heads=6,kv_heads=2")
    with pytest.raises(ValueError, match="num_splits 2 needs partial_out, partial_max and partial_sum"):
        launched(inputs, splits=2, partial_max=None)
    with pytest.raises(ValueError, match=r"partial_out must be \[1, 2, 2, 16, 128\], got"):
        launched(inputs, splits=2, partial_out=torch.zeros(1, 2, 3, 16, 128))
    with pytest.raises(ValueError, match="num_splits must be from 1 to 65535, got 0"):
        launched(inputs, splits=0)


def test_heads_wider_than_256_are_refused_by_the_path_and_by_the_launcher(batch_of):
    wide = SimpleNamespace(qk_head_dim=192, v_head_dim=257)
    assert path.supports(SimpleNamespace(layers=(wide,))) == "heads are at most 256 wide, got 257"
    inputs = batch_of(f"gqa_step/decode:5/{ERNIE},heads=6,kv_heads=2")
    inputs["v_cache"] = torch.zeros(*inputs["v_cache"].shape[:3], 257).bfloat16()
    with pytest.raises(ValueError, match="at most 256 wide, got keys of 128 and values of 257"):
        launched(inputs)


@pytest.mark.parametrize(
    ("tokens", "slots", "group", "itemsize", "rows"),
    [
        (8, 8, 16, 2, 16),  # decode rows alone, whose group fills a narrow tile
        (8, 8, 17, 2, 64),
        (9, 8, 12, 2, 64),  # one draft among them
        (4096, 1, 1, 2, 64),
        (4096, 1, 1, 4, 16),
        (0, 0, 3, 2, 16),
    ],
)
def test_tiles_are_wide_where_many_query_rows_share_their_keys(tokens, slots, group, itemsize, rows):
    assert path.rows_for(tokens, slots, group, itemsize) == rows


def test_a_decode_row_is_a_block_for_each_kv_head():
    assert path.blocks_of(8, 8, 24, 4, 16) == 32
    assert path.blocks_of(2100, 1, 24, 4, 64) == (2100 * 6 // 64 + 2) * 4
