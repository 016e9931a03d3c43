"""The suites: every file loads, says why, and holds what it promises; a wrong file is refused by entry."""

import pytest

from cases import Kind
from cases.contract import contract_of, operators
from cases.suite import SuiteError, load_suite, read_suite, suite_names

HEAD = 'summary = "some cases"\n'
ENTRY = '[[entry]]\nwhy = "because"\n'
CASES = 'cases = ["mla_decode/decode:5/heads=4"]\n'
PRODUCT = """operator = "mla_decode"
rows = ["decode:1", "decode:2"]
options = { heads = [4, 8], block = [16, 32, 64] }
"""

# A suite file's text, and the sentence it is refused with.
REFUSED = [
    ("summary = ", "suite s is not TOML: "),
    (HEAD, "suite s has no entry"),
    (ENTRY + CASES, "suite s has no summary"),
    (HEAD + "entry = 3", "suite s: entry is a list, got 3"),
    (HEAD + "entry = [3]", "suite s, entry 1 does not say why it is there"),
    (HEAD + "[[entry]]\n" + CASES, "suite s, entry 1 does not say why it is there"),
    (HEAD + ENTRY + CASES + '[[entry]]\nwhy = ""\n' + CASES, "suite s, entry 2 does not say why it is there"),
    (HEAD + "[[entry]]\nwhy = 3\n" + CASES, "suite s, entry 1: why is a str, got 3"),
    (HEAD + ENTRY, "suite s, entry 1 has no cases"),
    (HEAD + ENTRY + "cases = []", "suite s, entry 1 has no cases"),
    (HEAD + ENTRY + 'cases = "mla_decode/"', "suite s, entry 1: cases is a list, got 'mla_decode/'"),
    (HEAD + ENTRY + "cases = [3]", "suite s, entry 1: cases are texts, got 3"),
    (HEAD + ENTRY + CASES + 'checks = "pages"', "suite s, entry 1: checks is a list, got 'pages'"),
    (HEAD + ENTRY + 'case = ["mla_decode/"]', "suite s, entry 1 has no key 'case': it takes why, cases"),
    (
        HEAD + "[[entries]]\n",
        "suite s has no key 'entries': it takes summary, second_oracle_every, marks, entry",
    ),
    (HEAD + ENTRY + 'rows = ["decode:1"]', "suite s, entry 1 has no operator"),
    (HEAD + ENTRY + 'operator = "mla_decode"\n' + CASES, "suite s, entry 1 has no rows"),
    (HEAD + ENTRY + CASES + "options = { heads = [4] }", "suite s, entry 1 has no operator"),
    (HEAD + ENTRY + CASES + "marks = [3]", "suite s, entry 1: marks are texts, got 3"),
    ("marks = [3]\n" + HEAD + ENTRY + CASES, "suite s: marks are texts, got 3"),
    (HEAD + ENTRY + "schedules = { count = 3 }", "suite s, entry 1, schedules has no steps"),
    (
        HEAD + ENTRY + "schedules = { count = 3, steps = 1, slots = 1, tokens = 0 }",
        "suite s, entry 1, schedules: tokens is at least 1, got 0",
    ),
    (
        HEAD + ENTRY + "schedules = { count = 3, steps = 1, slots = 1, tokens = 9 }",
        "suite s, entry 1 has no operator",
    ),
    (HEAD + ENTRY + PRODUCT + "every = 0", "suite s, entry 1: every is at least 1, got 0"),
    ("second_oracle_every = 0\n" + HEAD + ENTRY + CASES, "suite s: second_oracle_every is at least 1, got 0"),
    (
        HEAD + ENTRY + PRODUCT.replace("[4, 8]", "4"),
        "suite s, entry 1: option heads takes a list of values, got 4",
    ),
    (
        HEAD + ENTRY + PRODUCT.replace("[4, 8]", "[]"),
        "suite s, entry 1: option heads takes a list of values, got []",
    ),
    (
        HEAD + ENTRY + CASES + ENTRY + 'cases = ["mla_decode/sleep"]',
        "suite s, entry 2: a row begins with a kind",
    ),
    (HEAD + ENTRY + PRODUCT.replace("heads", "hands"), "suite s, entry 1: an option is key=value"),
]


def texts(suite):
    return [str(item.case) for item in suite.cases]


@pytest.mark.parametrize("name", suite_names())
def test_every_case_of_a_suite_says_why_and_has_a_contract(name):
    suite = load_suite(name)
    assert suite.summary
    assert suite.cases
    for item in suite.cases:
        assert item.why.strip()
        assert contract_of(item.case).name == item.case.operator


