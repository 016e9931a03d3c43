"""How fast broken kernels' failures get small, and how often their mistake is named.

    python3 tests/diagnose_mutants.py --list drawn-2 --report out/diagnosed.jsonl

Every bug of a list of tests/data/diagnosed_mutants.toml is planted into its kernel. The first case marked
`mutants` that notices it is reduced, and check `diagnosis` is asked of the smallest case. A line a bug says
the seconds to that case, its rows, the options it keeps, how many of them do not matter, and what was named.

`--draw SEED` prints the entries of a new list, without names: these are written beside the bugs by reading
them, before any is diagnosed.

`--path GLOB` asks of every recorded bug of some paths what it is, on the case as it is: what has no name yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cases import Case, RuleError  # noqa: E402
from cases.contract import contract_of  # noqa: E402
from cases.errors import CaseError  # noqa: E402
from cases.options import Options, specs  # noqa: E402
from harness.commands.mutants import MARK, default_suites  # noqa: E402
from harness.diagnosis import diagnose_crash  # noqa: E402
from harness.listing import check_names  # noqa: E402
from harness.mutation.chosen import choose  # noqa: E402
from harness.mutation.mutant import Mutant, rank  # noqa: E402
from harness.plan import asked_cases, make_plan  # noqa: E402
from harness.pool import Pool  # noqa: E402
from harness.reduction import Failure, Reduction, reduce_verdict  # noqa: E402
from harness.task import Task  # noqa: E402
from harness.verdict import Kind, Verdict  # noqa: E402

RECORDS = Path(__file__).with_name("data") / "diagnosed_mutants.toml"

LANES = {"interpreted": "triton/*", "host": "cuda/*"}
DRAWN = 30

SIZES = frozenset({"model", "heads", "layers"})
"""Options that say how large a case is, as rows and lengths do."""

RIGHT, AMONG, UNKNOWN, UNSURE, WRONG = (
    "right",
    "one of several",
    "does not know",
    "wrong, not sure",
    "wrong and sure",
)


@dataclass(frozen=True)
class Bug:
    """A recorded bug of a path.

    Attributes:
        names: what the diagnosis may call it, decided before it was diagnosed; none where no fault is it.
    """

    list: str
    lane: str
    path: str
    mutant: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a bug.

    Attributes:
        noticed, smallest: cases. seconds, cpu_seconds: from the one to the other, of all processes.
        options: what the smallest keeps. idle_options: those without which it fails alike.
        said: what the diagnosis says. judged: whether that is right.
    """

    bug: Bug
    noticed: str
    smallest: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tried: int = 0
    is_complete: bool = False
    rows: int = 0
    options: tuple[str, ...] = ()
    idle_options: tuple[str, ...] = ()
    said: str = ""
    judged: str = ""


def bugs_of(name: str) -> list[Bug]:
    """The bugs of a list; of all, if it has no name."""
    with RECORDS.open("rb") as file:
        records = tomllib.load(file)["bug"]
    found = [Bug(**{**item, "names": tuple(item["names"])}) for item in records]
    return [bug for bug in found if name in ("", bug.list)]


def attempts(pool: Pool, lane: str, paths: str, only: str = "*") -> list[tuple[Mutant, Sequence[Task]]]:
    """Recorded bugs of a lane's paths with the cases that must notice them."""
    asked = asked_cases([], default_suites(), "*", check_names(), mark=MARK)
    plan = make_plan(asked, pool.describe(), lane, path_glob=paths, extra_checks=(), timeout=20.0, workers=2)
    return choose(plan.tasks, only, generated=False).attempts


def draw(seed: int) -> None:
    """Prints a list of `DRAWN` bugs in the order of the seed: the first of each operator, then of all.

    What is recorded of an operator under one id is one bug, in whichever family and variant it comes first.
    """
    known: dict[tuple[str, str], tuple[bytes, str, Task, Mutant]] = {}
    for lane, paths in LANES.items():
        with Pool(lane, 1) as pool:
            for mutant, tasks in attempts(pool, lane, paths):
                task = tasks[0]
                place = hashlib.blake2b(rank(mutant, seed) + task.path.encode()).digest()
                bug = (place, lane, task, mutant)
                same = known.setdefault((task.operator, mutant.id), bug)
                known[task.operator, mutant.id] = min(same, bug, key=lambda item: item[0])
    bugs = sorted(known.values(), key=lambda item: item[0])
    firsts = list({task.operator: bug for bug in reversed(bugs) for task in [bug[2]]}.values())
    others = (bug for bug in bugs if bug not in firsts)
    for _, lane, task, mutant in sorted(
        [*firsts, *islice(others, DRAWN - len(firsts))], key=lambda bug: (bug[2].operator, bug[0])
    ):
        print(f"\n# {mutant.why}\n[[bug]]\nlist = {json.dumps(f'drawn-{seed}')}\nlane = {json.dumps(lane)}")
        print(f"path = {json.dumps(task.path)}\nmutant = {json.dumps(mutant.id)}\nnames = []")


