"""Attention states merged: worked by hand, at their edges, in place, at any address; their data and bound."""

from importlib import import_module
from math import inf, isnan, log, nan

import pytest
import torch

from cases import parse
from cases.contract import contract_of, operators
from cases.operators.merge_states import OPERATOR
from harness.batch import materialise
from harness.checks import checks
from harness.fill import FINITE_POISON, PADDING_NAN
from harness.lanes import lanes
from harness.launch import Launch
from harness.merge_budgets import merge_budget_source, merge_budgets
from harness.tensors import DTYPES
from harness.verdict import Status
from references.oracle import Precision, oracle_for

ROLES = ("definition", "derivation")
FAMILIES = ("triton", "cuda")
NAMES = ("prefix_out", "prefix_lse", "suffix_out", "suffix_lse")
U = 2.0**-24


def kernel(request, family):
    """A family's path as (inputs by name, out, lse) -> None."""
    if family == "triton":
        pytest.importorskip("triton")
    else:
        request.getfixturevalue("cuda_on_the_processor")
    (path,) = import_module(f"harness.paths.{family}.merge_states").PATHS
    return lambda inputs, out, lse: path.run(inputs, {"out": out, "lse": lse}, {})


@pytest.fixture(params=FAMILIES)
def launch(request):
    """(prefix_out, prefix_lse, suffix_out, suffix_lse) -> out and lse of one of our kernels."""
    run = kernel(request, request.param)

    def launched(*tensors, out=None):
        out = torch.full_like(tensors[0], nan, memory_format=torch.contiguous_format) if out is None else out
        lse = torch.full(tensors[1].shape, nan)
        run(dict(zip(NAMES, tensors, strict=True)), out, lse)
        return out, lse

    return launched


@pytest.fixture(params=[*ROLES, *FAMILIES])
def merge(request):
    """(prefix outputs, LSE, suffix outputs, LSE) of one token and head -> out as a list, lse as a number."""

    def merged(prefix_out, prefix_lse, suffix_out, suffix_lse):
        tensors = (
            torch.tensor([[prefix_out]]),
            torch.tensor([[prefix_lse]]),
            torch.tensor([[suffix_out]]),
            torch.tensor([[suffix_lse]]),
        )
        inputs = dict(zip(NAMES, tensors, strict=True))
        if request.param in ROLES:
            outputs = oracle_for("merge_states", request.param).run(inputs, None)
            out, lse = outputs["out"], outputs["lse"]
        else:
            out, lse = torch.full((1, 1, len(prefix_out)), nan), torch.full((1, 1), nan)
            kernel(request, request.param)(inputs, out, lse)
        return out.flatten().tolist(), float(lse)

    return merged


def approximately(value):
    return pytest.approx(value, rel=1e-6)


# ---- worked by hand ------------------------------------------------------------------------------


def test_states_of_masses_1_and_3_count_one_and_three_quarters(merge):
    out, lse = merge([4.0, 0.0], 0.0, [8.0, -4.0], log(3))
    assert out == approximately([7.0, -3.0])
    assert lse == approximately(log(4))


def test_equal_states_are_averaged_and_have_twice_the_mass(merge):
    out, lse = merge([1.0, 5.0], 2.0, [3.0, -5.0], 2.0)
    assert out == approximately([2.0, 0.0])
    assert lse == approximately(2 + log(2))


@pytest.mark.parametrize("lse", [1000.0, 100.0, -104.0, -60000.0])
def test_exponentials_of_the_lses_themselves_are_never_taken(merge, lse):
    out, merged = merge([1.0], lse, [3.0], lse)
    assert out == approximately([2.0])
    assert merged == approximately(lse + log(2))


@pytest.mark.parametrize("gap", [30.0, 200.0, 1e30])
def test_of_states_far_apart_the_larger_is_all(merge, gap):
    assert merge([1.0], 0.0, [3.0], gap) == (approximately([3.0]), approximately(gap))
    assert merge([1.0], gap, [3.0], 0.0) == (approximately([1.0]), approximately(gap))
    assert merge([1.0], 0.0, [3.0], -gap)[0] == approximately([1.0])


