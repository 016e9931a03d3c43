"""Values padded to the width of keys: where, with what, at what cost, and where not at all."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from cases import parse
from cases.models import latent_model_names
from harness.paths import _prefill_attention_padded as padded
from harness.paths.triton import prefill_attention as unpadded
from harness.paths.triton import prefill_attention_padded
from harness.verdict import Status

(PATH,) = prefill_attention_padded.PATHS
(DIRECT,) = unpadded.PATHS

ROWS = "prefill:5,draft:30+2,hit:17+4,idle,decode:9,paused:6,pad:2"
# Padded by 64, 32 and 128 columns.
WIDER = {"deepseek-v3": (192, 128), "minicpm3-4b": (96, 64), "dots3-note-sliding": (256, 128)}
EQUAL = ("glm-4.7-flash", "glm-5", "mistral-small-4")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def nan(*shape):
    return torch.full(shape, torch.nan)


def tensors_of(launch):
    """Inputs, outputs and workspace of a launch of one layer."""
    (layer,) = launch.layers
    views = ({name: buffer.view for name, buffer in got.items()} for got in (layer.outputs, layer.workspace))
    return (layer.inputs, *views)


# ---- where widths differ -------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", ",dtype=fp16,strided=0", ",dtype=fp32"])
@pytest.mark.parametrize("model", WIDER)
def test_padded_columns_of_values_and_output_are_exactly_zero(launched, model, options):
    # All were NaN before the launch.
    launch = launched(f"prefill_attention/{ROWS}/model={model},heads=2{options}", PATH)
    inputs, outputs, workspace = tensors_of(launch)
    qk_head_dim, v_head_dim = WIDER[model]
    values, out = workspace["padded_value"], workspace["padded_out"]
    assert values.shape[2] == out.shape[2] == qk_head_dim
    assert (values[:, :, v_head_dim:] == 0).all()
    assert (out[:, :, v_head_dim:] == 0).all()
    assert torch.equal(values[:, :, :v_head_dim], inputs["value"])
    assert torch.equal(out[:, :, :v_head_dim], outputs["out"])


@pytest.mark.parametrize("model", WIDER)
def test_padding_changes_no_bit_of_the_lse(launched, model):
    text = f"prefill_attention/{ROWS}/model={model},heads=2"
    with_padding, without = (tensors_of(launched(text, path))[1]["lse"] for path in (PATH, DIRECT))
    assert torch.equal(with_padding, without)


@pytest.fixture
def recorded():
    """(q, k, v, out, workspace) -> operators of torch that a launch calls, and what the kernel gets."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called, given = [], []
    path = padded.path_of(lambda *arguments, **_: given.append(arguments), unpadded.supports, "tiny", ())

    def record(q, k, v, out, workspace):
        inputs = {
            "query": q,
            "key": k,
            "value": v,
            "cu_seqlens_q": int32(0, len(q)),
            "cu_seqlens_k_prefill": int32(0, len(k)),
            "qk_nope_head_dim": 2,
            "softmax_scale": 1.0,
        }
        outputs = {"out": out, "lse": nan(len(q), q.shape[1])}
        with Recorder():
            path.run(inputs, outputs, workspace)
        (arguments,) = given
        return called, arguments

    return record


def test_padding_is_two_copies_and_one_zeroing_between_given_tensors(recorded):
    # Nothing that allocates, and nothing that waits: no item(), no new tensor.
    q, k, v, out = torch.ones(3, 2, 4), torch.ones(5, 2, 4), torch.ones(5, 2, 3), nan(3, 2, 3)
    scratch = {"padded_value": nan(5, 2, 4), "padded_out": nan(3, 2, 4)}
    called, given = recorded(q, k, v, out, scratch)
    assert sorted(name for name in called if name != "slice") == ["copy_", "copy_", "zero_"]
    assert given[0] is q
    assert given[1] is k
    assert given[2] is scratch["padded_value"]
    assert given[5] is scratch["padded_out"]


@pytest.mark.parametrize(("model", "dtype"), [("deepseek-v3", "bfloat16"), ("minicpm3-4b", "float16")])
def test_the_workspace_holds_keys_and_tokens_as_wide_as_keys(model, dtype):
    option = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    case = parse(f"prefill_attention/{ROWS}/model={model},heads=3,dtype={option}")
    width = WIDER[model][0]
    # 5 and 17 + 4 keys of prefill rows; 5, 2, 4 and 1 tokens, and 2 of padding.
    assert PATH.workspace(case) == {
        "padded_value": ((26, 3, width), dtype),
        "padded_out": ((14, 3, width), dtype),
    }


# ---- where widths are equal ----------------------------------------------------------------------


@pytest.mark.parametrize("model", EQUAL)
def test_models_of_one_width_need_no_workspace(model):
    assert PATH.workspace(parse(f"prefill_attention/{ROWS}/model={model}")) == {}


