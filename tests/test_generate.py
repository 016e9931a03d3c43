"""Generated mutants: what each operator makes of sources small enough to be read at a glance."""

import ast
import re
from pathlib import Path

import pytest

from harness.mutation.generate import generate

ROOT = Path(__file__).resolve().parent.parent
PATH_FILES = sorted(ROOT.glob("harness/paths/triton/[!_]*.py"))
# A path may be composed of others' launchers and hold no kernel.
KERNEL_FILES = [file for file in PATH_FILES if "@triton.jit" in file.read_text(encoding="utf-8")]
PLANNERS = ("supports", "workspace", "partial_results", "tile_for", "programs_of")

HEAD = '"""A file of kernels."""\n\n\n@triton.jit\ndef kernel(a, b, c, m, p):\n'


def source(*lines):
    """A file with one kernel of these lines, the first in line 6."""
    return HEAD + "".join(f"    {line}\n" for line in lines)


def changes(*lines):
    """(old, new) of every mutant of that kernel, stripped."""
    mutants = generate("k.py", source(*lines))
    return [(mutant.old.strip(), mutant.new.strip()) for mutant in mutants]


def news(*lines):
    return {new for _, new in changes(*lines)}


@pytest.mark.parametrize("operator", ["+", "-", "*", "/", "//", "%", "<<", ">>", "&", "|"])
def test_an_arithmetic_operator_becomes_another_and_its_operands_stay(operator):
    ((old, new),) = changes(f"return a {operator} b")
    assert old == f"return a {operator} b"
    found = re.fullmatch(r"return a (\S+) b", new)
    assert found
    assert found[1] in {"+", "-", "*", "/", "//", "%", "<<", ">>", "&", "|"} - {operator}


def test_every_operator_of_a_sum_is_changed_alone():
    assert news("return a + b - c") == {"return a - b - c", "return a + b + c"}


def test_the_operator_between_parentheses_is_found():
    assert news("return (a + b) * (a + c)") == {
        "return (a - b) * (a + c)",
        "return (a + b) + (a + c)",
        "return (a + b) * (a - c)",
    }


def test_an_operator_in_a_comment_is_not_the_operator():
    lines = ("return (", "    a  # not a + b", "    + m", ")")
    changed = [mutant.applied(source(*lines)) for mutant in generate("k.py", source(*lines))]
    assert len(changed) == 1
    assert ast.dump(ast.parse(changed[0])) != ast.dump(ast.parse(source(*lines)))


@pytest.mark.parametrize(
    ("operator", "boundary", "negation"),
    [("<", "<=", ">="), ("<=", "<", ">"), (">", ">=", "<="), (">=", ">", "<")],
)
def test_a_comparison_moves_its_boundary_and_is_negated(operator, boundary, negation):
    assert news(f"return a {operator} b") == {f"return a {boundary} b", f"return a {negation} b"}


@pytest.mark.parametrize(("operator", "negation"), [("==", "!="), ("!=", "==")])
def test_an_equality_is_negated(operator, negation):
    assert news(f"return a {operator} b") == {f"return a {negation} b"}


@pytest.mark.parametrize(
    "literal", ["0", "1", "2", "-1", "-2", "64", "0.0", "1.0", "-1.0", "0.5", "-5.0e4", "True", "False"]
)
def test_a_constant_becomes_another_of_its_type(literal):
    ((_, new),) = changes(f"return {literal}")
    before, after = ast.literal_eval(literal), ast.literal_eval(new.removeprefix("return "))
    assert after != before
    assert type(after) is type(before)


def test_an_offset_or_an_axis_of_one_becomes_zero():
    assert "x = a + 0" in news("x = a + 1")
    assert "x = tl.arange(0, 0)" in news("x = tl.arange(0, 1)")
    assert {"x = tl.cumsum(a, 0)", "x = tl.cumsum(1, a)"} == news("x = tl.cumsum(a, 1)")


def test_minus_infinity_becomes_a_finite_number():
    ((_, new),) = changes('return float("-inf")')
    assert abs(ast.literal_eval(new.removeprefix("return "))) < 1e30


def test_a_conversion_of_a_name_is_not_a_constant():
    assert changes("return float(a)") == []


@pytest.mark.parametrize("literal", ['"bf16"', "None", "a", "a.b", "-a", "a[b]"])
def test_texts_and_names_are_not_constants(literal):
    assert changes(f"return {literal}") == []


@pytest.mark.parametrize("literal", ["not True", "not False", "not 1", 'float("0")'])
def test_a_constant_of_another_kind_is_left_alone(literal):
    assert changes(f"return {literal}") == []


def test_a_negative_constant_is_one_constant():
    assert len(changes("return -3")) == 1


