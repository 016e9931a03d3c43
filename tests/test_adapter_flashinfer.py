"""FlashInfer's adapter on a stand-in: its module paths and signatures, computing with plain tensors.

The stand-in's files are ours. They hold the adapter to the layouts, dtypes and arguments that FlashInfer
documents, and show that what departs from its conventions is noticed. FlashInfer itself runs on GPUs alone.
"""

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch

from cases import parse
from harness.judge import judge_case
from harness.paths.adapters._loading import Library
from harness.task import Task
from harness.verdict import Kind, Status

FILE = Path(__file__).resolve().parent.parent / "harness" / "paths" / "adapters" / "flashinfer.py"

MLA = """\
import math
from dataclasses import dataclass

import torch

@dataclass(frozen=True)
class MLAPlanMetadata:
    lists: tuple

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return cls((qo_indptr, kv_indptr, kv_indices, kv_len_arr))

class BatchMLAPagedAttentionWrapper:
    def __init__(self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None,
                 kv_indices=None, kv_len_arr=None, backend="auto"):
        assert float_workspace_buffer.nbytes >= 128 << 20 and backend in ("fa2", "fa3")
        self.workspace = float_workspace_buffer

    def plan(self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale,
             q_data_type, kv_data_type, lse_mode="none", query_layout="packed", kv_cache_layout="packed"):
        queries, pages, indices, lengths = metadata.lists
        for tensor in metadata.lists:
            assert tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()
        assert queries[0] == pages[0] == 0 and len(queries) == len(pages) == len(lengths) + 1 > 1
        assert torch.equal(pages.diff(), (lengths + page_size - 1) // page_size) and pages[-1] == len(indices)
        assert head_dim_ckv in (128, 256, 512) and head_dim_kpe % 64 == 0 and isinstance(sm_scale, float)
        assert q_data_type == kv_data_type in (torch.bfloat16, torch.float16) and causal in (True, False)
        self.lists, self.widths = metadata.lists, (head_dim_ckv, head_dim_kpe)
        self.heads, self.page_size, self.causal = num_heads, page_size, causal
        self.scale, self.dtype, self.lse_mode = SCALE, q_data_type, lse_mode

    def run(self, *, query, kv_cache, out=None, lse=None, return_lse=False, return_lse_base_on_e=False):
        assert (return_lse, return_lse_base_on_e) == (self.lse_mode != "none", self.lse_mode == "basee")
        width = sum(self.widths)
        assert query.shape[1:] == (self.heads, width) and kv_cache.shape[1:] == (self.page_size, width)
        assert query.dtype == kv_cache.dtype == out.dtype == self.dtype and lse.dtype == torch.float32
        assert out.shape == (*query.shape[:2], self.widths[0]) and lse.shape == query.shape[:2]
        assert lse.is_contiguous() and out.stride(2) == query.stride(2) == kv_cache.stride(2) == 1
        queries, pages, indices, lengths = self.lists
        assert queries[-1] == len(query)
        natural = return_lse_base_on_e
        for row, length in enumerate(lengths.tolist()):
            held = kv_cache[indices[pages[row] : pages[row + 1]].long()].flatten(0, 1)[:length].float()
            first, last = queries[row : row + 2].tolist()
            for token in range(first, last):
                seen = held[: SEEN] if self.causal else held
                logits = query[token].float() @ seen.T * self.scale
                lse[token] = logits.logsumexp(1) * math.log2(math.e) * BASE
                out[token] = logits.softmax(1) @ seen[:, : self.widths[0]] if length else EMPTY
"""

PREFILL = """\
import math

import torch

class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto"):
        assert float_workspace_buffer.nbytes >= 128 << 20 and kv_layout == "NHD" and backend in ("fa2", "fa3")

    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None,
             causal=False, sm_scale=None, q_data_type="float16", kv_data_type=None):
        for tensor in (qo_indptr, kv_indptr):
            assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor[0] == 0
        assert len(qo_indptr) == len(kv_indptr) > 1 and num_qo_heads == num_kv_heads and causal
        self.queries, self.keys, self.widths = qo_indptr, kv_indptr, (head_dim_qk, head_dim_vo)
        self.scale, self.dtype = SCALE, q_data_type

    def run(self, q, k, v, *args, out=None, lse=None, return_lse=False, lse_base="log2", lse_layout="NH"):
        assert q.dtype == k.dtype == v.dtype == out.dtype == self.dtype and return_lse and not args
        assert (q.shape[2], k.shape[2], v.shape[2]) == (*self.widths[:1] * 2, self.widths[1])
        assert len(q) == len(out) == self.queries[-1] and len(k) == len(v) == self.keys[-1]
        assert out.is_contiguous() and lse.is_contiguous() and lse.shape == q.shape[:2]
        natural = lse_base == "ln"
        for row in range(len(self.keys) - 1):
            first, last = self.queries[row : row + 2].tolist()
            start, end = self.keys[row : row + 2].tolist()
            length = end - start
            for token in range(first, last):
                key, value = (x[start : start + SEEN].float() for x in (k, v))
                logits = torch.einsum("hw,nhw->hn", q[token].float(), key) * self.scale
                lse[token] = logits.logsumexp(1) * math.log2(math.e) * BASE
                out[token] = torch.einsum("hn,nhv->hv", logits.softmax(1), value).to(out.dtype)
"""

