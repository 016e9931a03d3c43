"""Gate report `github`: workflow commands, which GitHub shows as annotations at the lines of a change.

They take effect where they are printed: `gate --report github:-`.
"""

from __future__ import annotations

from harness.gate.verdict import Finding, GateVerdict
from reports.gate_writer import GateWriter


def text(verdict: GateVerdict) -> str:
    """One line a finding, failures as errors, the rest as warnings; then what has no line."""
    lines = [_annotation(item) for item in verdict.findings()]
    lines += [f"::error title=gate::{_data(f'{item} expired on {item.expires}')}" for item in verdict.expired]
    lines += [f"::error title=gate::{_data(f'{item.case} fails; {item.repro}')}" for item in verdict.failed]
    lines += [f"::warning title=gate::{_data(warning)}" for warning in verdict.warnings]
    return "\n".join(lines)


def _annotation(item: Finding) -> str:
    level = "error" if item.is_failure else "warning"
    place = f"file={_property(item.file)},line={item.first},endLine={item.last}"
    return f"::{level} {place},title={_property(f'gate: {item.kind}')}::{_data(item.text)}"


def _data(text: str) -> str:
    """A message as a workflow command takes it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A value among the command's properties, where `:` and `,` mean something too."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")


WRITER = GateWriter("github", "annotations of a GitHub workflow, to be printed", text)
