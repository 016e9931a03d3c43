"""The sites of Python and Triton texts, against expectations worked out by hand."""

import pytest

from harness.coverage.python_sites import python_file
from harness.coverage.sites import SiteKind

HOST = '''"""A docstring."""
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch

LIMIT = call(
    1,
    2,
)
"""What LIMIT is."""


@decorated(
    3
)
class Thing:
    """A docstring."""

    name: str
    size: int = 3

    def method(self, value):
        """A docstring."""
        global LIMIT
        if (value
                and LIMIT):
            return 1
        elif value: return 2
        else:
            pass
        for item in value:
            print(item)
        else:
            print()
        while True:
            break
        while value:
            value = None
        try:
            with open(value) as one, open(
                value
            ) as two:
                two()
        except OSError:
            raise
        finally:
            ...
'''


def lines_of(found, kind):
    return [(site.lines, site.label) for site in sorted(set(found.sites)) if site.kind is kind]


def test_statements_are_what_runs_and_compound_ones_their_headers():
    lines = [line for line, _ in lines_of(python_file(HOST), SiteKind.STATEMENT)]
    assert lines == [
        *("2", "3", "4", "7-10"),
        *("21", "26-27", "28", "29", "29", "31", "32", "33", "35", "36", "37", "38", "39"),
        *("41-43", "44", "46"),
    ]


def test_arms_are_outcomes_and_constant_conditions_have_none():
    # An arm on the line of its condition cannot be told: line 29.
    assert lines_of(python_file(HOST), SiteKind.ARM) == [
        ("26-27", "false"),
        ("26-27", "true"),
        ("32", "ends"),
        ("32", "trips"),
        ("38", "ends"),
        ("38", "trips"),
    ]


def test_sites_name_the_function_they_lie_in():
    functions = {site.first: site.function for site in python_file(HOST).sites}
    assert [functions[line] for line in (2, 21, 28)] == ["", "Thing", "Thing.method"]


def test_a_text_without_a_kernel_is_python_and_has_no_lanes():
    found = python_file(HOST)
    assert found.language == "python"
    assert lines_of(found, SiteKind.LANE) == []


def test_lines_that_importing_runs_are_those_under_no_condition():
    assert [site.first for site in python_file(HOST).straight] == [2, 3, 4, 7, 21]


KERNEL = '''import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def kernel(
    x,
    n,
    BLOCK: tl.constexpr,
):
    """A docstring."""
    index = tl.arange(0, BLOCK)
    value = tl.load(
        x + index, mask=index < n, other=0
    )
    for _ in range(n):
        value += tl.load(x + index, index < n) + tl.load(x)
    for _ in tl.static_range(2):
        value = tl.where(value > 0, value, -value)
    while n > 0:
        n -= 1
    if BLOCK > 4 or n:
        value = 1 if BLOCK else 2
    if n: return
    tl.store(x, value, mask=None)
    tl.atomic_add(x, value, index < n)
    tl.atomic_cas(x, 0, 1)


def host(x, mask):
    return x.load(x, mask=mask) if mask else None
'''


def test_lanes_are_the_masks_of_kernels():
    found = python_file(KERNEL)
    assert found.language == "triton"
    assert list(found.kernels) == ["kernel"]
    expected = ["13-15", "17", "19", "26"]
    lanes = [(line, label) for line in expected for label in ("off", "on")]
    assert lines_of(found, SiteKind.LANE) == lanes


def test_loops_of_kernels_have_an_arm_for_no_trip_unless_they_always_have_one():
    arms = lines_of(python_file(KERNEL), SiteKind.ARM)
    assert [arm for arm in arms if not arm[1].startswith("not")] == [
        ("16", "no trip"),
        ("16", "trips"),
        ("18", "trips"),
        ("20", "no trip"),
        ("20", "trips"),
        ("22", "false"),
        ("22", "true"),
    ]


def test_what_cannot_be_measured_in_a_kernel_is_an_arm_that_says_so():
    arms = lines_of(python_file(KERNEL), SiteKind.ARM)
    assert [arm for arm in arms if arm[1].startswith("not")] == [
        ("22", "not measurable: or"),
        ("23", "not measurable: a ternary"),
        ("24", "not measurable: its body is on the same line"),
    ]


def test_two_masks_of_one_line_are_told_apart():
    text = "@triton.jit\ndef kernel(x, m):\n    tl.store(x, tl.load(x, mask=m), mask=m)\n"
    lanes = [site for site in python_file(text).sites if site.kind is SiteKind.LANE]
    assert {(site.column, site.label) for site in lanes} == {(4, "on"), (4, "off"), (16, "on"), (16, "off")}


@pytest.mark.parametrize(
    ("imports", "decorator", "is_kernel"),
    [
        ("import triton", "triton.jit", True),
        ("import triton as tn", "tn.jit", True),
        ("from triton import jit", "jit", True),
        ("from triton import jit as compiled", "compiled()", True),
        ("from numba import jit", "jit", False),
        ("import triton", "triton.constexpr_function", False),
    ],
)
def test_a_kernel_is_what_tritons_decorator_decorates(imports, decorator, is_kernel):
    found = python_file(f"{imports}\n@{decorator}\ndef f(x):\n    pass\n")
    assert bool(found.kernels) == is_kernel


@pytest.mark.parametrize("text", ["def f(:\n", "x = 1\0\n"])
def test_a_text_that_is_no_python_is_refused(text):
    with pytest.raises((SyntaxError, ValueError)):
        python_file(text)