CASCADE = """\
import torch

def get_cascade_module():
    pass

def merge_state(v_a, s_a, v_b, s_b):
    assert v_a.dtype == v_b.dtype in (torch.bfloat16, torch.float16)
    assert s_a.dtype == s_b.dtype == torch.float32
    assert v_a.dim() == 3 and v_a.shape == v_b.shape and s_a.shape == s_b.shape == v_a.shape[:2] and len(v_a)
    assert all(x.is_contiguous() for x in (v_a, s_a, v_b, s_b))
    most = torch.maximum(s_a, s_b)
    weights = [torch.POWER(s - most).nan_to_num(nan=0.0) for s in (s_a, s_b)]
    total = weights[0] + weights[1]
    # Of an empty state the output is read: NaN there would be seen.
    shares = [torch.where(total > 0, weight / total, 0).unsqueeze(2) for weight in weights]
    return (shares[0] * v_a.float() + shares[1] * v_b.float()).to(v_a.dtype), total.LOG() + most
"""

BOTTOM_RIGHT = "length - (last - first) + token - first + 1"
TOP_LEFT = "token - first + 1"
NAMES = {
    "SEEN": BOTTOM_RIGHT,
    "BASE": "(math.log(2) if natural else 1)",
    "SCALE": "sm_scale",
    "EMPTY": "0",
    "POWER": "exp2",
    "LOG": "log2",
}
FILES = {"mla/__init__.py": MLA, "prefill.py": PREFILL, "cascade.py": CASCADE}


def written(text, **changed):
    for name, value in {**NAMES, **changed}.items():
        text = text.replace(name, value)
    return text


@pytest.fixture
def adapter_of(tmp_path, monkeypatch):
    """(files, what they compute otherwise) -> the adapter's module, with a package of these as FlashInfer."""

    def load(files=FILES, **changed):
        package = tmp_path / "site" / "flashinfer"
        for name, text in {"__init__.py": "", **files}.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(written(text, **changed))
        about = tmp_path / "site" / "flashinfer_python-0.7.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.7.2\n")
        monkeypatch.syspath_prepend(str(package.parent))
        module = module_now()
        for name in module.NEEDED:
            if importlib.util.find_spec(name) is None:
                stand_in = ModuleType(name)
                stand_in.__spec__ = ModuleSpec(name, None)
                monkeypatch.setitem(sys.modules, name, stand_in)
        return module_now()

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        del sys.modules[name]


