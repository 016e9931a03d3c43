"""The HTML report: what it says without its script, what the script reads, and what a browser shows of it."""

import base64
import hashlib
import html
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cases import parse
from harness.paging import lay_out
from harness.picture import draw
from harness.run import Summary
from harness.verdict import CheckResult, Kind, Seconds, Status, Verdict, Where, Worst
from reports import html as report
from reports.writer import writers

ROOT = Path(__file__).resolve().parent.parent
CASE = "mla_decode/idle,decode:1,decode:164,draft:130+3,decode:700@sys,decode:900@sys,pad:3/heads=16"
HOSTILE = """</script><script>pwned = 1</script><img src=x onerror='pwned = 1'>"&amp;'`${1}$&\u2028"""


def check(status=Status.PASSED, ratio=0.3, tensor="out", **changed):
    failed = status is Status.FAILED
    return CheckResult(
        "values",
        status,
        tensor,
        Kind.WRONG if failed else None,
        "48 of 160 rows are over budget" if failed else "",
        **{"error": ratio * 4e-3, "budget": 4e-3, "budget_source": "the bf16 floor", **changed},
    )


def verdict(case=CASE, status=Status.PASSED, path="triton/mla_decode", lane="interpreted", **changed):
    """A verdict of a status, with what its status needs."""
    if status is Status.PASSED:
        parts = {"checks": (check(),)}
    elif status is Status.SKIPPED:
        parts = {"kind": Kind.UNAVAILABLE, "reason": "no such library"}
    else:
        where = Where(rows="2,4-5", tokens="1,5-6", heads="0-7", dims="3-9")
        worst = Worst((5, 2, 7), float("nan"), 0.25)
        parts = {"kind": Kind.WRONG, "reason": "48 of 160 rows are over budget"}
        parts["checks"] = (
            check(Status.FAILED, 145.7, where=where, worst=worst),
            CheckResult("guard", Status.PASSED, "out"),
        )
    operator = case.partition("/")[0]
    parts = {"environment": {"torch": "2.11"}, "seconds": Seconds(0.0, 1.25, 0.5), **parts, **changed}
    return Verdict(case, operator, path, lane, status, **parts)


def bare(**changed):
    """A failing verdict without checks, as of a crash."""
    return verdict(status=Status.ERROR, kind=Kind.CRASH, reason="signal 11", checks=(), **changed)


MIXED = [
    verdict("mla_decode/decode:5"),
    verdict("mla_decode/decode:6", path="cuda/mla_decode", lane="host"),
    verdict("position_ids/decode:5", path="triton/position_ids", checks=()),
    verdict(CASE, Status.FAILED),
    verdict("mla_decode/decode:7", Status.FAILED, checks=(check(Status.FAILED, 1.5),)),
    verdict("mla_decode/decode:5", Status.SKIPPED, path="paddle/mla_decode"),
    verdict("mla_decode/decode:8", Status.XFAILED),
    bare(case="mla_decode/decode:9"),
]


def write(file, verdicts, *, interrupted=False):
    """The page of a run that reached these verdicts."""
    summary = Summary()
    opened = writers()["html"].open(file)
    opened.begin({"version": "1.2", "lane": "interpreted", "tasks": 99, "suites": ["smoke"]})
    for item in verdicts:
        summary.add(item)
        opened.verdict(item)
    summary.interrupted = interrupted
    opened.end(summary)
    return file.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def figures(tmp_path, verdicts):
    return data_of(write(tmp_path / "page.html", verdicts))["figures"]


