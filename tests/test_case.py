"""A case is its text: one canonical form, read back as the same value."""

import re
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings

from cases import Case, Kind, Options, Row, RuleError, parse
from cases.case import MAX_SLOTS
from cases.options import specs
from cases.strategies import cases, options

EXAMPLE = "mla_decode/decode:63x8,draft:30+5,idle,paused:7,pad:4/model=deepseek-v3,heads=16,block=64,seed=3"
EXAMPLE_OF_STEPS = (
    "mla_step/prefill:130,hit:64+1,hit:1024+24@sys,decode:1100@sys..hit:130+17,decode:65,idle,decode:1101"
    "/model=deepseek-v3,heads=8,layers=4,window=0+128+128+0,block=64+32+32+64"
)

# What is written: what it is printed as.
CANONICAL = {
    EXAMPLE: "mla_decode/decode:63x8,draft:30+5,idle,paused:7,pad:4/heads=16,seed=3",
    EXAMPLE_OF_STEPS: (
        "mla_step/prefill:130,hit:64+1,hit:1024+24@sys,decode:1100@sys..hit:130+17,decode:65,idle,decode:1101"
        "/heads=8,layers=4,block=64+32+32+64,window=0+128+128+0"
    ),
    # Rows.
    "mla_decode/": "mla_decode/",
    "mla_decode/..": "mla_decode/..",
    "mla_decode/decode:63,decode:63,idle/seed=0,heads=16": "mla_decode/decode:63x2,idle/heads=16",
    "mla_decode/idle,idlex3,idlex1": "mla_decode/idlex5",
    "mla_decode/decode:063x02": "mla_decode/decode:63x2",
    "mla_decode/decode:5,idle,decode:5": "mla_decode/decode:5,idle,decode:5",
    "mla_decode/decode:5@a,decode:5@b": "mla_decode/decode:5@a,decode:5@b",
    # Keys and tags.
    "mla_decode/decode:5.k0,decode:5.k1": "mla_decode/decode:5x2",
    "mla_decode/decode:5.k1,decode:5.k0": "mla_decode/decode:5.k1,decode:5.k0",
    "mla_decode/decode:5x3.k1": "mla_decode/decode:5.k1,decode:5,decode:5.k1",
    "mla_decode/idle,decode:5x2.k007": "mla_decode/idle,decode:5x2.k7",
    "mla_step/hit:5+3@a.k9..decode:8@a.k9": "mla_step/hit:5+3@a.k9..decode:8",
    "mla_step/hit:5+3..idle..decode:8.k0": "mla_step/hit:5+3..idle..decode:8",
    # Options.
    "mla_decode//tp=2,seed=3,model=glm-5": "mla_decode//model=glm-5,seed=3,tp=2",
    "mla_decode//strided=1,table=given,poison=nan,tail=huge,pages=shuffled": "mla_decode/",
    "mla_decode//heads=16,layers=2,cache=fp8+fp8": "mla_decode//heads=16,layers=2,cache=fp8",
    "mla_decode//layers=2,window=0+0,block=64+64": "mla_decode//layers=2",
    "mla_decode//layers=2,block=64+32": "mla_decode//layers=2,block=64+32",
    "mla_decode//heads=128": "mla_decode/",
    "mla_decode//heads=16,tp=8": "mla_decode//tp=8",
    "mla_decode//heads=20,model=glm-4.7-flash": "mla_decode//model=glm-4.7-flash",
    "mla_decode//layers=2,heads=128+128": "mla_decode//layers=2",
    "mla_decode//layers=2,heads=128+64": "mla_decode//heads=128+64,layers=2",
}

DEFAULTS = (
    "model=deepseek-v3,heads=,kv_heads=,v_dim=,layers=1,block=64,window=0,dtype=bf16,cache=same,"
    "scale_fmt=fp32,data=planted,seed=0,pool=None,pages=shuffled,tail=huge,poison=nan,strided=1,table=given,splits=None,"
    "tp=1,topk=2048,sink=none"
)


@pytest.mark.parametrize(("written", "printed"), CANONICAL.items())
def test_a_text_has_one_canonical_form(written, printed):
    assert str(parse(written)) == printed
    assert parse(printed) == parse(written)
    assert str(parse(printed)) == printed


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_case_is_read_back_from_its_text(case):
    again = parse(str(case))
    assert again == case
    assert hash(again) == hash(case)
    assert str(again) == str(case)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_canonical_form_says_nothing_that_holds_anyway(case):
    _, steps, *rest = str(case).split("/")
    keys = [option.split("=")[0] for option in ",".join(rest).split(",") if option]
    assert keys == [key for key in specs() if key in keys]
    assert all(getattr(case.options, key) != getattr(Options(), key) for key in keys)
    for step in steps.split(".."):
        rows = [re.sub(r"^([^@.x]*)x[0-9]+", r"\1", row) for row in step.split(",")]
        assert all(row != following for row, following in pairwise(rows))
    for key in keys:
        values = getattr(case.options, key)
        assert not specs()[key].per_layer or len(values) == 1 or len(set(values)) > 1
    for slot, row in enumerate(case.steps[0]):
        assert row.key != slot


