"""`mla-harness import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def import_dump(
    file: Annotated[Path, typer.Argument(help="A dump: .json, .npz or .safetensors.")],
    operator: Annotated[str, typer.Option(help="The operator of the case.")] = "mla_step",
    form: Annotated[
        str | None, typer.Option("--format", help="json, npz or safetensors; default by the file's name.")
    ] = None,
) -> None:
    """Turn a dump of an engine's metadata into a case; what it cannot say is told on stderr."""
    from harness.dump_case import import_case
    from harness.dump_file import read_dump

    imported = import_case(read_dump(file, form), operator)
    for remark in imported.remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(imported.case)


COMMAND = import_dump