def static_rows(page):
    """The rows of the tables that need no script: [cell, ...]."""
    body = page.partition("<noscript>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


# ---- without the script --------------------------------------------------------------------------


def test_the_summary_counts_by_operator_and_by_path_and_lane(tmp_path):
    rows = static_rows(write(tmp_path / "page.html", MIXED))
    assert rows[0] == ["operator", "passed", "failed", "skipped", "xfailed", "error", "of budget", "run, s"]
    assert rows[1] == ["mla_decode", "2", "2", "1", "1", "1", "146 &times;", "8.8"]
    assert rows[2] == ["position_ids", "1", "", "", "", "", "", "1.2"]
    paths = {tuple(row[:2]): row[2:7] for row in rows[4:]}
    assert paths["triton/mla_decode", "interpreted"] == ["1", "2", "", "1", "1"]
    assert paths["cuda/mla_decode", "host"] == ["1", "", "", "", ""]
    assert paths["paddle/mla_decode", "interpreted"] == ["", "", "1", "", ""]


def test_what_failed_is_named_first_and_leads_the_tables(tmp_path):
    page = write(tmp_path / "page.html", MIXED)
    assert '<h1 class="bad">3 of 7 verdicts failed</h1>' in page
    assert static_rows(page)[4][0] == "triton/mla_decode"


def test_without_the_script_failures_have_their_line_to_rerun(tmp_path):
    noscript = write(tmp_path / "page.html", MIXED).partition("<noscript>")[2].partition("</noscript>")[0]
    assert html.escape(MIXED[3].repro) in noscript
    assert noscript.count("<li>") == 3
    many = [bare(case=f"mla_decode/decode:{number}") for number in range(1, 41)]
    noscript = write(tmp_path / "page.html", many).partition("<noscript>")[2]
    assert noscript.count("<li>") == report.MAX_PLAIN_FAILURES
    assert "and 20 more" in noscript


@pytest.mark.parametrize(
    ("verdicts", "headline"),
    [
        ([], "Nothing was judged"),
        ([verdict(status=Status.SKIPPED)], "Nothing was judged"),
        ([verdict()], "None of 1 verdicts failed"),
    ],
)
def test_a_run_without_failures_says_so(tmp_path, verdicts, headline):
    assert f">{headline}</h1>" in write(tmp_path / "page.html", verdicts)


def test_an_interrupted_run_leaves_a_page_of_what_ran(tmp_path):
    page = write(tmp_path / "page.html", MIXED[:4], interrupted=True)
    assert "interrupted: this is what ran" in page
    assert "exit code 130" in page
    assert len(data_of(page)["verdicts"]) == 4


def test_the_command_writes_a_page_of_what_it_ran(command, tmp_path):
    file = tmp_path / "new" / "page.html"
    arguments = ("--path", "triton/*", "--lane", "interpreted", "--workers", "1", "--report", f"html:{file}")
    assert command("harness", "run", "position_ids/decode:5", *arguments).returncode == 0
    page = file.read_text()
    assert ">None of 1 verdicts failed</h1>" in page
    assert "lane interpreted; 1 passed, 0 failed, 0 skipped" in page
    assert "position_ids/decode:5" in data_of(page)["texts"]


# ---- one file that cannot be broken out of -------------------------------------------------------


def hostile():
    wrong = check(Status.FAILED, 9.0, tensor=HOSTILE, where=Where(rows=HOSTILE, tokens=HOSTILE, dims=HOSTILE))
    parts = {"reason": HOSTILE, "checks": (replace(wrong, reason=HOSTILE, budget_source=HOSTILE),)}
    parts["environment"] = {HOSTILE: HOSTILE}
    return Verdict(HOSTILE, "mla_decode", HOSTILE, HOSTILE, Status.FAILED, Kind.WRONG, **parts)


def test_texts_of_a_verdict_are_nowhere_markup(tmp_path):
    page = write(tmp_path / "page.html", [hostile(), verdict()])
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert page.count("pwned") > 5
    assert data_of(page)["texts"].count(HOSTILE) == 1


def test_what_cannot_be_written_as_utf8_is_no_reason_to_lose_the_page(tmp_path):
    page = write(tmp_path / "page.html", [verdict(status=Status.ERROR, reason="lone \udc80 surrogate")])
    assert "lone \\udc80 surrogate" in page


def test_the_page_loads_nothing_and_its_policy_allows_its_own_script_and_style_alone(tmp_path):
    page = write(tmp_path / "page.html", MIXED)
    outside = page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert not re.search(r"https?:|src=|@import|url\(|<link", outside)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    for kind in ("script", "style"):
        text = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_5000_failing_verdicts_take_less_than_5_mb(tmp_path):
    shapes = [MIXED[3], MIXED[4], replace(MIXED[3], checks=MIXED[3].checks * 6)]
    verdicts = []
    for number in range(5000):
        shape = shapes[number % 3]
        checks = tuple(replace(item, error=item.error and item.error * (1 + number)) for item in shape.checks)
        digest = hashlib.sha256(str(number).encode()).hexdigest()[:32]
        # Every third batch is as large as a drawing gets.
        case = f"mla_decode/decode:{number + 900}x30" if number % 3 == 2 else f"{CASE},seed={number}"
        parts = {"checks": checks, "inputs_digest": digest, "outputs_digest": digest[::-1]}
        verdicts.append(replace(shape, case=case, **parts))
    page = write(tmp_path / "page.html", verdicts)
    assert len(data_of(page)["verdicts"]) == 5000
    assert len(page) < 5e6


def test_a_report_imports_neither_torch_nor_a_path(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from harness.run import Summary
from harness.verdict import Kind, Status, Verdict
from reports.html import HtmlReport
report = HtmlReport(Path({str(tmp_path / "page.html")!r}))
report.verdict(Verdict({CASE!r}, "mla_decode", "p", "host", Status.ERROR, Kind.CRASH, "signal 11"))
report.end(Summary())
print(sorted(name for name in sys.modules if name == "torch" or name.startswith("harness.paths")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- the batch that is drawn ---------------------------------------------------------------------


def test_the_drawn_batch_is_the_one_that_show_prints(tmp_path):
    (figure,) = figures(tmp_path, [verdict(status=Status.FAILED)])
    told = draw(parse(CASE)).partition("shared)\n")[2].splitlines()
    slots = [row for row in figure["rows"] if row[0] >= 0]
    for (slot, text, *_, blocks), line in zip(slots, told, strict=True):
        assert line.split()[:2] == [str(slot), text]
        printed = re.findall(r" (@?)(\d+):[#+.]", line)
        drawn = [("@", str(~block)) if block < 0 else ("", str(block)) for block in blocks]
        assert drawn[:6] == printed[:6]
    assert figure["rows"][-1][:2] == [-1, "pad:3"]
    assert (figure["tokens"], figure["heads"], figure["block"]) == (10, 16, 64)
    assert figure["starts"] == [[1, 0], [2, 1], [3, 2], [4, 5], [5, 6], [-1, 7]]


def test_a_long_row_keeps_its_first_and_its_last_blocks(tmp_path):
    case = "mla_decode/decode:6400/heads=2,pages=sequential"
    (figure,) = figures(tmp_path, [bare(case=case)])
    assert figure["rows"] == [[0, "decode:6400", 6400, 1, 101, [*range(6), *range(95, 101)]]]


def test_of_many_slots_the_failing_ones_are_drawn_and_the_others_counted(tmp_path):
    where = Where(rows="3000-3001,4999")
    wrong = check(Status.FAILED, 9.0, where=where)
    failing = verdict("mla_decode/decode:3x5000/heads=2", Status.FAILED, checks=(wrong,))
    (figure,) = figures(tmp_path, [failing])
    drawn = [row[0] for row in figure["rows"] if not isinstance(row, int)]
    left_out = sum(row for row in figure["rows"] if isinstance(row, int))
    assert {3000, 3001, 4999} <= set(drawn)
    assert len(drawn) == report.MAX_ROWS
    assert len(drawn) + left_out == 5000


def test_idle_slots_side_by_side_are_one_line(tmp_path):
    (figure,) = figures(tmp_path, [bare(case="mla_decode/decode:3,idlex900,decode:4,idle/heads=2")])
    told = [(row[0], row[1]) for row in figure["rows"]]
    assert told == [(0, "decode:3"), (1, "idlex900"), (901, "decode:4"), (902, "idle")]


def test_an_idle_slot_that_fails_is_a_line_of_its_own(tmp_path):
    wrong = check(Status.FAILED, where=Where(rows="5"))
    failing = verdict("mla_decode/idlex9,decode:3/heads=2", Status.FAILED, checks=(wrong,))
    (figure,) = figures(tmp_path, [failing])
    assert [(row[0], row[1]) for row in figure["rows"]] == [
        (0, "idlex5"),
        (5, "idle"),
        (6, "idlex3"),
        (9, "decode:3"),
    ]


def test_the_failing_step_and_layer_are_drawn(tmp_path):
    case = "mla_step/prefill:130..hit:130+17,decode:65/heads=2,layers=2,block=64+16"
    wrong = check(Status.FAILED, 9.0, tensor="out[1]", where=Where(steps="1"))
    failing = verdict(case, Status.FAILED, path="triton/mla_step", checks=(check(tensor="out[0]"), wrong))
    (figure,) = figures(tmp_path, [failing])
    assert (figure["step"], figure["layer"], figure["block"]) == (1, 1, 16)
    assert [row[1] for row in figure["rows"]] == ["hit:130+17", "decode:65"]


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    huge = bare(case="mla_decode/decode:2000000000/block=1")
    assert figures(tmp_path, [bare(case="no case at all"), huge, verdict()]) == []


# ---- in a browser --------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--window-size=1300,1000",
)


class Browser:
    """Headless Chromium, spoken to through the DevTools protocol over a pair of pipes."""

    def __init__(self, executable, profile):
        commands, ours = os.pipe()
        answers, theirs = os.pipe()
        shell = f'exec "$@" 3<&{commands} 4>&{theirs}'
        arguments = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *arguments],
            pass_fds=(commands, theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(theirs)
        self._commands, self._answers = os.fdopen(ours, "wb", 0), answers
        self._numbers, self._unread, self._session = itertools.count(1), b"", {}
        self.events = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(item["targetId"] for item in targets if item["type"] == "page")
        self._session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], 60)
            assert ready, "the browser has not answered within 60 s"
            read = os.read(self._answers, 2**16)
            assert read, "the browser has gone"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, file):
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        end = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < end, "the page has not loaded within 60 s"
            self.events.append(self._read())

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def theme(self, name):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key):
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9}[key]
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text
            )

    def complaints(self):
        told = {"Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"}
        return [event for event in self.events if event.get("method") in told]

    def close(self):
        self._process.kill()
        self._process.wait()
        self._commands.close()
        os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser; continuous integration says MLA_BROWSER=required and must have one."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        assert os.environ.get("MLA_BROWSER") != "required", f"none of {', '.join(NAMES)} is on PATH"
        pytest.skip(f"none of {', '.join(NAMES)} is on PATH")
    started = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """(verdicts) -> the browser with their page open."""

    def open_page(verdicts):
        file = tmp_path / "page.html"
        write(file, verdicts)
        browser.open(file)
        return browser

    yield open_page
    assert browser.complaints() == []


