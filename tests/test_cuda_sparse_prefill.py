"""cuda/sparse_prefill on the host: what the suites do not state."""

from types import SimpleNamespace

import pytest
import torch

from cases import parse
from harness.budgets import lse_budgets
from harness.lanes import lanes
from harness.paths.cuda import sparse_prefill as path
from references.oracle import oracle_for

LACK = lanes()["host"].unavailable()

pytestmark = [
    pytest.mark.skipif(LACK is not None, reason=str(LACK)),
    pytest.mark.usefixtures("cuda_on_the_processor"),
]

NAMES = ("q", "compressed_kv", "k_pe", "indices")


@pytest.fixture
def batch_of(make_batch):
    """Text -> inputs and outputs of its one layer."""

    def batch(text):
        layer = make_batch(text).layers[0]
        inputs = {**layer.tensors, **layer.attributes}
        tokens, heads, _ = inputs["q"].shape
        outputs = {
            "out": torch.full((tokens, heads, inputs["kv_lora_rank"]), torch.nan, dtype=inputs["q"].dtype),
            "lse": torch.full((tokens, heads), torch.nan),
        }
        return inputs, outputs

    return batch


def launched(inputs, outputs, **changed):
    """The outputs of the launcher itself, some arguments changed."""
    given = {name: inputs[name] for name in NAMES} | outputs | changed
    path.KERNELS.sparse_prefill(*given.values(), inputs["softmax_scale"])
    return outputs


def assert_right(inputs, outputs):
    expected = oracle_for("sparse_prefill", "definition").run(inputs, None)
    assert torch.equal(outputs["lse"].isinf(), expected["lse"].isinf())
    seen = expected["lse"].isfinite()
    error = (outputs["lse"].double() - expected["lse"]).abs()
    assert bool((error <= lse_budgets(expected["logit_magnitude"]))[seen].all())
    # Weights and outputs are rounded to the model's dtype: in bf16 some 2^-8 of an output's largest element.
    largest = float(expected["out"].abs().max())
    rounding = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-5}[outputs["out"].dtype]
    assert float((outputs["out"].double() - expected["out"]).abs().max()) <= rounding * largest


def named_by(listed, tokens):
    """The entries of a list that name a token."""
    return listed[(listed >= 0) & (listed < tokens)]


@pytest.mark.parametrize("heads", [3, 20])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_dtype_in_narrow_and_wide_tiles(batch_of, dtype, heads):
    rows = "prefill:9,hit:5+4,idle,pad:1"
    options = f"model=minicpm3-4b,heads={heads},topk=90,dtype={dtype}"
    inputs, outputs = batch_of(f"sparse_prefill/{rows}/{options}")
    assert_right(inputs, launched(inputs, outputs))


def test_narrow_and_wide_tiles_agree(batch_of):
    # Of up to 16 heads a block takes 16, of more it takes 64.
    inputs, outputs = batch_of("sparse_prefill/prefill:9/model=minicpm3-4b,heads=18,topk=150")
    many = launched(inputs, outputs)
    few = launched(
        {**inputs, "q": inputs["q"][:, 9:]},
        {"out": torch.full((9, 9, 256), torch.nan).bfloat16(), "lse": torch.full((9, 9), torch.nan)},
    )
    assert torch.allclose(few["lse"], many["lse"][:, 9:], rtol=0, atol=1e-5)
    assert torch.allclose(few["out"].float(), many["out"][:, 9:].float(), rtol=0, atol=0.02)
    assert not many["lse"].isnan().any()


