"""Pointers that leave the tensors of a launch are reported, with the kernel's line; others are not."""

import inspect
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.runtime.errors import InterpreterError  # noqa: E402

from harness.bounds import OutOfBounds, is_installed, take_violation  # noqa: E402
from harness.interpreter import repair  # noqa: E402
from harness.launch import PathFailure  # noqa: E402


@triton.jit
def load_kernel(source, target, first, limit, block: tl.constexpr):
    index = first + tl.arange(0, block)
    values = tl.load(source + index, mask=index < limit, other=0)
    tl.store(target + tl.arange(0, block), values)


@triton.jit
def store_kernel(target, first, limit, block: tl.constexpr):
    index = first + tl.arange(0, block)
    tl.store(target + index, index, mask=index < limit)


@triton.jit
def add_kernel(target, first, limit, block: tl.constexpr):
    index = first + tl.arange(0, block)
    tl.atomic_add(target + index, 1, mask=index < limit)


@triton.jit
def swap_kernel(target, offset):
    tl.atomic_cas(target + offset, 0, 1)


@triton.jit
def row_kernel(source, target, stride, rows: tl.constexpr, columns: tl.constexpr):
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    values = tl.load(source + row[:, None] * stride + column[None, :])
    tl.store(target + row[:, None] * columns + column[None, :], values)


def within(count, dtype=torch.int32):
    """A tensor amid others of its own storage: what lies around it is real memory, and not the launch's."""
    return torch.zeros(count + 200, dtype=dtype)[100 : 100 + count]


def line_of(kernel, text):
    """`file:line` of the line of a kernel that holds a text."""
    lines, start = inspect.getsourcelines(kernel.fn)
    number = next(i for i, line in enumerate(lines) if text in line)
    return f"test_bounds.py:{start + number}"


def violation_of(launch):
    with pytest.raises(InterpreterError):
        launch()
    violation = take_violation()
    assert isinstance(violation, OutOfBounds)
    return str(violation)


@pytest.fixture(autouse=True)
def _no_violation_is_left():
    assert is_installed()
    yield
    assert take_violation() is None


@pytest.mark.parametrize("first", [-1, 1])
def test_a_load_one_element_outside_is_reported_with_its_line(first):
    source, target = within(8), within(8)
    message = violation_of(lambda: load_kernel[(1,)](source, target, first, 100, block=8))
    assert message.startswith("load of 1 of 8 active lanes outside every tensor of the launch")
    assert message.endswith(line_of(load_kernel, "tl.load"))


@pytest.mark.parametrize("first", [-1, 1])
def test_a_store_one_element_outside_is_reported_and_does_not_happen(first):
    target = within(8)
    message = violation_of(lambda: store_kernel[(1,)](target, first, 100, block=8))
    assert message.startswith("store of 1 of 8")
    assert message.endswith(line_of(store_kernel, "tl.store"))
    whole = target.as_strided((208,), (1,), 0)
    assert not whole.any()


@pytest.mark.parametrize("first", [-1, 1])
def test_an_atomic_one_element_outside_is_reported_and_does_not_happen(first):
    target = within(8)
    message = violation_of(lambda: add_kernel[(1,)](target, first, 100, block=8))
    assert message.startswith("atomic of 1 of 8")
    assert message.endswith(line_of(add_kernel, "tl.atomic_add"))
    assert not target.as_strided((208,), (1,), 0).any()


def test_a_compare_and_swap_outside_is_reported():
    target = within(8)
    swap_kernel[(1,)](target, 7)
    assert target.tolist() == [0] * 7 + [1]
    message = violation_of(lambda: swap_kernel[(1,)](target, 8))
    assert message.startswith("atomic of 1 of 1")


def test_a_violation_is_taken_once():
    target = within(8)
    with pytest.raises(InterpreterError):
        store_kernel[(1,)](target, 1, 100, block=8)
    assert isinstance(take_violation(), OutOfBounds)
    assert take_violation() is None


def test_the_first_of_several_violations_is_kept():
    target = within(8)
    for first in (1, 4):
        with pytest.raises(InterpreterError):
            store_kernel[(1,)](target, first, 100, block=8)
    assert str(take_violation()).startswith("store of 1 of 8")


def test_masked_lanes_may_point_anywhere():
    source, target = within(8), within(8)
    source.fill_(3)
    load_kernel[(1,)](source, target, 5, 8, block=8)
    assert target.tolist() == [3, 3, 3, 0, 0, 0, 0, 0]
    store_kernel[(1,)](target, 6, 8, block=8)
    assert target.tolist() == [3, 3, 3, 0, 0, 0, 6, 7]
    add_kernel[(1,)](target, 7, 8, block=8)
    assert target[7] == 8
    load_kernel[(1,)](source, target, 10**6, 8, block=8)
    assert target.tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.bfloat16, torch.float32])
