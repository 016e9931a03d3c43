"""FlashMLA with stand-ins: its package as it is and as it was, and vLLM's files with their extension.

The stand-ins are ours. They have FlashMLA's signatures, refuse what it refuses, read of its tensors what it
reads, and compute with plain tensors; what FlashMLA's own kernels give is seen on a GPU alone.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from cases import parse
from harness.judge import judge_case
from harness.launch import Launch
from harness.paths.adapters._loading import Library, restored_modules
from harness.task import Task
from harness.verdict import Kind, Status

FILE = Path(__file__).resolve().parent.parent / "harness" / "paths" / "adapters" / "flash_mla.py"

KERNELS = """\
import torch

def attention(q, keys, scale):
    if len(keys) == 0:
        return torch.zeros(len(q), 512), torch.full((len(q),), EMPTY)
    logits = q.float() @ keys.float().T * scale
    return logits.softmax(1) @ keys[:, :512].float(), logits.logsumexp(1)

def dense_decode(q, cache, dv, lengths, table, scale, causal):
    rows, new, heads, width = q.shape
    assert rows > 0 and width == 576 and dv == 512 and q.dtype == cache.dtype != torch.float32
    assert cache.shape[1:] == (64, 1, 576) and cache.stride(3) == q.stride(3) == table.stride(1) == 1
    assert lengths.dtype == table.dtype == torch.int32 and lengths.is_contiguous()
    assert len(lengths) == len(table) == rows and table.shape[1] > 0
    # What a descriptor of the tensor memory accelerator asks for, and the block that is fetched at once.
    assert all(stride % 8 == 0 for stride in (*q.stride()[:3], *cache.stride()[:3]))
    assert bool(((table[:, 0] >= 0) & (table[:, 0] < len(cache))).all())
    out, lse = q.new_empty(rows, new, heads, 512), torch.empty(rows, heads, new)
    for row in range(rows):
        at = torch.arange(int(lengths[row]))
        keys = cache[table[row, at // 64].long(), at % 64, 0]
        for token in range(new):
            seen = len(at) - (new - 1 - token) * causal
            out[row, token], lse[row, :, token] = attention(q[row, token], keys[:seen], scale)
    return out, lse

def keys_of(cache):
    packed = cache.reshape(-1, 656)
    codes = packed[:, :512].contiguous().view(torch.float8_e4m3fn).float()
    scales = packed[:, 512:528].contiguous().view(torch.float32)
    latents = (codes * scales.repeat_interleave(128, 1)).bfloat16()
    return torch.cat([latents, packed[:, 528:].contiguous().view(torch.bfloat16)], 1)

def sparse_decode(q, cache, indices, dv, scale):
    rows, new, heads, width = q.shape
    assert rows > 0 and heads in (64, 128) and width == 576 and dv == 512 and q.dtype == torch.bfloat16
    assert cache.shape[2:] == (1, 656) and cache.stride(1) == 656 and cache.dtype == torch.uint8
    assert indices.shape[:2] == (rows, new) and indices.dtype == torch.int32 and indices.stride(2) == 1
    # Entries are read in pairs.
    assert indices.shape[2] % 64 == 0 and indices.stride(0) % 2 == 0
    out, lse = q.new_empty(rows, new, heads, 512), torch.empty(rows, new, heads)
    rows_of_cache = keys_of(cache)
    for row in range(rows):
        for token in range(new):
            listed = indices[row, token]
            # -1 alone is no key: an address is made of anything else.
            listed = listed[listed != -1].long()
            assert bool(((listed >= 0) & (listed < len(rows_of_cache))).all()), "an illegal memory access"
            out[row, token], lse[row, token] = attention(q[row, token], rows_of_cache[listed], scale)
    return out, lse.transpose(1, 2)

def sparse_prefill(q, kv, indices, scale, dv):
    tokens, heads, width = q.shape
    assert tokens > 0 and heads in (64, 128) and width == 576 and dv == 512
    assert kv.shape[1:] == (1, 576) and indices.shape[:2] == (tokens, 1) and indices.shape[2] % 128 == 0
    assert q.dtype == kv.dtype == torch.bfloat16 and indices.dtype == torch.int32
    out, lse = q.new_empty(tokens, heads, 512), torch.empty(tokens, heads)
    for token in range(tokens):
        listed = indices[token, 0]
        listed = listed[(listed >= 0) & (listed < len(kv))].long()
        out[token], lse[token] = attention(q[token], kv[listed, 0], scale)
    return out, lse.clone(), lse
"""

NEW = """\
SCHEDULES = []

class FlashMLASchedMeta:
    def __init__(self):
        self.made_for, self.calls = None, 0
        SCHEDULES.append(self)

def get_mla_metadata(*args, **kwargs):
    return FlashMLASchedMeta(), None

def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
    softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
    extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None,
):
    meta = tile_scheduler_metadata
    assert isinstance(meta, FlashMLASchedMeta) and num_splits is None
    topk = None if indices is None else indices.shape[2]
    lengths = cache_seqlens.tolist() if indices is None else []
    asked = (q.shape[:3], k_cache.shape[1:3], causal, is_fp8_kvcache, topk, lengths)
    meta.made_for = meta.made_for or asked
    meta.calls += 1
    assert meta.made_for == asked, "the schedule is of another step"
    if indices is None:
        return dense_decode(q, k_cache, head_dim_v, cache_seqlens, block_table, softmax_scale, causal)
    assert is_fp8_kvcache and not causal
    return sparse_decode(q, k_cache, indices, head_dim_v, softmax_scale)

def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    return sparse_prefill(q, kv, indices, sm_scale, d_v)
"""

OLD = """\
import math

def get_mla_metadata(
    cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None, is_fp8_kvcache=False, topk=None
):
    assert num_heads_k == 1 and (topk is None) == (num_heads_q is None) == (not is_fp8_kvcache)
    made_for = cache_seqlens if topk is None else torch.full_like(cache_seqlens, topk)
    return made_for.clone(), torch.tensor([num_q_tokens_per_head_k], dtype=torch.int32)

def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits,
    softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None,
):
    made_for = cache_seqlens if indices is None else torch.full_like(cache_seqlens, indices.shape[2])
    assert torch.equal(tile_scheduler_metadata, made_for), "the schedule is of another step"
    assert num_splits.tolist() == [q.shape[1] * q.shape[2]]
    if indices is None:
        return dense_decode(q, k_cache, head_dim_v, cache_seqlens, block_table, softmax_scale, causal)
    assert is_fp8_kvcache and not causal
    return sparse_decode(q, k_cache, indices, head_dim_v, softmax_scale)