@pytest.mark.parametrize("sign", [inf, -inf])
def test_an_empty_state_is_nothing_whatever_its_output_holds(merge, sign):
    assert merge([nan, nan], sign, [3.0, -0.5], -7.25) == ([3.0, -0.5], -7.25)
    assert merge([3.0, -0.5], 7.25, [inf, nan], sign) == ([3.0, -0.5], 7.25)


@pytest.mark.parametrize("signs", [(inf, inf), (inf, -inf), (-inf, inf), (-inf, -inf)])
def test_two_empty_states_are_an_empty_one(merge, signs):
    assert merge([nan, 3.0], signs[0], [nan, 5.0], signs[1]) == ([0.0, 0.0], -inf)


def test_nan_in_an_lse_is_handed_on(merge):
    out, lse = merge([1.0], nan, [3.0], 0.0)
    assert isnan(out[0])
    assert isnan(lse)


# ---- what it means -------------------------------------------------------------------------------


def state(logits, values):
    """Attention with these logits [n] and values [n, V]: out [1, 1, V] and LSE [1, 1]."""
    weights = torch.softmax(logits.double(), 0)
    lse = torch.logsumexp(logits.double(), 0)
    return (weights @ values.double()).float().view(1, 1, -1), lse.float().view(1, 1)


def test_states_of_parts_merged_one_after_another_in_place_are_the_state_of_all_keys(launch):
    generator = torch.Generator().manual_seed(1)
    logits, values = torch.randn(40, generator=generator) * 3, torch.randn(40, 24, generator=generator)
    # The third part has no key.
    parts = [slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 40)]
    out, lse = state(logits[parts[0]], values[parts[0]])
    for part in parts[1:]:
        if part.start == part.stop:
            nothing = (torch.full((1, 1, 24), nan), torch.full((1, 1), -inf))
        else:
            nothing = state(logits[part], values[part])
        out, lse = launch(out, lse, *nothing, out=out)
    whole, whole_lse = state(logits, values)
    assert torch.allclose(out, whole, rtol=1e-5, atol=1e-6)
    assert torch.allclose(lse, whole_lse, rtol=1e-6)


def some_states(tokens=5, heads=3, width=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(tokens, heads, width, generator=generator).to(dtype) for _ in range(2)]
    lses = [torch.randn(tokens, heads, generator=generator) * 3 for _ in range(2)]
    lses[0][1, 0], lses[1][2, 1] = -inf, inf
    outs[0][1, 0] = outs[1][2, 1] = nan
    return outs[0], lses[0], outs[1], lses[1]


def truth_of(tensors):
    return oracle_for("merge_states", "definition").run(dict(zip(NAMES, tensors, strict=True)))


def is_within_bounds(tensors, out, lse):
    truth = truth_of(tensors)
    for name, got in (("out", out), ("lse", lse)):
        error = torch.where(got == truth[name], 0.0, (got.double() - truth[name]).abs())
        if not bool((error <= merge_budgets(truth[name], truth[f"{name}_terms"], got.dtype)).all()):
            return False
    return True


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("of", [0, 2])
def test_the_result_may_stand_in_the_place_of_a_state(launch, dtype, of):
    tensors = some_states(dtype=dtype)
    apart = launch(*tensors)
    assert is_within_bounds(tensors, *apart)
    copies = [tensor.clone() for tensor in tensors]
    in_place = launch(*copies, out=copies[of])
    assert torch.equal(in_place[0], apart[0])
    assert torch.equal(in_place[1], apart[1])


def test_states_may_change_places(launch):
    tensors = some_states()
    there, back = launch(*tensors), launch(*tensors[2:], *tensors[:2])
    assert is_within_bounds(tensors, *back)
    assert torch.equal(there[1], back[1])


# ---- addresses -----------------------------------------------------------------------------------


