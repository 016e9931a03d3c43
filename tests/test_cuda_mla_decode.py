"""cuda/mla_decode on the host: what the suites do not state."""

import pytest
import torch

from cases import parse
from cases.contract import contract_of
from harness.batch import materialise
from harness.cuda import build
from harness.lanes import lanes
from harness.paths.cuda import mla_decode as path

HOST = lanes()["host"]
LACK = HOST.unavailable()

pytestmark = pytest.mark.skipif(LACK is not None, reason=str(LACK))


@pytest.fixture(autouse=True)
def on_host():
    """This process builds for the processor."""
    build.use(build.HOST)
    yield
    build.use(None)


def batch_of(text):
    case = parse(text)
    layer = materialise(case, contract_of(case), torch.device("cpu")).layers[0]
    inputs = {**layer.tensors, **layer.attributes}
    tokens, heads, _ = inputs["q"].shape
    outputs = {
        "out": torch.full((tokens, heads, inputs["kv_lora_rank"]), torch.nan, dtype=inputs["q"].dtype),
        "lse": torch.full((tokens, heads), torch.nan),
    }
    return inputs, outputs


def launched(inputs, outputs, *, rows=16, splits=1, **changed):
    """The outputs of the launcher itself, some arguments changed."""
    tokens, heads, _ = inputs["q"].shape
    rank = inputs["kv_lora_rank"]
    partial = [torch.full((tokens, heads, splits, rank), torch.nan)] if splits > 1 else [None]
    partial += [torch.full((tokens, heads, splits), torch.nan) if splits > 1 else None for _ in range(2)]
    names = ("q", "latent_cache", "block_tables", "seq_lens_encoder", "seq_lens_decoder", "cu_seqlens_q")
    given = {name: inputs[name] for name in (*names, "batch_id_per_token")} | outputs
    given |= dict(zip(("partial_out", "partial_max", "partial_sum"), partial, strict=True)) | changed
    path.KERNELS.mla_decode(*given.values(), inputs["softmax_scale"], splits, 0, rows)
    return outputs


@pytest.mark.parametrize("splits", [1, 3])
def test_narrow_and_wide_tiles_agree_on_drafts(splits):
    text = "mla_decode/draft:130+5,decode:70,idle,draft:3+2,pad:2/heads=5"
    narrow, wide = (launched(*batch_of(text), rows=rows, splits=splits) for rows in (16, 64))
    assert torch.allclose(narrow["lse"], wide["lse"], rtol=0, atol=1e-5)
    assert torch.allclose(narrow["out"].float(), wide["out"].float(), rtol=0, atol=0.02)
    assert not narrow["lse"].isnan().any()


def test_a_draft_longer_than_a_tile_is_computed_to_its_end():
    inputs, outputs = batch_of("mla_decode/draft:20+9/heads=8")
    launched(inputs, outputs)
    assert bool(outputs["lse"].isfinite().all())
    # Every token sees one key more than the one before, so that no two have the same sum.
    assert len(outputs["lse"][:, 0].unique()) == 9


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("q", lambda q: q.double(), "q must be bfloat16, float16 or float32, got float64"),
        ("latent_cache", lambda cache: cache.half(), "latent_cache must be bfloat16, got float16"),
        ("latent_cache", lambda cache: cache[:, :, ::2], "latent_cache must be contiguous"),
        ("block_tables", lambda table: table.long(), "block_tables must be int32, got int64"),
        ("cu_seqlens_q", lambda sums: sums[:-1], r"cu_seqlens_q must be \[3\], got \[2\]"),
        ("lse", lambda lse: lse[:, :1], r"lse must be \[2, 4\], got \[2, 1\]"),
    ],
)
def test_a_wrong_argument_is_one_sentence(name, changed, sentence):
    inputs, outputs = batch_of("mla_decode/decode:5,decode:9/heads=4")
    wrong = {name: changed((inputs | outputs)[name])}
    with pytest.raises(ValueError, match=sentence):
        launched(inputs, outputs, **wrong)
    assert bool(outputs["out"].isnan().all())


def test_queries_that_are_not_aligned_are_refused():
    inputs, outputs = batch_of("mla_decode/decode:5/heads=4")
    shifted = torch.zeros(inputs["q"].numel() + 1, dtype=inputs["q"].dtype)[1:].view(inputs["q"].shape)
    with pytest.raises(ValueError, match="q must begin at and step by multiples of 16 bytes"):
        launched(inputs, outputs, q=shifted)


def test_splits_without_a_workspace_are_refused():
    inputs, outputs = batch_of("mla_decode/decode:5/heads=4")
    with pytest.raises(ValueError, match="num_splits 2 needs partial_out, partial_max and partial_sum"):
        launched(inputs, outputs, splits=2, partial_out=None)


def test_no_split_at_all_is_refused():
    inputs, outputs = batch_of("mla_decode/decode:5/heads=4")
    with pytest.raises(ValueError, match="num_splits must be from 1 to 65535, got 0"):
        launched(inputs, outputs, splits=0)


def test_a_width_without_kernels_is_refused():
    inputs, outputs = batch_of("mla_decode/decode:5/heads=4")
    narrow = torch.zeros((1, 4, 128), dtype=inputs["q"].dtype)
    with pytest.raises(ValueError, match="got 128 of 576"):
        launched(inputs, outputs, out=narrow)


@pytest.mark.parametrize(
    ("tokens", "slots", "heads", "expected"),
    [
        (128, 128, 16, path.NARROW_ROWS),
        (128, 128, 17, path.WIDE_ROWS),
        (256, 64, 16, path.WIDE_ROWS),
        (3, 1025, 16, path.NARROW_ROWS),
        (5, 0, 1, path.NARROW_ROWS),
    ],
)
def test_tiles_are_wide_where_many_queries_share_their_keys(tokens, slots, heads, expected):
    assert path.rows_for(tokens, slots, heads, 576, 2) == expected


def test_tokens_of_a_draft_that_share_a_tile_count_as_one_block():
    assert path.blocks_of(tokens=128, slots=32, heads=16, rows=64) == 32
    # Nothing to share: as many tokens as rows, or more heads than a tile has.
    assert path.blocks_of(tokens=128, slots=128, heads=16, rows=16) == 128
    assert path.blocks_of(tokens=8, slots=2, heads=128, rows=64) == 16
    # A tile has room for four tokens, and a row has nine.
    assert path.blocks_of(tokens=18, slots=2, heads=16, rows=64) == 5
