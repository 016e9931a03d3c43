"""The Triton kernels on Paddle tensors: same bits, same memory, and a process as it was before the import."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from cases import parse
from harness.checks import checks
from harness.paths.triton import latent_cache_write, mla_decode
from harness.startup import cuda_answers
from harness.verdict import Status

ROOT = Path(__file__).resolve().parent.parent
TRITON = {path.operator: path for module in (mla_decode, latent_cache_write) for path in module.PATHS}
MIXED = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"
SMALL = "model=minicpm3-4b,heads=2,block=16"
DTYPES = ["bfloat16", "float16", "float32", "int32", "int64", "uint8", "float8_e4m3fn"]


@pytest.fixture(scope="module")
def bridge():
    """The bridge and what is built on it, or a skip where Paddle is missing."""
    # Not importorskip("paddle"): the bridge's import is the one that leaves the process as it was.
    if importlib.util.find_spec("paddle") is None:
        pytest.skip("paddle is not installed")
    from harness.paths.paddle import _bridge, latent_cache_write, mla_decode

    return SimpleNamespace(
        module=_bridge,
        paddle=_bridge.paddle,
        decode=mla_decode.mla_decode,
        write=latent_cache_write.latent_cache_write,
        paths={path.operator: path for found in (mla_decode, latent_cache_write) for path in found.PATHS},
    )


# ---- the paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("options", ["", ",splits=2"])
def test_decode_has_the_bits_of_the_triton_path(bridge, launched, dtype, options):
    text = f"mla_decode/{MIXED}/{SMALL},dtype={dtype}{options}"
    launches = [launched(text, paths["mla_decode"]) for paths in (TRITON, bridge.paths)]
    assert launches[0].outputs_digest() == launches[1].outputs_digest()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_cache_has_the_bits_of_the_triton_path(bridge, launched, dtype):
    text = f"latent_cache_write/{MIXED}/model=minicpm3-4b,block=16,dtype={dtype}"
    launches = [launched(text, paths["latent_cache_write"]) for paths in (TRITON, bridge.paths)]
    assert launches[0].outputs_digest() == launches[1].outputs_digest()


@pytest.mark.parametrize(
    "text", [f"mla_decode/{MIXED}/{SMALL},splits=2", f"latent_cache_write/{MIXED}/model=minicpm3-4b"]
)
def test_every_check_passes(bridge, launched, every_result, text):
    launch = launched(text, bridge.paths[parse(text).operator])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {
        result.name for result in results if result.status is Status.PASSED
    }


@pytest.mark.parametrize("rows", ["", "idlex3", "paused:5", "pad:3"])
@pytest.mark.parametrize("operator", TRITON)
def test_steps_without_a_decode_row_are_no_trouble(bridge, launched, operator, rows):
    launch = launched(f"{operator}/{rows}/model=minicpm3-4b", bridge.paths[operator])
    results = [result for name in ("values", "guard") for result in checks()[name].run(launch)]
    assert [result for result in results if result.status is Status.FAILED] == []


@pytest.mark.parametrize("operator", TRITON)
def test_what_is_taken_and_the_workspace_are_those_of_the_triton_path(bridge, operator):
    ours, theirs = bridge.paths[operator], TRITON[operator]
    assert (ours.supports, ours.workspace) == (theirs.supports, theirs.workspace)
    assert ours.batch_invariant == theirs.batch_invariant
    assert "interpreted" in ours.lanes
    assert ("compiled" in ours.lanes) == bridge.paddle.is_compiled_with_cuda()


# ---- the bridge ----------------------------------------------------------------------------------

VIEWS = {
    "dense": ((2, 3, 4), (12, 4, 1)),
    "rows with gaps": ((2, 3, 4), (100, 20, 1)),
    "one row": ((1, 3, 4), (100, 20, 1)),
    "transposed": ((4, 3), (1, 4)),
    "one row for all": ((5, 4), (0, 1)),
    "no row": ((0, 3, 4), (100, 20, 1)),
    "rows of nothing": ((2, 0, 4), (100, 20, 1)),
    "a number": ((), ()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", VIEWS)
def test_views_keep_address_strides_and_dtype_both_ways(bridge, shape, dtype):
    storage = torch.arange(4096, dtype=torch.int32).to(torch.uint8).view(getattr(torch, dtype))
    tensor = torch.as_strided(storage, *VIEWS[shape], 7)
    theirs = bridge.module.as_paddle(tensor)
    assert theirs.shape == list(tensor.shape)
    assert theirs.strides == list(tensor.stride())
    assert theirs.dtype is getattr(bridge.paddle, dtype)
    assert theirs.stop_gradient
    back = bridge.module.as_torch(theirs)
    assert (back.shape, back.stride(), back.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert theirs.data_ptr() == tensor.data_ptr() == back.data_ptr()


def test_what_one_side_writes_the_other_reads(bridge):
    tensor = torch.zeros(3, 4)
    theirs = bridge.module.as_paddle(tensor[:, 1:3])
    theirs[1] = 5.0
    bridge.module.as_torch(theirs)[2] = 7.0
    assert tensor.tolist() == [[0, 0, 0, 0], [0, 5, 5, 0], [0, 7, 7, 0]]


def test_a_view_holds_on_to_the_memory(bridge):
    ours = bridge.module.as_torch(bridge.paddle.ones([1 << 20]))
    theirs = bridge.module.as_paddle(torch.ones(1 << 20))
    others = [torch.zeros(1 << 20) for _ in range(4)], [bridge.paddle.zeros([1 << 20]) for _ in range(4)]
    assert float(ours.sum()) == float(theirs.sum()) == 1 << 20
    del others


def test_a_copy_is_refused_on_the_way_to_torch(bridge, monkeypatch):
    export = bridge.paddle.to_dlpack
    monkeypatch.setattr(bridge.paddle, "to_dlpack", lambda tensor: export(tensor.clone()))
    tensor = bridge.paddle.zeros([4, 6, 8])[:, 1:3]
    with pytest.raises(RuntimeError, match=r"the same memory, but torch has strides \[16, 8, 1\] at 0x"):
        bridge.module.as_torch(tensor)


def test_other_strides_at_the_same_address_are_refused(bridge, monkeypatch):
    export = bridge.paddle.to_dlpack
    monkeypatch.setattr(bridge.paddle, "to_dlpack", lambda tensor: export(tensor.transpose([1, 0])))
    with pytest.raises(RuntimeError, match=r"torch has strides \[1, 4\] at 0x"):
        bridge.module.as_torch(bridge.paddle.zeros([4, 4]))


def test_a_slice_without_elements_may_lose_its_address(bridge):
    tensor = bridge.paddle.zeros([4, 6])[2:2]
    assert tensor.data_ptr() != 0
    assert bridge.module.as_torch(tensor).shape == (0, 6)


def test_a_copy_is_refused_on_the_way_to_paddle(bridge, monkeypatch):
    load = bridge.paddle.from_dlpack
    monkeypatch.setattr(bridge.paddle, "from_dlpack", lambda capsule: load(capsule).clone())
    with pytest.raises(RuntimeError, match=r"the same memory, but torch has strides \[4, 1\] at 0x"):
        bridge.module.as_paddle(torch.zeros(3, 4))


def test_a_copy_fails_the_launch_with_one_sentence(bridge, launched, monkeypatch):
    export = bridge.paddle.to_dlpack
    monkeypatch.setattr(bridge.paddle, "to_dlpack", lambda tensor: export(tensor.clone()))
    with pytest.raises(Exception, match="the path raised RuntimeError: DLPack must hand on the same memory"):
        launched(f"mla_decode/decode:5/{SMALL}", bridge.paths["mla_decode"])


def test_a_tensor_that_asks_for_a_gradient_is_refused(bridge):
    tensor = bridge.paddle.zeros([3])
    tensor.stop_gradient = False
    with pytest.raises(ValueError, match="stop_gradient=False"):
        bridge.module.as_torch(tensor)
    assert bridge.module.as_torch(tensor.detach()).data_ptr() == tensor.data_ptr()


def test_tensors_are_converted_alone_in_mappings_and_by_name_and_nothing_else(bridge):
    seen = []
    launch = bridge.module.on_paddle(lambda *arguments, **named: seen.extend([arguments, named]))
    tensor = bridge.paddle.ones([2])
    launch(tensor, {"a": tensor, "b": 3}, 0.5, None, c=tensor, d="text")
    (alone, mapping, number, nothing), named = seen
    for value in (alone, mapping["a"], named["c"]):
        assert isinstance(value, torch.Tensor)
        assert value.data_ptr() == tensor.data_ptr()
    assert (mapping["b"], number, nothing, named["d"]) == (3, 0.5, None, "text")


# ---- as an engine calls it -----------------------------------------------------------------------


def decode_step(paddle, dtype, tokens):
    """Tensors of Paddle's own: one row of 20 cached keys and `tokens` new ones; q and out have gaps."""
    heads, rank, rope, splits = 2, 32, 16, 2
    width = rank + rope
    paddle.seed(3)
    q = paddle.uniform([tokens, heads + 1, width + 8], "float32").astype(dtype)[:, :heads, :width]
    cache = paddle.uniform([4, 1, 16, width], "float32").astype(dtype)
    rows = [
        paddle.to_tensor([[2, 0, 3]], "int32"),
        paddle.to_tensor([0], "int32"),
        paddle.to_tensor([20], "int32"),
        paddle.to_tensor([0, tokens], "int32"),
        paddle.zeros([tokens], "int32"),
    ]
    out = paddle.full([tokens, heads, rank + 8], 9.0, dtype)
    lse = paddle.zeros([tokens, heads])
    named = {
        "softmax_scale": 0.2,
        "num_splits": splits,
        "partial_out": paddle.zeros([tokens, heads, splits, rank]),
        "partial_max": paddle.zeros([tokens, heads, splits]),
        "partial_sum": paddle.zeros([tokens, heads, splits]),
    }
    return [q, cache, *rows, out[:, :, :rank], lse], named, out


