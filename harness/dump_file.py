"""Reading dumps of a step's metadata: JSON, npz or safetensors -> named values. Nothing in them is run.

A session is a folder of such files, `step-000000.json` and so on, a step each.

Contents are read of the names that `harness/capture.py` calls metadata; of any other array shape and dtype
alone, so that a dump with tensors of gigabytes costs no more than one without. A dump comes from anywhere:
sizes are looked at before anything is read, pickles are refused, and what is wrong is one sentence.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from harness.capture import REQUESTS, SAFETENSORS, STEP_FILE, is_metadata, request_numbers
from harness.plan import UsageError

FORMATS = ("json", "npz", "safetensors")

MAX_TEXT_BYTES = 256 * 2**20
"""Of a JSON file, and of the header of another."""

MAX_ELEMENTS = 2**26
"""Of one array whose contents are read: a block table of 8,192 slots and 8,192 blocks."""

MAX_STEPS = 4096
"""Of a session."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stub:
    """An array whose contents are not read."""

    dtype: str
    shape: tuple[int, ...]


Value = Int64 | Stub | int | str
Values = dict[str, Value]
"""Name, without `_cpu` behind it -> contents as int64 [...], a number or a text."""


@dataclass(frozen=True)
class Dump:
    """What is known of one step.

    Attributes:
        step: its number in the session; None of a file alone.
    """

    values: Values
    step: int | None = None

    @property
    def place(self) -> str:
        """What stands before a sentence about it."""
        return "" if self.step is None else f"step {self.step}: "


def read_steps(path: Path, form: str | None = None, steps: range | None = None) -> Iterator[Dump]:
    """The dump of a file, or those of a session in order, one in memory at a time.

    Args:
        form: as in `read_dump`.
        steps: the numbers of the session's steps that are read; default all.

    Raises:
        UsageError: as `read_dump`, with the step; or the folder holds no steps, too many, or one twice.
    """
    if not path.is_dir():
        if steps is not None:
            raise UsageError(f"{path} is one step: --steps chooses from a folder of them")
        yield Dump(read_dump(path, form))
        return
    for number, file in sorted(_step_files(path, steps).items()):
        try:
            yield Dump(read_dump(file, form), number)
        except UsageError as error:
            raise UsageError(f"step {number}: {error}") from None


def _step_files(folder: Path, steps: range | None) -> dict[int, Path]:
    """The files of a session's steps by number."""
    files: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        match = STEP_FILE.fullmatch(file.name)
        if match is None or (steps is not None and int(match[1]) not in steps):
            continue
        other = files.setdefault(int(match[1]), file)
        if other != file:
            raise UsageError(f"{folder} has step {int(match[1])} twice: {other.name} and {file.name}")
    if not files:
        raise UsageError(f"{folder} must hold the steps asked for, as step-000000.json: none found")
    if len(files) > MAX_STEPS:
        raise UsageError(f"{folder} holds {len(files):,} steps, more than {MAX_STEPS:,}: choose with --steps")
    return files


