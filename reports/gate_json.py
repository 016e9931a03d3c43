"""Gate report `json`: the fields of diff-cover's report, which CI systems read, and ours beside them.

Fields `report_name` to `num_changed_lines` are diff-cover's, with its meaning: lines, not arms or lanes, and
only of files that were measured. `gate` has all that is known.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from harness.gate.verdict import FileVerdict, GateVerdict
from harness.verdict import plain
from reports.gate_writer import GateWriter

SCHEMA = 1


def text(verdict: GateVerdict) -> str:
    """One JSON object."""
    lines = verdict.lines
    measured = [item for item in verdict.files if item.lines.total]
    fields = {
        "report_name": ", ".join(verdict.coverage),
        "diff_name": verdict.against,
        "src_stats": {item.file: _stats(item) for item in measured},
        "total_num_lines": lines.total,
        "total_num_violations": lines.total - lines.hit,
        "total_percent_covered": lines.percent,
        "num_changed_lines": verdict.changed,
        "gate": _ours(verdict),
    }
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def _stats(item: FileVerdict) -> dict[str, Any]:
    return {
        "percent_covered": 100 * item.lines.hit / item.lines.total,
        "violation_lines": list(item.missing_lines),
        "covered_lines": list(item.covered_lines),
        "violations": [[line, None] for line in item.missing_lines],
    }


def _ours(verdict: GateVerdict) -> dict[str, Any]:
    mutation = verdict.mutation
    return {
        "schema": SCHEMA,
        "exit_code": verdict.exit_code,
        "reasons": verdict.reasons(),
        "files": [_file(item) for item in verdict.files],
        "findings": [asdict(finding) for finding in verdict.findings()],
        "mutants": None if mutation is None else {**asdict(mutation), "tried": mutation.tried},
        "whole": [asdict(item) for item in verdict.whole],
        "expired": [str(item) for item in verdict.expired],
        "warnings": list(verdict.warnings),
        "notes": list(verdict.notes),
        "failed": [asdict(item) for item in verdict.failed],
    }


def _file(item: FileVerdict) -> dict[str, Any]:
    found: dict[str, Any] = plain(asdict(item))
    # Numbers of lines are no keys in JSON, and whoever reads this has the file.
    del found["text"]
    return {**found, "passes": not item.complaints()}


WRITER = GateWriter("json", "diff-cover's fields, and everything that is known", text)