def on_torch(value, bridge):
    return bridge.module.as_torch(value).clone() if isinstance(value, bridge.paddle.Tensor) else value


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decode_takes_tensors_of_paddles_own(bridge, dtype):
    arguments, named, out = decode_step(bridge.paddle, dtype, tokens=3)
    plain = [on_torch(value, bridge) for value in arguments]
    mla_decode.mla_decode(*plain, **{name: on_torch(value, bridge) for name, value in named.items()})
    bridge.decode(*arguments, **named)
    lse, rank = arguments[-1], arguments[-2].shape[-1]
    assert lse.numpy().tolist() == plain[-1].tolist()
    written = out.astype("float32").numpy()
    assert written[..., :rank].tolist() == plain[-2].float().tolist()
    assert (written[..., rank:] == 9.0).all()


def test_no_token_is_no_launch_for_tensors_of_paddles_own(bridge):
    arguments, named, _ = decode_step(bridge.paddle, "bfloat16", tokens=0)
    bridge.decode(*arguments, **named)
    cache = arguments[1]
    before = cache.clone()
    nothing = [bridge.paddle.zeros([0, size], "bfloat16") for size in (32, 16)]
    bridge.write(*nothing, cache, bridge.paddle.zeros([0], "int64"))
    assert bool((cache == before).all())


