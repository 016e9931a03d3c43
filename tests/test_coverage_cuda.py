"""CUDA sources with probes: what g++ compiles and runs hits the sites that a person would say it hits."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tree_sitter")
pytest.importorskip("tree_sitter_cuda")

from harness.coverage.cuda import HEADER, IN_MEMORY, CudaProbes, cuda_coverage, instrument, is_cuda
from harness.coverage.sites import SiteKind
from harness.cuda import build

KERNEL = """\
#include "stand_in.h"
#include "shared.cuh"

template <int WIDTH>
__device__ int clamp(int value) {
  if constexpr (WIDTH > 8)
    return value;
  return value < WIDTH
             ? value
             : WIDTH;
}

__global__ void __launch_bounds__(4) fill(
    int* out, int n) {
  __shared__ int tile[4];
  const int index = threadIdx.x;
  constexpr bool is_small = 4 > 2 && true;
  if (index >= n) return;
#pragma unroll
  for (int step = 0; step < 2; ++step) tile[index] = step;
  while (index > 100 || n < 0) { n = 0; break; }
  switch (n) {
    case 3:
      tile[index] += 1;
      break;
    default:
      tile[index] += 2;
  }
  do
    n -= 1;
  while (n > 0 && is_small);
#ifdef NEVER
  tile[index] = 9;
#else
  tile[index] += 0;
#endif
  auto add = [&](int other) { return other ? tile[index] + other : 0; };
  if (out == nullptr) { out = tile; } else if (index == 0) out[0] = -1; else
    out[index] = clamp<4>(add(index)) + twice(1);
}

constexpr int kSize = 4;
constexpr int size() { return kSize; }

