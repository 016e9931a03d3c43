"""Check `sanitizer`: NVIDIA's compute-sanitizer finds nothing wrong with a launch on a GPU.

The case is launched once by each of its tools, in a process of its own: memcheck (accesses out of bounds),
racecheck (races in shared memory), initcheck (reads of what nobody wrote) and synccheck (wrong barriers).
That takes minutes a case, so it is asked for by its name alone. Without the tool, or where it does not take
the device, the check is skipped with its reason.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.checks._check import CheckPlugin
from harness.cuda import build
from harness.launch import Launch
from harness.startup import ROOT, child_environment
from harness.verdict import CheckResult, Kind, Status

EXECUTABLE = "compute-sanitizer"
TOOLS = {
    "memcheck": Kind.BOUNDS,
    "racecheck": Kind.NONDETERMINISTIC,
    "initcheck": Kind.NONDETERMINISTIC,
    "synccheck": Kind.NONDETERMINISTIC,
}
"""The tools, and what a finding of each means."""

FOUND_EXIT = 86
TOOL_SECONDS = 250.0
"""What one tool may take: all four fit into the time that a worker gives its checks."""


class SanitizerFailure(RuntimeError):
    """The program under the tool failed, and not the kernel: the harness's own failure."""


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result a tool."""
    if shutil.which(EXECUTABLE) is None:
        reason = f"{EXECUTABLE} is not installed: it is part of the CUDA toolkit"
        yield CheckResult("sanitizer", Status.SKIPPED, reason=reason)
        return
    for tool in TOOLS:
        yield _result(launch, tool)


def _result(launch: Launch, tool: str) -> CheckResult:
    sources = {str(source): str(changed) for source, changed in build.substituted_last().items()}
    request = {"case": str(launch.case), "path": launch.path.name, "substituted": sources}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [EXECUTABLE, "--tool", tool, "--error-exitcode", str(FOUND_EXIT), "--log-file", str(log)]
        try:
            done = subprocess.run(
                [*command, sys.executable, "-m", "harness.cuda.alone", launch.lane.name],
                input=json.dumps(request) + "\n",
                capture_output=True,
                text=True,
                timeout=TOOL_SECONDS,
                env=child_environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                cwd=ROOT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            reason = f"{tool} did not end within {TOOL_SECONDS:g} s: ask it of a smaller case"
            return CheckResult("sanitizer", Status.SKIPPED, tool, reason=reason)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if done.returncode == FOUND_EXIT:
        return CheckResult("sanitizer", Status.FAILED, tool, TOOLS[tool], f"{tool}: {finding_of(text)}")
    answer = done.stdout.rpartition('{"raised": ')[2] if done.returncode == 0 else ""
    if answer.startswith('""'):
        return CheckResult("sanitizer", Status.PASSED, tool)
    refusal = refusal_of(text)
    if refusal is not None:
        return CheckResult("sanitizer", Status.SKIPPED, tool, reason=f"{EXECUTABLE} refuses: {refusal}")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
    raise SanitizerFailure(f"the program under {tool} ended with code {done.returncode}: {lines[-1]}")


# ---- what the tools write: lines behind `=========`, those that go on with a finding indented ------

LINE = re.compile(r"^=========( *)(.*)$", re.MULTILINE)
PLACE = re.compile(r"([^/\s]+\.(?:cuh?|py|h)):(\d+)")
# Not that the application ended before it used the GPU: that is the program's own failure.
REFUSALS = ("not supported", "Unable to", "Internal Sanitizer Error", "driver")
BOILERPLATE = ("COMPUTE-SANITIZER", "Program hit", "Target application")


def finding_of(text: str) -> str:
    """The first finding of a log as one sentence: what, on which line, and what of the address."""
    lines = [(len(match[1]), match[2].strip()) for match in LINE.finditer(text)]
    begins = [
        number
        for number, (indent, line) in enumerate(lines)
        if indent == 1 and line and "SUMMARY" not in line and not line.startswith(BOILERPLATE)
    ]
    if not begins:
        return next((line for _, line in lines if line.startswith("Program hit")), "it says nothing")
    first = begins[0]
    ends = next((number for number in range(first + 1, len(lines)) if lines[number][0] <= 1), len(lines))
    own = [line for _, line in lines[first:ends]]
    what = PLACE.sub(lambda place: f"{place[1]}:{place[2]}", own[0].removeprefix("Error: "))
    place = next((match for line in own[1:] if (match := PLACE.search(line))), None)
    address = next((line for line in own[1:] if line.startswith(("Address", "and "))), "")
    where = f" at {place[1]}:{place[2]}" if place and "and " not in address[:4] else ""
    return f"{what}{where}{f', {address}' if address else ''}"


def refusal_of(text: str) -> str | None:
    """The line by which the tool says that it cannot work here, or None."""
    lines = (match[2].strip() for match in LINE.finditer(text))
    return next((line for line in lines if any(word in line for word in REFUSALS)), None)


CHECK = CheckPlugin(
    "sanitizer",
    "compute-sanitizer finds no access out of bounds, race, uninitialised read or wrong barrier",
    run,
    lanes=("compiled",),
    relaunches=True,
)
