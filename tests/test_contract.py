"""The contracts: what a case may ask of an operator, and that every tensor is accounted for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CaseError, parse
from cases.contract import contract_of, operators
from cases.options import specs
from cases.strategies import cases

NAMES = sorted(operators())

# The offending part stands between « and ».
REFUSED = [
    ("«mla_encode»/decode:1/heads=4", "the operators are "),
    ("mla_decode/decode:1«..»decode:2", "mla_decode is judged on one step, got 2"),
    ("mla_decode/decode:1«..»decode:2..idle", "mla_decode is judged on one step, got 3"),
    ("mla_decode/decode:1/heads=4,«window»=128", "mla_decode has no option window: it takes model, heads"),
    ("mla_decode/decode:1/«v_dim»=128,heads=4", "mla_decode has no option v_dim"),
    ("latent_cache_write/decode:1/«splits»=2", "latent_cache_write has no option splits"),
    ("latent_cache_write/decode:1/«heads»=4,kv_heads=4", "latent_cache_write has no option heads"),
    ("latent_cache_write/decode:1/kv_heads=4,«heads»=4", "latent_cache_write has no option heads"),
]


@pytest.mark.parametrize(("marked", "reason"), REFUSED)
def test_what_an_operator_does_not_have_is_refused_and_underlined(marked, reason):
    before, rest = marked.split("«")
    part, after = rest.split("»")
    text = before + part + after
    with pytest.raises(CaseError) as caught:
        contract_of(parse(text), text)
    error = caught.value
    assert error.text == text
    assert (error.start, error.text[error.start : error.end]) == (len(before), part)
    assert reason in error.message


def test_without_a_text_the_canonical_one_is_underlined():
    with pytest.raises(CaseError) as caught:
        contract_of(parse("mla_decode/decode:1,decode:1/seed=0,window=128"))
    assert caught.value.text == "mla_decode/decode:1x2/window=128"


def test_an_option_at_its_default_may_be_stated():
    assert contract_of(parse("latent_cache_write/decode:1/table=given")).name == "latent_cache_write"


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_has_the_name_of_its_file(name):
    assert operators()[name].name == name
    assert contract_of(parse(f"{name}/")) is operators()[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_input_has_a_fill_and_every_output_a_judge(name):
    operator = operators()[name]
    assert operator.inputs
    assert operator.outputs
    assert all(spec.fill is not None for spec in operator.inputs)
    assert all(spec.judge is not None and spec.fill is None for spec in operator.outputs)
    assert all(spec.judge is None for spec in operator.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_named_once_and_described(name):
    operator = operators()[name]
    for tensors in (operator.inputs, operator.outputs):
        assert len({spec.name for spec in tensors}) == len(tensors)
        assert all(spec.doc and spec.axes for spec in tensors)
    for spec in operator.outputs:
        assert operator.output(spec.name) is spec


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_written_in_place_is_the_same_in_and_out(name):
    operator = operators()[name]
    inputs = {spec.name: spec for spec in operator.inputs}
    for tensor in operator.in_place:
        output = operator.output(tensor)
        assert (inputs[tensor].axes, inputs[tensor].dtype) == (output.axes, output.dtype)


def test_a_name_means_the_same_tensor_in_every_operator():
    seen = {}
    for operator in operators().values():
        for spec in operator.inputs:
            # A stack has an axis of layers before it, and one table for all dtypes.
            axes = spec.axes[operator.is_stack and spec.axes[0] == "num_layers" :]
            dtype = "any" if spec.name == "cos_sin_cache" else spec.dtype
            assert seen.setdefault(spec.name, (axes, dtype)) == (axes, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keys_of_the_language_in_its_order(name):
    options = operators()[name].options
    assert options == tuple(key for key in specs() if key in options)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(NAMES).flatmap(cases))
def test_a_drawn_case_of_an_operator_is_one_its_contract_accepts(case):
    assert contract_of(case) is operators()[case.operator]
