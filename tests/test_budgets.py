"""How errors are measured and what they may be: worked by hand from the definitions."""

import math

import pytest
import torch

from harness.budgets import BUDGETS, RowErrors, budget_source, judge_rows, lse_budgets, row_errors
from harness.tensors import DTYPES

NAN, INF = math.nan, math.inf


def errors_of(got, expected):
    """(relative L2, largest) of one row."""
    errors = row_errors(torch.tensor([got], dtype=torch.float64), torch.tensor([expected]))
    return float(errors.relative_l2), float(errors.largest)


def judged(dtype, relative_l2, largest, baseline=0.0, **arguments):
    """(error, budget, over) of one row."""
    errors = RowErrors(*(torch.tensor([value], dtype=torch.float64) for value in (relative_l2, largest)))
    judgement = judge_rows(dtype, errors, torch.tensor([baseline], dtype=torch.float64), **arguments)
    return float(judgement.error), float(judgement.budget), bool(judgement.over)


# ---- errors of rows ------------------------------------------------------------------------------


def test_errors_are_relative_to_the_row():
    # |error| = 0.5, |row| = 5, largest element 4.
    assert errors_of([3.0, 4.5], [3.0, 4.0]) == (0.1, 0.125)
    # The same as L2, whatever the sign and the place.
    assert errors_of([-3.5, 4.0], [-3.0, 4.0]) == (0.1, 0.125)


def test_equal_rows_have_no_error():
    for row in ([1.0, -2.0], [0.0, 0.0], [0.0, -0.0], [NAN, 1.0], [INF, 1.0], [-INF, -INF]):
        assert errors_of(row, row) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([NAN, 1.0], [1.0, 1.0]),
        ([INF, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [NAN, 1.0]),
        ([1.0, 1.0], [-INF, 1.0]),
        ([INF, 1.0], [-INF, 1.0]),
        ([NAN, 1.0], [INF, 1.0]),
        ([NAN, NAN], [0.0, 0.0]),
    ],
)
def test_a_row_that_is_not_finite_where_it_should_be_is_infinitely_wrong(got, expected):
    assert errors_of(got, expected) == (INF, INF)


def test_a_row_that_should_be_zero_and_is_not_is_infinitely_wrong():
    assert errors_of([0.0, 1e-30], [0.0, 0.0]) == (INF, INF)


def test_finite_elements_beside_an_agreed_nan_still_count():
    assert errors_of([NAN, 4.5], [NAN, 4.0]) == (0.125, 0.125)


def test_every_row_has_its_own_error():
    expected = torch.ones(2, 3, 4)
    got = expected.clone()
    got[1, 2] = 3.0
    errors = row_errors(got, expected)
    assert errors.relative_l2.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    assert errors.largest.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]


def test_low_precision_rows_are_compared_in_float64():
    got = torch.tensor([[1.0, 256.0]], dtype=torch.bfloat16)
    errors = row_errors(got, torch.tensor([[1.0, 256.0 + 2.0**-20]], dtype=torch.float64))
    assert float(errors.largest) == pytest.approx(2.0**-28, rel=1e-6)


