"""`mla-harness import`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.plan import UsageError


def import_dump(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A dump: .json, .npz or .safetensors; or a session's folder."),
    ],
    operator: Annotated[str, typer.Option(help="The operator of the case.")] = "mla_step",
    form: Annotated[
        str | None, typer.Option("--format", help="json, npz or safetensors; default by the file's name.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="FIRST-LAST of a session; default all.")] = None,
) -> None:
    """Turn a dump of an engine's metadata into a case; what it cannot say is told on stderr."""
    from harness.dump_case import import_case
    from harness.dump_file import read_steps

    imported = import_case(read_steps(path, form, _numbers(steps)), operator)
    for remark in imported.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(imported.case)


def _numbers(steps: str | None) -> range | None:
    """The numbers that `FIRST-LAST` names, both included.

    Raises:
        UsageError: it is something else.
    """
    if steps is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", steps)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--steps takes FIRST-LAST, as 3-17, got {steps}")
    return range(int(match[1]), int(match[2]) + 1)


COMMAND = import_dump
