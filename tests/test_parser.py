"""Text -> case: what is read, what is refused and where, and that nothing else ever happens."""

import pickle
import re
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, CaseError, Kind, Options, Row, parse
from cases.case import MAX_SLOTS
from cases.models import model_names
from cases.options import specs
from cases.strategies import cases

LONG = "9" * 5000

# Reason -> texts with that fault. The offending part stands between « and »: where it is empty, the
# character in its place, and nothing at the end of the text.
REFUSED = {
    "a case is operator/rows/options, and here is no '/'": [
        "«»",
        "«mla_decode»",
        "«mla_decode:decode=1»",
        "«..»",
    ],
    "a case has at most two '/'": [
        "mla_decode/decode:1/heads=2/«seed=3»",
        "mla_decode/decode:1/heads=2/«»",
    ],
    "an operator is a lower-case name like mla_decode": [
        "«/»decode:1",
        "«MLA_decode»/decode:1",
        "«9mla»/decode:1",
        "« mla_decode»/decode:1",
        "«mla_decode\n»/decode:1",
        "«mla_décode»/decode:1",
        "«mla-decode»/decode:1",
    ],
    "a row begins with a kind: one of prefill, hit, decode, draft, idle, paused, pad": [
        "mla_decode/«sleep:3»",
        "mla_decode/«Decode:1»",
        "mla_decode/« decode:1»",
        "mla_decode/« »",
        "mla_decode/«:5»",
        "mla_decode/«@»",
        "mla_decode/«.k3»",
        "mla_decode/«+»",
        "mla_decode/«.»",
        "mla_decode/«x2»",
        "mla_decode/«٣q1»",
        "mla_decode/decode:1,«»",
        "mla_decode/«,»decode:1",
        "mla_decode/decode:1,«,»decode:1",
        "mla_decode/decode:1,«.».idle",
        "mla_decode/decode:1..«.»",
        "mla_decode/idle..idle,«resting»..idle",
        "triton/«mla_decode»/decode:1",
    ],
    "in that order, and this does not fit": [
        "mla_decode/decode:1« »",
        "mla_decode/decode«:»",
        "mla_decode/decode«:-1»",
        "mla_decode/decode«:٣»",
        "mla_decode/decode:1«_000»",
        "mla_decode/decode:1«.5»",
        "mla_decode/hit:5«+»",
        "mla_decode/hit:5+3«+2»",
        "mla_decode/decode:1«x»",
        "mla_decode/decode:1«x-1»",
        "mla_decode/decode:1«X2»",
        "mla_decode/decode:1«@»",
        "mla_decode/decode:1«@Sys»",
        "mla_decode/decode:1«@2»",
        "mla_decode/decode:1@sys«_2»",
        "mla_decode/decode:1«.k»",
        "mla_decode/decode:1«.k-1»",
        "mla_decode/decode:1.k3«.k4»",
        "mla_decode/decode:1.k3«x2»",
        "mla_decode/decode:1.k3«@sys»",
        "mla_decode/idle«d»",
        "mla_decode/decode:1«;idle»",
    ],
    "decode is written decode:C: 1 length, got 0": ["mla_decode/idle,«decode»", "mla_decode/«decodex3»"],
    "decode is written decode:C: 1 length, got 2": ["mla_decode/«decode:5+1»,idle"],
    "hit is written hit:C+N: 2 lengths, got 1": ["mla_decode/«hit:5»"],
    "idle is written idle: 0 lengths, got 1": ["mla_decode/«idle:3x2»"],
    "a count is at least 1 and a step has at most 65,536 rows": [
        "mla_decode/«decode:1x0»",
        f"mla_decode/«idlex{MAX_SLOTS + 1}»",
        f"mla_decode/idlex{MAX_SLOTS},«idle»",
        "mla_decode/idle,«decode:1x999999999999999999»",
    ],
    "pad comes once in a step": ["mla_decode/«pad:4x2»"],
    "pad comes once and last in a step (rule V2)": [
        "mla_decode/decode:1,«pad:4»,pad:4",
        "mla_decode/decode:1..«pad:4»,decode:2",
    ],
    "decode:C needs C between 1 and 2,147,483,647, got 0 (rule V1)": ["mla_decode/decode:5,«decode:0»"],
    "got 2147483648 (rule V1)": ["mla_decode/«prefill:2147483648»", "mla_decode/«hit:2147483648+1»"],
    "C + N must be at most 2,147,483,647 tokens": ["mla_decode/«hit:2147483647+1»"],
    "takes no tag": ["mla_decode/«idle@sys»", "mla_decode/«pad:4@sys»"],
    "takes no data key": ["mla_decode/«idlex2.k1»", "mla_decode/«pad:4.k1»"],
    "a number has at most 18 digits": [
        "mla_decode/decode:«1000000000000000000»",
        f"mla_decode/decode:«{LONG}»",
        f"mla_decode/decode:1x«{LONG}»",
        f"mla_decode/decode:1.k«{LONG}»",
        f"mla_decode/q«{LONG}»",
        f"mla_decode/decode:1/seed=«{LONG}»",
        f"«{LONG}»",
    ],
    "holds 6 tokens after the step before, so C cannot be 9": [
        "mla_step/decode:5x3..decode:6,«decode:9»",
        "mla_step/decode:5x3..decode:6,«decode:9x2»",
        "mla_step/idle..idle,decode:5..prefill:1,«decode:9»",
        "mla_step/decode:5x3..q1s7_«q1s10»_q1s7",
    ],
    "data key 3, got .k4": ["mla_step/decode:5.k3..«decode:6.k4»"],
    "with tag a, got @b": ["mla_step/decode:5@a..«decode:6@b»"],
    "an option is key=value with a key of model, heads, ": [
        "mla_decode/decode:1/«»",
        "mla_decode/decode:1/heads=4,«»",
        "mla_decode/decode:1/«,»heads=4",
        "mla_decode/decode:1/«heads»",
        "mla_decode/decode:1/«Heads=4»",
        "mla_decode/decode:1/«head=4»",
        "mla_decode/decode:1/heads=4,« seed=3»",
        "mla_decode/decode:1/«=4»",
    ],
    "heads is given twice": ["mla_decode/decode:1/heads=4,«heads=4»,seed=3"],
    "heads takes an integer from 1 to 2,147,483,647, got": [
        "mla_decode/decode:1/heads=«»",
        "mla_decode/decode:1/heads=«0»",
        "mla_decode/decode:1/heads=«2147483648»",
        "mla_decode/decode:1/heads=«-4»",
        "mla_decode/decode:1/heads=«4.0»",
        "mla_decode/decode:1/heads=«٣»",
        "mla_decode/decode:1/heads=«4=5»,seed=3",
        "mla_decode/decode:1/layers=2,heads=4+«»",
        "mla_decode/decode:1/layers=2,heads=«x»+4",
    ],
    "layers takes an integer from 1 to 1,000": ["mla_decode/decode:1/layers=«1001»,pool=999"],
    "seed takes an integer from 0 to 999,999,999,999,999,999": ["mla_decode/decode:1/seed=«1+2»"],
    "dtype takes one of bf16, fp16, fp32, got 'bfloat16'": ["mla_decode/decode:1/dtype=«bfloat16»"],
    "tail takes one of huge, -1, 0, nb+7": ["mla_decode/decode:1/tail=«1»"],
    "cache takes one of same, fp8, packed": ["mla_decode/decode:1/layers=2,cache=same+«bf16»"],
    "model takes a name": ["mla_decode//model=«»", "mla_decode//model=«DeepSeek-V3»"],
    f"model takes one of {', '.join(model_names())}": ["mla_decode//heads=4,model=«gpt-2»"],
    "heads has 3 values for 2 layers": ["mla_decode/decode:1/seed=3,«heads=4+8+16»,layers=2"],
    "block has 2 values for 1 layers": ["mla_decode/decode:1/«block=64+64»"],
    "tp=3 does not divide the 128 heads of deepseek-v3": ["mla_decode/decode:1/heads=4,«tp=3»"],
    "the rows need 4 blocks of 64 tokens, got pool=3 (rule V3)": ["mla_decode/decode:64x2/«pool=3»,heads=4"],
}