# ---- budgets of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_floor_and_cap_bound_three_times_the_baseline(dtype):
    bounds = BUDGETS[dtype]
    between = (bounds.floor + bounds.cap) / 2
    for baseline, budget in ((0.0, bounds.floor), (between / 3, between), (1.0, bounds.cap)):
        assert judged(dtype, budget * 0.999, 0.0, baseline)[1:] == (pytest.approx(budget), False)
        assert judged(dtype, budget * 1.001, 0.0, baseline)[1:] == (pytest.approx(budget), True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_element_may_be_off_by_half_an_ulp_more(dtype):
    half_ulp = torch.finfo(DTYPES[dtype]).eps / 2
    budget = BUDGETS[dtype].floor + half_ulp
    assert BUDGETS[dtype].half_ulp == half_ulp
    assert judged(dtype, 0.0, budget * 0.999)[1:] == (pytest.approx(budget), False)
    assert judged(dtype, 0.0, budget * 1.001)[1:] == (pytest.approx(budget), True)


def test_the_error_that_uses_most_of_its_budget_is_reported():
    # Of 4e-3 and 4e-3 + 2^-8: 75 % and 51 %, then 25 % and 63 %.
    assert judged("bf16", 3e-3, 4e-3)[:2] == (3e-3, 4e-3)
    assert judged("bf16", 1e-3, 5e-3)[:2] == (5e-3, 4e-3 + 2.0**-8)


def test_either_error_alone_puts_a_row_over_budget():
    assert judged("bf16", 5e-3, 5e-3)[2]
    assert judged("bf16", 3e-3, 9e-3)[2]
    assert not judged("bf16", 3e-3, 7e-3)[2]


def test_infinite_errors_are_over_budget():
    for errors in ((INF, INF), (0.0, INF), (INF, 0.0), (NAN, 0.0), (NAN, NAN)):
        assert judged("bf16", *errors, baseline=1.0)[2]


def test_comparisons_of_two_launches_have_twice_the_budget():
    assert judged("fp16", 2 * 6e-4 * 0.999, 0.0, times=2.0)[1:] == (pytest.approx(1.2e-3), False)
    assert judged("fp16", 2 * 6e-4 * 1.001, 0.0, times=2.0)[2]
    assert judged("fp16", 0.0, 2 * (6e-4 + 2.0**-11), times=2.0)[1] == pytest.approx(2 * (6e-4 + 2.0**-11))


def test_in_fp32_a_logit_s_error_counts_twice_up_to_the_cap():
    for logit_error, budget in ((1e-6, 1e-5), (3e-5, 6e-5), (1.0, 2e-3)):
        assert judged("fp32", 0.0, 0.0, logit_error=logit_error)[1] == pytest.approx(budget)
    # Three times an emulation's error of 5e-5 is more.
    assert judged("fp32", 0.0, 0.0, 5e-5, logit_error=3e-5)[1] == pytest.approx(1.5e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_half_precision_a_logit_s_error_does_not_count(dtype):
    assert judged(dtype, 0.0, 0.0, logit_error=1.0)[1] == BUDGETS[dtype].floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_a_row_once_is_within_budget(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    # The worst for the largest element: one alone, just above a power of two.
    rows[:100, :] *= 1e-3
    rows[:100, 0] = 1 + torch.rand(100, generator=generator, dtype=torch.float64) * 2.0**-7
    errors = row_errors(rows.to(DTYPES[dtype]), rows)
    assert not judge_rows(dtype, errors, torch.zeros(500)).over.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_part_in_fifty_is_over_every_budget(dtype):
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = row_errors(rows * 1.02, rows)
    assert judge_rows(dtype, errors, torch.ones(20)).over.all()


def test_half_precision_budgets_are_the_designs():
    assert (BUDGETS["bf16"].floor, BUDGETS["bf16"].cap) == (4e-3, 6e-3)
    assert (BUDGETS["fp16"].floor, BUDGETS["fp16"].cap) == (6e-4, 8e-4)


# ---- LSE -----------------------------------------------------------------------------------------


def test_lse_budgets_grow_with_the_logits():
    # 64 * 2^-23 = 2^-17.
    budgets = lse_budgets(torch.tensor([0.0, 0.5, 1.0, 8.0, 2.0**16], dtype=torch.float64))
    expected = [1e-6 + 2.0**-17] * 3 + [1e-6 + 2.0**-14, 1e-6 + 0.5]
    assert budgets.tolist() == pytest.approx(expected, rel=1e-15)


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "baseline", "parts"),
    [
        (4e-3, 1e-4, ["bf16 floor 4.0e-03", "1.0e-04 in this row", "is less"]),
        (6e-3, 1e-2, ["bf16 cap 6.0e-03", "1.0e-02 in this row", "is more"]),
        (4.8e-3, 1.6e-3, ["3 x the emulation's error 1.6e-03"]),
        (4e-3 + 2.0**-8, 1e-4, ["bf16 floor 4.0e-03", "half an ulp 3.9e-03 for the largest element"]),
    ],
)
def test_the_source_of_a_budget_is_told(budget, baseline, parts):
    source = budget_source("bf16", budget, baseline)
    assert all(part in source for part in parts)
    assert ("half an ulp" in source) == (budget > 6e-3)


def test_a_budget_from_the_logits_is_told():
    assert budget_source("fp32", 6e-5, 1e-6, 3e-5) == "2 x the budget of its LSE 3.0e-05"
    assert "3 x the emulation's error 1.0e-06 in this row is less" in budget_source("fp32", 1e-5, 1e-6, 1e-6)