def test_a_mask_goes_with_its_other():
    found = news("return tl.load(p, mask=m, other=0.0)")
    assert "return tl.load(p)" in found
    assert "return tl.load(p, other=0.0)" not in found
    assert "return tl.load(p, mask=m)" not in found


def test_the_mask_of_a_store_goes_and_its_other_arguments_stay():
    assert news('tl.store(p, a, mask=m, cache_modifier=".cs")') == {
        'tl.store(p, a, cache_modifier=".cs")',
        'tl.store(a, p, mask=m, cache_modifier=".cs")',
        "pass",
    }


def test_a_mask_over_several_lines_with_comments_goes():
    text = source("x = tl.load(", "    p,  # where", "    mask=m,", "    other=0.0,", "    volatile=c,", ")")
    calls = [
        ast.unparse(ast.parse(mutant.applied(text)).body[-1].body[0].value)
        for mutant in generate("k.py", text)
    ]
    assert len(calls) == 2
    assert "tl.load(p, volatile=c)" in calls


def test_another_call_s_other_is_left_when_a_mask_goes():
    found = news("return tl.load(tl.load(p, mask=a, other=0), mask=b, other=0.0)")
    assert "return tl.load(tl.load(p, mask=a, other=0))" in found
    assert "return tl.load(tl.load(p), mask=b, other=0.0)" in found


@pytest.mark.parametrize("value", ["0.0", "-1", "0", 'float("-inf")'])
def test_what_masked_lanes_read_becomes_another_number(value):
    found = news(f"return tl.load(p, mask=m, other={value})") - {"return tl.load(p)"}
    (changed,) = found
    other = re.fullmatch(r"return tl\.load\(p, mask=m, other=(\S+)\)", changed)
    assert other
    assert abs(ast.literal_eval(other[1])) < 1e30
    assert other[1] != value


def test_what_nobody_reads_without_a_mask_stays():
    assert news("return tl.load(p, other=0.0)") == set()
    assert news("return tl.load(p, other=tl.load(a, other=1))") == set()


def test_parentheses_in_comments_are_not_an_argument_s():
    lines = ("x = f(", "    a,  # (", "    b", ")")
    (mutant,) = generate("k.py", source(*lines))
    assert ast.unparse(ast.parse(mutant.applied(source(*lines))).body[-1].body[0]) == "x = f(b, a)"


def test_only_neighbouring_arguments_trade_places():
    assert news("return f(a, b, c)") == {"return f(b, a, c)", "return f(a, c, b)"}


def test_arguments_that_trade_places_keep_their_parentheses():
    assert "return f(c, (a + b))" in news("return f((a + b), c)")
    assert "return f(((a + b)), c)" in news("return f(c, ((a + b)))")
    assert "return f(c, (a + b) * m)" in news("return f((a + b) * m, c)")
    assert "return f(c, (a, b))" in news("return f((a, b), c)")


def test_equal_arguments_do_not_trade_places():
    assert changes("return f(a, a)") == []


def test_keywords_and_starred_arguments_stay_in_place():
    assert changes("return f(*a, b)") == []
    assert changes("return f(b, *a)") == []
    assert changes("return f(a, k=b, l=c)") == []


@pytest.mark.parametrize("name", ["tl.maximum", "tl.minimum", "max", "min"])
def test_arguments_of_a_symmetric_function_stay_in_place(name):
    assert not any("(b, a)" in new for new in news(f"return {name}(a, b)"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.maximum(a, b)", "tl.minimum(a, b)"),
        ("tl.minimum(a, b)", "tl.maximum(a, b)"),
        ("tl.max(a, b)", "tl.min(a, b)"),
        ("min(a, b)", "max(a, b)"),
        ("tl.exp2(a)", "tl.exp(a)"),
        ("tl.exp(a)", "tl.exp2(a)"),
        ("tl.log(a)", "tl.log2(a)"),
        ("tl.log2(a)", "tl.log(a)"),
    ],
)
def test_a_function_becomes_its_counterpart(old, new):
    assert changes(f"return {old}") == [(f"return {old}", f"return {new}")]


def test_a_sum_becomes_another_reduction():
    ((_, new),) = changes("return tl.sum(a)")
    assert new in {"return tl.max(a)", "return tl.min(a)"}


def test_a_name_that_only_contains_a_function_s_stays():
    assert changes("return tl.maxnum(a)") == []
    assert changes("return tl.exp2") == []


def test_a_division_that_rounds_up_rounds_down_instead():
    found = {new.removeprefix("return ") for new in news("return 10 * triton.cdiv(a + 1, b - 1)")}
    (rounded,) = [text for text in found if "cdiv" not in text]
    assert eval(rounded, {"a": 6, "b": 4}) == 20  # noqa: S307 10 * ((6 + 1) // (4 - 1))