TOKENS = [
    *(kind.word for kind in Kind),
    *specs(),
    *["mla_decode", "deepseek-v3", "sys", "fp8", "q", "s", "k", ".k", ".k0", "x0", "x-1", "x65536", "x65537"],
    *["/", "..", ".", ",", ",,", ":", "+", "@", "=", "_", "-", " ", "\n", "\0", "A", "é", "٣", "²", "\ud800"],
    *["0", "1", "64", "007", "2147483648", "9" * 18, "9" * 19],
]
ANY_TEXT = st.text(max_size=30) | st.lists(st.sampled_from(TOKENS), max_size=30).map("".join)


@st.composite
def mutated(draw):
    """The text of a case after a few cuts, insertions and repetitions."""
    text = str(draw(cases()))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        part = draw(st.sampled_from(["", text[start:end] * 2, *TOKENS]))
        text = text[:start] + part + text[end:]
    return text


def refusal(text):
    with pytest.raises(CaseError) as caught:
        parse(text)
    return caught.value


@pytest.mark.parametrize(
    ("reason", "marked"),
    [(reason, text) for reason, texts in REFUSED.items() for text in texts],
    ids=lambda text: text[:60],
)
def test_a_refusal_is_one_sentence_and_underlines_the_offending_part(reason, marked):
    before, part, after = re.split("[«»]", marked)
    error = refusal(before + part + after)
    assert error.text[error.start : error.end] == part
    assert error.start == len(before)
    assert reason in error.message
    assert re.fullmatch(r"[a-z].*[^.]", error.message, re.IGNORECASE)
    assert ". " not in error.message


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("mla_decode/", Case("mla_decode")),
        ("mla_decode/..", Case("mla_decode", ((), ()))),
        (
            "mla_decode/hit:64+17x2@sys,pad:4..idle/tp=2,cache=fp8+same,layers=2",
            Case(
                "mla_decode",
                (
                    (
                        Row(Kind.HIT, 64, 17, tag="sys"),
                        Row(Kind.HIT, 64, 17, tag="sys"),
                        Row(Kind.PAD, new=4),
                    ),
                    (Row(Kind.IDLE),),
                ),
                Options(tp=2, cache=("fp8", "same"), layers=2),
            ),
        ),
    ],
)
def test_a_text_is_read_as_steps_of_rows_and_options(text, case):
    assert parse(text) == case


