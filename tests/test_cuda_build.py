"""CUDA sources built once for every content; and what is said where they cannot be built."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cuda import build

ROOT = Path(__file__).resolve().parent.parent
LACKS = build.lacking(build.HOST)
needs_compiler = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))

SOURCE = """
#include "mla/launch.h"

namespace {
int64_t answer() { return 41; }
}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(answer, answer)
"""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache; the runtime's library is fetched from the user's, where it is built once."""
    runtime = build.built(build.RUNTIME, build.HOST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(runtime.parent, build.cache_folder() / runtime.parent.name)
    return build.cache_folder()


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answers.cu"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def compiled(monkeypatch):
    """Names of the sources that were compiled since the test began."""
    names = []
    compile_ = build._compile

    def counting(source, *rest):
        names.append(source.name)
        compile_(source, *rest)

    monkeypatch.setattr(build, "_compile", counting)
    return names


# ---- the cache -----------------------------------------------------------------------------------


@needs_compiler
def test_a_source_is_built_once_for_every_content(own_cache, source, tmp_path, compiled):
    first = build.built(source, build.HOST)
    assert build.load(source, build.HOST).answer() == 41
    (tmp_path / "elsewhere").mkdir()
    again = shutil.copy(source, tmp_path / "elsewhere" / source.name)
    assert build.built(Path(again), build.HOST) == first
    assert compiled == ["answers.cu"]
    source.write_text(SOURCE.replace("41", "42"))
    assert build.load(source, build.HOST).answer() == 42
    assert compiled == ["answers.cu"] * 2
    source.write_text(SOURCE)
    assert build.built(source, build.HOST) == first
    assert compiled == ["answers.cu"] * 2


@needs_compiler
def test_what_a_library_is_made_from_changes_its_key(source, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_compile", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(build, "INCLUDE", shutil.copytree(build.INCLUDE, tmp_path / "include"))
    runtime = Path(shutil.copy(build.RUNTIME, tmp_path / "runtime.cc"))
    monkeypatch.setattr(build, "RUNTIME", runtime)

    def key():
        build._surroundings.cache_clear()
        return build.built(source, build.HOST)

    try:
        first = key()
        assert key() == first
        header = tmp_path / "include" / "mla" / "words.h"
        header.write_text(header.read_text() + "// changed\n")
        second = key()
        runtime.write_text(runtime.read_text() + "// changed\n")
        third = key()
        build._surroundings.cache_clear()
        sanitized = build.built(source, build.SANITIZED)
    finally:
        build._surroundings.cache_clear()
    assert len({first, second, third, sanitized}) == 4


def build_and_count(source, cache, counts):
    os.environ["XDG_CACHE_HOME"] = cache
    compile_ = build._compile

    def counting(*arguments):
        counts.put(os.getpid())
        compile_(*arguments)

    build._compile = counting
    build.built(Path(source), build.HOST)


@needs_compiler
def test_two_processes_at_once_build_once(own_cache, source):
    context = multiprocessing.get_context("fork")
    counts = context.SimpleQueue()
    arguments = (str(source), str(own_cache.parent.parent), counts)
    workers = [context.Process(target=build_and_count, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    counts.get()
    assert counts.empty()


@needs_compiler
def test_a_source_that_does_not_compile_is_one_sentence_with_its_line(own_cache, source):
    source.write_text(SOURCE.replace("return 41", "return fortyone"))
    with pytest.raises(build.BuildError) as refusal:
        build.built(source, build.HOST)
    said = str(refusal.value)
    assert "\n" not in said
    assert said.startswith("answers.cu does not compile for target host: ")
    assert "answers.cu:5:" in said
    assert "fortyone" in said
    log = Path(re.search(r"\((\S+)\)$", said)[1])
    assert "fortyone" in log.read_text()
    # Nothing half-made is taken for a library later.
    with pytest.raises(build.BuildError):
        build.built(source, build.HOST)


@needs_compiler
def test_what_does_not_compile_once_is_not_tried_again_for_every_case(
    own_cache, source, compiled, monkeypatch
):
    monkeypatch.setattr(build._Use, "target", build.HOST)
    source.write_text("no kernel")
    module = build.Module(source)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="does not compile"):
            module.answer()
    assert compiled == ["answers.cu"]


# ---- whose functions are called ------------------------------------------------------------------


@needs_compiler
def test_a_changed_source_stands_in_for_another_within_a_block_alone(
    own_cache, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(build._Use, "target", build.HOST)
    monkeypatch.setattr(build._Use, "called", {})
    changed = tmp_path / "changed.cu"
    changed.write_text(SOURCE.replace("41", "43"))
    module = build.Module(source)
    with build.substituted(source, changed):
        assert module.answer() == 43
    assert build.substituted_last() == {source: changed}
    assert module.answer() == 41
    assert build.substituted_last() == {}


def test_a_process_that_runs_no_cuda_paths_says_so(source):
    assert build._Use.target is None
    with pytest.raises(build.BuildError, match="in a process that runs no CUDA paths"):
        build.Module(source).answer()
    with pytest.raises(build.BuildError, match="schedule"):
        build.set_schedule(0)


# ---- what is missing -----------------------------------------------------------------------------

WITHOUT_FFI = """
import importlib.util, sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tvm_ffi" else find(name, *rest)
"""


def harness(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_unavailable(said, **environment):
    arguments = ["position_ids/decode:5", "--lane", "host", "--workers", "1", "--path", "cuda/*"]
    result = harness("run", *arguments, **environment)
    assert result.returncode == 4, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert f"unavailable: cuda/position_ids: {said}" in result.stdout


def host_state(**environment):
    """What `list paths` says of a CUDA path in lane `host`."""
    listed = harness("list", "paths", "--json", **environment)
    (row,) = [row for row in json.loads(listed.stdout) if row["name"] == "cuda/position_ids"]
    return row["lanes"]["host"]


def test_without_a_compiler_paths_are_unavailable_with_what_to_do(tmp_path):
    said = "g++ is not installed: install it"
    assert_unavailable(said, PATH=str(tmp_path))
    assert host_state(PATH=str(tmp_path)).startswith(said)


def test_without_tvm_ffi_paths_are_unavailable_with_what_to_do(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_FFI)
    assert_unavailable("apache-tvm-ffi is not installed: pip install", PYTHONPATH=str(tmp_path))


@needs_compiler
def test_lane_host_is_listed_with_its_paths():
    assert host_state() == "available"


# ---- every kernel --------------------------------------------------------------------------------

SOURCES = sorted(build.KERNELS.glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason=str(build.lacking(build.DEVICE)))
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(file, id=file.stem, marks=[] if file.stem == "position_ids" else pytest.mark.slow)
        for file in SOURCES
    ],
)
def test_kernels_compile_for_a_gpu(source):
    assert build.built(source, build.DEVICE).exists()


FLAWS = {
    # What the compiler decides is no branch.
    r"^(?!.*\bconstexpr\b).*\?(?!\?)[^\n]*:(?!:)": "a ternary",
    r"^\s*(?:if|for|while) \(.*\)[^{]*;\s*(?://.*)?$": "a statement on the line of its condition",
    r"\belse\s+[^{i]": "an else without braces",
}


def flaws_of(text):
    code = re.sub(r'//[^\n]*|"[^"\n]*"', "", text)
    lines = list(enumerate(code.splitlines(), 1))
    return [
        f"line {number}: {what}"
        for number, line in lines
        for flaw, what in FLAWS.items()
        if re.search(flaw, line)
    ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_are_written_for_coverage(source):
    text = source.read_text(encoding="utf-8")
    assert flaws_of(text) == []
    assert "getenv" not in text


@pytest.mark.parametrize("line", ["int a = b ? c : d;", "if (a) return;", "for (;;) a();", "} else b();"])
def test_the_lint_finds_what_it_is_for(line):
    assert flaws_of(f"int x;\n{line}\n") == [f"line 2: {flaws_of(line)[0].partition(': ')[2]}"]
