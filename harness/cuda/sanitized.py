"""A process whose kernels run under AddressSanitizer and UndefinedBehaviorSanitizer, and what they report.

The process is kept for further cases. A report ends it; the next case starts another. It does not outlive
the process that asks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from harness.cuda import build
from harness.cuda.guarded import GUARD_BYTES
from harness.startup import ROOT, child_environment

REPORT_EXIT = 99

OPTIONS = {
    # 2: the handler stays the sanitizer's, though apache-tvm-ffi installs one of its own.
    "ASAN_OPTIONS": f"exitcode={REPORT_EXIT}:handle_segv=2:handle_sigbus=2:detect_leaks=0:"
    "alloc_dealloc_mismatch=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": f"exitcode={REPORT_EXIT}:print_stacktrace=1",
}


class SanitizerFailure(RuntimeError):
    """A case could not be launched, or the process ended without a report: the harness's own failure."""


@cache
def lacking() -> str | None:
    """None, or what is missing to run kernels under the sanitizers, with what to do about it."""
    lack = build.lacking(build.SANITIZED)
    if lack is None and any(_library(name) is None for name in ("libasan.so", "libubsan.so")):
        return "g++ has no AddressSanitizer here: install its libasan and libubsan, on Debian part of gcc"
    return lack


@cache
def _library(name: str) -> str | None:
    """Where a library of g++'s is; None where it is not."""
    command = [build.SANITIZED.compiler, f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute() or not found.exists():
        return None
    if found.read_bytes()[:4] != b"\x7fELF":
        # Some distributions have a linker's script there, which names the library.
        named = re.search(r"/\S+\.so[.\d]*", found.read_text(encoding="utf-8", errors="replace"))
        return named[0] if named and Path(named[0]).exists() else None
    return str(found)


class SanitizedProcess:
    """The process; `launch` asks it for one case after another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._told: IO[str] | None = None
        self._owner = 0

    def launch(self, case: str, path: str, substituted: Mapping[Path, Path]) -> str | None:
        """None, or one sentence about what a case's launch did wrong.

        Args:
            substituted: sources of kernels and what stands in their place.

        Raises:
            SanitizerFailure: it could not be launched, or the process ended without a report.
        """
        process, told = self._running()
        sources = {str(source): str(changed) for source, changed in substituted.items()}
        request = {"case": case, "path": path, "substituted": sources}
        if process.stdin is None or process.stdout is None:
            raise SanitizerFailure("the process of check memory has no pipes")
        tensors: dict[str, Any] = {}
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            answer = json.loads(line)
            if "failed" in answer:
                raise SanitizerFailure(f"the process of check memory failed: {answer['failed']}")
            if "raised" in answer:
                return answer["raised"] or None
            tensors = answer
        code = process.wait()
        told.seek(0)
        text = told.read()
        self.close()
        if code != REPORT_EXIT or not tensors:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
            raise SanitizerFailure(f"the process of check memory ended with code {code}: {last}")
        return report_of(text, tensors)

    def close(self) -> None:
        """Ends the process, if this process has started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._told):
                if stream is not None:
                    stream.close()
        self._process = None

    def _running(self) -> tuple[subprocess.Popen[str], IO[str]]:
        # A fork of a worker, which tries a mutant, must not talk on the worker's line.
        if self._process is None or self._told is None or self._owner != os.getpid():
            self._told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._process = _start(self._told)
            self._owner = os.getpid()
        return self._process, self._told


def _start(told: IO[str]) -> subprocess.Popen[str]:
    # libstdc++ too: the sanitizer looks for its `throw` when it is loaded, and Python has none.
    libraries = " ".join(filter(None, (_library("libasan.so"), _library("libstdc++.so.6"))))
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cuda.alone", "host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=told,
        text=True,
        env=child_environment(**OPTIONS, LD_PRELOAD=libraries),
        cwd=ROOT,
    )


# ---- reports ---------------------------------------------------------------------------------------

FRAME = re.compile(r"^\s*#\d+ .*?([^/\s()]+\.(?:cuh?|h)):(\d+)", re.MULTILINE)
UNDEFINED = re.compile(r"^(\S+?):(\d+):\d+: runtime error: (.*)$", re.MULTILINE)
ADDRESS = re.compile(r"ERROR: AddressSanitizer: (\S+) on (?:unknown )?address (0x[0-9a-f]+)")
PLACES = {
    "heap-buffer-overflow": "outside the block's shared memory",
    "stack-use-after": "in a local variable that is no more",
    "stack-": "outside a local array",
}
"""What a report's kind begins with, and where that is, of addresses that are near no tensor."""
ACCESS = re.compile(r"(READ|WRITE) of size (\d+)|caused by a (READ|WRITE) memory access")


def report_of(text: str, tensors: Mapping[str, Any]) -> str:
    """One sentence that says where a launch did what, from what the sanitizers wrote.

    Args:
        tensors: where the launch's tensors are, as harness/cuda/alone.py tells.
    """
    undefined = UNDEFINED.search(text)
    if undefined is not None:
        place = _place(text) or f"{Path(undefined[1]).name}:{undefined[2]}"
        return f"{place}: {undefined[3]}"
    found = ADDRESS.search(text)
    place = _place(text) or "a kernel"
    if found is None:
        first = next((line for line in text.splitlines() if "ERROR" in line), "no report")
        return f"{place}: {first}"
    access = ACCESS.search(text)
    if found[1] == "stack-overflow":
        return f"{place}: the thread's stack overflows"
    size = int(access[2]) if access is not None and access[2] else 0
    return f"{place} {_access(access)}, {_where(found[1], int(found[2], 16), size, tensors)}"


def _place(text: str) -> str:
    """FILE:LINE of the innermost call within a kernel's source, or else within what it includes."""
    frames = FRAME.findall(text)
    own = [frame for frame in frames if frame[0].endswith((".cu", ".cuh")) and frame[0] != "kernel.cuh"]
    return next((f"{name}:{line}" for name, line in (*own, *frames)), "")


def _access(access: re.Match[str] | None) -> str:
    if access is None:
        return "touches memory"
    verb = "reads" if "READ" in (access[1], access[3]) else "writes"
    return f"{verb} {_bytes(int(access[2]))}" if access[2] else verb


def _where(kind: str, address: int, size: int, tensors: Mapping[str, Any]) -> str:
    """Where an access began: beside or in which tensor, or in what else the kind of the report names."""
    for name, (start, end) in tensors["tensors"].items():
        if start - GUARD_BYTES // 2 <= address < end + GUARD_BYTES // 2:
            is_input = kind == "SEGV" and name in tensors["inputs"]
            return _beside(name, address - start, address - end, size, is_input=is_input)
    for prefix, place in PLACES.items():
        if kind.startswith(prefix):
            return place
    return f"where no tensor is ({kind})"


def _beside(name: str, offset: int, behind: int, size: int, *, is_input: bool) -> str:
    """Where an access of `size` bytes is, whose first byte is so far from a tensor's start and its end."""
    if offset < 0:
        return f"{_bytes(-offset)} before {name} begins"
    if behind >= 0:
        return f"{_bytes(behind)} behind {name}" if behind > 0 else f"right behind {name}"
    if behind + size > 0:
        return f"the last {_bytes(behind + size)} behind {name}"
    if is_input:
        return f"in {name}, which is an input"
    return f"{_bytes(offset)} from where {name} begins, in a gap between its rows"


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count:,} bytes"
