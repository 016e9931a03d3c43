"""Generated mutants of CUDA sources: what each operator makes of kernels that are read at a glance."""

from pathlib import Path

import pytest

from harness.mutation import chosen
from harness.mutation.generate_cuda import generate_cuda
from harness.task import Task

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("harness/paths/cuda/*.cu"))

HEAD = """#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kThreads = 256 + 1;

struct Words {
  int value[64 + 1];
};

template <class T>
__global__ void __launch_bounds__(kThreads) kernel(const T* a, T* b, int64_t n) {
"""
TAIL = """}

int64_t planned(int64_t n) {
  return n + 1;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernel, launch_kernel)
"""


def source(*lines):
    """A file with one kernel of these lines."""
    return HEAD + "".join(f"  {line}\n" for line in lines) + TAIL


def news(*lines):
    """What the changed lines are, stripped."""
    return {mutant.new.strip() for mutant in generate_cuda("k.cu", source(*lines))}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<", {"<=", ">="}),
        (">=", {">", "<"}),
        ("==", {"!="}),
        ("&&", {"||"}),
        ("||", {"&&"}),
        ("+", {"-"}),
        ("<<", {">>"}),
        ("&", {"|"}),
    ],
)
def test_an_operator_between_two_operands_becomes_another(old, new):
    assert news(f"return a {old} b;") == {f"return a {other} b;" for other in new}


@pytest.mark.parametrize(
    "line",
    [
        "const T* c = a;",
        "T& c = *a;",
        "return -n;",
        'say("1 + 1 < 2");',
        "return a;  // 1 + 1 < 2",
        "return a; /* 1 + 1 */",
        "FragmentA<T> c;",
    ],
)
def test_what_is_no_operator_and_no_number_stays(line):
    assert news(line) <= {";", ";  // 1 + 1 < 2"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("5", "6"),
        ("1", "0"),
        ("0", "1"),
        ("0xffu", "0xfu"),
        ("0xffffffffu", "0xffffu"),
        ("0.5f", "1.5f"),
        ("1.0", "0.0"),
    ],
)
def test_a_number_becomes_another_of_its_type(old, new):
    assert news(f"return {old};") == {f"return {new};"}


def test_a_bound_moves_by_one_and_is_turned_round():
    assert news("if (a >= n - 1) {", "}") == {
        "if (a > n - 1) {",
        "if (a < n - 1) {",
        "if (a >= n + 1) {",
        "if (a >= n - 0) {",
        "if (true) {",
        "if (false) {",
    }


@pytest.mark.parametrize(
    "line",
    [
        "__syncthreads();",
        "__syncwarp();",
        "wait_copies<kPending>();",
        "commit_copies();",
        "a = b;",
        "a[n] += b;",
    ],
)
def test_a_barrier_a_wait_or_a_new_value_is_left_out(line):
    assert ";" in news(line)


@pytest.mark.parametrize(
    "line", ["int c = a;", "const int64_t c = b;", "return a;", "break;", "T* c = a;", "auto c = f(a);"]
)
def test_nothing_that_declares_or_leaves_is_left_out(line):
    assert ";" not in news(line)


def test_the_only_statement_of_a_branch_can_be_left_out():
    assert "if (a) {\n    ;\n  }".replace(" ", "") in {
        mutant.applied(text).split("n) {\n", 1)[1].split(TAIL)[0].strip().replace(" ", "")
        for text in [source("if (a) {", "  f();", "}")]
        for mutant in generate_cuda("k.cu", text)
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("min(a, b)", {"max(a, b)"}),
        ("fmaxf(a, b)", {"fminf(a, b)"}),
        ("static_cast<int64_t>(n)", {"static_cast<int>(n)"}),
        ("f(kAllLanes)", {"f(0xffffu)"}),
        ("__any_sync(m, c)", {"__all_sync(m, c)", "__any_sync(c, m)"}),
    ],
)
def test_a_name_becomes_its_counterpart(old, new):
    assert news(f"return {old};") == {f"return {other};" for other in new}


def test_neighbouring_arguments_trade_places_whatever_stands_in_them():
    assert news("return f(a, g(b, c), n);") == {
        "return f(g(b, c), a, n);",
        "return f(a, g(c, b), n);",
        "return f(a, n, g(b, c));",
    }


def test_argument_checks_constants_types_and_planners_are_spared():
    launcher = (
        "void launch_kernel(TensorView a) {\n  MLA_CHECK(a, {a.size(0) + 1}, kInt32);\n"
        '  if (a.size(0) > 1 || n == 2) {\n    TVM_FFI_THROW(ValueError) << "no";\n  }\n  launch(a);\n}\n'
    )
    text = HEAD + "  return a + b;\n" + TAIL.replace("}  // namespace", f"{launcher}\n}}  // namespace")
    assert [mutant.why for mutant in generate_cuda("k.cu", text)] == ["+ becomes -", "statement removed"]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_mutants_of_a_kernel_are_many_distinct_and_apply_once(file):
    text = file.read_text(encoding="utf-8")
    mutants = generate_cuda(file.name, text)
    assert len(mutants) > 20
    assert len({mutant.applied(text) for mutant in mutants}) == len(mutants)
    assert len({mutant.id for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        # Brackets stay in pairs: most of them compile.
        changed = mutant.applied(text)
        assert all(changed.count(left) == changed.count(right) for left, right in ("()", "[]", "{}"))


def test_a_cuda_path_has_mutants_of_its_cu_file():
    task = Task("position_ids/decode:5", "position_ids", "cuda/position_ids", "host")
    found = chosen.choose([task], "*", generated=True)
    assert found.attempts
    assert {mutant.file for mutant, _ in found.attempts} == {"harness/paths/cuda/position_ids.cu"}
