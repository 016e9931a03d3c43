"""Failing cases of a run, read back from its jsonl report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from harness.gate.verdict import FailedCase
from harness.plan import UsageError
from harness.verdict import Status

BAD = {Status.FAILED.value, Status.ERROR.value, Status.XPASSED.value}


def failed_cases(file: Path) -> Iterator[FailedCase]:
    """Every verdict of a jsonl report that makes a run fail.

    Raises:
        UsageError: the file cannot be read or is no such report.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read verdicts from {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            if found.get("status") in BAD:
                keys = ("case", "path", "lane", "status", "reason", "repro")
                yield FailedCase(*(str(found[key]) for key in keys))
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{file}:{number} is no verdict as `run --report jsonl` writes it: {error}"
            ) from None