def test_a_selection_becomes_each_of_its_values():
    found = {new.removeprefix("return ") for new in news("return 2 * tl.where(c, a + b, p)")}
    names = {"a": 1, "b": 2, "p": 5}
    selected = [eval(text, names) for text in found if "where" not in text]  # noqa: S307
    assert sorted(selected) == [6, 10]
    assert "2 * tl.where(a + b, c, p)" in found
    assert "2 * tl.where(c, p, a + b)" in found


def test_a_cast_is_dropped():
    assert "return a + b" in news("return a.to(tl.float32) + b")
    assert "return (a + b) * c" in news("return (a + b).to(p.dtype.element_ty) * c")


def test_a_condition_becomes_true_and_false():
    found = changes("if a:", "    return b")
    assert found == [("if a:", "if False:"), ("if a:", "if True:")]


def test_the_second_condition_of_a_chain_becomes_true_and_false():
    found = news("if a:", "    return b", "elif c:", "    return m")
    assert found == {"if True:", "if False:", "elif True:", "elif False:"}


def test_a_call_whose_result_nobody_uses_is_left_out():
    assert news("f(a)") == {"pass"}


def test_the_only_statement_of_a_block_can_be_left_out():
    lines = ("if a:", "    f(b)", "return c")
    for mutant in generate("k.py", source(*lines)):
        ast.parse(mutant.applied(source(*lines)))
    assert "pass" in news(*lines)


def test_a_new_value_is_left_out_but_not_the_first():
    assert changes("x = a", "return x") == []
    mutants = generate("k.py", source("x = a", "x = b", "return x"))
    assert [mutant.applied(source("x = a", "x = b", "return x")) for mutant in mutants] == [
        source("x = a", "pass", "return x")
    ]


def test_a_new_value_within_a_loop_is_left_out():
    found = changes("x = a", "for i in b:", "    x = i", "return x")
    assert found == [("x = i", "pass")]


def test_a_new_value_of_an_argument_is_left_out():
    assert changes("a = b", "return a") == [("a = b", "pass")]


def test_an_update_in_place_is_left_out():
    assert ("a += b", "pass") in changes("a += b")


@pytest.mark.parametrize("line", ["return a", "break", "x = f(a)", "x, y = a", "x: tl.constexpr = a"])
def test_nothing_else_is_left_out(line):
    assert "pass" not in news("for i in c:", f"    {line}")


OUTSIDE = '''"""A file's docstring: 1 + 1 < 2."""

import functools

LOG2_E = 1.4 + 0.04


@dataclass(frozen=True)
class Tile:
    """A tile."""

    heads: int = 16 * 4


@functools.cache
def plan(tokens, heads=16 + 1):
    """Plans: 1 + 1."""
    if tokens > 2 * heads:
        return max(tokens - 1, 0)
    return triton.cdiv(tokens, 64)


@triton.jit(do_not_specialize=["n" * 1], debug=0 < 1)
def kernel(x, WIDTH: tl.constexpr = 8 * 2) -> 1 + 1:
    """Doubles: 1 + 1 < 3."""
    HALF: tl.constexpr[2 + 2] = WIDTH // p
    return HALF


def launch(x, grid=2 * 3):
    """Launches: 1 + 1."""
    kernel[grid](x)


def run(inputs, outputs, workspace):
    """The path: 1 + 1."""
    launch(inputs[1 + 1], outputs)
'''


def test_nothing_outside_kernels_and_launchers_is_mutated():
    found = {(mutant.old, mutant.line(OUTSIDE)) for mutant in generate("k.py", OUTSIDE)}
    lines = OUTSIDE.splitlines()
    half, call = "    HALF: tl.constexpr[2 + 2] = WIDTH // p", "    kernel[grid](x)"
    assert found == {(line, lines.index(line) + 1) for line in (half, call)}


def test_annotations_within_a_kernel_are_not_mutated():
    (found,) = {mutant.new for mutant in generate("k.py", OUTSIDE) if "HALF" in mutant.old}
    assert found.startswith("    HALF: tl.constexpr[2 + 2] = WIDTH ")


@pytest.mark.parametrize("decorator", ["triton.jit", "jit", "triton.jit(do_not_specialize=['n'])"])
def test_a_decorated_function_is_a_kernel(decorator):
    text = f"import triton\n\n\n@{decorator}\ndef kernel(n):\n    return n + m\n"
    assert len(generate("k.py", text)) == 1