def module_now():
    spec = importlib.util.spec_from_file_location("flashinfer_adapter", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path_for(module, text, variant="fa2"):
    names = {f"adapters/flashinfer/{parse(text).operator}{part}" for part in ("", f"@{variant}")}
    return next(path for path in module.PATHS if path.name in names)


def verdict_of(path, lane, tmp_path, text):
    task = Task(text, parse(text).operator, path.name, lane.name)
    return judge_case(task, path, lane, tmp_path / "lock")


DECODE = "mla_decode/decode:20,draft:62+4,idle,hit:9+2,decode:100,paused:7,pad:2/heads=4"
CHUNKS = "prefill_attention/draft:30+3,hit:64+17,prefill:5,decode:40,idle,paused:7,pad:2/heads=2"
STATES = "merge_states/draft:30+9,hit:9+2,prefill:3,idle,pad:1/heads=4"
PASSING = [
    DECODE,
    "mla_decode/decode:9,decode:15/heads=2,block=16",
    "mla_decode/decode:20,decode:64/model=mistral-small-4,heads=4,dtype=fp16",
    "mla_decode/decode:20,draft:30+2/heads=4,layers=2,block=64+48,strided=0",
    "mla_decode/prefill:4,idle/heads=2",
    "mla_decode/pad:3/heads=2",
    "mla_decode//heads=2",
    CHUNKS,
    "prefill_attention/prefill:9,hit:5+3/heads=5,dtype=fp16",
    "prefill_attention/prefill:9,hit:5+3/heads=2,strided=0",
    "prefill_attention/decode:9,pad:1/heads=2",
    "prefill_attention//heads=2",
    STATES,
    "merge_states/hit:6+4,decode:9/heads=2,dtype=fp16,strided=0",
    "merge_states//heads=2",
]


@pytest.mark.parametrize("variant", ["fa2", "fa3"])
@pytest.mark.parametrize("text", PASSING)
def test_a_stand_in_of_flashinfer_attends_as_the_contract_says(text, variant, adapter_of, lane, tmp_path):
    path = path_for(adapter_of(), text, variant)
    assert path.unavailable is None
    assert path.libraries == {"flashinfer": "0.7.2, not seen working: 0.7.2.post1 was"}
    assert path.supports(parse(text)) is None
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        pytest.param(DECODE, {"BASE": "1"}, id="decode's LSE to base 2"),
        pytest.param(DECODE, {"SEEN": TOP_LEFT}, id="decode causal to the top left"),
        pytest.param(DECODE, {"SEEN": "length"}, id="decode without a mask"),
        pytest.param(DECODE, {"EMPTY": "torch.nan"}, id="decode rows without keys NaN"),
        pytest.param(DECODE, {"SCALE": "576**-0.5"}, id="decode's scale of the absorbed width"),
        pytest.param(CHUNKS, {"BASE": "1"}, id="prefill's LSE to base 2"),
        pytest.param(CHUNKS, {"SEEN": TOP_LEFT}, id="prefill causal to the top left"),
        pytest.param(CHUNKS, {"SCALE": "128**-0.5"}, id="prefill's scale without the rope part"),
        pytest.param(STATES, {"POWER": "exp", "LOG": "log"}, id="merged LSEs to base e"),
        pytest.param(STATES, {"LOG": "log"}, id="the merged LSE to base e"),
    ],
)
def test_another_convention_than_flashinfers_is_noticed(text, changed, adapter_of, lane, tmp_path):
    path = path_for(adapter_of(**changed), text)
    assert verdict_of(path, lane, tmp_path, text).kind is Kind.WRONG


def test_decode_rows_come_first_and_padding_is_rows_of_one_token_without_keys(adapter_of, make_batch):
    inputs = make_batch("mla_decode/decode:3,idle,hit:5+2,draft:17+2,pad:2/heads=1,block=16").layers[0]
    tables = inputs.tensors["block_tables"]
    planned = adapter_of().plan_decode("fa2", {**inputs.tensors, **inputs.attributes})
    assert planned["tokens"].tolist() == [0, 3, 4, 5, 6]
    queries, pages, indices, lengths = planned["wrapper"].lists
    assert queries.tolist() == [0, 1, 3, 4, 5]
    assert lengths.tolist() == [4, 19, 0, 0]
    assert pages.tolist() == [0, 1, 3, 3, 3]
    assert torch.equal(indices, torch.cat([tables[0, :1], tables[3, :2]]))
    assert planned["wrapper"].causal


def test_a_step_of_single_tokens_has_no_mask(adapter_of, make_batch):
    inputs = make_batch("mla_decode/decode:3,decode:20/heads=1").layers[0]
    planned = adapter_of().plan_decode("fa3", {**inputs.tensors, **inputs.attributes})
    assert not planned["wrapper"].causal


def test_two_plans_share_no_scratch_and_it_holds_nan(adapter_of, make_batch):
    module = adapter_of()
    inputs = make_batch("mla_decode/decode:3/heads=1").layers[0]
    plans = [module.plan_decode("fa2", {**inputs.tensors, **inputs.attributes}) for _ in range(2)]
    first, second = (plan["wrapper"].workspace for plan in plans)
    assert first.data_ptr() != second.data_ptr()
    assert first[:16].view(torch.float32).isnan().all()


def test_states_are_merged_to_base_2_below_the_larger_one(adapter_of, make_batch):
    inputs = make_batch(STATES).layers[0].tensors
    planned = adapter_of().plan_merge(inputs)
    largest = planned["largest"]
    for part in ("prefix", "suffix"):
        given, lse = inputs[f"{part}_lse"], planned[f"{part}_lse"]
        empty = given.isinf()
        assert empty.any()
        assert (lse[empty] == -torch.inf).all()
        assert (lse <= 0).all()
        torch.testing.assert_close(lse[~empty] * math.log(2) + largest[~empty], given[~empty])
        assert not planned[f"{part}_out"][empty].any()


