"""Report `jsonl`: one JSON object a line; the first says what ran, the last how it ended.

{"schema": 1, "run": {...}}
{"schema": 1, "case": "...", ..., "repro": "..."}
{"end": {"counts": {...}, "seconds": ..., "compile_variants": ..., "exit_code": ...}, "interrupted": false}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.run import Summary
from harness.verdict import SCHEMA, Verdict
from reports.writer import Writer


class JsonlReport:
    """Writes and flushes line by line."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("w", encoding="utf-8")

    def begin(self, run: dict[str, Any]) -> None:
        self._line({"schema": SCHEMA, "run": run})

    def verdict(self, verdict: Verdict) -> None:
        self._line({"schema": SCHEMA, **verdict.to_json()})

    def end(self, summary: Summary) -> None:
        end = {
            "counts": {status.value: count for status, count in summary.counts.items()},
            "seconds": round(summary.seconds, 3),
            "compile_variants": summary.compile_variants,
            "exit_code": summary.exit_code,
        }
        self._line({"end": end, "interrupted": summary.interrupted})
        self._stream.close()

    def _line(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()


WRITER = Writer("jsonl", "one JSON object a verdict, everything that is known", JsonlReport)
