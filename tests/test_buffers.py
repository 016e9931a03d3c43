"""Guard bands: what a buffer notices, and what it must not mistake for a stray write."""

import pytest
import torch

from harness import buffers
from harness.buffers import MIN_GUARD_BYTES, Buffer, bytes_of
from harness.paging import HUGE_BLOCK_ID

HOST = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)


def allocate(shape, dtype=torch.bfloat16, **options):
    return Buffer.allocate(shape, dtype, HOST, **options)


def address(buffer, indices):
    """Byte in `raw` of an element of the view, given by its indices."""
    view = buffer.view
    offset = sum(index * stride for index, stride in zip(indices, view.stride(), strict=True))
    return (view.storage_offset() + offset) * view.element_size()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_buffer_is_poison_throughout(dtype, strided):
    buffer = allocate((3, 4, 16), dtype, strided=strided)
    assert buffer.view.shape == (3, 4, 16)
    assert buffer.view.stride(2) == 1
    if dtype.is_floating_point:
        assert bool(buffer.view.isnan().all())
    elif dtype is torch.int32:
        assert bool((buffer.view == HUGE_BLOCK_ID).all())
    elif dtype is torch.int64:
        assert bool((buffer.view > 2**60).all())
    assert buffer.untouched_outside()


def test_poison_is_nan_in_every_float_format():
    raw = allocate((64,), torch.float32).raw
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        assert bool(raw.view(dtype).to(torch.float32).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_writes_to_the_view_are_not_stray(dtype, strided):
    buffer = allocate((3, 4, 16), dtype, strided=strided)
    buffer.view.fill_(1)
    assert buffer.untouched_outside()
    assert bool((buffer.view == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_a_byte_behind_or_before_the_view_is_noticed(dtype, strided):
    for place in ("before", "behind"):
        buffer = allocate((3, 4, 16), dtype, strided=strided)
        first, last = address(buffer, (0, 0, 0)), address(buffer, (2, 3, 15))
        buffer.raw[first - 1 if place == "before" else last + dtype.itemsize] = 0
        assert not buffer.untouched_outside(), place


def test_a_byte_at_either_end_of_the_allocation_is_noticed():
    for place in (0, -1):
        buffer = allocate((3, 4, 16))
        buffer.raw[place] = 0
        assert not buffer.untouched_outside()


@pytest.mark.parametrize("indices", [(0, 0), (1, 2), (2, 3)])
def test_a_byte_in_a_gap_is_noticed(indices):
    buffer = allocate((3, 4, 16), strided=True)
    buffer.raw[address(buffer, (*indices, 15)) + 2] = 0
    assert not buffer.untouched_outside()


def test_a_row_of_the_head_gap_is_noticed():
    buffer = allocate((3, 4, 16), strided=True)
    # One head past the last of token 0 is neither a head nor the next token.
    past = address(buffer, (0, 3, 0)) + buffer.view.stride(1) * 2
    assert past < address(buffer, (1, 0, 0))
    buffer.raw[past] = 0
    assert not buffer.untouched_outside()


def test_the_poison_check_leaves_the_view_as_it_was():
    buffer = allocate((5, 16), torch.float32, strided=True)
    buffer.view.copy_(torch.arange(80.0).view(5, 16))
    buffer.view[2, 3] = torch.nan
    before = buffer.raw.clone()
    buffer.untouched_outside()
    assert torch.equal(buffer.raw, before)


def test_guards_are_at_least_a_row_wide():
    buffer = allocate((3, 4096), torch.float32)
    assert address(buffer, (0, 0)) >= 4096 * 4
    assert len(buffer.raw) - address(buffer, (2, 4095)) > 4096 * 4
    assert address(allocate((3,), torch.int32), (0,)) >= MIN_GUARD_BYTES


@pytest.mark.parametrize("strided", [False, True])
def test_rows_are_aligned_to_sixteen_bytes(strided):
    for shape in ((3, 5, 512), (7, 576), (9, 32)):
        buffer = allocate(shape, strided=strided)
        assert buffer.view.data_ptr() % 16 == 0
        assert all(stride * 2 % 16 == 0 for stride in buffer.view.stride()[:-1])


def test_strided_views_leave_gaps_on_every_axis_but_the_first():
    assert allocate((3, 4, 16), strided=False).view.is_contiguous()
    view = allocate((3, 4, 16), strided=True).view
    assert view.stride(1) > 16
    assert view.stride(0) > view.stride(1) * 4
    assert allocate((7,), strided=True).view.is_contiguous()


def test_restore_brings_back_the_snapshot():
    buffer = allocate((3, 16), strided=True)
    buffer.view.fill_(2)
    snapshot = buffer.snapshot()
    assert buffer.equals(snapshot)
    buffer.view[1, 5] = 3
    buffer.raw[0] = 0
    assert not buffer.equals(snapshot)
    buffer.restore(snapshot)
    assert buffer.equals(snapshot)
    assert bool((buffer.view == 2).all())
    assert buffer.untouched_outside()


def test_a_snapshot_is_a_copy():
    buffer = allocate((3, 16))
    snapshot = buffer.snapshot()
    buffer.view.zero_()
    assert not buffer.equals(snapshot)


def test_poison_takes_back_what_was_written():
    buffer = allocate((3, 16))
    buffer.view.zero_()
    buffer.raw[1] = 0
    buffer.poison()
    assert buffer.untouched_outside()
    assert bool(buffer.view.isnan().all())


@pytest.mark.parametrize("shape", [(0,), (0, 4), (0, 4, 16), (3, 0, 16)])
@pytest.mark.parametrize("strided", [False, True])
def test_empty_tensors_have_guards_that_notice(shape, strided):
    buffer = allocate(shape, torch.float32, strided=strided)
    assert buffer.view.shape == shape
    assert buffer.untouched_outside()
    assert buffer.equals(buffer.snapshot())
    buffer.raw[MIN_GUARD_BYTES] = 0
    assert not buffer.untouched_outside()


def test_bytes_of_widens_the_last_axis():
    view = allocate((3, 16), torch.float32, strided=True).view
    assert bytes_of(view).shape == (3, 64)
    assert bytes_of(view).data_ptr() == view.data_ptr()
    narrow = allocate((3, 16), torch.uint8).view
    assert bytes_of(narrow) is narrow


# ---- tensors too large to watch whole ------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch):
    """A cache of 100 blocks, 4 KiB each, of which 3 and 50 are in use."""
    monkeypatch.setattr(buffers, "SPARSE_BYTES", 1000)
    return allocate((100, 1, 4, 512), used_rows=torch.tensor([3, 50]))


def test_a_large_tensor_is_watched_around_what_is_in_use(sparse):
    assert sparse.sparse
    # Two guards, and three blocks around each block in use.
    assert len(sparse.snapshot()) == 2 * 4096 + 6 * 4096
    for block in (2, 3, 4, 49, 50, 51):
        assert bool(sparse.view[block].isnan().all())


@pytest.mark.parametrize("block", [2, 3, 4, 49, 50, 51])
def test_writes_near_what_is_in_use_are_noticed(sparse, block):
    snapshot = sparse.snapshot()
    sparse.view[block, 0, 3, 511] = 1
    assert not sparse.equals(snapshot)
    sparse.restore(snapshot)
    assert sparse.equals(snapshot)
    assert bool(sparse.view[block].isnan().all())


def test_writes_to_the_guards_of_a_large_tensor_are_noticed(sparse):
    for place in (0, 4095, -1, -4096):
        snapshot = sparse.snapshot()
        sparse.raw[place] = 0
        assert not sparse.equals(snapshot)
        sparse.restore(snapshot)


def test_the_first_and_last_block_of_a_large_tensor_are_watched(monkeypatch):
    monkeypatch.setattr(buffers, "SPARSE_BYTES", 1000)
    buffer = allocate((10, 1, 4, 512), used_rows=torch.tensor([0, 9]))
    assert len(buffer.snapshot()) == 2 * 4096 + 4 * 4096
    assert bool(buffer.view[[0, 1, 8, 9]].isnan().all())


def test_small_tensors_and_those_without_used_rows_are_watched_whole(monkeypatch):
    assert not allocate((100, 1, 4, 512), used_rows=torch.tensor([3])).sparse
    monkeypatch.setattr(buffers, "SPARSE_BYTES", 1000)
    assert not allocate((100, 1, 4, 512)).sparse
