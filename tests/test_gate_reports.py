"""What the gate's reports say, and that nothing which they quote means anything to who shows it."""

import datetime as dt
import json
from html.parser import HTMLParser

import pytest

from harness.coverage.sites import Site, SiteKind
from harness.gate.exemptions import Exemption
from harness.gate.policy import HOST, KERNEL
from harness.gate.verdict import FailedCase, FileVerdict, GateVerdict, MutationVerdict, Share, Survivor
from reports.gate_console import against_base
from reports.gate_markdown import MARKER, SPECIAL, code, prose
from reports.gate_writer import gate_writers
from reports.writer import writers

CROSS = "\N{CROSS MARK}"
NASTY = "a|b`<script>alert(1)</script>*_[x](y)\\@team #7 ~~&$\r\nnext"

KERNEL_FILE = FileVerdict(
    "csrc/fill.cu",
    "cuda",
    changed=9,
    limits=KERNEL,
    covered_lines=(3, 4, 9),
    missing_lines=(6, 7),
    arms=Share(1, 2),
    missing_arms=(Site(3, 3, SiteKind.ARM, "true"),),
    lanes=Share(1, 2),
    missing_lanes=(Site(4, 5, SiteKind.LANE, "on"),),
    whole=Share(95, 100),
    base=Share(97, 100),
    text={3: "if (i < n) {", 4: "x = 1;", 6: "y = 2;", 7: "z = 3;", 9: "}"},
)
HOST_FILE = FileVerdict("engine/plan.py", "python", changed=3, limits=HOST, covered_lines=(1, 2))
NEW_FILE = FileVerdict(
    "csrc/new.cu", "cuda", changed=4, limits=KERNEL, unmeasured="nothing measured it", is_required=True
)
MUTATION = MutationVerdict(
    eligible=70,
    accepted=2,
    caught=58,
    survivors=(Survivor("csrc/fill.cu", 6, "+ becomes -", "a + b", "a - b", 2),),
    stillborn=1,
    seed=4,
    limit=70,
    seconds=41.2,
    files=("csrc/fill.cu",),
)
EXPIRED = Exemption(3, "csrc/a.cu", "arm", "why", "who", dt.date(2026, 1, 31), function="f")
FAILED = FailedCase(
    "mla_decode/decode:1", "triton/mla_decode", "interpreted", "failed", "off", "python3 -m harness repro 'X'"
)
VERDICT = GateVerdict(
    "abc, the merge base with main",
    coverage=("out/coverage/coverage.json",),
    changed=16,
    files=(HOST_FILE, KERNEL_FILE, NEW_FILE),
    mutation=MUTATION,
    expired=(EXPIRED,),
    warnings=("exemption 9 is not needed",),
    notes=("1 changed files are excluded by the policy",),
    failed=(FAILED,),
)
CLEAN = GateVerdict("abc", files=(HOST_FILE,), changed=3)
HOSTILE = GateVerdict(
    NASTY,
    files=(
        FileVerdict(NASTY, "cuda", 1, KERNEL, missing_lines=(1,), text={1: NASTY}),
        FileVerdict(f"{NASTY}.cu", "cuda", 1, KERNEL, unmeasured=NASTY, is_required=True),
    ),
    mutation=MutationVerdict(
        1, 0, 0, (Survivor(NASTY, 1, NASTY, NASTY, NASTY, 1),), limit=70, notes=(NASTY,)
    ),
    expired=(Exemption(1, NASTY, "arm", NASTY, NASTY, dt.date(2026, 1, 1), text=NASTY),),
    warnings=(NASTY,),
    failed=(FailedCase(NASTY, NASTY, NASTY, "failed", NASTY, NASTY),),
)


def report(name, verdict=VERDICT):
    return gate_writers()[name].text(verdict)


def test_the_formats_are_found_by_listing_and_share_two_names_with_those_of_run():
    assert list(gate_writers()) == ["console", "github", "html", "json", "markdown"]
    assert set(gate_writers()) & set(writers()) == {"console", "html"}


# ---- Markdown ------------------------------------------------------------------------------------