@pytest.mark.parametrize("key", specs())
def test_every_option_can_be_written(key):
    spec = specs()[key]
    values = spec.choices or (("glm-5",) if spec.is_name else (spec.minimum, 2))
    for value in values:
        assert getattr(parse(f"mla_decode//{key}={value}").options, key) in (value, (value,))


def test_the_underline_stands_below_the_offending_part():
    error = refusal("mla_decode/decode:1,sleep:3/heads=4")
    assert str(error).splitlines() == [
        error.message,
        "  mla_decode/decode:1,sleep:3/heads=4",
        "                      ^^^^^^^",
    ]


def test_what_is_missing_at_the_end_is_underlined_behind_it():
    error = refusal("mla_decode/idle,")
    assert (error.start, error.end) == (16, 17)
    assert str(error).endswith("\n  mla_decode/idle,\n                  ^")


def test_characters_that_would_move_the_underline_are_shown_as_one():
    shown = str(refusal("mla_decode/\tdecode:1\n\ud800/seed=1")).splitlines()
    assert shown[1] == "  mla_decode/?decode:1??/seed=1"
    assert shown[2] == "             ^^^^^^^^^^^"


def test_a_refusal_can_be_sent_between_processes():
    error = refusal("mla_decode/sleep:3")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 written just now
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def outcome(text):
    try:
        return parse(text)
    except CaseError as error:
        return error


def check_outcome(text):
    """A text is a case with a text of its own, or is refused at a place within it."""
    found = outcome(text)
    if isinstance(found, Case):
        assert parse(str(found)) == found
        return
    assert found.text == text
    assert 0 <= found.start <= len(text)
    assert found.start < found.end <= max(len(text), found.start + 1)
    assert len(str(found).split("\n")) == 3


# A deadline far beyond what any text takes: what reaches it hangs.
@settings(max_examples=300, deadline=timedelta(seconds=20))
@given(ANY_TEXT)
def test_any_text_is_a_case_or_refused(text):
    check_outcome(text)


@settings(max_examples=300, deadline=timedelta(seconds=20))
@given(ANY_TEXT, ANY_TEXT)
def test_any_rows_and_options_are_a_case_or_refused(rows, options):
    check_outcome(f"mla_decode/{rows}")
    check_outcome(f"mla_decode/decode:1/{options}")


@settings(max_examples=400, deadline=timedelta(seconds=20))
@given(mutated())
def test_a_damaged_case_is_a_case_or_refused(text):
    check_outcome(text)
