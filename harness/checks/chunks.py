"""Check `chunks`: a prompt computed in chunks gives what it gives in one.

The new tokens of every first chunk and every continued one are cut in up to three, the last of a single
token, and computed step after step; all other rows come with the last. A first chunk that a tag names stays
whole: the tag names what its first row computes, which would be less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cases import Kind, Row
from harness.checks._check import CheckPlugin
from harness.checks._variant import TokenMap, compare_launches, keyed_rows, play
from harness.launch import Launch
from harness.verdict import CheckResult, Status


def run(launch: Launch) -> Iterator[CheckResult]:
    """Plays the batch in steps of chunks and compares every token with its own."""
    rows = keyed_rows(launch)
    ends = [_ends(row) for row in rows]
    count = max((len(cuts) for cuts in ends), default=0)
    if count < 2:
        yield CheckResult("chunks", Status.SKIPPED, reason="no row has a chunk that can be cut")
        return
    steps = tuple(
        tuple(_part(row, cuts, step - count) for row, cuts in zip(rows, ends, strict=True))
        for step in range(count)
    )
    steps = (*(tuple(row for row in step if row.is_slot) for step in steps[:-1]), steps[-1])
    starts = launch.batch.metadata.cu_seqlens_q.tolist()
    for played in play(launch, replace(launch.case, steps=steps)):
        tokens: TokenMap = []
        theirs = played.batch.metadata.cu_seqlens_q.tolist()
        for slot, part in enumerate(row for row in played.batch.rows if row.is_slot):
            # A token of a row is known by its position.
            skipped = part.cached - rows[slot].cached
            tokens += [(starts[slot] + skipped + i, theirs[slot] + i) for i in range(part.seq_lens_this_time)]
        yield from compare_launches(
            "chunks", launch, played, tokens, bits=False, what="its prompt is computed in chunks"
        )


def _ends(row: Row) -> list[int]:
    """How many of a row's new tokens are computed at the end of each of its steps."""
    whole = row.kind is Kind.PREFILL and row.tag is not None
    if not row.is_prefill or whole:
        return [row.new]
    return sorted({max(1, row.new // 3), max(1, row.new - 1), row.new})


def _part(row: Row, ends: list[int], step: int) -> Row:
    """The row in one of the steps, counted from the last, which is -1."""
    if -step > len(ends):
        # Its chunks are fewer.
        return replace(row, kind=Kind.PAUSED, new=0) if row.cached else Row(Kind.IDLE)
    begin = 0 if -step == len(ends) else ends[step - 1]
    end = ends[step]
    if begin == 0 and end == row.new:
        return row
    cached = row.cached + begin
    return replace(row, kind=Kind.HIT if cached else Kind.PREFILL, cached=cached, new=end - begin)


CHECK = CheckPlugin(
    "chunks",
    "within budget however a prompt is cut in chunks",
    run,
    relaunches=True,
    plays=True,
)