def test_a_comment_begins_with_its_mark_and_has_a_row_a_file_the_failing_ones_first():
    lines = report("markdown").splitlines()
    assert lines[0] == MARKER
    assert lines[3].startswith("5 of 7 changed lines with statements are hit (71 %): not passed, exit code 8")
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2:] == [
        f"| {CROSS} <code>csrc/fill.cu</code> | 9 | 3 of 5 | 6-7 | 1 of 2 | 1 of 2 | 1 | 97 % to 95 % |",
        f"| {CROSS} <code>csrc/new.cu</code> | 4 | - | **nothing measured it** | - | - | - | - |",
        "| <code>engine/plan.py</code> | 3 | 2 of 2 | - | - | - | - | - |",
    ]


def test_details_are_folded_and_name_failing_cases_missing_places_and_survivors():
    said = report("markdown")
    assert said.count("<details>") == said.count("</details>") == 4
    for line in (
        "<details><summary>Failing cases (1)</summary>",
        "<br><code>python3 -m harness repro &#39;X&#39;</code>",
        "<details><summary>What is missing (4)</summary>",
        "- <code>csrc/fill.cu:6</code> line: no case runs these lines <code>y = 2;</code>",
        "- <code>csrc/fill.cu:3</code> arm: the condition was never true <code>if (i &#60; n) {</code>",
        "- <code>csrc/fill.cu:4</code> lane: no lane of this mask was ever on <code>x = 1;</code>",
        "- <code>csrc/new.cu:1</code> unmeasured: nothing measured it",
        "- <code>csrc/fill.cu:6</code> + becomes -: <code>a + b</code> as <code>a - b</code>, 2 cases did",
        "58 of 59 caught, a sample of 70 of seed 4, 41 s; 2 accepted in the records are not counted; 1",
        "- Warning: exemption 9 is not needed",
        "- exemption 3 (csrc/a.cu, arm f; who: why) expired on 2026-01-31",
    ):
        assert line in said, line
    assert "<details>" not in report("markdown", CLEAN)


def test_nothing_that_a_comment_quotes_means_anything():
    said = report("markdown", HOSTILE)
    ours = {"<code>", "</code>", "<details>", "</details>", "<summary>", "</summary>", "<br>", MARKER}
    rest = said
    for tag in ours:
        rest = rest.replace(tag, "")
    assert "<" not in rest
    assert "`" not in rest
    assert "@" not in rest
    assert "script" in rest
    # A table's rows have the columns of its head: no bar of a name splits a cell.
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    # A name with a line break leaves no line of its own.
    assert not any(line.startswith("next") for line in said.splitlines())


def test_special_characters_are_written_by_number_and_nobody_is_mentioned():
    every = "".join(sorted(SPECIAL))
    assert not (set(prose(every)) | set(code(every)[6:-7])) & (SPECIAL - set("&#"))
    assert prose("@kernels fixes #7") == "&#64;&#8203;kernels fixes &#35;&#8203;7"
    assert code("a\n  b") == "<code>a b</code>"


def test_a_comment_fits_what_github_takes_however_much_is_missing():
    files = tuple(
        FileVerdict(
            f"csrc/{'long/' * 20}{number}.cu",
            "cuda",
            400,
            KERNEL,
            missing_lines=tuple(range(1, 800, 2)),
            text=dict.fromkeys(range(1, 800), NASTY * 9),
        )
        for number in range(300)
    )
    survivors = tuple(Survivor(files[0].file, 1, NASTY * 9, NASTY * 9, NASTY * 9, 1) for _ in range(60))
    mutation = MutationVerdict(60, survivors=survivors, limit=70)
    failed = (FailedCase("x" * 5000, "p", "l", "failed", NASTY * 99, "r" * 5000),) * 300
    verdict = GateVerdict("abc", files=files, mutation=mutation, failed=failed)
    assert len(report("markdown", verdict)) <= 65_536


# ---- the other formats ---------------------------------------------------------------------------


