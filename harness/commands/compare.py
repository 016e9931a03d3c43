"""`mla-harness compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.plan import UsageError
from harness.run import EXIT_FAILED, EXIT_PASSED
from reports import compare as report
from reports import outcomes


def compare(
    before: Annotated[
        Path, typer.Argument(help="The jsonl report, or folder of outcomes, of the earlier run.")
    ],
    after: Annotated[Path, typer.Argument(help="That of the later one.")],
) -> None:
    """Say what changed between two runs, as Markdown; fails if the later is worse.

    Of folders that report `outcomes` wrote, every line that differs is told, and any fails.
    """
    if before.is_dir() and after.is_dir():
        try:
            lines = list(outcomes.differences(before, after))
        except ValueError as error:
            raise UsageError(str(error)) from None
        print("\n".join(lines) or f"{after}: as in {before}")
        raise typer.Exit(EXIT_FAILED if lines else EXIT_PASSED)
    found = report.compare(report.read(before), report.read(after))
    print(report.markdown(found))
    raise typer.Exit(EXIT_FAILED if found.is_worse else EXIT_PASSED)


COMMAND = compare
