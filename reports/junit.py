"""Report `junit`: JUnit XML, one test case a verdict, for CI systems that draw tables from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from harness.run import Summary
from harness.verdict import Status, Verdict
from reports.console import failure_block
from reports.writer import Writer

_TAGS = {
    Status.FAILED: "failure",
    Status.XPASSED: "failure",
    Status.ERROR: "error",
    Status.SKIPPED: "skipped",
    Status.XFAILED: "skipped",
}

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


class JunitReport:
    """Collects verdicts; the file is written at the end, whole."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._suite = ET.Element("testsuite", name="mla-harness")

    def begin(self, run: dict[str, Any]) -> None:
        properties = ET.SubElement(self._suite, "properties")
        for name, value in run.items():
            ET.SubElement(properties, "property", name=name, value=str(value))

    def verdict(self, verdict: Verdict) -> None:
        seconds = verdict.seconds
        item = ET.SubElement(
            self._suite,
            "testcase",
            classname=f"{verdict.path} [{verdict.lane}]",
            name=verdict.case,
            time=f"{seconds.compile + seconds.run + seconds.oracle:.3f}",
        )
        tag = _TAGS.get(verdict.status)
        if tag is not None:
            message = _NOT_XML.sub("?", f"{verdict.status.value}: {verdict.reason}")
            ET.SubElement(item, tag, message=message).text = _NOT_XML.sub("?", failure_block(verdict))

    def end(self, summary: Summary) -> None:
        counts = summary.counts
        self._suite.set("tests", str(summary.total))
        self._suite.set("failures", str(counts[Status.FAILED] + counts[Status.XPASSED]))
        self._suite.set("errors", str(counts[Status.ERROR]))
        self._suite.set("skipped", str(counts[Status.SKIPPED] + counts[Status.XFAILED]))
        self._suite.set("time", f"{summary.seconds:.3f}")
        ET.indent(self._suite)
        ET.ElementTree(self._suite).write(self._file, encoding="utf-8", xml_declaration=True)


WRITER = Writer("junit", "JUnit XML for CI systems", JunitReport)