def test_large_lses_lose_no_digits_to_the_base(adapter_of, lane, tmp_path):
    text = "merge_states/draft:30+9,prefill:3,pad:1/heads=4,data=deep"
    verdict = verdict_of(path_for(adapter_of(), text), lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mla_decode/decode:9/heads=2,dtype=fp32", "MLA kernels are for bf16 and fp16, got fp32"),
        ("mla_decode/decode:9/model=minicpm3-4b,heads=4", "multiple of 64, got 256 + 32"),
        # Two blocks of 64 rows hold 25 tokens and 3 heads of the next, whose newest key is the 129th.
        ("mla_decode/draft:103+30/heads=5", "would leave that key out"),
        ("mla_decode/draft:102+30/heads=5", None),
        ("mla_decode/draft:103+30/heads=4", None),
        # A block of 64 rows ends in the third of three tokens with 25 heads, whose newest key is the 65th.
        ("mla_decode/draft:62+3,decode:9x4/heads=25", "would leave that key out"),
        ("mla_decode/draft:62+3,decode:9x4,pad:4/heads=25", "would leave that key out"),
        ("mla_decode/draft:62+3/heads=25", None),
        ("mla_decode/decode:128/heads=192", None),
        ("mla_decode/decode:9/heads=2,block=1,dtype=fp16", None),
        ("prefill_attention/prefill:9/heads=2,dtype=fp32", "prefill kernels are for bf16 and fp16, got fp32"),
        ("prefill_attention/prefill:9/model=minicpm3-4b,heads=4", "got 96 and 64"),
        ("prefill_attention/prefill:9/model=mistral-small-4,heads=4", None),
        ("merge_states/hit:6+4/heads=2,dtype=fp32", "is for bf16 and fp16, got fp32"),
        ("merge_states/hit:6+4/heads=2,v_dim=32", "columns, got 32"),
        ("merge_states/hit:6+4/heads=128", "at most 64 heads of 128 columns, got 128"),
        ("merge_states/hit:6+4/heads=64,dtype=fp16", None),
        ("merge_states/hit:6+4/heads=33,v_dim=512", "at most 32 heads of 512 columns, got 33"),
        ("merge_states/hit:6+4/heads=128,v_dim=64", None),
    ],
)
def test_what_flashinfer_does_not_claim_is_said(text, said, adapter_of):
    reason = path_for(adapter_of(), text).supports(parse(text))
    assert (said in reason) if said else (reason is None)


def test_fa3_is_for_hopper_alone(adapter_of, monkeypatch):
    module = adapter_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert module.refused_device("fa3") == "FlashInfer's fa3 is for compute capability 9.0, got 10.0"
    assert module.refused_device("fa2") is None


# An H100, an A100 and a consumer's GPU.
@pytest.mark.parametrize(("shared", "keys"), [(233472, 64), (167936, 32), (102400, 16)])
def test_keys_of_a_tile_follow_the_shared_memory(shared, keys, adapter_of, monkeypatch):
    module = adapter_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(shared_memory_per_multiprocessor=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    assert module.keys_of_tile("fa2") == keys
    assert module.keys_of_tile("fa3") == 64


def test_without_flashinfer_every_path_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr(Library, "folder", None)
    paths = module_now().PATHS
    assert [path.name.removeprefix("adapters/flashinfer/") for path in paths] == [
        "mla_decode@fa2",
        "mla_decode@fa3",
        "prefill_attention@fa2",
        "prefill_attention@fa3",
        "merge_states",
    ]
    reason = "flashinfer is not installed: pip install --no-deps 'flashinfer-python==0.7.2.post1'"
    assert {(path.unavailable, path.lanes, len(path.libraries)) for path in paths} == {
        (reason, ("compiled",), 0)
    }


def test_a_module_that_a_version_has_not_is_named(adapter_of):
    module = adapter_of({name: text for name, text in FILES.items() if name != "cascade.py"})
    assert {path.unavailable for path in module.PATHS} == {"flashinfer has no module cascade in this version"}


def test_a_library_that_flashinfer_needs_is_named(adapter_of, monkeypatch):
    module = adapter_of()
    monkeypatch.setitem(module.NEEDED, "no_such_module", "no-such-library")
    said = "flashinfer needs no_such_module, which is not installed: pip install no-such-library"
    assert module.unavailable() == said


def test_the_package_is_not_imported_before_it_is_called(adapter_of):
    files = {**FILES, "__init__.py": "raise RuntimeError('the package was imported')\n"}
    assert {path.unavailable for path in adapter_of(files).PATHS} == {None}
    assert "flashinfer" not in sys.modules