def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512):
    out, most, lse = sparse_prefill(q, kv, indices, sm_scale, d_v)
    return out, most, torch.where(lse == EMPTY, -torch.inf, lse / math.log(2))
"""

UPSTREAM_NEW = {"flash_mla/__init__.py": KERNELS + NEW}
UPSTREAM_OLD = {"flash_mla/__init__.py": KERNELS + OLD}
IMPORTS = "import vllm._flashmla_C\nfrom vllm._flashmla_C import *\n\n"
COPY = {
    "vllm/__init__.py": "raise RuntimeError('the engine was imported')\n",
    "vllm/_flashmla_C.py": KERNELS,
    "vllm/third_party/flashmla/flash_mla_interface.py": IMPORTS + NEW,
}
FORMS = {"upstream": UPSTREAM_NEW, "upstream-2025": UPSTREAM_OLD, "vllm": COPY}


@pytest.fixture
def adapter_of(tmp_path, monkeypatch):
    """(files, what of their text is replaced by what) -> the adapter's module, with such a package."""
    with restored_modules("flash_mla"), restored_modules("vllm"):

        def install(files, replaced=("EMPTY", "torch.inf")):
            site = tmp_path / "site"
            for name, text in files.items():
                file = site / name
                file.parent.mkdir(parents=True, exist_ok=True)
                changed = text.replace(*replaced)
                file.write_text(changed.replace("EMPTY", "torch.inf"))
            package = "vllm" if "vllm/__init__.py" in files else "flash_mla"
            release = "0.25.1" if package == "vllm" else "1.0.0"
            about = site / f"{package}-{release}.dist-info"
            about.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {release}\n"
            (about / "METADATA").write_text(metadata)
            monkeypatch.syspath_prepend(str(site))
            return module_now()

        yield install