def planted(pool: Pool, mutant: Mutant, asked: Sequence[Task]) -> list[Verdict]:
    """Verdicts of a path with a bug."""
    attempted = pool.judge_mutants([(mutant, [task]) for task in asked])
    return [verdict for _, _, verdicts in attempted for verdict in verdicts]


def survey(paths: str, only: str) -> None:
    """Prints what the diagnosis says of every recorded bug of some paths, or of some of them, unreduced."""
    for lane in LANES:
        with Pool(lane, 2) as pool:
            for mutant, tasks in attempts(pool, lane, paths):
                if only not in f"{tasks[0].path}/{mutant.id}":
                    continue
                trial = next(iter(pool.try_mutants([(mutant, tasks)])))
                task = next((task for task in tasks if task.case == trial.case), None)
                said = trial.reason
                if task is not None:
                    asked = replace(task, checks=(*task.checks, "diagnosis"), timeout=60.0)
                    judge = partial(planted, pool, mutant)
                    said = sentence(judge([asked]), task, judge)
                print(f"{tasks[0].path} {mutant.id}: {mutant.why}\n    {trial.case}\n    {said}", flush=True)


def outcomes(pool: Pool, bugs: Sequence[Bug], seconds: float) -> Iterator[Outcome]:
    """What becomes of the bugs of one lane."""
    for bug in bugs:
        mutant, tasks = attempts(pool, bug.lane, bug.path, bug.mutant)[0]
        yield outcome(pool, bug, mutant, tasks, seconds)


def outcome(pool: Pool, bug: Bug, mutant: Mutant, tasks: Sequence[Task], seconds: float) -> Outcome:
    """Plants a bug, reduces the first case that notices it, and asks what it is."""
    judge = partial(planted, pool, mutant)
    trial = next(iter(pool.try_mutants([(mutant, tasks)])))
    task = next((task for task in tasks if task.case == trial.case), None)
    verdict = next(iter(judge([task])), None) if task is not None else None
    cpu, found = cpu_seconds(), None
    if task is not None and verdict is not None:
        found = reduce_verdict(verdict, judge, task, width=2, seconds=seconds)
    cpu = cpu_seconds() - cpu
    if task is None or verdict is None or found is None:
        reason = f"unknown: {trial.reason or 'no case notices it'}"
        return Outcome(bug, trial.case, said=reason, judged=judged(reason, bug.names))
    failure = Failure.of(verdict)
    assert failure is not None
    options = options_of(found.case)
    idle = [
        key
        for key in options
        for plainer in without(found.case, key)
        for item in judge([replace(task, case=str(plainer))])
        if failure.is_like(Failure.of(item))
    ]
    smallest = replace(task, case=str(found.case), checks=(*task.checks, "diagnosis"), timeout=60.0)
    said = sentence(judge([smallest]), replace(smallest, checks=task.checks), judge)
    return Outcome(
        bug,
        trial.case,
        str(found.case),
        round(found.seconds, 1),
        round(cpu, 1),
        found.tried,
        found.is_complete,
        rows_of(found),
        tuple(options),
        tuple(idle),
        said,
        judged(said, bug.names),
    )


def rows_of(found: Reduction) -> int:
    """The most rows of a step."""
    return max(len(step) for step in found.case.steps)


def options_of(case: Case) -> list[str]:
    """Options that a case sets, sizes apart."""
    defaults = Options()
    return [
        key for key in specs() if key not in SIZES and getattr(case.options, key) != getattr(defaults, key)
    ]