def choose(browser, name, value):
    control = f"document.getElementById('by-{name}')"
    browser.js(f"{control}.value = {json.dumps(value)}; {control}.dispatchEvent(new Event('input'))")
    return browser.js("document.getElementById('count').textContent")


def texts(browser, selector):
    return browser.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(item => item.textContent)")


def click(browser, selector):
    browser.js(f"document.querySelector({json.dumps(selector)}).click()")


def test_the_table_has_the_worst_case_first_and_a_column_a_family_and_lane(opened):
    page = opened(MIXED)
    assert texts(page, "#map > thead th") == ["case", "cudahost", "paddleinterpreted", "tritoninterpreted"]
    assert texts(page, "#map > tbody > tr > th") == [
        "mla_decode/decode:9",
        CASE,
        "mla_decode/decode:7",
        "mla_decode/decode:8",
        "mla_decode/decode:5",
        "mla_decode/decode:6",
        "position_ids/decode:5",
    ]
    cells = ["crash", "146\xa0×", "1.5\xa0×", "known", "skipped", "0.30", "0.30", "pass"]  # noqa: RUF001
    assert texts(page, "#map .cell") == cells


def test_a_cell_opens_its_verdict_and_closes_it(opened):
    page = opened([verdict(status=Status.FAILED)])
    click(page, ".cell")
    assert page.js("document.querySelector('.cell').getAttribute('aria-expanded')") == "true"
    assert texts(page, ".detail .line code") == [MIXED[3].repro, f"python3 -m harness show '{CASE}'"]
    told = " ".join(texts(page, ".detail table td, .detail table th"))
    for said in ("token 5, head 2, dim 7: got nan, expected 0.25", "heads 0-7", "the bf16 floor", "0.5828"):
        assert said in told
    assert "Passed: guard of out." in texts(page, ".detail p")
    click(page, ".cell")
    assert texts(page, ".detail") == []


