"""cuda/prefill_attention on the host: what the suites do not state."""

import math

import pytest
import torch

from harness.cuda import build
from harness.lanes import lanes
from harness.paths.cuda import prefill_attention as path

HOST = lanes()["host"]
LACK = HOST.unavailable()

pytestmark = pytest.mark.skipif(LACK is not None, reason=str(LACK))

SCALE = 0.3
ROWS = ((3, 0), (0, 0), (5, 70))
"""(new tokens, cached tokens) of rows; a row without new tokens has no keys. Two tokens of padding follow."""
TOKENS, KEYS = 10, 78


@pytest.fixture(autouse=True)
def on_host():
    """This process builds for the processor."""
    build.use(build.HOST)
    yield
    build.set_schedule(0)
    build.use(None)


def heads_of(tokens, heads, width, dtype, seed, *, begin=0, gap=0):
    """[tokens, heads, width] of random numbers, `begin` elements into its memory, `gap` between its rows."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((begin + tokens * heads * (width + gap) + gap,), torch.nan, dtype=dtype)
    view = memory.as_strided((tokens, heads, width), (heads * (width + gap), width + gap, 1), begin)
    return view.copy_(torch.randn((tokens, heads, width), generator=generator))


def arguments_of(qk_width, v_width, dtype=torch.bfloat16, heads=2, **layout):
    """The launcher's tensors by name. Outputs hold NaN."""
    new = [0, *(new for new, _ in ROWS)]
    all_keys = [0, *(new + cached for new, cached in ROWS)]
    out = heads_of(TOKENS, heads, v_width, dtype, 4, **layout)
    return {
        "q": heads_of(TOKENS, heads, qk_width, dtype, 1, **layout),
        "k": heads_of(KEYS, heads, qk_width, dtype, 2, **layout),
        "v": heads_of(KEYS, heads, v_width, dtype, 3, **layout),
        "cu_seqlens_q": torch.tensor(new).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor(all_keys).cumsum(0).int(),
        "out": out.fill_(torch.nan),
        "lse": torch.full((TOKENS, heads), torch.nan),
    }


def launched(arguments):
    """(out, lse) after a launch."""
    path.KERNELS.prefill_attention(*arguments.values(), SCALE)
    return arguments["out"], arguments["lse"]


def expected(arguments):
    """(out, lse) by softmax in float64, a row at a time."""
    q, k, v = (arguments[name].double() for name in "qkv")
    out = torch.zeros((len(q), q.shape[1], v.shape[2]), dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for row, (new, cached) in enumerate(ROWS):
        first, begin = int(arguments["cu_seqlens_q"][row]), int(arguments["cu_seqlens_k"][row])
        for i in range(new):
            seen = slice(begin, begin + cached + i + 1)
            logits = SCALE * torch.einsum("hw,khw->hk", q[first + i], k[seen])
            lse[first + i] = logits.logsumexp(1)
            out[first + i] = torch.einsum("hk,khw->hw", logits.softmax(1), v[seen])
    return out, lse


def check(arguments):
    """What a launch computes is right, within what the dtype rounds."""
    (out, lse), (right_out, right_lse) = launched(arguments), expected(arguments)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[out.dtype]
    assert torch.allclose(out.double(), right_out, rtol=0, atol=tolerance)
    assert torch.allclose(lse.double(), right_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("qk_width", "v_width"), [(50, 30), (40, 104), (136, 8), (192, 192), (256, 120), (17, 250)]
)
def test_any_widths_up_to_256_are_taken(qk_width, v_width, dtype):
    check(arguments_of(qk_width, v_width, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [{"begin": 1}, {"gap": 3}, {"begin": 5, "gap": 8}])
def test_addresses_and_strides_need_no_alignment(layout, dtype):
    check(arguments_of(96, 64, dtype, **layout))


def test_gaps_between_the_rows_of_the_output_stay_as_they_were():
    arguments = arguments_of(96, 60, gap=4)
    out, _ = launched(arguments)
    behind = out.as_strided((*out.shape[:2], 4), out.stride(), out.storage_offset() + out.shape[2])
    assert bool(behind.isnan().all())
    assert not out.isnan().any()


@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_beyond_the_2_to_the_31st_element_are_found(name):
    arguments = arguments_of(96, 64)
    near = launched(arguments)[0].clone()
    dense, stride = arguments[name], 2**31 // (KEYS - 4)
    # Never real but where a key lies.
    far = torch.empty(KEYS * stride, dtype=dense.dtype).as_strided(dense.shape, (stride, dense.stride(1), 1))
    arguments[name] = far.copy_(dense)
    assert torch.equal(launched(arguments)[0], near)


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_in_any_order_compute_the_same_bits(seed):
    out, lse = (tensor.clone() for tensor in launched(arguments_of(128, 128)))
    build.set_schedule(2, seed)
    again = launched(arguments_of(128, 128))
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def test_heads_wider_than_256_are_refused():
    with pytest.raises(ValueError, match="heads must be at most 256 wide, got 264 of q and 64 of v"):
        launched(arguments_of(264, 64))


def test_more_heads_than_a_grid_takes_are_refused():
    arguments = arguments_of(16, 16, heads=1)
    for name in ("q", "k", "v", "out"):
        arguments[name] = arguments[name].expand(-1, 65536, -1)
    arguments["lse"] = torch.empty((TOKENS, 65536))
    with pytest.raises(ValueError, match="at most 65535 heads, got 65536"):
        launched(arguments)


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("q", lambda q: q.double(), "q must be bfloat16, float16 or float32, got float64"),
        ("k", lambda k: k.half(), "k must be bfloat16, got float16"),
        ("v", lambda v: v[1:], r"v must be \[78, 2, 64\], got \[77, 2, 64\]"),
        ("v", lambda v: v.transpose(1, 2).contiguous().transpose(1, 2), "v must be dense in its last axis"),
        ("cu_seqlens_k", lambda sums: sums.long(), "cu_seqlens_k must be int32, got int64"),
        ("cu_seqlens_k", lambda sums: sums[:-1], r"cu_seqlens_k must be \[4\], got \[3\]"),
        ("lse", lambda lse: lse.t().contiguous().t(), "lse must be contiguous"),
    ],
)
def test_a_wrong_argument_is_one_sentence(name, changed, sentence):
    arguments = arguments_of(96, 64)
    arguments[name] = changed(arguments[name])
    with pytest.raises(ValueError, match=sentence):
        launched(arguments)
    assert bool(arguments["out"].isnan().all())
