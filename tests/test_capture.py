"""Capturing a step's metadata: what is written, what is not, and that nothing reaches the engine."""

import importlib.util
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.capture import MAX_BYTES, Session, capture, request_numbers
from harness.dump_file import Stub, read_dump, read_steps
from harness.plan import UsageError

ROOT = Path(__file__).resolve().parent.parent


class Foreign:
    """An array of a framework that has DLPack and nothing else."""

    def __init__(self, values):
        self._array = np.array(values, np.int32)
        self.shape, self.dtype = self._array.shape, "foreign.int32"

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Paddle:
    """An array as Paddle has them: `.cpu()`, `.numpy()`, and a shape that is a list."""

    def __init__(self, values):
        self._array = np.array(values, np.int32)
        self.shape, self.dtype = list(self._array.shape), "paddle.int32"

    def cpu(self):
        return self

    def numpy(self):
        return self._array


LENGTHS = [[3], [0], [70]]
KINDS = {
    "list": LENGTHS,
    "numpy": np.array(LENGTHS, np.int32),
    "torch": torch.tensor(LENGTHS, dtype=torch.int32),
    "torch, strided": torch.tensor([[3, 9], [0, 9], [70, 9]])[:, :1],
    "paddle": Paddle(LENGTHS),
    "dlpack": Foreign(LENGTHS),
}


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_framework_are_read_back(tmp_path, kind, suffix):
    file = tmp_path / f"step.{suffix}"
    assert capture(file, {"seq_lens_decoder": KINDS[kind], "block_size": 64}) is None
    found = read_dump(file)
    assert found["seq_lens_decoder"].tolist() == LENGTHS
    assert found["block_size"] == 64


