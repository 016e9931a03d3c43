"""Reading dumps: the three formats say the same, and a broken one is refused in one sentence."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest

from harness.dump_file import MAX_ELEMENTS, Stub, read_dump
from harness.plan import UsageError

VALUES = {
    "seq_lens_encoder": np.array([[4], [0]], np.int32),
    "block_tables": np.array([[3, -1], [5, 2**30]], np.int32),
    "slot_mapping": np.array([0, 2**40, -1], np.int64),
    "block_size": np.array(64, np.int64),
}


def safetensors(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype="I32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def header_of(shape, dtype="<i8"):
    """An array's file with a header and no contents."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("slot_mapping.npy", stream.getvalue())
    return archive.getvalue()


def refusal(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_dump(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what can be read ----------------------------------------------------------------------------


def written(tmp_path, suffix):
    file = tmp_path / f"dump.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps({name: value.tolist() for name, value in VALUES.items()}))
    elif suffix == "npz":
        np.savez(file, **VALUES)
    else:
        save_file = pytest.importorskip("safetensors.numpy").save_file
        save_file(VALUES, file)
    return file


@pytest.mark.parametrize("suffix", ["json", "npz", "safetensors"])
def test_every_format_holds_the_same(tmp_path, suffix):
    found = read_dump(written(tmp_path, suffix))
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert np.array_equal(found[name], value)
        assert np.asarray(found[name]).dtype == np.int64


def test_the_format_may_be_said(tmp_path):
    file = written(tmp_path, "json").rename(tmp_path / "dump.txt")
    assert read_dump(file, "json").keys() == VALUES.keys()
    with pytest.raises(UsageError, match="must be one of json, npz, safetensors by its name"):
        read_dump(file)


def test_fortran_order_and_big_endian_are_read_as_what_they_say(tmp_path):
    table = np.arange(6, dtype=">i4").reshape(2, 3)
    np.savez(tmp_path / "dump.npz", block_tables=np.asfortranarray(table))
    assert read_dump(tmp_path / "dump.npz")["block_tables"].tolist() == table.tolist()


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_of_what_is_no_metadata_the_shape_alone_is_read(tmp_path, suffix):
    if suffix == "npz":
        content = npz(q=np.ones((3, 5), np.float16), seq_lens=np.array([1, 2]))
    else:
        # The contents of q are not even there.
        header = {"seq_lens": entry(), "q": entry("F16", (3, 5), (8, 38))}
        content = safetensors(header, struct.pack("<2i", 1, 2))
    (tmp_path / f"dump.{suffix}").write_bytes(content)
    found = read_dump(tmp_path / f"dump.{suffix}")
    assert found["q"] == Stub("float16", (3, 5))
    assert found["seq_lens"].tolist() == [1, 2]


def test_a_copy_on_the_host_has_the_name_without_cpu_and_null_is_absent(tmp_path):
    (tmp_path / "dump.json").write_text('{"seq_lens_cpu": [1], "block_table": null}')
    assert read_dump(tmp_path / "dump.json") == {"seq_lens": np.array([1])}
    assert "both seq_lens and seq_lens_cpu" in refusal(
        tmp_path, "two.json", '{"seq_lens": [1], "seq_lens_cpu": [1]}'
    )


def test_ids_of_requests_may_be_texts(tmp_path):
    (tmp_path / "dump.json").write_text('{"req_ids": ["a", "b", null, "a", 7]}')
    ids = read_dump(tmp_path / "dump.json")["req_ids"].tolist()
    assert ids[0] == ids[3] != ids[1]
    assert ids[2:] == [-1, ids[0], 7]


# ---- what cannot ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "not JSON at line 1, column 1"),
        ('{"seq_lens": [1, 2', "was it cut off?"),
        (b"\xff\xfe\x00", "not JSON: 'utf-8'"),
        (b"\x80\x04\x95pickle", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "must hold one JSON object of named values, got a list"),
        ('{"seq_lens": [1], "seq_lens": [2]}', "has seq_lens twice"),
        ('{"seq_lens": [1, NaN]}', "seq_lens[1] must be a whole number, got NaN"),
        ('{"seq_lens": [1, Infinity]}', "got Infinity"),
        ('{"seq_lens": [[1], [2.5]]}', "seq_lens[1][0] must be a whole number, got 2.5"),
        ('{"seq_lens": [true]}', "got true"),
        ('{"seq_lens": ["7"]}', 'got "7"'),
        ('{"seq_lens": 1.5}', "seq_lens must be a whole number or an array of them, got 1.5"),
        ('{"seq_lens": {"a": 1}}', "must be a whole number or an array"),
        (f'{{"seq_lens": [{10**30}]}}', "must be a number of 64 bits"),
        (f'{{"seq_lens": [{"9" * 5000}]}}', "not JSON"),
        (
            '{"request_ids": ["a", [1]]}',
            "request_ids: id 1 of the requests must be a text or a number, got [1]",
        ),
        ('{"request_ids": [1.5]}', "got 1.5"),
        ('{"block_table": [[1, 2], [3]]}', "row 1 has 1 entries and row 0 has 2"),
        ('{"block_table": [[1, 2], 3]}', "its row 1 is 3"),
        ('{"block_table": [[[1]]]}', "block_table[0][0] must be a whole number, got [1]"),
        ('{"seq_lens": {"dtype": "int32", "shape": [-1]}}', "the shape of seq_lens"),
    ],
)
def test_json_that_is_no_dump_is_refused_in_one_sentence(tmp_path, content, sentence):
    assert sentence in refusal(tmp_path, "dump.json", content)