@pytest.mark.parametrize("heads", [3, 20])
def test_a_token_named_twice_counts_twice(batch_of, heads):
    inputs, outputs = batch_of(f"sparse_prefill/prefill:10/model=minicpm3-4b,heads={heads},topk=80")
    listed = inputs["indices"][9, 0]
    named = named_by(listed, 10).clone()
    assert len(named) == 10
    once = launched(inputs, {name: tensor.clone() for name, tensor in outputs.items()})
    listed.fill_(-1)
    listed[5:15], listed[66:76] = named, named.flip(0)
    launched(inputs, outputs)
    assert_right(inputs, outputs)
    # Twice the sum of all weights.
    assert torch.allclose(outputs["lse"][9], once["lse"][9] + 0.6931472, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("place", [0, 15, 16, 63, 64, 130, 191])
def test_one_key_is_found_wherever_it_stands(batch_of, place, dtype):
    inputs, outputs = batch_of(f"sparse_prefill/prefill:3/model=minicpm3-4b,heads=2,topk=192,dtype={dtype}")
    listed = inputs["indices"][2, 0]
    listed.fill_(-1)
    listed[place] = 1
    launched(inputs, outputs)
    assert_right(inputs, outputs)


@pytest.mark.parametrize("number", [-1, -(2**31), 2**31 - 1, 4])
def test_a_list_of_numbers_that_name_no_token_is_empty(batch_of, number):
    inputs, outputs = batch_of("sparse_prefill/prefill:4/model=minicpm3-4b,heads=2,topk=200")
    inputs["indices"].fill_(number)
    inputs["q"].fill_(torch.nan)
    launched(inputs, outputs)
    assert not outputs["out"].any()
    assert outputs["lse"].tolist() == [[-torch.inf] * 2] * 4


def test_lists_without_entries_are_empty(batch_of):
    inputs, outputs = batch_of("sparse_prefill/prefill:4/model=minicpm3-4b,heads=20,topk=5")
    launched(inputs, outputs, indices=inputs["indices"][..., :0])
    assert not outputs["out"].any()
    assert outputs["lse"].tolist() == [[-torch.inf] * 20] * 4


def test_tokens_that_no_list_names_have_no_influence(batch_of):
    inputs, outputs = batch_of("sparse_prefill/prefill:5/model=minicpm3-4b,heads=20,topk=70")
    inputs["indices"][inputs["indices"] == 0] = -1
    for name in ("compressed_kv", "k_pe"):
        inputs[name][0] = torch.nan
    launched(inputs, outputs)
    assert outputs["lse"][0].tolist() == [-torch.inf] * 20
    assert bool(outputs["lse"][1:].isfinite().all())
    assert_right(inputs, outputs)


def test_not_a_number_in_a_key_is_none_in_the_answer(batch_of):
    inputs, outputs = batch_of("sparse_prefill/prefill:2/model=minicpm3-4b,heads=20,topk=3")
    inputs["indices"][:, 0] = torch.tensor([[0, 1, -1], [1, -1, 1]])
    inputs["k_pe"][0, 3] = torch.nan
    launched(inputs, outputs)
    assert bool(outputs["out"][0].isnan().all())
    assert bool(outputs["lse"][0].isnan().all())
    assert bool(outputs["out"][1].isfinite().all())


@pytest.mark.parametrize("name", ["q", "compressed_kv", "k_pe", "indices", "out"])
def test_rows_may_lie_more_than_2_to_the_31_elements_behind_the_first(batch_of, name):
    inputs, outputs = batch_of("sparse_prefill/prefill:3/model=minicpm3-4b,heads=2,topk=4")
    expected = launched(inputs, {key: tensor.clone() for key, tensor in outputs.items()})
    dense = (inputs | outputs)[name]
    stride = 2**30 + 8
    # Pages that nobody touches take no memory.
    raw = torch.empty(2 * stride + dense[0].numel(), dtype=dense.dtype)
    far = raw.as_strided(dense.shape, (stride, *dense[0].contiguous().stride()))
    far.copy_(dense)
    if name == "out":
        launched(inputs, {**outputs, "out": far})
        outputs["out"] = far.contiguous()
    else:
        launched(inputs, outputs, **{name: far})
    assert torch.equal(outputs["out"], expected["out"])
    assert torch.equal(outputs["lse"], expected["lse"])


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("q", lambda q: q.double(), "q must be bfloat16, float16 or float32, got float64"),
        ("q", lambda q: q.half(), "compressed_kv must be float16, got bfloat16"),
        ("q", lambda q: q[..., 1:], r"k_pe must be \[9, 63\], got \[9, 64\]"),
        ("q", lambda q: q.transpose(1, 2), "q must be dense in its last axis"),
        ("compressed_kv", lambda kv: kv[1:], r"compressed_kv must be \[9, 512\], got \[8, 512\]"),
        (
            "compressed_kv",
            lambda kv: torch.zeros(9, 513, dtype=kv.dtype)[:, :512],
            "compressed_kv must begin at and step by multiples of 16 bytes",
        ),
        (
            "k_pe",
            lambda k_pe: torch.zeros(9 * 64 + 4, dtype=k_pe.dtype)[4:].view(9, 64),
            "k_pe must begin at and step by multiples of 16 bytes",
        ),
        ("indices", lambda indices: indices.long(), "indices must be int32, got int64"),
        ("indices", lambda indices: indices[:1], r"indices must be \[9, 1, \*\], got \[1, 1, 70\]"),
        (
            "indices",
            lambda indices: indices.new_empty(1, 1, 2**30 + 1).expand(9, -1, -1),
            "indices must have at most 1073741824 entries a token, got 1073741825",
        ),
        ("out", lambda out: out.float(), "out must be bfloat16, got float32"),
        ("lse", lambda lse: lse[:, :1], r"lse must be \[9, 4\], got \[9, 1\]"),
    ],
)
def test_a_wrong_argument_is_one_sentence(batch_of, name, changed, sentence):
    inputs, outputs = batch_of("sparse_prefill/prefill:9/heads=4,topk=70")
    with pytest.raises(ValueError, match=sentence):
        launched(inputs, outputs, **{name: changed((inputs | outputs)[name])})
    assert bool(outputs["out"].isnan().all())


def test_widths_that_the_kernel_is_not_compiled_for_are_refused_by_the_path_and_by_the_launcher(batch_of):
    (layer,) = parse("sparse_prefill/prefill:5").layers
    assert path.supports(SimpleNamespace(layers=(layer,))) is None
    odd = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=32)
    assert path.supports(SimpleNamespace(layers=(layer, odd))) == (
        "(kv_lora_rank, qk_rope_head_dim) must be one of [(256, 32), (256, 64), (512, 64), (1024, 64)], "
        "got (512, 32)"
    )
    inputs, outputs = batch_of("sparse_prefill/prefill:5/heads=4,topk=70")
    narrow = {"q": inputs["q"][..., :544], "k_pe": inputs["k_pe"][:, :32]}
    with pytest.raises(ValueError, match="or 1024 of 1088, got 512 of 544"):
        launched(inputs, outputs, **narrow)
