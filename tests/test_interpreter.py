"""Repaired operations of Triton's interpreter equal torch's, bit for bit."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from harness import interpreter  # noqa: E402
from harness.interpreter import (  # noqa: E402
    REPAIRS,
    bfloat16_to_float32,
    e4m3_to_float32,
    float32_to_bfloat16,
    float32_to_e4m3,
)

E4M3 = torch.float8_e4m3fn


def bits_of(tensor):
    """The bits of a tensor, every NaN replaced by one and the same."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.where(tensor.float().isnan(), -1, tensor.view(integers).long())


def every_bfloat16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def floats_around_bfloat16():
    """Every bf16 pattern as upper half, with the lower halves around a tie: int32 bits as float32."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper.unsqueeze(1) + lower).flatten().to(torch.int32).view(torch.float32)


def floats_around_e4m3():
    """Every e4m3 value, every midpoint between neighbours, and the floats next to each, beyond +-448 too."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    values = values[values.isfinite()].unique()
    beyond = torch.tensor([456.0, 464.0, 480.0, 500.0, 1e30], dtype=torch.float64)
    values = torch.cat([-beyond, values, beyond]).sort().values
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 2.0**-10])
    return torch.cat([exact, exact.nextafter(up), exact.nextafter(down), special])


def to_e4m3(values):
    return values.clamp(-448.0, 448.0).to(E4M3)


# ---- number formats ------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.name)
def test_no_defect_is_left_after_the_repairs(repair):
    assert not repair.is_needed()


def test_repairing_again_changes_nothing():
    assert interpreter.repair() == ()


def test_float32_to_bfloat16_rounds_as_torch_does():
    values = floats_around_bfloat16()
    got = torch.from_numpy(float32_to_bfloat16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits_of(got), bits_of(values.bfloat16()))


def test_bfloat16_to_float32_is_exact():
    values = every_bfloat16()
    got = torch.from_numpy(bfloat16_to_float32(values.view(torch.int16).numpy().view(np.uint16)))
    assert torch.equal(bits_of(got), bits_of(values.float()))


def test_float32_to_e4m3_rounds_and_saturates_as_torch_does_after_a_clamp():
    values = floats_around_e4m3()
    got = torch.from_numpy(float32_to_e4m3(values.numpy())).view(E4M3)
    assert torch.equal(bits_of(got), bits_of(to_e4m3(values)))


def test_e4m3_to_float32_is_exact():
    codes = torch.arange(256, dtype=torch.uint8)
    got = torch.from_numpy(e4m3_to_float32(codes.numpy()))
    assert torch.equal(bits_of(got), bits_of(codes.view(E4M3).float()))


# ---- inside a kernel -----------------------------------------------------------------------------


