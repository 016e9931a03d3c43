"""Coverage told: the table, Cobertura as diff-cover reads it, and pages that show a source as it is."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

from harness.coverage.sites import Coverage, FileCoverage, Hits, Site, SiteKind, digest_of
from reports import coverage_html, coverage_table, coverage_xml

SOURCE = '''"""A kernel & more."""
x = call(
    "<script>alert(1)</script>",
)
if x:
    y = 1
z = 2; w = 3
'''


def statement(first, last=None, column=0):
    return Site(first, last or first, SiteKind.STATEMENT, "", column)


def coverage_of(text=SOURCE, name="pkg/k.py", unmeasured=""):
    sites = {
        statement(2, 4): Hits(3, {"process"}, {"a case", "b </script> case"}),
        statement(5): Hits(3, {"process"}),
        statement(6, column=4): Hits(),
        statement(7): Hits(2, {"process"}),
        statement(7, column=7): Hits(),
        Site(5, 5, SiteKind.ARM, "true"): Hits(),
        Site(5, 5, SiteKind.ARM, "false"): Hits(3, {"process"}, {"a case"}),
        Site(2, 4, SiteKind.LANE, "off", 4): Hits(),
    }
    return Coverage({name: FileCoverage(name, "triton", digest_of(text), sites, unmeasured)})


@pytest.fixture
def project(tmp_path):
    """A folder with the source."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "k.py").write_text(SOURCE)
    return tmp_path


# ---- table ---------------------------------------------------------------------------------------


def test_the_table_has_a_files_shares_and_what_was_missed():
    header, row, total = coverage_table.text(coverage_of()).splitlines()
    assert header.split() == ["file", "statements", "arms", "lanes", "missing"]
    assert " ".join(row.split()) == "pkg/k.py 3/5 60.0 % 1/2 50.0 % 0/1 0.0 % 6-7, 5 true, 2-4 off"
    assert total == "kernels: 3/5 60.0 % statements, 1/2 50.0 % arms, 0/1 0.0 % lanes"


def test_an_unmeasured_kernel_is_listed_and_counts_for_nothing():
    coverage = coverage_of()
    coverage.merge(coverage_of(name="pkg/other.cu", unmeasured="no lane that ran built it with probes"))
    lines = coverage_table.text(coverage).splitlines()
    assert lines[2].split(maxsplit=4) == [
        *("pkg/other.cu", "-", "-", "-"),
        "unmeasured: no lane that ran built it with probes",
    ]
    assert lines[-2].startswith("kernels: 3/5 ")
    assert lines[-1] == "unmeasured: pkg/other.cu: no lane that ran built it with probes"


def test_host_files_with_nothing_missing_are_counted():
    coverage = Coverage()
    for name, count in (("whole.py", 1), ("part.py", 0)):
        sites = {statement(1): Hits(1), statement(2): Hits(count)}
        coverage.files[name] = FileCoverage(name, "python", "", sites)
    text = coverage_table.text(coverage)
    assert "part.py" in text
    assert "whole.py" not in text
    assert "1 host files more with every statement and arm hit" in text
    assert coverage_table.text(coverage, with_hosts=False).splitlines()[1:] == [
        "host code: 3/4 75.0 % statements, none arms, none lanes"
    ]


@pytest.mark.parametrize(
    ("hit", "total", "text"),
    [(0, 10, "0.0 %"), (1, 10**6, "0.1 %"), (999_999, 10**6, "99.9 %"), (2, 3, "66.7 %"), (5, 5, "100.0 %")],
)
def test_nothing_is_rounded_to_all_or_nothing(hit, total, text):
    assert coverage_table.percent(hit, total) == text


# ---- Cobertura -----------------------------------------------------------------------------------


def test_every_line_of_a_statement_is_a_line_and_arms_are_its_conditions(project):
    coverage_xml.write(coverage_of(), project, project / "out" / "coverage.xml")
    tree = ET.parse(project / "out" / "coverage.xml").getroot()  # noqa: S314 written by ourselves
    assert tree.findtext("sources/source") == str(project)
    (element,) = tree.iter("class")
    assert element.get("filename") == "pkg/k.py"
    lines = {line.get("number"): line for line in element.iter("line")}
    hits = {number: line.get("hits") for number, line in lines.items()}
    # Of two statements on a line the one that was missed speaks.
    assert hits == {"2": "3", "3": "3", "4": "3", "5": "3", "6": "0", "7": "0"}
    assert lines["5"].get("condition-coverage") == "50% (1/2)"
    assert [number for number, line in lines.items() if line.get("branch")] == ["5"]
    assert (tree.get("lines-covered"), tree.get("lines-valid")) == ("4", "6")
    assert (tree.get("branches-covered"), tree.get("branches-valid")) == ("1", "2")
    assert (tree.get("line-rate"), tree.get("branch-rate")) == ("0.6667", "0.5")


