"""cuda/sparse_decode on the host: what the suites do not state."""

import pytest
import torch

from harness.budgets import lse_budgets
from harness.lanes import lanes
from harness.paths.cuda import sparse_decode as path
from references.oracle import oracle_for

LACK = lanes()["host"].unavailable()

pytestmark = [
    pytest.mark.skipif(LACK is not None, reason=str(LACK)),
    pytest.mark.usefixtures("cuda_on_the_processor"),
]


@pytest.fixture
def batch_of(make_batch):
    """Text -> inputs and outputs of its one layer."""

    def batch(text):
        layer = make_batch(text).layers[0]
        inputs = {**layer.tensors, **layer.attributes}
        tokens, heads, _ = inputs["q"].shape
        outputs = {
            "out": torch.full((tokens, heads, inputs["kv_lora_rank"]), torch.nan, dtype=torch.bfloat16),
            "lse": torch.full((tokens, heads), torch.nan),
        }
        return inputs, outputs

    return batch


def launched(inputs, outputs, *, rows=16, splits=1, fewest=0, **changed):
    """The outputs of the launcher itself, some arguments changed."""
    tokens, heads, _ = inputs["q"].shape
    rank = inputs["kv_lora_rank"]
    partial = [torch.full((tokens, heads, splits, rank), torch.nan)] if splits > 1 else [None]
    partial += [torch.full((tokens, heads, splits), torch.nan) if splits > 1 else None for _ in range(2)]
    given = {name: inputs[name] for name in ("q", "packed_cache", "indices")} | outputs
    given |= dict(zip(("partial_out", "partial_max", "partial_sum"), partial, strict=True)) | changed
    path.KERNELS.sparse_decode(*given.values(), inputs["softmax_scale"], splits, fewest, rows)
    return outputs


def assert_right(inputs, outputs):
    # The kernel rounds its keys to bf16, and so does the oracle when it is told.
    expected = oracle_for("sparse_decode", "definition").run({**inputs, "rounds_keys": True})
    assert torch.equal(outputs["lse"].isinf(), expected["lse"].isinf())
    seen = expected["lse"].isfinite()
    error = (outputs["lse"].double() - expected["lse"]).abs()
    assert bool((error <= lse_budgets(expected["logit_magnitude"]))[seen].all())
    # Weights are rounded to bf16, some 2^-8 of an output's largest element.
    largest = float(expected["out"].abs().max())
    assert float((outputs["out"].double() - expected["out"]).abs().max()) <= 0.02 * largest


@pytest.mark.parametrize("splits", [1, 3])
def test_narrow_and_wide_tiles_agree(batch_of, splits):
    text = "sparse_decode/decode:200,draft:70+2,idle,pad:1/model=minicpm3-4b,heads=18,topk=150"
    narrow, wide = (launched(*batch_of(text), rows=rows, splits=splits) for rows in (16, 64))
    assert torch.allclose(narrow["lse"], wide["lse"], rtol=0, atol=1e-5)
    assert torch.allclose(narrow["out"].float(), wide["out"].float(), rtol=0, atol=0.02)
    assert not narrow["lse"].isnan().any()