def test_the_drawing_marks_the_slots_tokens_heads_and_columns_that_failed(opened):
    page = opened([verdict(status=Status.FAILED)])
    click(page, ".cell")
    assert texts(page, "svg .badtext") == [
        "decode:164decode:164",
        "decode:700@sysdecode:700@sys",
        "decode:900@sysdecode:900@sys",
    ]
    box = "document.querySelectorAll('figure')[{}].querySelectorAll('svg > .{}')"
    attributes = (
        "[...{}].map(item => ['x', 'y', 'width', 'height'].map(name => Number(item.getAttribute(name))))"
    )

    def boxes(figure, name):
        return page.js(attributes.format(box.format(figure, name)))

    # 16 by 16 a head and token, to the right of the slots' names and below the heads'.
    (left, top, width, height) = boxes(1, "frame")[0]
    assert (width, height) == (256, 160)
    assert boxes(1, "soft") == [[left, top + 16, 128, 16], [left, top + 80, 128, 32]]
    assert boxes(1, "mark") == [[left + 32, top + 80, 16, 16]]
    ((x, _, wide, _),) = boxes(2, "soft")
    assert (x, wide) == (pytest.approx(3 / 512 * 320), pytest.approx(7 / 512 * 320))


def test_failing_blocks_are_ringed_in_the_rows_that_failed(opened):
    case = parse("latent_cache_write/decode:70,decode:3/pages=reversed")
    _, block = lay_out(case, case.layers[0])[0].blocks[0].tolist()
    assert block > 1
    where = Where(rows="0", tokens="0", blocks=str(block))
    wrong = check(Status.FAILED, tensor="latent_cache", error=None, budget=None, where=where)
    page = opened([verdict(str(case), Status.FAILED, path="triton/latent_cache_write", checks=(wrong,))])
    click(page, ".cell")
    ringed = "[...document.querySelectorAll('.ring')].map(item => item.parentNode.lastChild.textContent)"
    assert page.js(ringed) == [str(block)]