def pickled():
    stream = io.BytesIO()
    np.savez(stream, seq_lens=np.array([object()], dtype=object))
    return stream.getvalue()


def without_crc():
    """A member whose contents were changed."""
    whole = bytearray(npz(seq_lens=np.arange(1000)))
    whole[len(whole) // 3] ^= 0xFF
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no whole npz file"),
        (npz(seq_lens=np.arange(1000))[:-100], "was it cut off?"),
        (without_crc(), "dump.npz"),
        (pickled(), "seq_lens holds pickled objects, which are never read"),
        (npz(seq_lens=np.array([1.0, np.nan])), "seq_lens must hold whole numbers, got an array of float64"),
        (npz(seq_lens=np.array([True])), "got an array of bool"),
        (npz(seq_lens=np.array([2**63], np.uint64)), "64 bits with a sign"),
        (header_of((10**9,)), "slot_mapping has 1,000,000,000 elements, more than"),
        (header_of((2**62, 2**62)), "elements, more than"),
        (header_of((100,)), "is cut off"),
        (header_of((1,), "|O"), "pickled"),
    ],
)
def test_an_npz_that_is_no_dump_is_refused_in_one_sentence(tmp_path, content, sentence):
    assert sentence in refusal(tmp_path, "dump.npz", content)


def test_a_file_of_torch_is_never_unpickled(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"seq_lens": torch.ones(3)}, tmp_path / "dump.npz")
    with pytest.raises(UsageError, match="pickles, which are never read"):
        read_dump(tmp_path / "dump.npz")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "its header would pass its end"),
        (b"\x01", "its header would pass its end"),
        (struct.pack("<Q", 2**60), "its header would pass its end"),
        (safetensors({"seq_lens": entry(offsets=(0, 0), shape=(0,))})[:-1], "its header would pass its end"),
        (safetensors(b"{"), "is not JSON"),
        (safetensors({"seq_lens": entry()}, b"\0" * 7), "seq_lens is cut off"),
        (safetensors({"seq_lens": entry(offsets=(-8, 0))}, b"\0" * 8), "seq_lens is cut off"),
        (safetensors({"seq_lens": entry(shape=(3,))}, b"\0" * 8), "seq_lens is cut off: it needs 12 bytes"),
        (safetensors({"seq_lens": entry("F32")}, b"\0" * 8), "got an array of float32"),
        (safetensors({"seq_lens": entry("I3")}, b"\0" * 8), "got an array of I3"),
        (safetensors({"seq_lens": {"dtype": "I32"}}), "must have dtype, shape and data_offsets"),
        (safetensors({"seq_lens": entry(shape=(MAX_ELEMENTS + 1,))}), "elements, more than"),
        (safetensors({"seq_lens": entry(shape=("a",))}, b"\0" * 8), "the shape of seq_lens"),
        (safetensors({"__metadata__": ["a"]}), "__metadata__"),
    ],
)
def test_a_safetensors_file_that_is_no_dump_is_refused_in_one_sentence(tmp_path, content, sentence):
    assert sentence in refusal(tmp_path, "dump.safetensors", content)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    for suffix in ("json", "npz", "safetensors"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_dump(tmp_path / f"missing.{suffix}")