def test_paddles_own_arrays_are_read_back(tmp_path):
    if importlib.util.find_spec("paddle") is None:
        pytest.skip("paddle is not installed")
    # In a process of its own: paddle's import changes the one it is imported in.
    code = f"""
import sys, paddle
from harness.capture import capture
lengths = paddle.to_tensor({LENGTHS}, dtype="int32")
query = paddle.zeros([2, 3], dtype="bfloat16")
values = {{"seq_lens_decoder": lengths, "block_table": lengths.T, "q": query}}
for name in ("step.json", "step.safetensors"):
    print(capture({str(tmp_path)!r} + "/" + name, values, tensors=name.endswith("s")))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["None", "None"]
    for name in ("step.json", "step.safetensors"):
        found = read_dump(tmp_path / name)
        assert found["seq_lens_decoder"].tolist() == LENGTHS
        assert found["block_table"].tolist() == [[3, 0, 70]]
        assert found["q"] == Stub("bfloat16", (2, 3))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_only_metadata_is_written_with_its_contents(tmp_path, suffix):
    secret = torch.full((5, 7), 0x5EC4E7, dtype=torch.int64)
    file = tmp_path / f"step.{suffix}"
    values = {
        "seq_lens_decoder": torch.tensor([1]),
        "input_ids": secret,
        "prompt": "a secret",
        "q": secret.half(),
    }
    assert capture(file, values) is None
    written = file.read_bytes()
    assert str(0x5EC4E7).encode() not in written
    assert struct.pack("<q", 0x5EC4E7) not in written
    assert b"a secret" not in written
    found = read_dump(file)
    assert found["q"] == Stub("float16", (5, 7))
    assert found.keys() == {"seq_lens_decoder", "input_ids", "q"}


def test_tensors_are_written_where_they_are_asked_for(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    values = {
        "seq_lens_decoder": torch.tensor([[7]], dtype=torch.int32),
        "q": torch.randn(3, 2, 5).to(torch.bfloat16),
        "latent_cache": torch.randn(4, 6).to(torch.float8_e4m3fn).T,
        "scale": torch.tensor(0.5),
        "slots": np.arange(6, dtype=np.int64)[::2],
    }
    assert capture(tmp_path / "step.safetensors", values, tensors=True) is None
    found = load_file(tmp_path / "step.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        expected = torch.as_tensor(value)
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(found[name].float(), expected.float())
    # They are for other readers: a case makes its own contents.
    assert read_dump(tmp_path / "step.safetensors")["q"] == Stub("bfloat16", (3, 2, 5))


@pytest.mark.parametrize(
    ("name", "values", "options", "sentence"),
    [
        ("step.npz", {}, {}, "a .json or a .safetensors file, got step.npz"),
        ("step.json", {"seq_lens": [1]}, {"tensors": True}, "written to a .safetensors file"),
        (
            "step.json",
            {"seq_lens": np.ones(1000, np.int64)},
            {"max_bytes": 7999},
            "8,000 bytes and max_bytes",
        ),
        ("step.json", {"seq_lens": np.ones(10, np.int8) * 100}, {"max_bytes": 40}, "would have"),
        ("step.json", {"seq_lens": object()}, {}, "Error"),
        ("step.safetensors", {"seq_lens": np.ones(3, np.complex64)}, {}, "no dtype complex64"),
    ],
)
def test_what_is_not_written_is_said_and_leaves_no_file(tmp_path, name, values, options, sentence):
    reason = capture(tmp_path / name, values, **options)
    assert sentence in reason
    assert list(tmp_path.iterdir()) == []
    with pytest.raises((ValueError, TypeError, AttributeError)):
        capture(tmp_path / name, values, raises=True, **options)


def test_nothing_raises_into_the_engine_whatever_a_value_does(tmp_path):
    class Hostile:
        shape, dtype = (3,), "int32"

        def cpu(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    reason = capture(tmp_path / "step.json", {"seq_lens": Hostile()})
    assert reason == "RuntimeError: operation not permitted when stream is capturing"
    assert "Error" in capture(tmp_path / "file" / "step.json", None)
    (tmp_path / "file").write_text("")
    assert "Error" in capture(tmp_path / "file" / "step.json", {})


def test_what_is_too_large_is_not_copied_off_its_device(tmp_path):
    class Remote:
        shape, dtype = (10**9,), "torch.int32"

        def cpu(self):
            pytest.fail("copied")

    assert "4,000,000,000 bytes" in capture(tmp_path / "step.json", {"slot_mapping": Remote()})


def test_a_file_that_exists_is_left_as_it_is(tmp_path):
    file = tmp_path / "new" / "step.json"
    assert capture(file, {"block_size": 64}) is None
    assert "exists already" in capture(file, {"block_size": 32})
    assert json.loads(file.read_text()) == {"block_size": 64}
    assert [item.name for item in file.parent.iterdir()] == ["step.json"]


def test_what_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert capture(tmp_path / "step.json", {"block_size": 64}) == "OSError: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_capture_is_no_pickle(tmp_path):
    for suffix in ("json", "safetensors"):
        file = tmp_path / f"step.{suffix}"
        assert capture(file, {"seq_lens": torch.tensor([1])}) is None
        with pytest.raises((pickle.UnpicklingError, KeyError, ValueError, EOFError)):
            pickle.loads(file.read_bytes())  # noqa: S301 that it cannot be is what is tested


def test_an_engine_that_imports_it_imports_numpy_and_no_framework():
    code = """
