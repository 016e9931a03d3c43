"""Does `fuzz` find faults that only rare batches show? `python3 tests/find_rare_faults.py --minutes 5`.

Each fault of tests/data/rare_faults.toml is planted into its kernel, and cases of that kernel's operator are
drawn until one fails; what it is reduced to is printed beside the seconds it took.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness.fuzzing import Tally, drawn_at_once, drawn_cases, fuzz  # noqa: E402
from harness.lanes import default_lanes  # noqa: E402
from harness.mutation.mutant import Mutant, path_file  # noqa: E402
from harness.pool import Pool  # noqa: E402
from harness.task import Task  # noqa: E402
from harness.verdict import Verdict  # noqa: E402

RECORDS = Path(__file__).with_name("data") / "rare_faults.toml"


def rare_faults() -> list[tuple[Mutant, dict[str, str]]]:
    """Every planted fault with its record."""
    with RECORDS.open("rb") as file:
        records = tomllib.load(file)["fault"]
    return [
        (Mutant(item["id"], path_file(item["path"]), item["old"], item["new"], item["shown_by"]), item)
        for item in records
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=5.0, help="for each fault")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", default="")
    asked = arguments.parse_args()
    lane = "compiled" if default_lanes() == ["compiled"] else "interpreted"
    found = 0
    faults = [(mutant, record) for mutant, record in rare_faults() if asked.only in mutant.id]
    with Pool(lane, asked.workers) as pool:
        for mutant, record in faults:
            path = record["path"]
            operator = path.partition("/")[2]

            def tasks_of(number: int, operator: str = operator, path: str = path) -> list[Task]:
                cases = drawn_cases(operator, lane, drawn_at_once(asked.workers), asked.seed + number)
                return [
                    Task(str(case), operator, path, lane, both_oracles=False, memory_share=1 / asked.workers)
                    for case in cases
                ]

            def judge(tasks: Sequence[Task], mutant: Mutant = mutant) -> Iterator[Verdict]:
                # Several cases a process: each imports, and compiles, the changed kernel anew.
                shares = [tasks[start :: asked.workers] for start in range(asked.workers)]
                for _, _, verdicts in pool.judge_mutants([(mutant, share) for share in shares if share]):
                    yield from verdicts

            tally = Tally()
            limits = {"seconds": 60 * asked.minutes, "width": asked.workers}
            failure = next(iter(fuzz(tasks_of, judge, tally=tally, **limits)), None)
            if failure is None:
                print(f"NOT FOUND {mutant.id}: {len(tally.cases)} cases, {tally.seconds:.0f} s", flush=True)
                continue
            found += 1
            print(
                f"{failure.seconds:6.1f} s  {mutant.id}: {len(tally.cases)} cases, reduced in "
                f"{failure.reduction.seconds:.1f} s to {failure.reduction.case}",
                flush=True,
            )
    print(f"{found} of {len(faults)} found in lane {lane}")


if __name__ == "__main__":
    main()
