"""vLLM's Triton kernels from its wheel: a stand-in with its paths and signatures, and the real ones.

The stand-in's files are ours: they ask for the same names and compute with plain tensors. What vLLM's own
kernels give is tested where vLLM's files are installed.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from cases import parse
from harness.judge import judge_case
from harness.kernel_path import path_named
from harness.paths.adapters._loading import Library
from harness.task import Task
from harness.verdict import Kind, Status

FILE = Path(__file__).resolve().parent.parent / "harness" / "paths" / "adapters" / "vllm.py"

DECODE = """\
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

is_hip_ = current_platform.is_rocm()

@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1

def decode_attention_fwd(
    q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale,
    page_size=1, logit_cap=0.0, k_scale=None, v_scale=None, is_mla=False,
):
    assert is_mla and not is_hip_ and k_scale == 1 and v_scale == 1 and logit_cap == 0
    assert k_buffer.shape[1:3] == (page_size, 1) and len(req_to_token) == len(b_seq_len) == len(q)
    assert attn_logits.shape == (*o.shape[:2], num_kv_splits, o.shape[2] + 1)
    for row in range(len(q)):
        at = torch.arange(int(b_seq_len[row]))
        where = req_to_token[row, at // page_size].long(), at % page_size, 0
        logits = q[row].float() @ k_buffer[where].float().T * sm_scale
        lse[row] = logits.logsumexp(1)
        o[row] = logits.softmax(1) @ v_buffer[where].float() if len(at) else EMPTY
"""

MERGE = """\
import torch
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

float8_info = torch.finfo(current_platform.fp8_dtype())

@triton.jit
def merge_attn_states_kernel(output, FP8_MAX: tl.constexpr = float8_info.max):
    pass

def merge_attn_states(
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None,
    prefill_tokens_with_context=None, output_scale=None,
):
    assert all(x.is_contiguous() for x in (output, prefix_output, suffix_output))
    lses = torch.stack([prefix_lse, suffix_lse])
    output_lse.copy_(torch.where(lses.isinf(), -torch.inf, lses).logsumexp(0))
    shares = torch.where(lses.isinf(), 0, (lses - output_lse).exp()).transpose(1, 2).unsqueeze(3)
    # Of an empty state the output is read: NaN there would be seen.
    output.copy_(shares[0] * prefix_output.float() + shares[1] * suffix_output.float())
"""

FILES = {
    "triton_decode_attention.py": DECODE.replace("EMPTY", "0"),
    "triton_merge_attn_states.py": MERGE,
}


@pytest.fixture
def adapter_of(tmp_path, monkeypatch):
    """(files) -> the adapter's module, with a package of these as vLLM."""

    def load(files):
        package = tmp_path / "site" / "vllm"
        kernels = package / "v1" / "attention" / "ops"
        kernels.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the engine was imported')\n")
        for name, text in files.items():
            (kernels / name).write_text(text)
        about = tmp_path / "site" / "vllm-0.33.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
        monkeypatch.syspath_prepend(str(package.parent))
        return module_now()

    return load


def module_now():
    spec = importlib.util.spec_from_file_location("vllm_adapter", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path_for(module, text):
    return next(path for path in module.PATHS if path.operator == parse(text).operator)


def verdict_of(path, lane, tmp_path, text):
    task = Task(text, parse(text).operator, path.name, lane.name)
    return judge_case(task, path, lane, tmp_path / "lock")


PASSING = [
    "mla_decode/decode:20,draft:62+4,idle,hit:9+2,decode:100,paused:7/heads=4",
    "mla_decode/decode:9,draft:15+2,prefill:3/heads=2,block=16,splits=3",
    "mla_decode/decode:20,decode:64/model=mistral-small-4,heads=4,dtype=fp16",
    "mla_decode/idlex3/heads=2",
    "mla_decode//heads=2",
    "merge_states/draft:30+9,hit:9+2,prefill:3,idle,pad:1/heads=4",
    "merge_states/hit:6+4,decode:9/heads=2,dtype=fp32,strided=0",
    "merge_states//heads=2",
]
PADDED = "mla_decode/decode:9,idle,hit:9+2,draft:3+2,pad:2/heads=2"


@pytest.mark.parametrize("text", [*PASSING, PADDED, "mla_decode/pad:3/heads=2"])
def test_a_stand_in_of_vllm_attends_as_the_contract_says(text, adapter_of, lane, tmp_path):
    path = path_for(adapter_of(FILES), text)
    assert path.unavailable is None
    assert path.libraries == {"vllm": "0.33.0"}
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


def test_a_row_without_keys_that_is_not_zero_is_noticed(adapter_of, lane, tmp_path):
    files = {**FILES, "triton_decode_attention.py": DECODE.replace("EMPTY", "torch.nan")}
    path = path_for(adapter_of(files), PADDED)
    without = PADDED.replace(",pad:2", "")
    assert verdict_of(path, lane, tmp_path, without).status is Status.PASSED
    assert verdict_of(path, lane, tmp_path, PADDED).kind is Kind.WRONG


def test_neither_the_engine_nor_its_kernels_stay_imported(adapter_of):
    before = set(sys.modules)
    assert [path.unavailable for path in adapter_of(FILES).PATHS] == [None, None]
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] == "vllm"}