@pytest.mark.parametrize("name", suite_names())
def test_every_check_that_a_suite_asks_for_exists(name):
    from harness.checks import checks

    assert {check for item in load_suite(name).cases for check in item.checks} <= set(checks())


@pytest.mark.parametrize(("name", "least"), [("smoke", 150), ("grid", 3000)])
def test_a_suite_is_as_large_as_promised(name, least):
    assert len(load_suite(name).cases) >= least


def test_smoke_has_every_operator_every_row_kind_and_every_data_mode():
    found = [item.case for item in load_suite("smoke").cases]
    for operator in operators():
        steps = [step for case in found if case.operator == operator for step in case.steps]
        kinds = {row.kind for step in steps for row in step}
        assert kinds == set(Kind)
    assert len({case.options.data for case in found}) == 7
    assert {case.options.dtype for case in found} == {"bf16", "fp16", "fp32"}


def test_an_unknown_suite_is_refused_with_the_known_ones():
    with pytest.raises(SuiteError, match=r"the suites are .*smoke.*, got 'smoek'"):
        load_suite("smoek")


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_a_wrong_file_is_refused_naming_suite_and_entry(text, sentence):
    with pytest.raises(SuiteError) as caught:
        read_suite("s", text)
    assert str(caught.value).startswith(sentence)


def test_a_wrong_case_of_a_suite_is_underlined():
    with pytest.raises(SuiteError) as caught:
        read_suite("s", HEAD + ENTRY + 'cases = ["mla_decode/sleep"]')
    assert str(caught.value).endswith("\n  mla_decode/sleep\n             ^^^^^")


def test_an_entry_without_cases_of_its_own_is_a_product():
    suite = read_suite("s", HEAD + ENTRY + PRODUCT)
    assert len(suite.cases) == 12
    assert texts(suite)[:3] == [
        "mla_decode/decode:1/heads=4,block=16",
        "mla_decode/decode:1/heads=4,block=32",
        "mla_decode/decode:1/heads=4",
    ]
    assert texts(suite)[-1] == "mla_decode/decode:2/heads=8"


def test_an_entry_may_have_a_list_and_a_product():
    suite = read_suite("s", HEAD + ENTRY + CASES + 'operator = "mla_decode"\nrows = ["decode:1"]')
    assert texts(suite) == ["mla_decode/decode:5/heads=4", "mla_decode/decode:1"]


@pytest.mark.parametrize("every", [1, 2, 5, 12, 13])
def test_every_takes_the_first_of_each_so_many(every):
    whole = read_suite("s", HEAD + ENTRY + PRODUCT)
    part = read_suite("s", HEAD + ENTRY + PRODUCT + f"every = {every}")
    assert part.cases == whole.cases[::every]


def test_a_case_listed_twice_keeps_the_first_why_and_has_the_checks_of_both():
    first = ENTRY + CASES + 'checks = ["pages", "repeat"]\n'
    second = '[[entry]]\nwhy = "again"\nchecks = ["repeat", "idle"]\n' + CASES.replace("/heads", "x1/heads")
    (item,) = read_suite("s", HEAD + first + second).cases
    assert (item.why, item.checks) == ("because", ("pages", "repeat", "idle"))


def test_the_second_derivation_judges_every_case_unless_the_suite_says_otherwise():
    assert read_suite("s", HEAD + ENTRY + CASES).second_oracle_every == 1
    assert read_suite("s", "second_oracle_every = 10\n" + HEAD + ENTRY + CASES).second_oracle_every == 10


def test_marks_of_the_suite_and_of_the_entry_add_up():
    text = 'marks = ["mutants"]\n' + HEAD + ENTRY + CASES + 'marks = ["ci"]\n'
    (item,) = read_suite("s", text).cases
    assert item.marks == ("mutants", "ci")


SCHEDULES = 'operator = "mla_step"\nschedules = { count = 3, steps = 4, slots = 2, tokens = 20 }\n'


def test_schedules_take_options_in_turn_and_are_the_same_every_time():
    text = HEAD + ENTRY + SCHEDULES + "options = { block = [16, 32] }"
    cases = [item.case for item in read_suite("s", text).cases]
    assert [case.options.block for case in cases] == [(16,), (32,), (16,)]
    assert [len(case.steps) for case in cases] == [4, 4, 4]
    assert cases == [item.case for item in read_suite("s", text).cases]
    other = text.replace("tokens = 20", "tokens = 20, seed = 2")
    assert not set(cases) & {item.case for item in read_suite("s", other).cases}
