"""How often check `diagnosis` names a broken kernel's mistake: `python3 tests/diagnose_mutants.py [GLOB]`.

Thirty recorded bugs of `harness/mutation/known/`, each on the first case marked `mutants` that notices it.
They were chosen before any was diagnosed: of every operator but the plan and the model one to six, by how
many bugs are recorded of it, and of those each of another sort: which key, which row, which angle, which
scale, which part. What each is called was written beside it by reading the mutant.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.commands.mutants import MARK, default_suites
from harness.listing import check_names
from harness.mutation.chosen import choose
from harness.mutation.mutant import Mutant
from harness.plan import asked_cases, make_plan
from harness.pool import Pool
from harness.task import Task

LANE = "interpreted"
GOAL = 24


@dataclass(frozen=True)
class Expected:
    """A recorded bug of a path, and what the diagnosis should call it."""

    path: str
    mutant: str
    name: str


BUGS = (
    Expected("triton/mla_decode", "log2-e-missing", "log2-e-missing"),
    Expected("triton/mla_decode", "scale-from-latent-width", "scale-from-latent-width"),
    Expected("triton/mla_decode", "drafts-not-causal", "not-causal"),
    Expected("triton/mla_decode", "block-size-is-64", "block-size-is-a-literal"),
    Expected("triton/mla_decode", "rope-left-out", "rope-left-out"),
    Expected("triton/mla_decode", "last-split-lost", "last-split-lost-if-short"),
    Expected("triton/prefill_attention", "causal-top-left", "causal-top-left"),
    Expected("triton/prefill_attention", "not-causal", "not-causal"),
    Expected("triton/prefill_attention", "lse-base-2", "lse-base-2"),
    Expected("triton/prefill_attention", "keys-up-to-the-longest-chunk", "keys-beyond-the-chunk"),
    Expected("triton/latent_cache_write", "neighbours-token", "neighbours-slot"),
    Expected("triton/latent_cache_write", "rope-half-split", "rope-written-reordered"),
    Expected("triton/latent_cache_write", "stop-at-first-padding", "stop-at-padding"),
    Expected("triton/read_cache_interleave", "linear-pages", "blocks-in-a-line"),
    Expected("triton/read_cache_interleave", "history-lost", "history-ignored"),
    Expected("triton/rope", "pairing-swapped", "pairing-exchanged"),
    Expected("triton/rope", "position-plus-one", "position-off-by-one"),
    Expected("triton/slot_mapping", "block-of-64", "block-size-is-a-literal"),
    Expected("triton/slot_mapping", "next-slots-table", "neighbours-table"),
    Expected("triton/position_ids", "prefill-from-zero", "history-ignored"),
    Expected("triton/padding_offset", "keys-are-queries", "keys-without-the-cache"),
    Expected("triton/swa_indices", "window-counts-keys-before", "window-one-too-long"),
    Expected("triton/swa_indices", "history-unseen", "history-unseen"),
    Expected("triton/decode_rows", "first-query-for-all", "first-query-for-all"),
    Expected("triton/sparse_decode", "scale-of-the-neighbouring-tile", "scale-of-the-neighbour"),
    Expected("triton/sparse_decode", "minus-one-is-row-0", "minus-one-is-row-0"),
    Expected("triton/sparse_prefill", "lse-without-the-scale", "lse-without-the-scale"),
    Expected("triton/packed_cache_write", "scale-of-the-row", "scale-of-the-row"),
    Expected("triton/kv_b_split", "rank-ignored", "rank-ignored"),
    Expected("triton/mla_step", "keys-of-the-next-head", "keys-of-the-neighbour"),
)


def main(glob: str) -> int:
    """Prints a line a bug and the counts; 0 if enough are named and none wrongly as sure."""
    bugs = [bug for bug in BUGS if fnmatchcase(f"{bug.path}/{bug.mutant}", glob)]
    asked = asked_cases([], default_suites(), "*", check_names(), mark=MARK)
    named = sure = wrong = 0
    with Pool(LANE, 1) as pool:
        paths = pool.describe()
        for bug in bugs:
            plan = make_plan(asked, paths, LANE, path_glob=bug.path, extra_checks=(), timeout=20.0, workers=1)
            attempts = choose(plan.tasks, bug.mutant, generated=False).attempts
            sentence, case = diagnosis(pool, *attempts[0])
            name = sentence.partition(":")[0]
            is_sure = name not in ("unknown", "not sure") and not name.startswith("likely ")
            is_right = name.removeprefix("likely ") == bug.name
            named, sure = named + is_right, sure + (is_right and is_sure)
            wrong += is_sure and not is_right
            said = f"{'right' if is_right else 'wrong'}, {'sure' if is_sure else 'not sure'}"
            print(f"{said:16} {bug.path} {bug.mutant}, expected {bug.name}", flush=True)
            print(f"                 {case}\n                 {sentence}", flush=True)
    print(f"{named} of {len(bugs)} named rightly, {sure} of them as sure; {wrong} named wrongly as sure")
    return 0 if not wrong and named * len(BUGS) >= GOAL * len(bugs) else 1


def diagnosis(pool: Pool, mutant: Mutant, tasks: list[Task]) -> tuple[str, str]:
    """What is said of a mutant on the first case that notices it, and that case."""
    trial = next(iter(pool.try_mutants([(mutant, tasks)])))
    if not trial.case:
        return f"unknown: {trial.reason or 'no case notices it'}", ""
    task = next(task for task in tasks if task.case == trial.case)
    task = replace(task, checks=(*task.checks, "diagnosis"), timeout=60.0)
    _, _, verdicts = next(iter(pool.judge_mutants([(mutant, [task])])))
    found = [check.reason for verdict in verdicts for check in verdict.checks if check.name == "diagnosis"]
    return (found[0] if found else f"unknown: it ended in {trial.check}"), trial.case


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "*"))