def test_json_has_the_fields_of_diff_cover_and_ours_beside_them():
    found = json.loads(report("json"))
    assert found["report_name"] == "out/coverage/coverage.json"
    assert found["diff_name"] == "abc, the merge base with main"
    assert found["src_stats"] == {
        "csrc/fill.cu": {
            "percent_covered": 60.0,
            "violation_lines": [6, 7],
            "covered_lines": [3, 4, 9],
            "violations": [[6, None], [7, None]],
        },
        "engine/plan.py": {
            "percent_covered": 100.0,
            "violation_lines": [],
            "covered_lines": [1, 2],
            "violations": [],
        },
    }
    totals = ("total_num_lines", "total_num_violations", "total_percent_covered", "num_changed_lines")
    assert [found[key] for key in totals] == [7, 2, 71, 16]
    ours = found["gate"]
    assert ours["exit_code"] == 8
    assert [item["passes"] for item in ours["files"]] == [True, False, False]
    assert ours["mutants"]["tried"] == 60
    assert ours["failed"][0]["repro"] == FAILED.repro
    assert {item["kind"] for item in ours["findings"]} == {"line", "arm", "lane", "unmeasured", "mutant"}
    json.loads(report("json", HOSTILE))


def test_json_of_a_change_without_statements_passes_as_diff_covers_does():
    found = json.loads(report("json", GateVerdict("abc", changed=3)))
    assert (found["total_num_lines"], found["total_percent_covered"], found["src_stats"]) == (0, 100, {})


def test_annotations_stand_at_their_lines_and_only_failures_are_errors():
    lines = report("github").splitlines()
    assert "::error file=csrc/fill.cu,line=6,endLine=7,title=gate%3A line::no case runs these lines" in lines
    assert "::error file=csrc/new.cu,line=1,endLine=1,title=gate%3A unmeasured::nothing measured it" in lines
    # Enough mutants are caught: the one that is not is told.
    assert any(
        line.startswith("::warning file=csrc/fill.cu,line=6,endLine=6,title=gate%3A mutant::")
        for line in lines
    )
    assert "::warning title=gate::exemption 9 is not needed" in lines
    assert report("github", CLEAN) == ""


def test_no_annotation_is_split_by_what_it_quotes():
    lines = report("github", HOSTILE).splitlines()
    assert all(line.startswith(("::error ", "::warning ")) for line in lines)
    assert len(lines) == 3 + 3
    hostile = GateVerdict(
        "x", files=(FileVerdict("a,line=1::b%\n.cu", "cuda", 1, KERNEL, missing_lines=(2,)),)
    )
    assert report("github", hostile).startswith("::error file=a%2Cline=1%3A%3Ab%25%0A.cu,line=2,")


class Page(HTMLParser):
    """Tags still open, everything asked of other files, and the text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.asked, self.tags, self.said = [], [], set(), ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.asked += [value for name, value in attributes if name in ("src", "href") and value[0] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data


@pytest.mark.parametrize("verdict", [VERDICT, HOSTILE, CLEAN, GateVerdict("abc")])
def test_the_page_is_well_formed_needs_no_other_file_and_runs_nothing(verdict):
    page = Page()
    page.feed(report("html", verdict))
    assert page.open == []
    assert page.asked == []
    assert "script" not in page.tags
    assert "prefers-color-scheme" in page.said or "color-scheme: light dark" in page.said


def test_the_page_shows_touched_lines_with_what_is_missing_there():
    said = report("html")
    assert '<span class="miss">    6  y = 2;' in said
    assert '<span class="hit">    3  if (i &lt; n) { <i>the condition was never true</i></span>' in said
    assert "nothing measured it" in said


def test_the_console_ends_with_the_sum_and_the_exit_code():
    said = report("console").splitlines()
    assert said[-1] == "5 of 7 changed lines with statements are hit (71 %): not passed, exit code 8"
    assert report("console", CLEAN).splitlines()[-1].endswith("(100 %): passed")
    assert said[1].split("  ")[0] == "changed"
    many = FileVerdict("a.cu", "cuda", 1, KERNEL, missing_lines=tuple(range(1, 500, 2)))
    assert "... and 190 more: see the other reports" in report("console", GateVerdict("x", files=(many,)))


def test_a_file_is_compared_with_the_base_where_both_are_known():
    assert against_base(KERNEL_FILE) == "97 % to 95 %"
    assert against_base(FileVerdict("a", "cuda", 1, KERNEL, whole=Share(1, 2))) == "50 %"
    assert against_base(FileVerdict("a", "cuda", 1, KERNEL)) == "-"
