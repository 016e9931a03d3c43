"""Check `sanitizer`: what compute-sanitizer says, said by a stand-in that writes what it documents."""

import json
import stat
import sys
from dataclasses import replace

import pytest

from harness.checks import checks
from harness.checks import sanitizer as check
from harness.commands._options import chosen_checks
from harness.kernel_path import KernelPath
from harness.verdict import Kind, Status

STAND_IN = """#!{python}
import json, sys
from pathlib import Path

arguments = sys.argv[1:]
tool = arguments[arguments.index("--tool") + 1]
Path({folder!r}, tool).write_text(json.dumps([arguments, sys.stdin.read()]))
code, log, answer = json.loads(Path({folder!r}, "answers").read_text()).get(tool, [0, "", '{{"raised": ""}}'])
Path(arguments[arguments.index("--log-file") + 1]).write_text(log)
print(answer)
sys.exit(code)
"""

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void write_rows()+0x470 in /src/cache.cu:27
=========     by thread (32,0,0) in block (1,0,0)
=========     Address 0x40 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f1c2be00000 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure"
========= ERROR SUMMARY: 2 errors
"""
OLDER_MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at 0x160 in position_ids.cu:24:place_tokens(int const *)
=========     by thread (5,0,0) in block (0,0,0)
=========     Address 0x41 is misaligned
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at 0x1 in a.cu:40:f()
=========     and Read access at 0x2 in a.cu:66:f()
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x70 in merge.cu:17:merge(float *)
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fd2a6a00000
=========
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at 0x90 in /a/b/divergent.cu:21:myKernel(int *)
=========     by thread (9,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation.
========= ERROR SUMMARY: 0 errors
"""
ENDED_EARLY = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""
CASE = "position_ids/decode:5"


@pytest.fixture
def results(tmp_path, monkeypatch, launched):
    """(answers by tool) -> what the check says, and what the stand-in was asked."""
    executable = tmp_path / "compute-sanitizer"
    executable.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = KernelPath("cuda/position_ids", "position_ids", ("compiled",), lambda _: None, lambda *_: None)
    launch = launched(CASE, path)
    launch.lane = replace(launch.lane, name="compiled")

    def ask(**answers):
        (tmp_path / "answers").write_text(json.dumps(answers))
        found = {result.tensor: result for result in checks()["sanitizer"].run(launch)}
        return found, {tool: json.loads((tmp_path / tool).read_text()) for tool in check.TOOLS}

    return ask


def test_every_tool_launches_the_case_in_a_program_of_its_own(results):
    found, asked = results()
    assert {tool: result.status for tool, result in found.items()} == dict.fromkeys(
        check.TOOLS, Status.PASSED
    )
    for tool, (arguments, request) in asked.items():
        assert arguments[:4] == ["--tool", tool, "--error-exitcode", "86"]
        assert arguments[-4:] == [sys.executable, "-m", "harness.cuda.alone", "compiled"]
        assert json.loads(request) == {"case": CASE, "path": "cuda/position_ids", "substituted": {}}


@pytest.mark.parametrize(
    ("tool", "log", "kind", "said"),
    [
        (
            "memcheck",
            MEMCHECK,
            Kind.BOUNDS,
            "Invalid __global__ read of size 16 bytes at cache.cu:27, Address 0x40 is out of bounds",
        ),
        (
            "memcheck",
            OLDER_MEMCHECK,
            Kind.BOUNDS,
            "Invalid __global__ write of size 4 bytes at position_ids.cu:24, Address 0x41 is misaligned",
        ),
        (
            "racecheck",
            RACECHECK,
            Kind.NONDETERMINISTIC,
            "Race reported between Write access at 0x1 in a.cu:40:f(), and Read access at 0x2 in a.cu:66:f()",
        ),
        (
            "initcheck",
            INITCHECK,
            Kind.NONDETERMINISTIC,
            "Uninitialized __global__ memory read of size 4 bytes at merge.cu:17, Address 0x7fd2a6a00000",
        ),
        (
            "synccheck",
            SYNCCHECK,
            Kind.NONDETERMINISTIC,
            "Barrier error detected. Divergent thread(s) in block. at divergent.cu:21",
        ),
    ],
)
def test_a_finding_fails_with_its_line_and_the_other_tools_run_on(tool, log, kind, said, results):
    found, _ = results(**{tool: [86, log, '{"raised": "the path raised"}']})
    failed = [result for result in found.values() if result.status is Status.FAILED]
    assert [(result.tensor, result.kind, result.reason) for result in failed] == [
        (tool, kind, f"{tool}: {said}")
    ]
    assert sum(result.status is Status.PASSED for result in found.values()) == 3


def test_a_device_that_the_tool_does_not_take_is_a_skip_with_its_reason(results):
    found, _ = results(racecheck=[1, REFUSED, ""])
    assert found["racecheck"].status is Status.SKIPPED
    assert "refuses: Error: Device not supported" in found["racecheck"].reason


def test_a_program_that_fails_under_a_tool_is_no_finding(results):
    with pytest.raises(check.SanitizerFailure, match="under memcheck ended with code 1: no such module"):
        results(memcheck=[1, ENDED_EARLY, "no such module"])
    with pytest.raises(check.SanitizerFailure, match=r"code 0: .*CaseError"):
        results(memcheck=[0, "", '{"failed": "CaseError"}'])


def test_without_the_tool_the_check_is_skipped_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = checks()["sanitizer"].run(None)
    assert found.status is Status.SKIPPED
    assert found.reason == "compute-sanitizer is not installed: it is part of the CUDA toolkit"


def test_a_glob_does_not_ask_for_it():
    assert "sanitizer" not in chosen_checks(["*"])
    assert "memory" in chosen_checks(["*"])
    assert chosen_checks(["sanitizer"]) == ("sanitizer",)