def without(case: Case, key: str) -> Iterator[Case]:
    """The case without an option, if it can be."""
    # Ranks of another number would have other heads.
    heads = {"heads": tuple(layer.num_attention_heads for layer in case.layers)} if key == "tp" else {}
    try:
        plainer = case.with_options(**heads, **{key: getattr(Options(), key)})
        contract_of(plainer)
    except (CaseError, RuleError):
        return
    yield plainer


def sentence(
    verdicts: Sequence[Verdict], task: Task, judge: Callable[[Sequence[Task]], list[Verdict]]
) -> str:
    """What the diagnosis says in a verdict, as `repro` gives it, or how the path ended."""
    found = [check for verdict in verdicts for check in verdict.checks if check.name == "diagnosis"]
    if found:
        return found[0].reason
    if not verdicts or any(verdict.kind is Kind.CRASH for verdict in verdicts):
        return diagnose_crash(task, judge).sentence
    return f"unknown: {next((verdict.reason for verdict in verdicts), 'the process ended')}"


def judged(said: str, names: Sequence[str]) -> str:
    """Whether a diagnosis is right."""
    head, _, rest = said.partition(": ")
    if head == "not sure":
        several = rest.removeprefix("each of ").partition(" gives all")[0].split(", ")
        return AMONG if set(several) & set(names) else UNSURE
    likely = head.startswith("likely ")
    name = head.removeprefix("likely ")
    if " " in name or name == "unknown":
        return UNKNOWN
    if name in names:
        return RIGHT
    return UNSURE if likely else WRONG


def cpu_seconds() -> float:
    """Of the pool's processes and of those that they waited for."""
    ticks = 0
    for process in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Prints a line a bug and what they come to; 1 if a name is wrong and given as sure."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--list", default="", help="of which list; default all")
    arguments.add_argument("--only", default="", help="part of a path and a mutant")
    arguments.add_argument("--draw", type=int, help="print the list of a seed, and do nothing else")
    arguments.add_argument("--path", help="ask of recorded bugs of these paths, and do nothing else")
    arguments.add_argument("--seconds", type=float, default=120.0, help="the most a reduction may take")
    arguments.add_argument("--report", type=Path, help="where every outcome is written as a line of JSON")
    asked = arguments.parse_args()
    if asked.draw is not None:
        draw(asked.draw)
        return 0
    if asked.path is not None:
        survey(asked.path, asked.only)
        return 0
    chosen = [bug for bug in bugs_of(asked.list) if asked.only in f"{bug.path}/{bug.mutant}"]
    found: list[Outcome] = []
    started = time.perf_counter()
    print("seconds   cpu  rows  options  judged            mutant")
    for lane in LANES:
        bugs = [bug for bug in chosen if bug.lane == lane]
        if not bugs:
            continue
        with Pool(lane, 2) as pool:
            for item in outcomes(pool, bugs, asked.seconds):
                found.append(item)
                show(item)
    if asked.report is not None:
        asked.report.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in found)
        asked.report.write_text(lines, encoding="utf-8")
    counts = Counter(item.judged for item in found)
    timed = [item for item in found if item.smallest]
    print(f"{len(found)} bugs in {time.perf_counter() - started:.0f} s: ", end="")
    print(", ".join(f"{counts[word]} {word}" for word in (RIGHT, AMONG, UNKNOWN, UNSURE, WRONG)))
    if timed:
        print(
            f"reduced: {len(timed)}, median {median(item.seconds for item in timed):.1f} s, "
            f"slowest {max(item.seconds for item in timed):.1f} s; "
            f"{sum(item.rows > 2 for item in timed)} with more than two rows, "
            f"{sum(bool(item.idle_options) for item in timed)} with an option that does not matter, "
            f"{sum(not item.is_complete for item in timed)} not done in time"
        )
    return 1 if counts[WRONG] else 0


def show(item: Outcome) -> None:
    """Prints an outcome."""
    options = f"{len(item.options)}" + (f" ({len(item.idle_options)} idle)" if item.idle_options else "")
    late = "" if item.is_complete else " (time ran out)"
    print(
        f"{item.seconds:7.1f} {item.cpu_seconds:5.1f}  {item.rows:4}  {options:7}  {item.judged:16}  "
        f"{item.bug.path} {item.bug.mutant}{late}\n"
        f"                                           {item.noticed}\n"
        f"                                           {item.smallest}\n"
        f"                                           {item.said}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