extern "C" void run(int* out, int n) {
  if (n == 0) {
    return;
  }
  launch(fill, kSize, out, n);
}
"""
SHARED = """\
#pragma once
__device__ inline int twice(int x) { return 2 * x; }
__device__ inline int never(int x) { return x; }
"""
STAND_IN = """\
#pragma once
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(x)
static struct { int x; } threadIdx;
template <class Kernel> void launch(Kernel kernel, int threads, int* out, int n) {
  for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(out, n);
}
"""


@pytest.fixture
def library(tmp_path):
    """The folder of the sources, their probes, and a call of what was built with them: n -> out."""
    import ctypes

    folder = tmp_path / "source"
    folder.mkdir()
    texts = {"fill.cu": KERNEL, "shared.cuh": SHARED, "stand_in.h": STAND_IN, "other.h": SHARED}
    for name, text in texts.items():
        (folder / name).write_text(text)
    # Nothing includes other.h: its like for another compiler.
    probes = CudaProbes({str(folder / name) for name in ("fill.cu", "shared.cuh", "other.h")})
    source, arguments = probes.prepare(folder / "fill.cu", folder, tmp_path / "built")
    built = tmp_path / "fill.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    flags += ["-MD", "-MF", str(built.with_suffix(".d"))]
    command = ["g++", *flags, "-x", "c++", *arguments, str(source), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    probes.loaded(folder / "fill.cu", built)
    run = ctypes.CDLL(str(built)).run

    def call(n):
        out = (ctypes.c_int * 4)(7, 7, 7, 7)
        run(out, n)
        return list(out)

    return folder, probes, call


def told(sites, kind):
    return sorted((site.lines, site.label) for site in sites if site.kind is kind)


def test_the_sites_hit_are_those_that_a_person_would_name(library):
    folder, probes, call = library
    # Threads 0 to 2 of 4 work. A tile holds 1 of the last step and 1 of case 3; threads 1 and 2 add their
    # number, clamp it to 4 and add 2.
    assert call(3) == [-1, 5, 6, 7]
    found = probes.take()
    assert set(found) == {str(folder / "fill.cu"), str(folder / "shared.cuh")}
    hits = found[str(folder / "fill.cu")]
    assert [line for line, _ in told(hits, SiteKind.STATEMENT)] == sorted(
        [
            *("6", "8-10"),  # clamp, of width 4
            *("16", "18", "18", "20", "20", "21"),  # both `if` and `return`, loop and body
            *("22", "24", "25"),  # case 3 and not the default
            *("30", "31"),  # do and its condition
            *("35", "37", "37", "38", "38", "38", "39"),
            *("46", "49"),
        ]
    )
    assert told(hits, SiteKind.ARM) == sorted(
        [
            *[("6", "false"), ("9", "true"), ("9", "false")],  # sums of 3 and 4, one below the width
            *[("18", "true"), ("18", "false"), ("20", "trips"), ("20", "ends")],
            *[("21", "ends"), ("21", "false"), ("21", "false")],  # and both of its conditions
            *[("29-31", "trips"), ("29-31", "ends")],
            *[("31", "true"), ("31", "false"), ("31", "true")],  # constants never are false
            *[("37", "true"), ("38", "false"), ("38", "true"), ("38", "false"), ("46", "false")],
        ]
    )
    assert [(site.function, site.lines) for site in found[str(folder / "shared.cuh")]] == [("twice", "2")]


def test_of_a_header_that_was_not_included_nothing_is_known(library):
    folder, probes, _ = library
    assert str(folder / "other.h") not in probes.take()


@pytest.mark.parametrize(
    ("line", "is_device_code"),
    [
        ("template <class T> __device__ __forceinline__ T* at(int64_t token);", True),
        ("static __global__ void fill(int* out) {", True),
        ("#define __device__ (nothing)", False),
        ("// __device__ functions (of this file) run on the host", False),
        ("static __device__ unsigned char* flags = nullptr;", False),
        ("inline bool same(DLDataType left, DLDataType right) {", False),
    ],
)
def test_a_header_is_measured_for_its_functions_of_the_device(line, is_device_code):
    assert is_cuda("a.h", f"#pragma once\n{line}\n") == is_device_code
    assert is_cuda("a.cuh", line)
    assert not is_cuda("a.py", line)


def test_flags_are_cleared_by_reading_them(library):
    _, probes, call = library
    call(3)
    probes.take()
    assert probes.take() == {}
    assert call(0) == [7, 7, 7, 7]
    (hits,) = probes.take().values()
    assert [line for line, _ in told(hits, SiteKind.STATEMENT)] == ["46", "47"]
    assert told(hits, SiteKind.ARM) == [("46", "true")]


def test_everything_hit_is_a_site_and_what_was_not_built_or_not_run_is_missed(library):
    folder, probes, call = library
    call(3)
    file = cuda_coverage(folder / "fill.cu")
    hits = probes.take()[str(folder / "fill.cu")]
    assert file.language == "cuda"
    assert hits <= set(file.sites)
    missed = told(set(file.sites) - hits, SiteKind.STATEMENT)
    assert missed == sorted(
        [
            *[("7", ""), ("21", ""), ("21", ""), ("27", ""), ("33", ""), ("38", ""), ("47", "")],
            ("43", "not measurable: it is constexpr"),
        ]
    )


def test_lines_stay_what_they_were():
    text = instrument(KERNEL, "fill.cu").text
    head, _, rest = text.partition("#line 1")
    assert head == f'#include "{HEADER.name}"\n'
    assert rest.partition("\n")[0] == ' "fill.cu"'
    lines = rest.splitlines()[1:]
    assert len(lines) == len(KERNEL.splitlines())
    for before, after in zip(KERNEL.splitlines(), lines, strict=True):
        # Nothing is taken away, and directives are left alone.
        characters = iter(after)
        assert all(character in characters for character in before)
        assert not before.startswith("#") or after == before


def test_flags_go_on_where_another_source_of_the_library_ended():
    first = instrument(KERNEL, "fill.cu")
    second = instrument(KERNEL, "fill.cu", len(first.flags))
    numbers = [int(found) for found in re.findall(r"MLA_COV(?:_ARM)?\((\d+)", second.text)]
    assert min(numbers) == len(first.flags)
    assert max(numbers) < 2 * len(first.flags)
    assert second.flags == first.flags


BROKEN = """\
__device__ int fine(int x) { return x; }
__global__ void broken(int* x) {
  x[0] = = 1;
}
"""


def test_a_function_that_does_not_parse_is_a_site_that_is_never_hit(tmp_path):
    found = instrument(BROKEN, "k.cu")
    assert [(site.lines, site.label) for site in found.sites] == [
        ("1", ""),
        ("2-4", "not measurable: it does not parse"),
    ]
    assert len(found.flags) == 1
    assert found.text.endswith(BROKEN.partition("\n")[2])


def test_a_loop_behind_endif_and_a_pragma_keeps_its_pragma():
    text = "void f(int n) {\n#if A\n  n = 1;\n#endif\n#pragma unroll\n  for (;;) n = 2;\n}\n"
    found = instrument(text, "k.cu")
    lines = found.text.splitlines()[2:]
    assert lines[4:6] == ["#pragma unroll", "  for (;;) { MLA_COV(1);n = 2;}"]
    assert ("6", "not measurable: it follows #endif and #pragma") in told(found.sites, SiteKind.STATEMENT)


@pytest.mark.parametrize("expression", ["a && b && c", "(a && b) || c"])
def test_of_a_chain_each_operand_is_measured_once(expression):
    found = instrument(f"bool f(bool a, bool b, bool c) {{ return {expression}; }}\n", "k.cu")
    arms = [site for site in found.sites if site.kind is SiteKind.ARM]
    assert len(arms) == len(set(arms)) == 6


def test_nothing_is_put_where_nothing_runs():
    text = (
        "template <bool B = (1 > 0 && true)>\n"
        "struct S { static_assert(B && true); int size[1 && 1]; };\n"
        "enum { A = 1 && 0 };\n"
        "int f() { constexpr bool b = 1 && 0; static_assert(b || true); while (true) { break; } }\n"
    )
    found = instrument(text, "k.cu")
    assert "MLA_COV_ARM" not in found.text
    assert told(found.sites, SiteKind.STATEMENT) == [("4", ""), ("4", "")]


def test_a_kernel_and_no_other_function_begins_with_its_registers():
    kernel = "template <class T> __global__ void k(T* a) { f(); }\n"
    text = "__device__ void f() { g(); }\n" + kernel + "void h() { f(); }\n"
    lines = instrument(text, "k.cu").text.splitlines()[2:]
    assert lines[1] == "template <class T> __global__ void k(T* a) { MLA_COV_KERNEL; MLA_COV(1); f(); }"
    assert "MLA_COV_KERNEL" not in lines[0] + lines[2]


CALLED = """\
__device__ __noinline__ int far(int x) { if (x > 3) { return 1; } return 2; }
__global__ void kernel(int* a) { a[threadIdx.x] = far(a[0]); }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason=str(build.lacking(build.DEVICE)))
@pytest.mark.parametrize(
    ("text", "in_memory"), [(CALLED, True), (CALLED.replace("__noinline__ ", ""), False)]
)
def test_flags_are_in_memory_where_a_device_function_is_not_inlined(tmp_path, monkeypatch, text, in_memory):
    source = tmp_path / "kernel.cu"
    source.write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy, arguments = CudaProbes({str(source)}).prepare(source, build.INCLUDE, tmp_path / "probes")
    made = []
    monkeypatch.setattr(
        build, "built", lambda *asked, built=build.built: made.append(asked[2]) or built(*asked)
    )
    assert build.built_with_probes(copy, build.DEVICE, tuple(arguments)).exists()
    assert [IN_MEMORY in asked for asked in made] == ([False, True] if in_memory else [False])


def test_a_source_is_unmeasured_where_tree_sitter_is_missing(tmp_path, monkeypatch):
    import sys

    from harness.coverage import cuda

    (tmp_path / "k.cu").write_text(BROKEN)
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    cuda._parser.cache_clear()
    try:
        assert cuda_coverage(Path(tmp_path / "k.cu")).unmeasured == cuda.NOT_INSTALLED
    finally:
        cuda._parser.cache_clear()