def test_the_last_element_counts_by_its_own_size(dtype):
    target = within(8, dtype)
    store_kernel[(1,)](target, 0, 8, block=8)
    assert target.tolist() == list(range(8))
    message = violation_of(lambda: store_kernel[(1,)](target, 1, 100, block=8))
    assert message.startswith("store of 1 of 8")


def test_strided_views_reach_from_their_first_to_their_last_element():
    view = torch.arange(64.0).view(8, 8)[2:6, 1:5]
    target = torch.zeros(4, 4)
    row_kernel[(1,)](view, target, 8, rows=4, columns=4)
    assert torch.equal(target, view)
    # A stride too large leaves the view with the last two rows; every lane of theirs counts.
    message = violation_of(lambda: row_kernel[(1,)](view, target, 13, rows=4, columns=4))
    # Last element of the view: 3 * 8 + 3 = 27. Row 2 begins at 26: 28 and 29 are out; row 3 at 39: all.
    assert message.startswith("load of 6 of 16")


def test_an_empty_tensor_has_no_element():
    empty, target = torch.zeros(200, dtype=torch.int32)[100:100], within(8)
    load_kernel[(1,)](empty, target, 0, 0, block=8)
    assert target.tolist() == [0] * 8
    message = violation_of(lambda: load_kernel[(1,)](empty, target, 0, 1, block=8))
    assert message.startswith("load of 1 of 1 active lanes")


def test_a_launch_of_nothing_but_empty_tensors_allows_no_pointer():
    empty = torch.zeros(0, dtype=torch.int32)
    store_kernel[(1,)](empty, 0, 0, block=8)
    assert violation_of(lambda: store_kernel[(1,)](empty, 0, 1, block=8)).startswith("store of 1 of 1")


def test_an_empty_view_with_strides_beside_others_is_no_trouble():
    empty, target = torch.zeros(4, 8, dtype=torch.int32)[:0, 2:4], within(8)
    load_kernel[(1,)](empty, target, 0, 0, block=8)
    assert violation_of(lambda: store_kernel[(1,)](target, 8, 9, block=1)).startswith("store of 1 of 1")


def test_each_launch_is_watched_by_its_own_tensors():
    first, second = within(8), within(8)
    store_kernel[(1,)](first, 0, 8, block=8)
    load_kernel[(1,)](first, second, 0, 8, block=8)
    assert second.tolist() == list(range(8))
    # Tensors of the launch before are not this one's.
    offset = (first.data_ptr() - second.data_ptr()) // 4
    message = violation_of(lambda: store_kernel[(1,)](second, offset, 2**62, block=8))
    assert message.startswith("store of 8 of 8")


def test_watching_does_not_undo_the_repairs():
    assert repair() == ()


# ---- through a launch ----------------------------------------------------------------------------


@pytest.fixture
def straying():
    """act -> a path that calls act(out) after the kernel has run."""
    from harness.paths.triton.mla_decode import PATHS

    def make(act):
        def run(inputs, outputs, workspace):
            PATHS[0].run(inputs, outputs, workspace)
            act(outputs["lse"])

        return replace(PATHS[0], name="bad/mla_decode", run=run)

    return make


def test_a_launch_raises_the_violation_and_not_the_interpreters_wrapper(straying, launched):
    path = straying(lambda lse: store_kernel[(1,)](lse, lse.numel(), 100, block=8))
    with pytest.raises(OutOfBounds, match=r"outside every tensor of the launch at test_bounds\.py"):
        launched("mla_decode/decode:3/model=minicpm3-4b,heads=2", path)


def test_a_launch_raises_a_violation_that_the_path_swallowed(straying, launched):
    def swallow(lse):
        with pytest.raises(InterpreterError):
            store_kernel[(1,)](lse, lse.numel(), 100, block=8)

    with pytest.raises(OutOfBounds):
        launched("mla_decode/decode:3/model=minicpm3-4b,heads=2", straying(swallow))


def test_a_launch_keeps_the_cause_of_another_error(straying, launched):
    def fail(lse):
        row_kernel[(1,)](lse, lse, 1, rows=3, columns=4)

    # tl.arange takes powers of two only; the interpreter wraps what it raises.
    with pytest.raises(PathFailure, match="the path raised ValueError: ") as caught:
        launched("mla_decode/decode:3/model=minicpm3-4b,heads=2", straying(fail))
    assert isinstance(caught.value.__cause__, InterpreterError)