def test_the_cache_of_paddles_own_is_written_in_place(bridge):
    paddle = bridge.paddle
    cache = paddle.zeros([2, 1, 4, 48], "bfloat16")
    latent, rope = paddle.full([3, 40], 1.0, "bfloat16")[:, :32], paddle.full([3, 16], 2.0, "bfloat16")
    bridge.write(latent, rope, cache, paddle.to_tensor([6, -1, 1], "int64"))
    rows = cache.astype("float32").numpy().reshape(8, 48)
    assert rows[[1, 6]].tolist() == [[1.0] * 32 + [2.0] * 16] * 2
    assert not rows[[0, 2, 3, 4, 5, 7]].any()


# ---- the process ---------------------------------------------------------------------------------

STATE = """
import faulthandler, logging, os, pathlib, signal, sys, warnings

def caught():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    # Real-time signals from 32 on belong to the C library.
    return [int(line.split()[1], 16) & 0x7FFFFFFF for line in lines if line.startswith(("SigCgt", "SigIgn"))]

def state():
    root = logging.getLogger()
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    threads = os.environ.get("OMP_NUM_THREADS")
    return caught(), handlers, root.level, list(root.handlers), threads, list(warnings.filters), os.getcwd()

sys.path[:0] = [{root!r}]
for name in {first!r}:
    __import__(name)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
faulthandler.enable()
before = state()
from harness.paths.paddle import mla_decode
assert state() == before, (before, state())
import torch
from harness.paths.paddle import _bridge
assert float(_bridge.as_torch(_bridge.paddle.ones([3])).sum()) == 3.0
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("threads", [None, "4"])
@pytest.mark.parametrize("first", [["torch", "triton"], ["paddle", "torch", "triton"]], ids=" ".join)
def test_importing_paddle_changes_nothing_in_the_process(bridge, tmp_path, first, threads):
    # Where the engine has imported Paddle already, its noise is the engine's.
    noise = ["-W", "ignore"] if "paddle" in first else ["-W", "error"]
    environment = {"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    result = subprocess.run(
        [sys.executable, *noise, "-c", STATE.format(root=str(ROOT), first=first)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 7, result.stderr
    assert result.stdout == ""
    if "paddle" not in first:
        assert result.stderr == ""
    assert not list(tmp_path.iterdir())


LATE = """
import os, signal, sys