import sys, harness.capture
print(sorted(name for name in sys.modules if name in {"torch", "triton", "paddle", "typer", "rich", "numpy"}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['numpy']"


def test_captured_metadata_that_is_no_integer_is_refused_when_it_is_read(tmp_path):
    assert capture(tmp_path / "step.json", {"seq_lens": torch.tensor([1.0, float("nan")])}) is None
    with pytest.raises(UsageError, match=r"seq_lens\[0\] must be a whole number, got 1.0"):
        read_dump(tmp_path / "step.json")


# ---- sessions ------------------------------------------------------------------------------------


def numbers(folder):
    return [dump.step for dump in read_steps(folder)]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_session_is_a_file_for_every_step(tmp_path, suffix):
    session = Session(tmp_path / "new" / "session", suffix=f".{suffix}")
    for step in range(3):
        assert session.capture({"seq_lens": torch.tensor([step]), "q": torch.ones(3)}) is None
    dumps = list(read_steps(tmp_path / "new" / "session"))
    assert [dump.step for dump in dumps] == [0, 1, 2]
    assert [dump.values["seq_lens"].tolist() for dump in dumps] == [[0], [1], [2]]
    assert dumps[0].values["q"] == Stub("float32", (3,))


def test_steps_before_a_crash_stay_readable(tmp_path):
    code = f"""
import os
from pathlib import Path
from harness.capture import Session
session = Session({str(tmp_path)!r})
for step in range(3):
    session.capture({{"seq_lens": [step]}})
# It dies while it writes the next one.
Path.replace = lambda *_: os.abort()
session.capture({{"seq_lens": [3]}})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode != 0
    assert len(list(tmp_path.iterdir())) == 4
    assert numbers(tmp_path) == [0, 1, 2]


def test_a_session_ends_at_its_steps_and_bytes(tmp_path):
    session = Session(tmp_path / "steps", max_steps=2)
    reasons = [session.capture({"seq_lens": [1]}) for _ in range(4)]
    assert reasons[:2] == [None, None]
    assert all("is full: it has had 2 steps" in reason for reason in reasons[2:])
    assert numbers(tmp_path / "steps") == [0, 1]

    session = Session(tmp_path / "bytes", max_bytes=50)
    first, second, third = (session.capture({"seq_lens": list(range(count))}) for count in (5, 5, 1))
    assert first is None
    # Each fits alone.
    assert "max_bytes allows" in second
    # What would fit into the rest is no step after the one that did not.
    assert "is full" in third
    assert sum(file.stat().st_size for file in (tmp_path / "bytes").iterdir()) <= 50


def test_a_step_takes_no_more_than_a_file_may(tmp_path):
    session = Session(tmp_path)
    values = {"slot_mapping": np.zeros(MAX_BYTES // 8 + 1, np.int64)}
    assert f"max_bytes allows {MAX_BYTES:,}" in session.capture(values)


def test_a_step_that_could_not_be_written_leaves_out_its_number(tmp_path):
    session = Session(tmp_path)
    assert session.capture({"seq_lens": [1]}) is None
    assert "AttributeError" in session.capture({"seq_lens": object()})
    assert session.capture({"seq_lens": [2]}) is None
    assert numbers(tmp_path) == [0, 2]
    with pytest.raises(AttributeError):
        session.capture({"seq_lens": object()}, raises=True)


def test_a_folder_with_steps_is_left_as_it_is(tmp_path):
    assert Session(tmp_path).capture({"block_size": 64}) is None
    assert "holds steps already" in Session(tmp_path).capture({"block_size": 32})
    assert [dump.values["block_size"] for dump in read_steps(tmp_path)] == [64]


def test_a_session_refuses_what_a_capture_refuses(tmp_path):
    assert ".safetensors file, got step-000000.npz" in Session(tmp_path, suffix=".npz").capture({})
    (tmp_path / "file").write_text("")
    assert "Error" in Session(tmp_path / "file").capture({})


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_ids_of_requests_are_numbers_that_do_not_tell_the_text(tmp_path, suffix):
    file = tmp_path / f"step.{suffix}"
    assert (
        capture(file, {"request_ids": ["cmpl-7-of-alice", None, "cmpl-8"], "req_ids": np.array([3])}) is None
    )
    assert b"alice" not in file.read_bytes()
    found = read_dump(file)
    first, none, third = found["request_ids"].tolist()
    assert none == -1
    assert min(first, third) >= 0
    assert first != third
    assert found["req_ids"].tolist() == [3]
    # As b2sum -l 64 has it, in every process.
    assert request_numbers(["a"]).tolist() == [0x40F89E395B66422F >> 1]


def test_ids_that_are_no_ids_are_refused(tmp_path):
    reason = capture(tmp_path / "step.json", {"request_ids": [1, 2.5]})
    assert reason == "id 1 of the requests must be a text or a number, got 2.5"
    assert list(tmp_path.iterdir()) == []
