"""Writing down the metadata of an engine's steps, for `mla-harness import`: engine code calls `capture`.

    from harness.capture import capture

    why_not = capture("/tmp/step.json", {
        "seq_lens_encoder": meta.seq_lens_encoder,
        "seq_lens_decoder": meta.seq_lens_decoder,
        "seq_lens_this_time": meta.seq_lens_this_time,
        "block_tables": meta.block_tables,
        "block_size": 64,
    })

writes one step, and a `Session` every step that its `capture` is called in, a file each:

    session = Session("/tmp/session", max_steps=100)
    ...
    why_not = session.capture({..., "request_ids": [request.id for request in batch]})

Values are numbers, lists, or arrays of torch, Paddle, NumPy or anything that has DLPack. The file is JSON or
safetensors, by its name; nothing is pickled. Only what stands in `METADATA` is written with its contents: of
any other array shape and dtype alone, unless tensors are asked for. Ids of requests become numbers: a text's
is a digest of it. A file that exists is left as it is, so that a call in a loop keeps the first step; each
rank needs a name of its own.

Needs the standard library and NumPy, imports no framework, and raises nothing into the engine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FASTDEPLOY = frozenset(
    {
        "seq_lens_encoder",
        "seq_lens_decoder",
        "seq_lens_this_time",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "block_tables",
        "slot_mapping",
        "batch_id_per_token",
        "position_ids",
    }
)
VLLM = frozenset(
    {
        "query_start_loc",
        "seq_lens",
        "block_table",
        "slot_mapping",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_reqs",
    }
)
SCALARS = frozenset({"block_size", "num_blocks", "num_attention_heads", "sliding_window", "model"})

REQUESTS = frozenset({"request_ids", "req_ids"})
"""Names of the ids of the slots' requests, [B]: texts, numbers, or None of an empty slot."""

METADATA = FASTDEPLOY | VLLM | SCALARS | REQUESTS
"""Names whose contents are written; with `_cpu` behind it, a name is the same."""

MAX_BYTES = 16 * 2**20
"""Of a step."""

MAX_SESSION_BYTES = 256 * 2**20
MAX_STEPS = 256
"""Of a session."""

STEP_FILE = re.compile(r"step-([0-9]{1,9})\.(json|npz|safetensors)")
"""A step's file in the folder of a session."""

SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""dtype -> what safetensors calls it."""


class _Refused(ValueError):
    """What cannot be written, one sentence."""


class _TooLarge(_Refused):
    """What would be more than is allowed."""


def capture(
    file: str | os.PathLike[str],
    values: Mapping[str, Any],
    *,
    tensors: bool = False,
    max_bytes: int = MAX_BYTES,
    raises: bool = False,
) -> str | None:
    """None if the file was written, else why not, in one sentence.

    Args:
        file: ends in .json or .safetensors.
        values: name -> value, with FastDeploy's or vLLM's names.
        tensors: whether to write the contents of other arrays too; .safetensors only.
        max_bytes: the most that the file may take; what would be more is not copied off its device.
        raises: whether to raise what went wrong, for tests.
    """
    try:
        _write(Path(file), values, tensors=tensors, max_bytes=max_bytes)
    except Exception as error:
        if raises:
            raise
        return _reason(error)
    return None


class Session:
    """The steps of an engine, each in a file of its own: what is written stays whatever comes after it.

    A step that could not be written leaves out its number, which `import` tells. Once a step does not fit any
    more the session is full, and so it is after `max_steps` calls: nothing is written into a gap.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        suffix: str = ".json",
        tensors: bool = False,
        max_steps: int = MAX_STEPS,
        max_bytes: int = MAX_SESSION_BYTES,
    ) -> None:
        """A session whose first step is the next one.

        Args:
            folder: must hold no steps yet; it is made with the first one.
            suffix: .json or .safetensors.
            tensors: as in `capture`.
            max_steps: the most calls that write.
            max_bytes: the most that all steps together may take; one takes `MAX_BYTES` at most, unless its
                tensors are asked for.
        """
        self._folder, self._suffix, self._tensors = folder, suffix, tensors
        self._max_steps, self._max_bytes = max_steps, max_bytes
        self._steps = 0
        self._bytes = 0
        self._is_full = False

    def capture(self, values: Mapping[str, Any], *, raises: bool = False) -> str | None:
        """None if the step was written, else why not, in one sentence. Args as of `capture`."""
        try:
            self._write(values)
        except Exception as error:
            if raises:
                raise
            return _reason(error)
        return None

    def _write(self, values: Mapping[str, Any]) -> None:
        folder = Path(self._folder)
        if self._is_full or self._steps >= self._max_steps:
            raise _Refused(f"the session in {folder} is full: it has had {self._steps:,} steps")
        if self._steps == 0 and folder.is_dir() and any(_is_step(file) for file in folder.iterdir()):
            raise _Refused(f"{folder} holds steps already: nothing was written")
        file = folder / f"step-{self._steps:06}{self._suffix}"
        self._steps += 1
        left = self._max_bytes - self._bytes
        most = left if self._tensors else min(left, MAX_BYTES)
        try:
            self._bytes += _write(file, values, tensors=self._tensors, max_bytes=most)
        except _TooLarge:
            self._is_full = True
            raise