def module_now():
    spec = importlib.util.spec_from_file_location("flash_mla_adapter", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path_for(module, text):
    return next(path for path in module.PATHS if path.operator == parse(text).operator)


def verdict_of(path, lane, tmp_path, text):
    task = Task(text, parse(text).operator, path.name, lane.name)
    return judge_case(task, path, lane, tmp_path / "lock")


DRAFTS = "mla_decode/draft:63+3,decode:20,draft:9+2,idle,paused:7/heads=2"
PADDED = "mla_decode/decode:9,idle,hit:9+2,draft:3+2,pad:2/heads=2"
LISTS = "sparse_decode/decode:70,draft:9+2,hit:5+2,pad:2/heads=2,topk=50"
TOKENS = "sparse_prefill/prefill:6,decode:9,prefill:3,pad:1/heads=2,topk=5"

PASSING = [
    DRAFTS,
    PADDED,
    "mla_decode/decode:20,decode:64,pad:1/heads=70,dtype=fp16,strided=0",
    "mla_decode/draft:20+2,draft:64+2/heads=2",
    "mla_decode/pad:3/heads=2",
    "mla_decode/idlex3/heads=2",
    "mla_decode//heads=2",
    LISTS,
    "sparse_decode/decode:70,decode:130/heads=2,topk=64,strided=0,block=16",
    "sparse_decode/decode:9/heads=65,topk=9",
    "sparse_decode/pad:2/heads=2,topk=20",
    "sparse_decode//heads=2,topk=20",
    TOKENS,
    "sparse_prefill/prefill:3/heads=65,topk=128,strided=0",
    "sparse_prefill//heads=2,topk=20",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", PASSING)
def test_a_stand_in_of_flash_mla_attends_as_the_contract_says(text, form, adapter_of, lane, tmp_path):
    path = path_for(adapter_of(FORMS[form]), text)
    assert path.unavailable is None
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


WRONG = {
    "drafts see each other": (DRAFTS, "(new - 1 - token) * causal", "0"),
    "drafts aligned to the top left": (DRAFTS, "(new - 1 - token) * causal", "token"),
    "the LSE by token": (DRAFTS, "lse[row, :, token]", "lse.view(rows, new, heads)[row, token]"),
    "a row without keys is zero": (PADDED, "EMPTY", "0.0"),
    "no row is zero": (LISTS, "EMPTY", "0.0"),
    "no token is zero": (TOKENS, "EMPTY", "0.0"),
    "scales behind the rotated keys": (LISTS, "packed[:, 512:528]", "packed[:, 640:]"),
    "scales rounded to bf16": (LISTS, "codes * scales.repeat", "codes * scales.bfloat16().float().repeat"),
    "prefill's LSE to base 2": (TOKENS, "return out, lse.clone(), lse", "return out, lse, lse / 0.6931472"),
    "no scale": (LISTS, "keys.float().T * scale", "keys.float().T"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_convention_is_noticed(what, adapter_of, lane, tmp_path):
    text, *replaced = WRONG[what]
    assert KERNELS.count(replaced[0]) == 1
    path = path_for(adapter_of(UPSTREAM_NEW, replaced), text)
    assert verdict_of(path, lane, tmp_path, text).kind is Kind.WRONG


def test_rounding_of_scales_to_bf16_is_not_seen_where_they_are_powers_of_two(adapter_of, lane, tmp_path):
    _, *replaced = WRONG["scales rounded to bf16"]
    text = f"{LISTS},scale_fmt=ue8m0"
    path = path_for(adapter_of(UPSTREAM_NEW, replaced), text)
    assert verdict_of(path, lane, tmp_path, text).status is Status.PASSED


def test_a_list_that_is_given_as_it_is_would_be_read_out_of_bounds(adapter_of, lane, tmp_path, monkeypatch):
    module = adapter_of(UPSTREAM_NEW)
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda lists, *_: lists)
    verdict = verdict_of(path_for(module, LISTS), lane, tmp_path, LISTS)
    assert "an illegal memory access" in verdict.reason


# ---- schedules -----------------------------------------------------------------------------------


def test_rows_of_equally_many_tokens_are_one_call_and_padding_is_among_the_rows_of_one(
    adapter_of, make_batch
):
    module = adapter_of(UPSTREAM_NEW)
    batch = make_batch("mla_decode/decode:3,draft:70+2,idle,hit:5+2,draft:17+2,decode:64,pad:2/heads=1")
    inputs = {**batch.layers[0].tensors, **batch.layers[0].attributes}
    single, double = module.plan_decode(inputs)["calls"]
    assert (single.new, double.new) == (1, 2)
    assert single.tokens.tolist() == [0, 7, 8, 9]
    assert single.seq_lens.tolist() == [4, 65, 0, 0]
    assert double.tokens.tolist() == [1, 2, 5, 6]
    assert double.seq_lens.tolist() == [72, 19]
    assert (single.has_empty, double.has_empty) == (True, False)
    tables = inputs["block_tables"]
    assert torch.equal(single.block_table[:2], tables[[0, 5]])
    assert not single.block_table[2:].any()


@pytest.mark.parametrize("text", ["mla_decode/decode:3,draft:70+2/heads=1", LISTS])
def test_a_schedule_is_filled_by_the_plan_and_reused_by_every_run(text, adapter_of, lane):
    module = adapter_of(UPSTREAM_NEW)
    launch = Launch.prepare(parse(text), path_for(module, text), lane)
    plans = launch.plan()
    schedules = sys.modules["flash_mla"].SCHEDULES
    assert {schedule.calls for schedule in schedules} == {1}
    for runs in (2, 3):
        launch.enqueue(plans)
        assert {schedule.calls for schedule in schedules} == {runs}


def test_another_step_gets_schedules_of_its_own(adapter_of, lane):
    module = adapter_of(UPSTREAM_NEW)
    for text in ("mla_decode/decode:3,decode:70/heads=1", "mla_decode/decode:70,decode:3/heads=1"):
        Launch.prepare(parse(text), path_for(module, text), lane).run()
    first, second = sys.modules["flash_mla"].SCHEDULES
    assert (first.calls, second.calls) == (2, 2)
    assert first.made_for != second.made_for


# ---- what is claimed and what is there -----------------------------------------------------------

SPARSE = ("sparse_decode/decode:9/heads=2", "sparse_prefill/prefill:9/heads=2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mla_decode/decode:9/heads=2,dtype=fp32", "is for bf16 and fp16, got fp32"),
        ("mla_decode/decode:9/heads=2,block=16", "takes blocks of 64 tokens, got 16"),
        ("mla_decode/decode:9/model=minicpm3-4b", "takes rows of 512 + 64 columns, got 256 + 32"),
        ("mla_decode/decode:9x11623/heads=2", "schedules at most 11,622 rows, got 11,623 tokens"),
        ("mla_decode/decode:9x11622/heads=1,dtype=fp16", None),
        ("sparse_decode/decode:9/heads=129", "takes at most 128 heads, got 129"),
        ("sparse_decode/decode:9x11623/heads=2", "schedules at most 11,622 rows"),
        ("sparse_decode/decode:9/heads=128,block=16", None),
        ("sparse_prefill/prefill:9/heads=2,dtype=fp16", "is for bf16, got fp16"),
        ("sparse_prefill/prefill:9/heads=129", "takes at most 128 heads, got 129"),
        ("sparse_prefill/prefill:20000/heads=128", None),
        ("sparse_prefill/prefill:9/model=minicpm3-4b,heads=2", "takes rows of 512 + 64 columns"),
    ],
)
def test_what_flash_mla_does_not_claim_is_said(text, said, adapter_of):
    reason = path_for(adapter_of(UPSTREAM_NEW), text).supports(parse(text))
    assert (said in reason) if said else (reason is None)


@pytest.mark.parametrize(
    ("text", "capability", "said"),
    [
        ("mla_decode/decode:9/heads=2", (9, 0), None),
        ("mla_decode/decode:9/heads=2", (10, 0), "is for compute capability 9, this device has 10.0"),
        *((text, (10, 3), None) for text in SPARSE),
        *((text, (12, 0), "is for compute capability 9 and 10, this device has 12.0") for text in SPARSE),
    ],
)
def test_another_device_is_told(text, capability, said, adapter_of, monkeypatch):
    module = adapter_of(UPSTREAM_NEW)
    monkeypatch.setattr(module, "compute_capability", lambda: capability)
    reason = path_for(module, text).supports(parse(text))
    assert (said in reason) if said else (reason is None)


def test_the_package_comes_before_the_copy_and_verdicts_say_which_it_was(adapter_of):
    paths = adapter_of({**COPY, **UPSTREAM_OLD}).PATHS
    assert {path.libraries["flash_mla"] for path in paths} == {
        "of unknown version, not seen working: none was"
    }


def test_vllms_copy_is_run_without_its_engine(adapter_of):
    module = adapter_of(COPY)
    assert [path.libraries for path in module.PATHS] == [{"flash_mla": "vllm 0.25.1"}] * 3
    assert "vllm" not in sys.modules


def test_without_either_every_path_says_what_is_installed(monkeypatch):
    monkeypatch.setattr(Library, "folder", None)
    paths = module_now().PATHS
    reason = "flash_mla is not installed, and vllm is not installed: pip install --no-deps 'vllm==0.25.1'"
    assert [(path.unavailable, path.libraries) for path in paths] == [(reason, {})] * 3
    assert {path.lanes for path in paths} == {("compiled",)}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({name: text for name, text in COPY.items() if "_C" not in name}, "has no file _flashmla_C.py"),
        (
            {name: text for name, text in COPY.items() if "third" not in name},
            "has no file flash_mla_interface.py in this version",
        ),
        ({"flash_mla/__init__.py": "import flash_mla_cuda\n"}, "No module named 'flash_mla_cuda'"),
        (
            {"flash_mla/__init__.py": (KERNELS + NEW).replace("def flash_mla_sparse_fwd", "def gone")},
            "flash_mla has no flash_mla_sparse_fwd",
        ),
    ],
)
def test_what_an_installation_lacks_is_said_by_every_path(files, said, adapter_of):
    reasons = {path.unavailable for path in adapter_of(files).PATHS}
    assert len(reasons) == 1
    assert said in reasons.pop()
