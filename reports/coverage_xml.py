"""Coverage as Cobertura XML, which diff-cover, Codecov and GitLab read.

Every line of a statement is a line there, continuation lines too: a change of any of them is a change of the
statement. Arms are its conditions. An unmeasured file has its statements, never hit: what reads only this
file must not take it for covered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from harness.coverage.sites import Coverage, FileCoverage, SiteKind
from harness.startup import harness_version

DOCTYPE = '<!DOCTYPE coverage SYSTEM "http://cobertura.sourceforge.net/xml/coverage-04.dtd">\n'


def write(coverage: Coverage, root: Path, file: Path) -> None:
    """Writes it; files are relative to the root."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = ET.Element("coverage", version=harness_version(), timestamp=str(int(time.time() * 1000)))
    sources = ET.SubElement(tree, "sources")
    ET.SubElement(sources, "source").text = str(root)
    packages = ET.SubElement(tree, "packages")
    folders: dict[str, list[FileCoverage]] = {}
    for name in sorted(coverage.files):
        folders.setdefault(str(Path(name).parent), []).append(coverage.files[name])
    for folder, files in folders.items():
        package = ET.SubElement(packages, "package", name=folder.replace("/", "."), complexity="0")
        classes = ET.SubElement(package, "classes")
        elements = [_class(item) for item in files]
        classes.extend(elements)
        _set_rates(package, elements)
    _set_rates(tree, list(packages.iter("class")), totals=True)
    ET.indent(tree)
    text = ET.tostring(tree, encoding="unicode")
    file.write_text(f'<?xml version="1.0" ?>\n{DOCTYPE}{text}\n', encoding="utf-8")


def _class(file: FileCoverage) -> ET.Element:
    path = Path(file.file)
    element = ET.Element("class", name=path.name, filename=file.file, complexity="0")
    ET.SubElement(element, "methods")
    lines = ET.SubElement(element, "lines")
    lines.extend(_lines(file))
    _set_rates(element, [element])
    return element


def _lines(file: FileCoverage) -> Iterator[ET.Element]:
    hits: dict[int, int] = {}
    for site, found in file.of_kind(SiteKind.STATEMENT).items():
        for line in range(site.first, site.last + 1):
            # Of two statements on a line the one that was missed speaks.
            hits[line] = min(hits.get(line, found.count), found.count)
    arms: dict[int, list[bool]] = {}
    for site, found in file.of_kind(SiteKind.ARM).items():
        arms.setdefault(site.first, []).append(found.count > 0)
    for line in sorted(hits):
        element = ET.Element("line", number=str(line), hits=str(hits[line]))
        if line in arms:
            taken, total = sum(arms[line]), len(arms[line])
            element.set("branch", "true")
            element.set("condition-coverage", f"{100 * taken // total}% ({taken}/{total})")
        yield element


def _set_rates(element: ET.Element, classes: list[ET.Element], *, totals: bool = False) -> None:
    lines = [line for item in classes for line in item.iter("line")]
    covered = sum(line.get("hits") != "0" for line in lines)
    pairs = [line.get("condition-coverage", "").partition("(")[2].rstrip(")") for line in lines]
    counts = [pair.split("/") for pair in pairs if pair]
    taken, branches = (sum(int(count[n]) for count in counts) for n in (0, 1))
    element.set("line-rate", f"{covered / len(lines) if lines else 1:.4g}")
    element.set("branch-rate", f"{taken / branches if branches else 1:.4g}")
    if totals:
        for name, value in (
            ("lines-covered", covered),
            ("lines-valid", len(lines)),
            ("branches-covered", taken),
            ("branches-valid", branches),
        ):
            element.set(name, str(value))
        element.set("complexity", "0")