def test_a_row_is_a_token_with_its_own_number_of_keys_and_padding_has_none(adapter_of, make_batch):
    module = adapter_of(FILES)
    batch = make_batch("mla_decode/decode:3,idle,hit:5+2,draft:17+2,pad:2/heads=1,block=16")
    inputs = batch.layers[0].tensors
    planned = module.plan_decode(inputs)
    assert planned["rows"].tolist() == [0, 3, 4, 5, 6]
    assert planned["seq_lens"].tolist() == [4, 18, 19, 0, 0]
    tables = inputs["block_tables"]
    nothing = torch.zeros_like(tables[0])
    expected = torch.stack([tables[0], tables[3], tables[3], nothing, nothing])
    assert torch.equal(planned["block_table"], expected)


# max_seq_len // 512 rounded up to a power of two; twice an H100's 132 multiprocessors at most.
@pytest.mark.parametrize(
    ("longest", "splits"), [(0, 1), (511, 1), (1023, 1), (1024, 2), (1536, 4), (8193, 16), (1 << 30, 264)]
)
def test_splits_are_counted_by_the_longest_row(longest, splits, adapter_of):
    assert adapter_of(FILES).num_kv_splits(longest) == splits


def test_the_longest_row_is_one_that_has_a_token(adapter_of):
    module = adapter_of(FILES)
    for text, splits in [
        ("mla_decode/decode:20,paused:5000/heads=2", 1),
        ("mla_decode/decode:20,hit:2040+8/heads=2", 4),
        ("mla_decode/decode:20,decode:1023,pad:3/heads=2", 2),
        ("mla_decode/decode:2047/heads=2,splits=3", 3),
    ]:
        case = parse(text)
        tokens = sum(row.new for row in case.steps[0])
        assert module.decode_workspace(case) == {"attn_logits": ((tokens, 2, splits, 513), "float32")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mla_decode/decode:9/heads=2,dtype=fp32", "is for bf16 and fp16, got fp32"),
        ("mla_decode/decode:9/heads=2,block=8", "takes blocks of multiples of 16 tokens, got 8"),
        ("mla_decode/decode:9/heads=2,block=32", None),
        ("mla_decode/draft:9+3,draft:9+2/heads=2,dtype=fp16", None),
        ("merge_states/hit:9+3/heads=2,dtype=fp32", None),
    ],
)
def test_what_vllm_does_not_claim_is_said(text, said, adapter_of):
    reason = path_for(adapter_of(FILES), text).supports(parse(text))
    assert (said in reason) if said else (reason is None)


def test_without_vllm_every_path_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr(Library, "folder", None)
    paths = module_now().PATHS
    assert [path.name for path in paths] == ["adapters/vllm/mla_decode", "adapters/vllm/merge_states"]
    reason = "vllm is not installed: pip install --no-deps 'vllm==0.33.0'"
    assert [(path.unavailable, path.libraries) for path in paths] == [(reason, {})] * 2


def test_a_file_that_a_version_has_not_is_named(adapter_of):
    module = adapter_of({"triton_decode_attention.py": FILES["triton_decode_attention.py"]})
    reasons = {path.unavailable for path in module.PATHS}
    assert len(reasons) == 1
    assert "has no file triton_merge_attn_states.py in this version" in reasons.pop()


# ---- vLLM itself ---------------------------------------------------------------------------------


def own(text):
    """The path of vLLM itself for a case's operator."""
    path = path_named(f"adapters/vllm/{parse(text).operator}")
    if path.unavailable is not None:
        pytest.skip(path.unavailable)
    return path


@pytest.mark.parametrize("text", PASSING)
def test_vllm_attends_as_the_contract_says(text, lane, tmp_path):
    verdict = verdict_of(own(text), lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize("text", ["mla_decode/pad:1/heads=1", "mla_decode/decode:1/heads=1"])
def test_what_is_written_up_of_vllm_fails(text, lane, tmp_path):
    assert verdict_of(own(text), lane, tmp_path, text).kind is Kind.WRONG