def test_a_function_that_only_calls_is_no_launcher():
    assert generate("k.py", "import triton\n\n\ndef run(x):\n    launch(x + 1)\n    table[0]\n") == ()


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("\u00e9", id="two bytes"),
        pytest.param("\u2192", id="three bytes"),
        pytest.param("\U0001d6fc", id="four bytes"),
        pytest.param("\x0c", id="form feed"),
        pytest.param("\u2028", id="line separator"),
        pytest.param("\x85", id="next line"),
    ],
)
@pytest.mark.parametrize("place", ["docstring", "same line", "comment"])
def test_characters_before_an_edit_do_not_shift_it(before, place):
    text = {
        "docstring": source("return a + b").replace("A file", f"A {before} file"),
        "same line": source(f'return f("{before}") if a + b else c'),
        "comment": source(f"# {before}", "return a + b"),
    }[place]
    (mutant,) = generate("k.py", text)
    assert mutant.applied(text) == text.replace("a + b", "a - b")


def test_equal_lines_of_two_kernels_are_changed_each_in_its_place():
    second = "\n\n@triton.jit\ndef again(a, b):\n    return a + b\n"
    text = source("return a + b") + second
    first, last = generate("k.py", text)
    assert first.applied(text) == source("return a - b") + second
    assert last.applied(text) == source("return a + b") + second.replace("+", "-")


def test_three_equal_lines_are_changed_each_in_its_place():
    equal = ["x += a", "x += a", "x += a"]
    text = source("x = b", *equal, "return x")
    expected = [source("x = b", *equal[:i], "pass", *equal[i + 1 :], "return x") for i in range(3)]
    assert [mutant.applied(text) for mutant in generate("k.py", text)] == expected


def test_a_launcher_may_stand_at_the_top_of_its_file():
    text = "def launch(x): kernel[x](x)\n"
    assert [mutant.applied(text) for mutant in generate("k.py", text)] == ["def launch(x): pass\n"]


def test_equal_lines_at_the_top_of_a_file_are_changed_each_in_its_place():
    text = "def launch(x):\n    kernel[x](x)\n\n\ndef again(x):\n    kernel[x](x)\n"
    found = [mutant.applied(text) for mutant in generate("k.py", text)]
    call = "kernel[x](x)"
    assert found == [text.replace(call, "pass", 1), "pass".join(text.rsplit(call, 1))]


def test_a_file_s_first_lines_may_stand_again_further_down():
    text = "def launch(x): kernel[x](x)\n" * 2
    found = [mutant.applied(text) for mutant in generate("k.py", text)]
    assert found == [text.replace("kernel[x](x)", "pass", 1), "pass".join(text.rsplit("kernel[x](x)", 1))]


def test_a_file_may_end_without_a_newline():
    text = source("return a + b").rstrip("\n")
    (mutant,) = generate("k.py", text)
    assert mutant.applied(text) == text.replace("+", "-")


def test_a_file_without_kernels_has_no_mutants():
    assert generate("k.py", "x = 1 + 1\n") == ()


def test_mutants_name_their_file_and_follow_the_text():
    text = source("x = a + b", "y = a < b", "return x * y")
    found = generate("harness/k.py", text)
    assert [mutant.line(text) for mutant in found] == [6, 7, 7, 8]
    assert {mutant.file for mutant in found} == {"harness/k.py"}
    assert len({mutant.id for mutant in found}) == 4
    assert all(mutant.why for mutant in found)


@pytest.fixture(scope="module", params=KERNEL_FILES, ids=lambda file: file.stem)
def kernel_file(request):
    text = request.param.read_text(encoding="utf-8")
    return text, generate(request.param.name, text)


def test_mutants_of_a_kernel_are_many_distinct_and_always_the_same(kernel_file):
    text, mutants = kernel_file
    assert len(mutants) > 20
    assert len({mutant.applied(text) for mutant in mutants}) == len(mutants)
    assert len({mutant.id for mutant in mutants}) == len(mutants)
    assert generate(mutants[0].file, text) == mutants


def test_mutants_of_a_kernel_apply_once_and_parse(kernel_file):
    text, mutants = kernel_file
    parts = text.split("\n\n\n")
    for mutant in mutants:
        assert text.count(mutant.old) == 1
        # One function of the file has changed: to parse the others again would take seconds.
        (changed,) = [part for part in mutant.applied(text).split("\n\n\n") if part not in parts]
        ast.parse(changed)


def test_mutants_of_a_kernel_spare_its_planner(kernel_file):
    text, mutants = kernel_file
    spared = set()
    for node in ast.parse(text).body:
        is_planner = isinstance(node, ast.FunctionDef) and node.name in PLANNERS
        if is_planner or isinstance(node, ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Import):
            spared.update(range(node.lineno, node.end_lineno + 1))
    assert spared
    assert not [mutant.why for mutant in mutants if mutant.line(text) in spared]