@settings(max_examples=100, deadline=None)
@given(cases())
def test_construction_is_idempotent(case):
    again = Case(case.operator, case.steps, case.options)
    assert (again.steps, again.options) == (case.steps, case.options)


def test_defaults_are_frozen():
    # Changing one changes what existing texts mean: a breaking release.
    written = (
        f"{key}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in vars(Options()).items()
    )
    assert ",".join(written) == DEFAULTS


def test_a_case_is_frozen_and_hashable():
    case = parse(EXAMPLE)
    assert {case: 1}[parse(str(case))] == 1
    for name in ("operator", "steps", "options"):
        with pytest.raises(FrozenInstanceError):
            setattr(case, name, getattr(case, name))
    with pytest.raises(FrozenInstanceError):
        case.options.seed = 1


def test_steps_may_be_given_as_lists():
    case = Case("mla_decode", [[Row(Kind.DECODE, 63), Row(Kind.IDLE)]])
    assert case == parse("mla_decode/decode:63,idle")
    assert hash(case) == hash(parse("mla_decode/decode:63,idle"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": (0,)}, "heads takes an integer from 1"),
        ({"heads": (4, "x"), "layers": 2}, "got 'x'"),
        ({"block": ()}, "block has 0 values for 1 layers"),
        ({"seed": -1}, "seed takes an integer from 0"),
        ({"seed": 10**18}, "seed takes an integer from 0"),
        ({"strided": 0}, "strided takes one of 0, 1, got 0"),
        ({"dtype": "int8"}, "dtype takes one of bf16, fp16, fp32"),
        ({"model": "gpt-2"}, "model takes one of deepseek-v2"),
        ({"model": "a/b"}, "model takes a name"),
        ({"layers": None}, "layers takes an integer"),
        ({"tp": 3}, "tp=3 does not divide"),
    ],
)
def test_options_that_no_text_gives_are_refused(options, reason):
    with pytest.raises(RuleError, match=reason) as caught:
        Case("mla_decode", options=Options(**options))
    assert caught.value.option in options


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("MLA",), "an operator is a lower-case name like mla_decode, got 'MLA'"),
        (("mla_decode", ()), "a case has at least one step"),
        (("mla_decode", ((Row(Kind.IDLE),) * (MAX_SLOTS + 1),)), "a step has at most 65,536 rows"),
        (("mla_decode", ((Row(Kind.PAD, new=1), Row(Kind.IDLE)),)), "pad comes once and last"),
    ],
)
def test_a_case_that_no_text_gives_is_refused(arguments, reason):
    with pytest.raises(RuleError, match=reason):
        Case(*arguments)


def test_other_options_leave_the_steps():
    case = parse(EXAMPLE_OF_STEPS)
    changed = case.with_options(seed=7, dtype="fp16", window=(0,))
    assert changed.steps == case.steps
    assert changed.options == replace(case.options, seed=7, dtype="fp16", window=(0,))
    assert changed.with_options(seed=0, dtype="bf16", window=(0, 128, 128, 0)) == case


def test_other_options_are_checked():
    with pytest.raises(RuleError, match="block has 4 values for 2 layers"):
        parse(EXAMPLE_OF_STEPS).with_options(layers=2)


def test_one_layer_has_the_values_of_that_layer():
    case = parse("mla_step/decode:63/heads=8,layers=3,block=64+32+16,window=0+128+0")
    texts = [str(case.one_layer(index)) for index in range(3)]
    assert texts == [
        "mla_step/decode:63/heads=8",
        "mla_step/decode:63/heads=8,block=32,window=128",
        "mla_step/decode:63/heads=8,block=16",
    ]


def test_there_is_no_layer_beyond_the_last():
    with pytest.raises(IndexError):
        parse("mla_step/decode:63/layers=2,heads=4+8").one_layer(2)


@settings(max_examples=50, deadline=None)
@given(options())
def test_a_layer_alone_is_the_layer_of_the_stack(drawn):
    case = Case("mla_step", options=replace(drawn, pool=None))
    assert [layer.index for layer in case.layers] == list(range(drawn.layers))
    for layer in case.layers:
        (alone,) = case.one_layer(layer.index).layers
        assert replace(alone, index=layer.index) == layer


def test_heads_are_the_models_over_tp_unless_stated():
    def heads(text):
        return [layer.num_attention_heads for layer in parse(f"mla_decode//{text}").layers]

    assert heads("layers=2") == [128, 128]
    assert heads("model=glm-4.7-flash,tp=4") == [5]
    assert heads("heads=7,tp=4") == [7]
    assert heads("layers=2,heads=7+9") == [7, 9]
