"""`mla-harness compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.run import EXIT_FAILED, EXIT_PASSED
from reports import compare as report


def compare(
    before: Annotated[Path, typer.Argument(help="The jsonl report of the earlier run.")],
    after: Annotated[Path, typer.Argument(help="That of the later one.")],
) -> None:
    """Say what changed between two runs, as Markdown; fails if the later is worse."""
    found = report.compare(report.read(before), report.read(after))
    print(report.markdown(found))
    raise typer.Exit(EXIT_FAILED if found.is_worse else EXIT_PASSED)


COMMAND = compare