@pytest.mark.parametrize("rows", [16, 64])
def test_a_row_named_twice_counts_twice(batch_of, rows):
    inputs, outputs = batch_of("sparse_decode/decode:9/model=minicpm3-4b,heads=3,topk=80")
    listed = inputs["indices"][0, 0]
    named = listed[(listed >= 0) & (listed < inputs["packed_cache"].shape[0] * 64)]
    assert len(named) == 10
    once = launched(inputs, {name: tensor.clone() for name, tensor in outputs.items()}, rows=rows)
    twice = torch.full_like(listed, -1)
    twice[5:15], twice[66:76] = named, named.flip(0)
    inputs["indices"][0, 0] = twice
    launched(inputs, outputs, rows=rows)
    assert_right(inputs, outputs)
    # Twice the sum of all weights.
    assert torch.allclose(outputs["lse"], once["lse"] + 0.6931472, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("place", [0, 63, 64, 130, 191])
def test_one_key_is_found_wherever_it_stands(batch_of, place, splits):
    inputs, outputs = batch_of("sparse_decode/decode:4/model=minicpm3-4b,heads=2,topk=192")
    listed = inputs["indices"][0, 0]
    (key, *_) = listed[(listed >= 0) & (listed < inputs["packed_cache"].shape[0] * 64)].tolist()
    listed.fill_(-1)
    listed[place] = key
    launched(inputs, outputs, splits=splits)
    assert_right(inputs, outputs)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("number", [-1, -(2**31), 2**31 - 1, "rows"])
def test_a_list_of_numbers_that_name_no_row_is_empty(batch_of, number, splits):
    inputs, outputs = batch_of("sparse_decode/decode:4/model=minicpm3-4b,heads=2,topk=200")
    rows = inputs["packed_cache"].shape[0] * 64
    inputs["indices"].fill_(rows if number == "rows" else number)
    inputs["q"].fill_(torch.nan)
    launched(inputs, outputs, splits=splits)
    assert not outputs["out"].any()
    assert outputs["lse"].tolist() == [[-torch.inf] * 2]


def test_more_splits_than_are_worth_one_leave_the_others_alone(batch_of):
    # One split at least as long as the list: the others write nothing, and nothing of theirs is read.
    inputs, outputs = batch_of("sparse_decode/decode:100/model=minicpm3-4b,heads=2,topk=100")
    launched(inputs, outputs, splits=3, fewest=256)
    assert_right(inputs, outputs)


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("q", lambda q: q.half(), "q must be bfloat16, got float16"),
        ("packed_cache", lambda cache: cache.view(torch.int8), "packed_cache must be uint8, got int8"),
        ("packed_cache", lambda cache: cache[:, :, ::2], "packed_cache must be contiguous"),
        ("packed_cache", lambda cache: cache[..., 1:], r"packed_cache must be \[\*, 1, \*, 656\], got"),
        (
            "packed_cache",
            lambda cache: torch.zeros(cache.numel() + 8, dtype=torch.uint8)[8:].view(cache.shape),
            "packed_cache must begin at a multiple of 16 bytes",
        ),
        ("indices", lambda indices: indices.long(), "indices must be int32, got int64"),
        ("indices", lambda indices: indices[:1], r"indices must be \[2, 1, \*\], got \[1, 1, 70\]"),
        (
            "indices",
            lambda indices: indices[..., :0],
            "indices must have 1 to 1073741824 entries a token, got 0",
        ),
        ("out", lambda out: out.float(), "out must be bfloat16, got float32"),
        ("out", lambda out: out[..., :128], "got 128 of 576"),
        ("lse", lambda lse: lse[:, :1], r"lse must be \[2, 4\], got \[2, 1\]"),
    ],
)
def test_a_wrong_argument_is_one_sentence(batch_of, name, changed, sentence):
    inputs, outputs = batch_of("sparse_decode/decode:5,decode:9/heads=4,topk=70")
    wrong = {name: changed((inputs | outputs)[name])}
    if name == "out" and wrong["out"].shape[2] == 128:
        # A cache of such rows: the width itself is what is refused.
        wrong["packed_cache"] = torch.zeros(2, 1, 64, 128 + 4 + 2 * 448, dtype=torch.uint8)
    with pytest.raises(ValueError, match=sentence):
        launched(inputs, outputs, **wrong)
    assert bool(outputs["out"].isnan().all())


def test_splits_without_a_workspace_are_refused(batch_of):
    inputs, outputs = batch_of("sparse_decode/decode:5/heads=4,topk=70")
    with pytest.raises(ValueError, match="num_splits 2 needs partial_out, partial_max and partial_sum"):
        launched(inputs, outputs, splits=2, partial_out=None)


@pytest.mark.parametrize(
    ("heads", "rank", "expected"),
    [(1, 512, 16), (16, 512, 16), (17, 512, 64), (128, 256, 64), (128, 1024, 16)],
)
def test_tiles_are_wide_where_there_are_heads_for_them(heads, rank, expected):
    assert path.rows_for(heads, rank) == expected