def _is_step(file: Path) -> bool:
    return STEP_FILE.fullmatch(file.name) is not None


def is_metadata(name: str) -> bool:
    """Whether contents of that name are written unasked."""
    return name.removesuffix("_cpu") in METADATA


def request_numbers(ids: Iterable[Any]) -> npt.NDArray[np.int64]:
    """[B] int64, a number for each id of a request: its own, 63 bits of a text's digest, -1 of None.

    Raises:
        ValueError: an id is something else.
    """
    return np.array([_request_number(place, item) for place, item in enumerate(ids)], np.int64)


def _request_number(place: int, item: Any) -> int:
    if item is None:
        return -1
    if isinstance(item, str):
        return int.from_bytes(hashlib.blake2b(item.encode(), digest_size=8).digest()) >> 1
    if isinstance(item, int | np.integer) and not isinstance(item, bool) and -(2**63) <= item < 2**63:
        return int(item)
    raise _Refused(f"id {place} of the requests must be a text or a number, got {str(item)[:40]}")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {error}"


def _write(file: Path, values: Mapping[str, Any], *, tensors: bool, max_bytes: int) -> int:
    """The size of the file in bytes."""
    if file.exists():
        raise _Refused(f"{file} exists already: nothing was written")
    encode = {".json": _json, ".safetensors": _safetensors}.get(file.suffix)
    if encode is None:
        raise _Refused(f"a capture is a .json or a .safetensors file, got {file.name}")
    if tensors and encode is _json:
        raise _Refused("contents of tensors are written to a .safetensors file")
    values = {name: _with_numbers(name, value) for name, value in values.items()}
    kept = {name for name in values if tensors or is_metadata(name)}
    size = sum(_size(values[name]) for name in kept)
    if size > max_bytes:
        raise _TooLarge(f"the arrays have {size:,} bytes and max_bytes allows {max_bytes:,}")
    encoded = encode(values, kept)
    if len(encoded) > max_bytes:
        raise _TooLarge(f"the file would have {len(encoded):,} bytes and max_bytes allows {max_bytes:,}")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all.
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(encoded)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return len(encoded)


def _with_numbers(name: str, value: Any) -> Any:
    """A value to be written: ids of requests as numbers, everything else as it is."""
    if (
        name.removesuffix("_cpu") not in REQUESTS
        or _is_plain(value)
        or (hasattr(value, "dtype") and "int" in str(value.dtype))
    ):
        return value
    return request_numbers(value)


def _json(values: Mapping[str, Any], kept: set[str]) -> bytes:
    told: dict[str, Any] = {}
    for name, value in values.items():
        if _is_plain(value):
            if name in kept:
                told[name] = value
        elif name in kept:
            told[name] = _array(value).tolist()
        else:
            told[name] = {"dtype": _dtype(value), "shape": list(_shape(value))}
    return json.dumps(told).encode()


def _safetensors(values: Mapping[str, Any], kept: set[str]) -> bytes:
    """The format of huggingface/safetensors: length of the header, header, bytes of the arrays."""
    header: dict[str, Any] = {}
    texts: dict[str, str] = {}
    pieces: list[bytes] = []
    at = 0
    for name, value in values.items():
        if _is_plain(value):
            if name in kept and value is not None:
                texts[name] = json.dumps(value)
            continue
        if name not in kept:
            texts[name] = json.dumps({"dtype": _dtype(value), "shape": list(_shape(value))})
            continue
        piece, dtype, shape = _bytes(value)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(piece)]}
        pieces.append(piece)
        at += len(piece)
    if texts:
        header["__metadata__"] = texts
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join([struct.pack("<Q", len(encoded)), encoded, *pieces])


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | str)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in (value.shape if hasattr(value, "shape") else np.shape(value)))


def _dtype(value: Any) -> str:
    """`int32`, `bfloat16`, ...: the same for every framework."""
    return str(value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype).rpartition(".")[2]


def _size(value: Any) -> int:
    """Bytes of an array, without a look at its contents."""
    if _is_plain(value):
        return 0
    digits = "".join(character for character in _dtype(value).partition("_")[0] if character.isdecimal())
    return math.prod(_shape(value)) * max(1, int(digits or 8) // 8)


def _array(value: Any) -> npt.NDArray[Any]:
    """The contents on the host."""
    for method in ("detach", "cpu"):
        value = getattr(value, method, lambda value=value: value)()
    if isinstance(value, np.ndarray | np.generic | list | tuple):
        return np.asarray(value)
    if hasattr(value, "numpy"):
        return np.asarray(value.numpy())
    return np.from_dlpack(value)


def _bytes(value: Any) -> tuple[bytes, str, list[int]]:
    """Contents, dtype and shape as safetensors has them."""
    name, shape = _dtype(value), list(_shape(value))
    if name not in SAFETENSORS:
        raise _Refused(f"safetensors has no dtype {name}")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and not hasattr(np, name):
        # NumPy has neither bf16 nor fp8: their bytes go over.
        value = value.detach().reshape(-1).view(torch.uint8)
    array = _array(value)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(), SAFETENSORS[name], shape