def moved(tensor, offset, gap):
    """A copy `offset` elements behind an aligned address, with `gap` elements between its rows."""
    *rows, width = tensor.shape
    count = 1
    for size in rows:
        count *= size
    flat = torch.zeros(offset + count * (width + gap), dtype=tensor.dtype)
    copy = flat[offset:].view(*rows, width + gap)[..., :width]
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("place", [(0, 0), (8, 8), (4, 4), (2, 2), (1, 0), (0, 1), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_states_lie_at_any_address(launch, place, dtype):
    tensors = some_states(dtype=dtype)
    expected = launch(*tensors)
    out = moved(torch.full_like(tensors[0], nan), *place)
    got = launch(*(moved(tensor, *place) for tensor in tensors), out=out)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ["prefix_out", "suffix_out", "out"])
def test_tokens_beyond_the_2_to_the_31st_element_are_found(launch, name):
    tensors = some_states(dtype=torch.bfloat16)
    expected = launch(*tensors)[0]
    dense, stride = tensors[0], 2**31 // 3
    # Never real but where a token lies.
    far = torch.empty(5 * stride, dtype=dense.dtype).as_strided(dense.shape, (stride, dense.stride(1), 1))
    if name == "out":
        got = launch(*tensors, out=far)[0]
    else:
        states = [
            far.copy_(tensors[NAMES.index(name)]) if name == own else tensor
            for own, tensor in zip(NAMES, tensors, strict=True)
        ]
        got = launch(*states)[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("tokens", "heads"), [(0, 3), (5, 0)])
def test_no_state_is_no_launch(launch, tokens, heads):
    out, lse = launch(*(torch.zeros(shape) for shape in ((tokens, heads, 8), (tokens, heads)) * 2))
    assert out.shape == (tokens, heads, 8)
    assert lse.shape == (tokens, heads)


def test_lses_of_another_layout_are_refused_in_cuda(request):
    run = kernel(request, "cuda")
    tensors = list(some_states())
    tensors[3] = tensors[3].T.contiguous()
    with pytest.raises(ValueError, match=r"suffix_lse must be \[5, 3\], got \[3, 5\]"):
        run(dict(zip(NAMES, tensors, strict=True)), torch.empty(5, 3, 24), torch.empty(5, 3))


# ---- the data ------------------------------------------------------------------------------------


def states_of(text):
    case = parse(text)
    batch = materialise(case, contract_of(case), torch.device("cpu"))
    return batch.layers[0].tensors


def lses_of(mode, rows="hit:70+300", more=""):
    tensors = states_of(f"merge_states/{rows}/heads=8,data={mode}{more}")
    return tensors["prefix_lse"].double(), tensors["suffix_lse"].double()


def gaps_of(mode):
    prefix, suffix = lses_of(mode)
    both = prefix.isfinite() & suffix.isfinite()
    return (prefix - suffix)[both], suffix[both]


@pytest.mark.parametrize("mode", ["planted", "randn", "peaked", "huge", "deep", "tiny"])
def test_some_states_of_tokens_with_a_history_are_empty_by_either_sign(mode):
    prefix, suffix = lses_of(mode)
    no_prefix, no_suffix = prefix.isinf(), suffix.isinf()
    assert 0.1 < float((no_prefix & ~no_suffix).double().mean()) < 0.15
    assert 0.1 < float((no_suffix & ~no_prefix).double().mean()) < 0.15
    assert 0.03 < float((no_prefix & no_suffix).double().mean()) < 0.09
    for lses in (prefix, suffix):
        assert {inf, -inf} <= set(lses.flatten().tolist())
    # Of one head and not of the next.
    assert bool((no_prefix.any(1) & ~no_prefix.all(1)).any())


def test_what_is_not_cached_is_no_prefix_and_padding_has_no_key():
    prefix, suffix = lses_of("planted", "prefill:9,decode:20,pad:3")
    assert bool(prefix[:9].isinf().all())
    assert bool(suffix[:9].isfinite().any())
    assert bool((prefix[10:] == -inf).all())
    assert bool((suffix[10:] == -inf).all())


def test_flat_states_are_equal_and_none_is_empty_but_of_first_chunks():
    prefix, suffix = lses_of("flat", "hit:70+9,prefill:5")
    assert torch.equal(prefix[:9], suffix[:9])
    assert bool(prefix[:9].isfinite().all())
    assert bool(prefix[9:].isinf().all())
    assert bool(suffix.isfinite().all())


def test_planted_states_both_count_and_some_are_equal():
    gaps, suffix = gaps_of("planted")
    assert float(gaps.abs().max()) <= 4
    assert 0.08 < float((gaps == 0).double().mean()) < 0.18
    assert float(suffix.min()) < -3
    assert float(suffix.max()) > 11


def test_one_of_two_peaked_states_is_far_below_a_rounding():
    gaps, _ = gaps_of("peaked")
    assert float(gaps.abs().min()) >= 21
    assert 0.4 < float((gaps > 0).double().mean()) < 0.6


def test_exponents_of_huge_states_overflow_and_underflow_near_and_far_apart():
    gaps, suffix = gaps_of("huge")
    assert float(suffix.min()) < -200
    assert float(suffix.max()) > 200
    assert float((gaps.abs() <= 4).double().mean()) > 0.4
    assert float((gaps.abs() > 88).double().mean()) > 0.2


def test_deep_states_lie_below_stand_ins_for_minus_infinity_and_both_count():
    gaps, suffix = gaps_of("deep")
    assert float(suffix.max()) < -50000
    assert float(gaps.abs().max()) <= 4.01
    assert bool((gaps == 0).any())


@pytest.mark.parametrize("poison", ["nan", "finite", "zero"])
def test_an_empty_state_holds_the_poison_that_the_case_asks_for(poison):
    tensors = states_of(f"merge_states/hit:70+9,prefill:2,pad:2/heads=8,poison={poison}")
    for part in ("prefix", "suffix"):
        out, empty = tensors[f"{part}_out"], tensors[f"{part}_lse"].isinf()
        held = out[:11][empty[:11]].float()
        assert len(held)
        expected = {"nan": nan, "finite": FINITE_POISON, "zero": 0.0}[poison]
        assert torch.equal(held.isnan(), torch.full_like(held, poison == "nan", dtype=torch.bool))
        assert poison == "nan" or bool((held == expected).all())
        assert bool(out[:11][~empty[:11]].isfinite().all())
        integer, bits = PADDING_NAN[out.dtype]
        assert bool((out[11:].contiguous().view(integer) == bits).all())


def test_both_states_are_of_the_same_position_and_of_other_values():
    tensors = states_of("merge_states/hit:70+9/heads=4,data=flat")
    assert not torch.equal(tensors["prefix_out"], tensors["suffix_out"])
    planted = states_of("merge_states/hit:70+20/heads=4")
    both = planted["prefix_lse"].isfinite() & planted["suffix_lse"].isfinite()
    prefix, suffix = planted["prefix_out"][both], planted["suffix_out"][both]
    assert torch.equal(prefix[:, -16:], suffix[:, -16:])
    assert not torch.equal(prefix[:, :16], suffix[:, :16])


# ---- the bound -----------------------------------------------------------------------------------


def test_a_bound_is_sixteen_roundings_of_the_terms_and_one_of_the_result():
    one = torch.ones(1, dtype=torch.float64)
    assert float(merge_budgets(one, 2 * one, torch.bfloat16)) == pytest.approx(32 * U + 2.0**-8, rel=1e-9)
    assert float(merge_budgets(one, 2 * one, torch.float16)) == pytest.approx(32 * U + 2.0**-11, rel=1e-9)
    assert float(merge_budgets(one, 2 * one, torch.float32)) == pytest.approx(33 * U, rel=1e-6)
    assert float(merge_budgets(one * -inf, 0 * one, torch.float32)) == 0
    assert merge_budget_source(torch.bfloat16).endswith("one of the result to bfloat16")


@pytest.mark.parametrize("mode", ["planted", "randn", "flat", "peaked", "huge", "deep", "tiny"])
@pytest.mark.parametrize("name", DTYPES)
def test_one_rounding_keeps_the_bound_and_two_do_not(name, mode):
    dtype = DTYPES[name]
    tensors = states_of(f"merge_states/hit:70+30/heads=8,dtype={name},data={mode}")
    truth = oracle_for("merge_states", "definition").run(tensors)
    emulated = oracle_for("merge_states", "definition").run(tensors, Precision(dtype, dtype))
    for output, stored in (("out", dtype), ("lse", torch.float32)):
        budget = merge_budgets(truth[output], truth[f"{output}_terms"], stored)
        error = torch.where(emulated[output] == truth[output], 0.0, (emulated[output] - truth[output]).abs())
        assert bool((error <= budget).all())
    if name != "fp32" and mode not in ("peaked", "flat"):
        # The products, rounded before they are added: halves of numbers need none, and none is what is left
        # of a state far below the other.
        logs = [tensors[f"{part}_lse"].double() for part in ("prefix", "suffix")]
        both = logs[0].isfinite() & logs[1].isfinite()
        shares = torch.softmax(torch.stack(logs), 0)
        parts = [tensors[f"{part}_out"].double() for part in ("prefix", "suffix")]
        twice = sum(
            (share.unsqueeze(-1) * part).to(dtype).double() for share, part in zip(shares, parts, strict=True)
        )
        error = (twice.to(dtype).double() - truth["out"]).abs()
        assert bool((error > merge_budgets(truth["out"], truth["out_terms"], dtype))[both].any())


def test_an_lse_off_by_a_thousandth_is_over_its_bound(request):
    case = parse("merge_states/hit:70+5/heads=4")
    path = next(iter(import_module("harness.paths.triton.merge_states").PATHS))
    launched = Launch.prepare(case, path, lanes()["interpreted"])
    launched.run()
    values = checks()["values"].run
    assert {result.status for result in values(launched)} == {Status.PASSED}
    place = tuple(launched.layers[0].outputs["lse"].view.isfinite().nonzero()[0].tolist())
    launched.layers[0].outputs["lse"].view[place] += 1e-3
    by_tensor = {result.tensor: result for result in values(launched)}
    assert by_tensor["out"].status is Status.PASSED
    failed = by_tensor["lse"]
    assert failed.status is Status.FAILED
    assert failed.worst.index == place
    assert failed.reason.startswith("1 of 20 elements of lse are over budget, the worst by ")
    assert failed.where.tokens == str(place[0])
    assert failed.where.heads == str(place[1])


def test_where_both_states_are_empty_the_result_is_exact():
    case = parse("merge_states/pad:2/heads=4")
    path = next(iter(import_module("harness.paths.triton.merge_states").PATHS))
    launched = Launch.prepare(case, path, lanes()["interpreted"])
    launched.run()
    launched.layers[0].outputs["out"].view[1, 2, 3] = 1e-30
    failed = next(result for result in checks()["values"].run(launched) if result.tensor == "out")
    assert failed.status is Status.FAILED
    assert failed.budget_source == "both states are empty here: it must be exact"


# ---- the contract --------------------------------------------------------------------------------


def test_the_least_work_reads_no_state_that_a_row_leaves_empty():
    case = parse("merge_states/hit:6+4,prefill:3,decode:9,idle,pad:2/heads=2,v_dim=64")
    # Two states of five tokens, one of three; ten outputs, three LSEs each.
    elements = (5 * 2 + 3 + 10) * 2 * 64
    assert OPERATOR.work(case, case.layers[0]).bytes == elements * 2 + 3 * 10 * 2 * 4
    assert OPERATOR.work(case, case.layers[0]).flops == 3 * 10 * 2 * 64
    assert operators()["merge_states"] is OPERATOR


def test_heads_that_step_by_whole_words_need_not_be_as_wide(launch):
    tensors = some_states(width=20, dtype=torch.bfloat16)
    out = moved(torch.full_like(tensors[0], nan), 0, 12)
    moved_states = [moved(tensor, 0, 12) if tensor.dim() == 3 else tensor for tensor in tensors]
    assert torch.equal(launch(*moved_states, out=out)[0], launch(*tensors)[0])


def test_a_width_may_be_any(launch):
    for width in (1, 7, 100, 1100):
        tensors = some_states(width=width, dtype=torch.bfloat16)
        assert is_within_bounds(tensors, *launch(*tensors))
