"""A program that launches cases one by one, apart from who asks: for tools that end what they watch.

    python3 -m harness.cuda.alone LANE

It reads a request a line from its input, an object with `case`, `path` and `substituted` (sources of kernels
and what stands in their place), and answers each on its output by

    {"tensors": {NAME: [FIRST BYTE, BEHIND THE LAST]}, "inputs": [NAME]}   for every layer; on a GPU none
    {"raised": ""}    at last; or what the path raised
    {"failed": TEXT}  instead: it could not be launched

In lane `host` kernels are built by `SANITIZED` and AddressSanitizer is loaded. Every tensor lies in memory of
its own (guarded.py). What ends the process instead is told by its tool.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from harness.kernel_path import KernelPath
    from harness.launch import Launch

PR_SET_PDEATHSIG = 1


def serve(lane: str, requests: TextIO, answers: TextIO) -> None:
    """Launches what is asked for until nothing more is."""
    from harness.cuda import build
    from harness.kernel_path import path_named
    from harness.lanes import lanes

    for name, value in lanes()[lane].environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    lanes()[lane].start()
    if lane == "host":
        build.use(build.SANITIZED)
    for line in requests:
        request = json.loads(line)
        try:
            _answer(request, path_named(request["path"]), lane, answers)
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            _say(answers, {"failed": f"{type(error).__name__}: {first}"})


def _answer(request: dict[str, Any], path: KernelPath, lane: str, answers: TextIO) -> None:
    from cases import parse
    from harness.cuda import build
    from harness.lanes import lanes
    from harness.launch import Launch, PathFailure

    launch = Launch.prepare(parse(request["case"]), path, lanes()[lane])
    with ExitStack() as stack:
        for source, changed in request["substituted"].items():
            stack.enter_context(build.substituted(Path(source), Path(changed)))
        try:
            _launch_apart(launch, answers)
        except PathFailure as failure:
            _say(answers, {"raised": str(failure)})
            return
    _say(answers, {"raised": ""})


def _launch_apart(launch: Launch, answers: TextIO) -> None:
    """Layer after layer, every tensor in memory of its own.

    Raises:
        PathFailure: the path raised.
    """
    from harness.cuda.guarded import DeviceMemory, GuardedMemory
    from harness.launch import blaming_the_path

    in_place = launch.operator.in_place
    for layer in launch.layers:
        memory = GuardedMemory() if launch.lane.device == "cpu" else DeviceMemory()
        inputs = {
            name: memory.tensor(name, buffer, writable=name in in_place)
            for name, buffer in layer.batch.inputs.items()
        }
        outputs = {
            name: inputs[name] if name in in_place else memory.tensor(name, buffer, writable=True)
            for name, buffer in layer.outputs.items()
        }
        workspace = {
            name: memory.tensor(name, buffer, writable=True) for name, buffer in layer.workspace.items()
        }
        _say(answers, {"tensors": memory.places, "inputs": memory.inputs})
        with blaming_the_path():
            launch.path.run({**inputs, **layer.batch.attributes}, outputs, workspace)
            launch.lane.synchronize()
        memory.close()


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def main() -> None:
    """The program."""
    # It must not outlive who asks; and compilers that it starts are not to be watched.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.pop("LD_PRELOAD", None)
    # What paths and libraries print is no answer.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