def read_dump(file: Path, form: str | None = None) -> Values:
    """What a dump holds.

    Args:
        form: one of `FORMATS`; default by the file's name.

    Raises:
        UsageError: it cannot be read, is not what its name says, or an array is not one of integers.
    """
    form = form or file.suffix.removeprefix(".")
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(f"{file} must be one of {known} by its name, or be said to be with --format")
    read = {"json": _read_json, "npz": _read_npz, "safetensors": _read_safetensors}[form]
    try:
        named = read(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from None
    found: Values = {}
    for name, value in named.items():
        if value is None:
            continue
        short = name.removesuffix("_cpu")
        if short in found:
            raise UsageError(f"{file} has both {short} and {short}_cpu: leave one out")
        found[short] = value
    return found


# ---- JSON ----------------------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Value | None]:
    size = file.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise UsageError(f"{file} has {size:,} bytes, more than {MAX_TEXT_BYTES:,}: dump it as safetensors")
    return {name: _from_json(name, value) for name, value in _object(file, file.read_bytes()).items()}


def _object(file: Path, text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{file} has {twice} twice")
        return named

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{file} is not JSON at {where}: {error.msg}; was it cut off?") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{file} must hold one JSON object of named values, got {_kind(value)}")
    return value


def _from_json(name: str, value: Any) -> Value | None:
    """A value of a JSON dump: a number, a text, nested lists of integers, or an array's dtype and shape."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("shape"), list) and "dtype" in value:
        return Stub(str(value["dtype"]), tuple(_counts(name, value["shape"])))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not is_metadata(name):
        return Stub(_kind(value), (len(value),) if isinstance(value, list) else ())
    if not isinstance(value, list):
        raise UsageError(f"{name} must be a whole number or an array of them, got {_shown(value)}")
    if name.removesuffix("_cpu") in REQUESTS:
        try:
            return request_numbers(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    return _from_lists(name, value)


def _from_lists(name: str, value: list[Any]) -> Int64:
    if any(isinstance(item, list) for item in value):
        for place, item in enumerate(value):
            if not isinstance(item, list):
                raise UsageError(f"{name} must be a table, but its row {place} is {_shown(item)}")
            if len(item) != len(value[0]):
                told = f"row {place} has {len(item):,} entries and row 0 has {len(value[0]):,}"
                raise UsageError(f"{name} must be a table with rows of one length, but {told}")
        for row, items in enumerate(value):
            _check_numbers(f"{name}[{row}]", items)
    else:
        _check_numbers(name, value)
    return np.array(value, np.int64)


def _check_numbers(name: str, items: list[Any]) -> None:
    for place, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, int):
            raise UsageError(f"{name}[{place}] must be a whole number, got {_shown(item)}")
        if not -(2**63) <= item < 2**63:
            raise UsageError(f"{name}[{place}] must be a number of 64 bits, got {_shown(item)}")


def _counts(name: str, shape: list[Any]) -> list[int]:
    if all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
        return shape
    raise UsageError(f"the shape of {name} must be whole numbers from 0, got {_shown(shape)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a bool"}
    return names.get(type(value), "null" if value is None else "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# ---- npz -----------------------------------------------------------------------------------------


def _read_npz(file: Path) -> dict[str, Value | None]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            if not members:
                raise UsageError(f"{file} holds no arrays; torch.save writes pickles, which are never read")
            return {
                member.removesuffix(".npy"): _read_member(archive, member, f"{member} of {file}")
                for member in members
            }
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UsageError(f"{file} is no whole npz file: {error}; was it cut off?") from None


def _read_member(archive: zipfile.ZipFile, member: str, told: str) -> Value:
    name = member.removesuffix(".npy")
    with archive.open(member) as stream:
        try:
            shape, _, dtype = _npy_header(stream)
        except ValueError as error:
            raise UsageError(f"{told} is no array: {error}") from None
    if dtype.hasobject:
        raise UsageError(f"{name} holds pickled objects, which are never read: dump it as integers")
    told_dtype = str(dtype.newbyteorder("="))
    if not is_metadata(name):
        return Stub(told_dtype, shape)
    _check_array(name, told_dtype, shape)
    with archive.open(member) as stream:
        try:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        except ValueError as error:
            raise UsageError(f"{told} is cut off: {error}") from None
    return _int64(name, array)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of an array in NumPy's format."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"its format is version {version[0]}.{version[1]}, and 1.0 and 2.0 are read")


# ---- safetensors ---------------------------------------------------------------------------------


def _read_safetensors(file: Path) -> dict[str, Value | None]:
    """The format of huggingface/safetensors: length of the header, header, bytes of the arrays."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))[0]
        if length > size - 8:
            raise UsageError(f"{file} is no whole safetensors file: its header would pass its end")
        if length > MAX_TEXT_BYTES:
            raise UsageError(f"the header of {file} has {length:,} bytes, more than {MAX_TEXT_BYTES:,}")
        header = _object(file, stream.read(length))
        texts = header.pop("__metadata__", None) or {}
        found: dict[str, Value | None] = {}
        for name, entry in header.items():
            found[name] = _read_entry(stream, name, entry, 8 + length, size)
    if not isinstance(texts, dict):
        raise UsageError(f"__metadata__ of {file} must hold texts, got {_shown(texts)}")
    for name, text in texts.items():
        value = _from_text(name, text)
        # What other writers say beside the arrays is no value of the step.
        if name not in found and (is_metadata(name) or isinstance(value, Stub)):
            found[name] = value
    return found


def _from_text(name: str, text: Any) -> Value | None:
    """A number, a text or an array's dtype and shape, as `capture` writes them beside the arrays."""
    try:
        return _from_json(name, json.loads(text))
    except (ValueError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        return str(text)


def _read_entry(stream: IO[bytes], name: str, entry: Any, start: int, size: int) -> Value:
    dtypes = {told: dtype for dtype, told in SAFETENSORS.items()}
    match entry:
        case {"dtype": str(told), "shape": list(sizes), "data_offsets": [int(begin), int(end)]}:
            shape = tuple(_counts(name, sizes))
        case _:
            raise UsageError(f"{name} must have dtype, shape and data_offsets, got {_shown(entry)}")
    dtype = dtypes.get(told, told)
    if not is_metadata(name):
        return Stub(dtype, shape)
    _check_array(name, dtype, shape)
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if not 0 <= begin <= end <= size - start or end - begin != expected:
        raise UsageError(
            f"{name} is cut off: it needs {expected:,} bytes, and the file does not have them there"
        )
    stream.seek(start + begin)
    data = np.frombuffer(stream.read(expected), np.dtype(dtype).newbyteorder("<"))
    return _int64(name, data.reshape(shape))


# ---- arrays of any format ------------------------------------------------------------------------


def _check_array(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuses what is not a vector or table of integers, before it is read."""
    is_integer = dtype.startswith(("int", "uint")) and dtype.removeprefix("u")[3:].isdecimal()
    if not is_integer:
        raise UsageError(f"{name} must hold whole numbers, got an array of {dtype}")
    if math.prod(shape) > MAX_ELEMENTS:
        raise UsageError(f"{name} has {math.prod(shape):,} elements, more than {MAX_ELEMENTS:,}")


def _int64(name: str, array: npt.NDArray[Any]) -> Int64:
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise UsageError(f"{name} must hold numbers of 64 bits with a sign, got {int(array.max()):,}")
    return array.astype(np.int64)