def test_an_error_that_is_no_number_is_beyond_every_budget(opened):
    wrong = check(Status.FAILED, error=float("nan"), worst=Worst((0, 0, 0), float("-inf"), 1.0))
    page = opened([*MIXED, verdict("mla_decode/decode:4", Status.FAILED, checks=(wrong,))])
    assert choose(page, "text", "decode:4") == "1 of 9 verdicts"
    assert texts(page, "#map .cell") == ["∞\xa0×"]  # noqa: RUF001
    click(page, ".cell")
    assert "token 0, head 0, dim 0: got -inf, expected 1" in texts(page, ".detail td")


def test_a_batch_that_is_not_drawn_is_said_to_be(opened):
    page = opened([bare(case="mla_decode/decode:2000000000/block=1")])
    click(page, ".cell")
    assert "Not drawn here; the second line below may." in texts(page, ".detail p")
    assert texts(page, ".detail svg") == []


def test_filters_narrow_the_table_and_clear_widens_it(opened):
    page = opened(MIXED)
    assert choose(page, "status", "bad") == "3 of 8 verdicts"
    assert choose(page, "text", "DECODE:7 triton") == "2 of 8 verdicts"
    assert texts(page, "#map > tbody > tr > th") == [CASE, "mla_decode/decode:7"]
    click(page, "#clear")
    assert page.js("document.getElementById('count').textContent") == "8 of 8 verdicts"
    assert choose(page, "operator", "position_ids") == "1 of 8 verdicts"
    click(page, "#clear")
    assert choose(page, "lane", "host") == "1 of 8 verdicts"
    click(page, "#clear")
    assert choose(page, "path", "paddle/mla_decode") == "1 of 8 verdicts"
    click(page, "#clear")
    assert choose(page, "text", "no such word") == "0 of 8 verdicts"
    assert page.js("document.getElementById('nothing').checkVisibility()")


def test_a_name_of_the_summary_filters_by_it(opened):
    page = opened(MIXED)
    names = "[...document.querySelectorAll('button.name')].find(item => item.textContent === {}).click()"
    page.js(names.format("'cuda/mla_decode'"))
    assert texts(page, "#map .cell") == ["0.30"]
    page.js(names.format("'position_ids'"))
    assert texts(page, "#map .cell") == ["pass"]


def test_long_tables_are_shown_a_part_at_a_time(opened):
    page = opened([verdict(f"mla_decode/decode:{number}") for number in range(1, 400)])
    assert len(texts(page, "#map > tbody > tr")) == 60
    click(page, "#more")
    assert len(texts(page, "#map > tbody > tr")) == 300
    click(page, "#more")
    assert len(texts(page, "#map > tbody > tr")) == 399
    assert page.js("document.getElementById('more').hidden")