def test_values_as_wide_as_keys_reach_the_kernel_as_they_are(recorded):
    q, k, v, out = torch.ones(3, 2, 4), torch.ones(5, 2, 4), torch.ones(5, 2, 4), nan(3, 2, 4)
    called, given = recorded(q, k, v, out, {})
    assert called == []
    for position, tensor in ((0, q), (1, k), (2, v), (5, out)):
        assert given[position] is tensor


@pytest.mark.parametrize("model", EQUAL)
def test_values_as_wide_as_keys_give_the_unpadded_path_s_bits(launched, model):
    text = f"prefill_attention/{ROWS}/model={model},heads=1"
    got, expected = (tensors_of(launched(text, path))[1] for path in (PATH, DIRECT))
    assert torch.equal(got["out"], expected["out"])
    assert torch.equal(got["lse"], expected["lse"])


# ---- where values are wider ----------------------------------------------------------------------


@pytest.mark.parametrize("model", latent_model_names())
def test_every_published_model_is_taken(model):
    assert PATH.supports(parse(f"prefill_attention/prefill:5/model={model}")) is None


def test_values_wider_than_keys_are_refused_in_one_sentence():
    (layer,) = parse("prefill_attention/prefill:5/model=glm-4.7-flash").layers
    case = SimpleNamespace(layers=(replace(layer, model=replace(layer.model, v_head_dim=257)),))
    reason = PATH.supports(case)
    assert reason == "values are padded to the width of keys, got v_head_dim 257 > qk_head_dim 256"


def test_an_engine_s_values_wider_than_keys_raise_before_anything_is_written():
    out, lse = nan(1, 1, 3), nan(1, 1)
    scratch = {"padded_value": nan(1, 1, 2), "padded_out": nan(1, 1, 2)}
    with pytest.raises(ValueError, match="v_head_dim 3 > qk_head_dim 2"):
        padded.prefill_attention_padded(
            unpadded.prefill_attention,
            torch.ones(1, 1, 2),
            torch.ones(1, 1, 2),
            torch.ones(1, 1, 3),
            int32(0, 1),
            int32(0, 1),
            out,
            lse,
            *scratch.values(),
            qk_nope_head_dim=1,
            softmax_scale=1.0,
        )
    assert all(bool(tensor.isnan().all()) for tensor in (out, lse, *scratch.values()))


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 3], ids=["dense", "strided"])
def test_a_step_worked_by_hand(gap):
    # Queries are 0, so every visible key weighs the same. Row 0: one cached and one new token. Row 1: two new
    # ones. The last token is padding. Two heads, keys of 1 + 2 columns, values of 2; the second head's are
    # ten times the first's. Tensors with gaps are slices of wider ones, the workspace's too.
    def sliced(tensor):
        wide = nan(tensor.shape[0], tensor.shape[1] + gap, tensor.shape[2] + gap)
        view = wide[:, : tensor.shape[1], : tensor.shape[2]]
        view.copy_(tensor)
        return view

    head = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0], [9.0, 1.0]])
    q = torch.zeros(4, 2, 3)
    q[3] = torch.nan
    out, lse = sliced(nan(4, 2, 2)), nan(4, 2)
    values, wide_out = sliced(nan(4, 2, 3)), sliced(nan(4, 2, 3))
    padded.prefill_attention_padded(
        unpadded.prefill_attention,
        sliced(q),
        sliced(torch.ones(4, 2, 3)),
        sliced(torch.stack([head, 10 * head], 1)),
        int32(0, 1, 3),
        int32(0, 2, 4),
        out,
        lse,
        values,
        wide_out,
        qk_nope_head_dim=1,
        softmax_scale=0.5,
    )
    expected = torch.tensor([[2.0, 4.0], [5.0, 7.0], [7.0, 4.0], [0.0, 0.0]])
    assert torch.equal(out, torch.stack([expected, 10 * expected], 1))
    half = pytest.approx(math.log(2))
    assert lse.tolist() == [[half, half], [0, 0], [half, half], [-math.inf, -math.inf]]
    assert (values[:, :, 2:] == 0).all()
    assert (wide_out[:, :, 2:] == 0).all()


# ---- on the harness's batches --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"prefill_attention/{ROWS}/model=minicpm3-4b,heads=2",
        f"prefill_attention/{ROWS}/model=minicpm3-4b,heads=5,dtype=fp16,strided=0",
        "prefill_attention/prefill:3,hit:40+30/model=dots3-note-sliding,heads=1,dtype=fp32",
        "prefill_attention/prefill:3,hit:9+5/model=mistral-small-4,heads=2",
        *(f"prefill_attention/{rows}/heads=2" for rows in ("", "idlex3", "paused:5", "pad:3", "decode:5")),
    ],
)
def test_the_variant_passes_every_check(text, launched, every_result):
    launch = launched(text, PATH)
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "lse", "guard", "inputs", "bounds", "repeat"} <= {result.name for result in results}