def test_diff_cover_finds_the_changed_lines_that_were_missed(project):
    pytest.importorskip("diff_cover")

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=project, check=True, capture_output=True)

    git("init", "-b", "main")
    git("commit", "--allow-empty", "-m", "empty")
    git("checkout", "-b", "change")
    git("add", "pkg")
    git("commit", "-m", "kernel")
    coverage_xml.write(coverage_of(), project, project / "coverage.xml")
    code = "from diff_cover.diff_cover_tool import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "coverage.xml",
        "--compare-branch",
        "main",
        "--format",
        "json:d.json",
    ]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (stats,) = json.loads((project / "d.json").read_text())["src_stats"].values()
    assert stats["violation_lines"] == [6, 7]
    # The continuation lines of the call count.
    assert stats["covered_lines"] == [2, 3, 4, 5]


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture
def page(project):
    coverage_html.write(coverage_of(), project, project / "out")
    return (project / "out" / coverage_html.page_name("pkg/k.py")).read_text()


def test_a_page_shows_the_source_escaped_with_its_states(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    states = dict(re.findall(r'<tr class="(\w*)" id="L(\d+)">', page))
    assert "miss" in states
    by_line = {number: state for state, number in re.findall(r'<tr class="(\w*)" id="L(\d+)">', page)}
    assert by_line == {"1": "", "2": "part", "3": "hit", "4": "hit", "5": "part", "6": "miss", "7": "miss"}


def test_a_page_shows_arms_lanes_and_the_cases_of_a_line(page):
    row = next(line for line in page.splitlines() if 'id="L5"' in line)
    assert '<span class="site miss" title="column 1, hit 0 times">true</span>' in row
    assert '<span class="site hit" title="column 1, hit 3 times">false</span>' in row
    assert 'data-cases="0"' in row
    assert "off</span>" in next(line for line in page.splitlines() if 'id="L2"' in line)


def test_cases_cannot_end_the_script_they_stand_in(page):
    data = page.partition('id="cases">')[2].partition("</script>")[0]
    assert json.loads(data) == ["a case", "b </script> case"]


def test_pages_stand_alone(page, project):
    index = (project / "out" / "index.html").read_text()
    for text in (page, index):
        assert not re.search(r"https?://|src=|@import|url\(", text.replace("http-equiv", ""))
        assert "prefers-color-scheme: dark" in text
    assert f'href="{coverage_html.page_name("pkg/k.py")}"' in index


def test_the_index_begins_with_all_kernels_together(project, page):
    rows = re.findall(r"<tr.*?</tr>", (project / "out" / "index.html").read_text())
    assert rows[1].startswith('<tr class="total"><td>all kernels</td><td>3/5 60.0 %</td>')
    assert "pkg/k.py" in rows[2]


def test_a_page_leads_to_what_was_missed(page):
    note = next(line for line in page.splitlines() if "missed: " in line)
    assert 'statements missed: <a href="#L6">6-7</a>; arms missed: <a href="#L5">5</a>' in note
    assert 'lanes missed: <a href="#L2">2-4</a>' in note


def test_a_source_that_changed_since_or_is_gone_is_said_to(project):
    (project / "pkg" / "k.py").write_text("x = 1\n")
    coverage_html.write(coverage_of(), project, project / "out")
    page = project / "out" / coverage_html.page_name("pkg/k.py")
    assert "is not the one that was measured" in page.read_text()
    (project / "pkg" / "k.py").unlink()
    coverage_html.write(coverage_of(), project, project / "out")
    assert "cannot be read" in page.read_text()


def test_files_of_like_names_have_pages_of_their_own():
    names = ["a/b.py", "a_b.py", "a_/b.py", "a/_b.py", "a__b.py"]
    assert len({coverage_html.page_name(name) for name in names}) == len(names)
