"""FastDeploy's Triton kernels from a checkout: a stand-in with its paths and signatures, and a real one.

The stand-in's files are ours: they ask for the same names and compute with plain tensors. What FastDeploy's
own kernels give is tested where FASTDEPLOY_SOURCE names a checkout.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from cases import parse
from harness.judge import judge_case
from harness.task import Task
from harness.verdict import Kind, Status

FILE = Path(__file__).resolve().parent.parent / "harness" / "paths" / "adapters" / "fastdeploy.py"

IMPORTS = """\
import paddle
from fastdeploy.model_executor.ops.triton_ops.triton_utils import (
    enable_compat_on_triton_kernel,
)
"""

INDICES = """
def build_kv_indices_from_block_tables(block_tables, seq_lens, block_size, bs):
    zero = paddle.zeros([1], dtype="int32")
    kv_indptr = paddle.concat([zero, paddle.cumsum(seq_lens[:bs]).astype("int32")])
    kv_indices = paddle.empty([max(int(paddle.sum(seq_lens).item()), 1)], dtype="int32")
    for row in range(bs):
        at = paddle.arange(int(seq_lens[row].item()), dtype="int32")
        found = block_tables[row, at // block_size] * block_size + at % block_size
        kv_indices[int(kv_indptr[row]) : int(kv_indptr[row + 1])] = found
    return kv_indptr, kv_indices
"""

DECODE = """
@enable_compat_on_triton_kernel
def attend(q, keys, rank, sm_scale):
    weights = ((q.float() @ keys.float().T) * sm_scale).softmax(1)
    return weights @ keys[:, :rank].float()

def compute_num_kv_splits(seq_lens, num_seq, max_kv_splits, out_buf=None):
    assert num_seq == len(seq_lens) and max_kv_splits == 32 and out_buf is None
    return seq_lens.clamp(1, 1)

def decode_attention_fwd(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits,
    sm_scale, kv_block_size,
):
    assert k_buffer.strides[1:] == [kv_block_size * q.shape[2], q.shape[2], 1]
    assert attn_logits.shape == (*o.shape[:2], max_kv_splits, o.shape[2]) and len(attn_lse) == len(o)
    for row in range(len(q)):
        keys = k_buffer.reshape(-1, q.shape[2])[kv_indices[kv_indptr[row] : kv_indptr[row + 1]]]
        o[row] = attend(q[row], keys, o.shape[2], sm_scale) if len(keys) else EMPTY
"""

WRITE = """
def mla_write_cache_triton(
    compressed_kv: paddle.Tensor,
    k_pe: paddle.Tensor,
    latent_cache: paddle.Tensor,
    slot_mapping: paddle.Tensor,
):
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    kept = slot_mapping >= 0
    rows[slot_mapping[kept]] = paddle.concat([compressed_kv[kept], k_pe.reshape([len(k_pe), -1])[kept]], 1)
"""

READ = """
from __future__ import annotations
import paddle
paddle.enable_compat(scope={"flash_mla"})
from paddle.nn.functional.flash_attention import flash_attn_unpadded
from paddleformers.utils.log import logger
from fastdeploy.model_executor.layers.attention.ops import (
    get_block_shape_and_split_kv_block,
    init_kv_signal_per_query,
    init_signal_layerwise,
    open_shm_and_get_meta_signal,
)
from fastdeploy.platforms import current_platform
if current_platform.is_cuda():
    from fastdeploy.model_executor.ops.gpu import decode_mla_write_cache
from fastdeploy.config import FDConfig
from fastdeploy.model_executor.layers.attention.attention import Attention
from fastdeploy.model_executor.layers.attention.base_attention_backend import (
    AttentionBackend,
    AttentionMetadata,
)
from fastdeploy.model_executor.layers.attention.utils import init_rank_and_device_id
from fastdeploy.spec_decode import SpecMethod

class Metadata(AttentionMetadata):
    _dtype: paddle.dtype = paddle.bfloat16

def fused_read_cache_and_interleave_triton(
    latent_cache, block_tables, new_compressed_kv, new_k_pe, cu_seqlens_k, cu_seqlens_q, kv_lora_rank,
    qk_rope_head_dim, block_size,
):
    keys = []
    for b in range(len(cu_seqlens_k) - 1):
        q, k = cu_seqlens_q[b : b + 2].tolist(), cu_seqlens_k[b : b + 2].tolist()
        at = paddle.arange(k[1] - k[0] - q[1] + q[0], dtype="int32")
        keys.append(latent_cache[block_tables[b, at // block_size], 0, at % block_size])
        keys.append(paddle.concat([new_compressed_kv[q[0] : q[1]], new_k_pe[q[0] : q[1]]], 1))
    keys = paddle.concat(keys)
    return keys[:, :kv_lora_rank], keys[:, kv_lora_rank:]
"""

FILES = {
    "triton_ops/unified_extend_attention.py": IMPORTS + INDICES,
    "triton_ops/decode_attention.py": IMPORTS + DECODE.replace("EMPTY", "0.0"),
    "triton_ops/mla_cache_kernel.py": IMPORTS + WRITE,
    "mla_attention_backend.py": READ,
}


@pytest.fixture
def adapter_of(tmp_path, monkeypatch):
    """(files) -> the adapter's paths by operator, with a checkout of these as its source."""

    def load(files):
        package = tmp_path / "checkout" / "fastdeploy"
        attention = package / "model_executor" / "layers" / "attention"
        (attention / "triton_ops").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the engine was imported')\n")
        for name, text in files.items():
            (attention / name).write_text(text)
        monkeypatch.setenv("FASTDEPLOY_SOURCE", str(package.parent))
        return {path.operator: path for path in paths_now()}

    return load


def paths_now():
    spec = importlib.util.spec_from_file_location("fastdeploy_adapter", FILE)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up.
    sys.modules["fastdeploy_adapter"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["fastdeploy_adapter"]
    return module.PATHS


def verdict_of(path, lane, tmp_path, text):
    task = Task(text, parse(text).operator, path.name, lane.name)
    return judge_case(task, path, lane, tmp_path / "lock")


PASSING = [
    "mla_decode/decode:20,idle,hit:9+2,decode:100,paused:7,pad:2/heads=2",
    "mla_decode/decode:20,decode:64/heads=2",
    "mla_decode/pad:3/heads=2",
    "mla_decode/prefill:3/heads=2",
    "latent_cache_write/decode:5,hit:63+3,paused:4/block=4",
    "read_cache_interleave/decode:5,hit:63+3,idle,paused:7,prefill:4",
    "mla_step/hit:17+4,prefill:5,decode:40,idle/heads=2",
]


@pytest.mark.parametrize("text", PASSING)
def test_a_stand_in_of_fastdeploy_attends_as_the_contract_says(text, adapter_of, lane, tmp_path):
    path = adapter_of(FILES)[parse(text).operator]
    assert path.unavailable is None
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


def test_neither_paddle_nor_the_engine_stays_imported(adapter_of):
    before = set(sys.modules)
    assert adapter_of(FILES)["mla_decode"].unavailable is None
    packages = {"paddle", "paddleformers", "fastdeploy"}
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in packages}


def test_without_a_checkout_every_path_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDEPLOY_SOURCE", raising=False)
    reason = "FASTDEPLOY_SOURCE is not set: set it to a checkout of github.com/PaddlePaddle/FastDeploy"
    assert {path.unavailable for path in paths_now()} == {reason}
    monkeypatch.setenv("FASTDEPLOY_SOURCE", str(tmp_path))
    reason = reason.replace("is not set", f"= {tmp_path} has no folder fastdeploy")
    assert {path.unavailable for path in paths_now()} == {reason}
    assert all(path.libraries == {} for path in paths_now())


def test_a_file_that_a_version_has_not_costs_its_own_paths(adapter_of):
    files = {name: text for name, text in FILES.items() if name != "mla_attention_backend.py"}
    paths = adapter_of(files)
    assert (
        "has no file mla_attention_backend.py in this version" in paths["read_cache_interleave"].unavailable
    )
    others = [path for path in paths.values() if path.operator != "read_cache_interleave"]
    assert [path.unavailable for path in others] == [None, None, None]


def test_a_function_that_a_version_has_not_is_named(adapter_of):
    paths = adapter_of({**FILES, "mla_attention_backend.py": "import paddle\n"})
    assert "has no fused_read_cache_and_interleave_triton" in paths["read_cache_interleave"].unavailable


def with_arguments(more):
    asked = "block_tables, seq_lens, block_size, bs"
    name = "triton_ops/unified_extend_attention.py"
    return {**FILES, name: FILES[name].replace(asked, f"{asked}, {more}")}


def test_a_version_with_more_arguments_that_may_be_left_out_is_called_and_told_apart(
    adapter_of, lane, tmp_path
):
    buffers = "total_kv_len=None, kv_indptr_buf=None, kv_indices_buf=None"
    path = adapter_of(with_arguments(buffers))["mla_decode"]
    assert verdict_of(path, lane, tmp_path, PASSING[0]).status is Status.PASSED
    _, told = path.libraries["fastdeploy"].split(", ")
    assert told == ("build_kv_indices_from_block_tables/7 compute_num_kv_splits/4 decode_attention_fwd/12")


def test_an_argument_that_the_adapter_does_not_know_makes_its_paths_unavailable(adapter_of):
    paths = adapter_of(with_arguments("page_owner"))
    reason = paths["mla_decode"].unavailable
    assert reason.startswith("build_kv_indices_from_block_tables of ")
    assert reason.endswith("asks for page_owner, which is not known here")
    assert paths["mla_step"].unavailable == reason
    assert paths["latent_cache_write"].unavailable is None


def test_a_digest_of_the_files_is_the_version(adapter_of, monkeypatch, tmp_path):
    path = adapter_of(FILES)["mla_decode"]
    file = tmp_path / "checkout/fastdeploy/model_executor/layers/attention/triton_ops/decode_attention.py"
    file.write_text(file.read_text() + "# another commit\n")
    other = next(path for path in paths_now() if path.operator == "mla_decode")
    first, second = (one.libraries["fastdeploy"].partition(",")[0] for one in (path, other))
    assert len(first) == len(second) == 10
    assert first != second


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mla_decode/draft:9+2/heads=2", "has one query a row, got drafts"),
        ("mla_step/decode:9,draft:9+3/heads=2", "has one query a row, got drafts"),
        ("read_cache_interleave/hit:9+2/model=mistral-small-4", None),
        ("read_cache_interleave/hit:9+2/model=dots3-note-sliding", None),
    ],
)
def test_what_fastdeploy_does_not_claim_is_said(text, said, adapter_of):
    reason = adapter_of(FILES)[parse(text).operator].supports(parse(text))
    assert (said in reason) if said else (reason is None)


def test_widths_that_are_no_powers_of_two_are_not_claimed_of_the_fused_read(adapter_of):
    layer = SimpleNamespace(kv_lora_rank=320, qk_rope_head_dim=64)
    reason = adapter_of(FILES)["read_cache_interleave"].supports(SimpleNamespace(layers=[layer]))
    assert reason == "the fused read takes widths that are powers of two, got 320 + 64"


def test_a_row_without_keys_that_is_not_zero_is_noticed(adapter_of, lane, tmp_path):
    files = {**FILES, "triton_ops/decode_attention.py": IMPORTS + DECODE.replace("EMPTY", "float('nan')")}
    path = adapter_of(files)["mla_decode"]
    assert (
        verdict_of(path, lane, tmp_path, "mla_decode/decode:9,idle,prefill:2/heads=2").status is Status.PASSED
    )
    assert verdict_of(path, lane, tmp_path, "mla_decode/decode:9,pad:2/heads=2").kind is Kind.WRONG


# ---- FastDeploy itself ---------------------------------------------------------------------------


@pytest.fixture
def own(request):
    """The path of FastDeploy itself for a case's operator."""
    if "FASTDEPLOY_SOURCE" not in os.environ:
        pytest.skip("FASTDEPLOY_SOURCE names no checkout of FastDeploy")
    paths = {path.operator: path for path in paths_now()}

    def path_for(text):
        path = paths[parse(text).operator]
        if path.unavailable is not None:
            pytest.skip(path.unavailable)
        return path

    return path_for


@pytest.mark.parametrize("text", [text for text in PASSING if "pad" not in text])
def test_fastdeploy_attends_as_the_contract_says(text, own, lane, tmp_path):
    verdict = verdict_of(own(text), lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mla_decode/decode:1/heads=1,pool=58256,pages=reversed", Kind.BOUNDS),
        ("mla_decode/decode:1/heads=1,pool=116510,pages=reversed", Kind.WRONG),
        ("read_cache_interleave/hit:1+1/pool=58256,pages=reversed", Kind.BOUNDS),
        ("read_cache_interleave/hit:1+1/pool=116510,pages=reversed", Kind.WRONG),
        ("latent_cache_write/pad:1", Kind.BOUNDS),
    ],
)
def test_what_is_written_up_of_fastdeploy_fails(text, kind, own, lane, tmp_path):
    assert verdict_of(own(text), lane, tmp_path, text).kind is kind