@triton.jit
def cast_kernel(source, target, count, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(source + index, mask=index < count)
    tl.store(target + index, values.to(target.dtype.element_ty), mask=index < count)


def cast(values, dtype):
    target = torch.zeros(len(values), dtype=dtype)
    cast_kernel[(triton.cdiv(len(values), 4096),)](values, target, len(values), block=4096)
    return target


def test_a_cast_in_a_kernel_rounds_to_bfloat16():
    values = floats_around_bfloat16()
    assert torch.equal(bits_of(cast(values, torch.bfloat16)), bits_of(values.bfloat16()))


def test_a_cast_in_a_kernel_rounds_to_e4m3():
    values = floats_around_e4m3()
    assert torch.equal(bits_of(cast(values, E4M3)), bits_of(to_e4m3(values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_in_a_kernel_widen_bfloat16(dtype):
    values = every_bfloat16()
    assert torch.equal(bits_of(cast(values, dtype)), bits_of(values.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3])
def test_casts_in_a_kernel_widen_e4m3(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    assert torch.equal(bits_of(cast(values, dtype)), bits_of(values.float().to(dtype)))


@pytest.mark.parametrize("source", [torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_become_bfloat16_by_value(source):
    values = torch.tensor([0, 1, -1, 2, 3, 100, 257, -1000]).to(source)
    assert torch.equal(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_float64_becomes_bfloat16_and_back_by_value():
    values = torch.tensor([0.0, 1.0, -3.14159, 1e-3, torch.inf], dtype=torch.float64)
    assert torch.equal(cast(values, torch.bfloat16), values.bfloat16())
    assert torch.equal(cast(values.bfloat16(), torch.float64), values.bfloat16().double())


@triton.jit
def dot_kernel(left, right, product, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr):
    rows, columns, inner = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    a = tl.load(left + rows[:, None] * k + inner[None, :])
    b = tl.load(right + inner[:, None] * n + columns[None, :])
    total = tl.full([m, n], 1.0, tl.float32)
    total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(product + rows[:, None] * n + columns[None, :], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4M3])
def test_dot_of_integer_valued_operands_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    # Integers to 8 are exact in every format, sums of 64 products of them in float32.
    a = torch.randint(-8, 9, (16, 64), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (64, 32), generator=generator).to(dtype)
    product = torch.zeros(16, 32)
    dot_kernel[(1,)](a, b, product, m=16, n=32, k=64)
    assert torch.equal(product.double(), a.double() @ b.double() + 1)


@triton.jit
def arithmetic_kernel(left, right, results, total, block: tl.constexpr):
    index = tl.arange(0, block)
    a, b = tl.load(left + index), tl.load(right + index)
    tl.store(results + index, a + b)
    tl.store(results + block + index, a * b)
    tl.store(results + 2 * block + index, -a)
    tl.store(results + 3 * block + index, tl.where(a < b, a, b))
    tl.store(results + 4 * block + index, tl.maximum(a, b))
    tl.store(results + 5 * block + index, tl.full([block], 1.00390625, results.dtype.element_ty))
    tl.store(total, tl.sum(a, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 256, generator=generator).to(dtype)
    results, total = torch.zeros(6, 256, dtype=dtype), torch.zeros(1, dtype=dtype)
    arithmetic_kernel[(1,)](a, b, results, total, block=256)
    # 1 + 2^-8 is a tie in bfloat16, and 1 is the even neighbour.
    constant = torch.full_like(a, 1.0 if dtype is torch.bfloat16 else 1.00390625)
    expected = [a + b, a * b, -a, torch.where(a < b, a, b), torch.maximum(a, b), constant]
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right)
    # The order of the additions is free: a sum is only near.
    assert torch.allclose(total.double(), a.double().sum(), atol=0.2)


@triton.jit
def scalar_mask_kernel(source, target, limit, block: tl.constexpr):
    index = tl.arange(0, block)
    is_first = tl.program_id(0) == 0
    values = tl.load(source + index, mask=is_first & (index < limit), other=-1.0)
    tl.store(target + tl.program_id(0) * block + index, values, mask=limit > 0)


def test_scalar_comparisons_serve_as_masks():
    source, target = torch.arange(8.0), torch.full((2, 8), 7.0)
    scalar_mask_kernel[(2,)](source, target, 3, block=8)
    assert target.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [-1] * 8]
    scalar_mask_kernel[(2,)](source, target, 0, block=8)
    assert target.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [-1] * 8]


@triton.jit
def range_kernel(bounds, target):
    first, last = tl.load(bounds), tl.load(bounds + 1)
    total = first * 0
    for value in range(first, last, 2):
        total += value
    tl.store(target, total)


def test_ranges_over_loaded_bounds_run_as_written():
    target = torch.zeros(1, dtype=torch.int32)
    range_kernel[(1,)](torch.tensor([3, 10], dtype=torch.int32), target)
    assert target.tolist() == [3 + 5 + 7 + 9]
    range_kernel[(1,)](torch.tensor([3, 3], dtype=torch.int32), target)
    assert target.tolist() == [0]


@triton.autotune(
    configs=[triton.Config({"step": size}) for size in (1, 2, 4)], key=["count"], reset_to_zero=["seen"]
)
@triton.jit
def autotuned_kernel(target, seen, count, step: tl.constexpr):
    tl.store(seen + step, 1)
    for start in range(0, count, step):
        index = start + tl.arange(0, step)
        tl.store(target + index, index, mask=index < count)


def test_autotune_runs_every_configuration_and_gives_the_right_result():
    visited = []
    original = autotuned_kernel.fn.run

    def recording(*args, **options):
        visited.append(options["step"])
        return original(*args, **options)

    target, seen = torch.zeros(7, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    autotuned_kernel.fn.run = recording
    try:
        autotuned_kernel[(1,)](target, seen, 7)
    finally:
        autotuned_kernel.fn.run = original
    assert set(visited) == {1, 2, 4}
    assert target.tolist() == list(range(7))


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_a_launch_does_not_make_untouched_memory_real():
    storage = torch.empty(2**31, dtype=torch.uint8)
    target = storage.view(torch.float32)[:4]
    before = resident_bytes()
    cast_kernel[(1,)](torch.ones(4), target, 4, block=4)
    assert target.tolist() == [1.0] * 4
    assert resident_bytes() - before < 2**28


def test_overflow_in_a_kernel_is_silent():
    got = cast(torch.tensor([1e38, -1e38, 1.0]), torch.float16)
    assert got.tolist() == [torch.inf, -torch.inf, 1.0]


@triton.jit
def doubled(values):
    return values + values


@triton.jit
def calling_kernel(source, target, fails: tl.constexpr):
    index = tl.arange(0, 4)
    values = doubled(tl.load(source + index))
    if fails:
        tl.load(source + index, mask=None, no_such_argument=1)
    # From a module that names another part of the language.
    tl.store(target + index, values + tl.sum(values, axis=0))


def test_integers_wrap_around_as_on_a_device():
    source, target = torch.tensor([2**31 - 1, 0, 0, 0], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    calling_kernel[(1,)](source, target, fails=False)
    assert target.tolist() == [-4, -2, -2, -2]


def test_device_functions_are_called_without_patching_the_language_again(monkeypatch):
    patched = []
    attribute = triton.runtime.interpreter._LangPatchScope.set_attr

    def counted(self, owner, name, value):
        patched.append((owner, name))
        attribute(self, owner, name, value)

    monkeypatch.setattr(triton.runtime.interpreter._LangPatchScope, "set_attr", counted)
    target = torch.zeros(4)
    counts = []
    for programs in (1, 5):
        patched.clear()
        calling_kernel[(programs,)](torch.ones(4), target, fails=False)
        counts.append(len(patched))
    assert 0 < counts[0] == counts[1]
    assert target.tolist() == [10.0] * 4


def test_a_launch_leaves_the_language_as_it_was_even_if_it_fails():
    before, target = tl.load, torch.zeros(4)
    with pytest.raises(triton.runtime.errors.InterpreterError):
        calling_kernel[(1,)](torch.ones(4), target, fails=True)
    assert tl.load is before
    calling_kernel[(1,)](torch.ones(4), target, fails=False)
    assert tl.load is before
    assert target.tolist() == [10.0] * 4