def test_texts_of_a_verdict_are_shown_as_they_are_and_run_nothing(opened):
    page = opened([hostile(), verdict(HOSTILE, path=HOSTILE)])
    for number in range(2):
        page.js(f"document.querySelectorAll('.cell')[{number}].click()")
        assert texts(page, ".detail .line code")[
            0
        ] == f"python3 -m harness repro '{HOSTILE}' --path {HOSTILE} --lane " + (
            HOSTILE if number == 0 else "interpreted"
        )
    assert page.js("typeof pwned") == "undefined"
    assert page.js("document.images.length") == 0
    assert HOSTILE in texts(page, "#map > tbody > tr > th")


def test_the_copy_button_selects_the_line_and_says_what_became_of_it(opened):
    page = opened([verdict(status=Status.FAILED)])
    click(page, ".cell")
    click(page, ".line button")
    assert page.js("getSelection().toString()") == MIXED[3].repro
    said = """new Promise(done => {
      const button = document.querySelector(".line button");
      const look = () => button.textContent === "Copy" ? setTimeout(look, 20) : done(button.textContent);
      look();
    })"""
    assert page.js(said) in {"Copied", "Selected"}


def test_the_keyboard_reaches_a_cell_and_opens_it(opened):
    page = opened([verdict(status=Status.FAILED)])
    page.js("document.getElementById('clear').focus()")
    page.press("Tab")
    assert page.js("document.activeElement.className").startswith("cell")
    page.press("Enter")
    assert len(texts(page, ".detail")) == 1


def test_everything_that_acts_or_pictures_has_a_name_to_be_read_out(opened):
    page = opened(MIXED)
    page.js("document.querySelectorAll('.cell')[1].click()")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "searchbox", "combobox", "image", "region", "columnheader"}
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node.get("role", {}).get("value") in roles
    ]
    assert {role for role, _ in named} == roles
    assert [role for role, name in named if not name.strip()] == []


CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (color, under) => {
    for (const layer of [`rgb(${under})`, color]) {
      canvas.fillStyle = layer;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const ground = item => item ? over(getComputedStyle(item).backgroundColor, ground(item.parentElement))
    : [255, 255, 255];
  const linear = part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
  const shares = [.2126, .7152, .0722];
  const light = color => color.reduce((sum, part, i) => sum + linear(part / 255) * shares[i], 0);
  const contrast = item => {
    const under = ground(item), lights = [light(under), light(over(getComputedStyle(item).color, under))];
    return (Math.max(...lights) + .05) / (Math.min(...lights) + .05);
  };
  const faded = item => item && (getComputedStyle(item).opacity < 1 || faded(item.parentElement));
  const items = [...document.querySelectorAll("h1, h2, h3, th, td, p, span, button, figcaption, code")];
  return items.filter(item => item.textContent && item.checkVisibility())
    .map(item => [faded(item) ? 0 : contrast(item), item.className, item.textContent]);
})()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_the_page_in_both_themes(opened, theme):
    many = verdict("mla_decode/decode:4", Status.FAILED, checks=(check(Status.FAILED, 9.0),))
    near = [
        verdict(f"mla_decode/decode:{length}", checks=(check(ratio=length / 100),)) for length in (40, 60, 90)
    ]
    page = opened([*MIXED, many, *near])
    page.theme(theme)
    page.js("document.querySelectorAll('.cell')[1].click()")
    found = page.js(CONTRASTS)
    assert len(found) > 60
    # WCAG AA.
    assert [item for item in found if item[0] < 4.5] == []
    light = page.js("getComputedStyle(document.body).backgroundColor")
    page.theme({"light": "dark", "dark": "light"}[theme])
    assert page.js("getComputedStyle(document.body).backgroundColor") != light
    page.theme("light")


def test_without_a_script_the_summary_and_the_failures_are_what_is_seen(opened, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(MIXED)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    seen = "\n".join(node.get("name", {}).get("value", "") for node in nodes if not node.get("ignored"))
    assert "3 of 7 verdicts failed" in seen
    assert "position_ids" in seen
    assert MIXED[3].repro in seen
    assert "every status" not in seen