def terminate(event, arguments):
    # Among the last that Paddle imports: its handlers are in place.
    if event == "import" and arguments[0] == "paddle.hapi":
        os.kill(os.getpid(), signal.SIGTERM)

sys.path[:0] = [{root!r}]
sys.addaudithook(terminate)
from harness.paths.paddle import _bridge
"""


def test_a_process_ended_while_it_imports_paddle_ends_quietly(bridge):
    result = subprocess.run(
        [sys.executable, "-c", LATE.format(root=str(ROOT))],
        # As in a worker of lane `interpreted`: a library's thread pool would take the signal.
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGTERM, "", "")


def test_a_missing_paddle_is_said_and_costs_nothing_else(make_house, command):
    house = make_house({"paddle/__init__.py": "raise ImportError('libpaddle.so is not for this machine')\n"})
    result = command("harness", "list", "paths", "--json", cwd=house)
    lanes = {row["name"]: row["lanes"] for row in json.loads(result.stdout)}
    for operator in TRITON:
        reason = lanes[f"paddle/{operator}"]["interpreted"]
        assert reason == "ImportError: libpaddle.so is not for this machine"
        assert lanes[f"triton/{operator}"]["interpreted"] == "available"


# ---- on a GPU, with a stand-in for Paddle --------------------------------------------------------

STAND_IN = '''
"""As much of Paddle as the bridge calls: tensors that are torch's, and one stream of its own."""

import functools

import torch
from torch.utils import dlpack


class Tensor:
    stop_gradient = True

    def __init__(self, inner):
        self.inner = inner

    def data_ptr(self):
        return self.inner.data_ptr()

    @property
    def strides(self):
        return list(self.inner.stride())


def from_dlpack(capsule):
    return Tensor(dlpack.from_dlpack(capsule))


def to_dlpack(tensor):
    return dlpack.to_dlpack(tensor.inner)


def is_compiled_with_cuda():
    return True


class Stream:
    def __init__(self, device):
        self.inner = torch.cuda.Stream(device)

    def __cuda_stream__(self):
        # Late, so that whoever does not wait for this stream reads what was there before.
        with torch.cuda.stream(self.inner):
            torch.cuda._sleep(100_000)
        return 0, self.inner.cuda_stream


class device:
    @staticmethod
    @functools.cache
    def current_stream(name):
        return Stream(name.replace("gpu", "cuda"))
'''


WHERE = """
import paddle, torch
from harness.paths.paddle._bridge import on_paddle

seen = []
launch = on_paddle(lambda tensor: seen.append(torch.cuda.current_stream().cuda_stream))
launch(paddle.Tensor(torch.zeros(3, device="cuda")))
_, handle = paddle.device.current_stream("gpu:0").__cuda_stream__()
assert seen == [handle]
assert torch.cuda.current_stream().cuda_stream != handle
"""

needs_gpu = pytest.mark.skipif(not cuda_answers(), reason="no CUDA device answers")


@pytest.mark.gpu
@needs_gpu
def test_launches_are_on_the_stream_of_paddle(make_house, command):
    house = make_house({"paddle/__init__.py": STAND_IN, "where.py": WHERE})
    result = command("where", cwd=house)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@needs_gpu
def test_a_stream_of_paddles_is_joined_and_captured(make_house, command, tmp_path):
    house = make_house({"paddle/__init__.py": STAND_IN})
    report = tmp_path / "report.jsonl"
    cases = [
        f"mla_decode/{MIXED}/{SMALL},splits=2",
        f"latent_cache_write/{MIXED}/model=minicpm3-4b",
        "mla_decode/idlex3/heads=2",
    ]
    arguments = ["run", *cases, "--lane", "compiled", "--path", "paddle/*", "--check", "*", "--workers", "1"]
    result = command("harness", *arguments, "--report", f"jsonl:{report}", cwd=house, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in report.read_text().splitlines()][1:-1]
    graphs = [check["status"] for verdict in found for check in verdict["checks"] if check["name"] == "graph"]
    assert graphs.count("passed") >= 4
