"""The command line: `mla-harness COMMAND`, whose commands are the files of `harness/commands/`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import typer

from cases import CaseError, RuleError
from cases.discovery import discover
from cases.suite import SuiteError
from harness.coverage.sites import CoverageError
from harness.known_failures import KnownFailuresError
from harness.mutation.mutant import MutantError
from harness.plan import UsageError
from harness.pool import WorkerError
from harness.run import EXIT_HARNESS, EXIT_USAGE
from harness.startup import shadowed_package

_REFUSALS = (
    UsageError,
    CaseError,
    RuleError,
    SuiteError,
    KnownFailuresError,
    MutantError,
    CoverageError,
)

app = typer.Typer(
    name="mla-harness",
    help="Tells whether an MLA path computes the right numbers on any batch an engine can build.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Runs the command line; every refusal is one sentence on stderr and an exit code."""
    shadowed = shadowed_package()
    if shadowed is not None:
        _refuse(shadowed, EXIT_HARNESS)
    try:
        _add_commands()
        app()
    except _REFUSALS as error:
        _refuse(str(error), EXIT_USAGE)
    except (WorkerError, ImportError) as error:
        _refuse(str(error), EXIT_HARNESS)


def _add_commands() -> None:
    for item in discover("harness.commands", Path(__file__).parent / "commands", "COMMAND"):
        if item.reason is not None:
            raise ImportError(f"{item.module} must end in COMMAND: {item.reason}")
        # `import` is a keyword, and its file import_.py.
        name = item.module.rpartition(".")[2].rstrip("_")
        app.command(name=name)(cast("Callable[..., None]", item.value))


def _refuse(message: str, code: int) -> NoReturn:
    print(f"mla-harness: {message}", file=sys.stderr)
    raise SystemExit(code)
