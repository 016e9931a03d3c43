"""What became of mutants: a table, the score, jsonl, and survivors as records to be accepted or cured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.mutation.chosen import Chosen
from harness.mutation.mutant import Mutant, source_of
from harness.mutation.trial import Trial

NOT_IN_A_BLOCK = re.compile(r"'''|[^\t\n\x20-\x7e\x80-\U0010ffff]")
"""What a literal block of TOML cannot hold: its own end, and control characters."""


@dataclass(frozen=True)
class Score:
    """Counts of one path's trials. `accepted` are survivors with a recorded reason."""

    path: str
    caught: int
    accepted: int
    survived: int
    stillborn: int

    @property
    def share(self) -> float:
        """Caught of those that could be, accepted ones counted as not caught."""
        tried = self.caught + self.accepted + self.survived
        return self.caught / tried if tried else 1.0


def score(path: str, trials: Sequence[Trial], chosen: Chosen) -> Score:
    """The counts of a path."""
    own = [trial for trial in trials if trial.path == path]
    born = [trial for trial in own if not trial.stillborn]
    missed = [trial for trial in born if not trial.caught]
    with_reason = sum(trial.mutant in chosen.accepted for trial in missed)
    caught = len(born) - len(missed)
    return Score(path, caught, with_reason, len(missed) - with_reason, len(own) - len(born))


def has_failed(trials: Sequence[Trial], chosen: Chosen) -> bool:
    """Whether a mutant survived without a reason, a recorded one is none, or an acceptance is stale."""
    if chosen.recorded and any(trial.stillborn for trial in trials):
        return True
    return bool(chosen.stale) or any(score(path, trials, chosen).survived for path in _paths(trials))


def text(trials: Sequence[Trial], chosen: Chosen) -> str:
    """Who was caught by what; who was not, and why; the score of every path."""
    lines = {trial.mutant: trial.mutant.line(source_of(trial.mutant.file)) for trial in trials}
    parts = [_caught_table([trial for trial in trials if trial.caught], lines)]
    parts += [_missed(trial, lines, chosen) for trial in trials if not trial.caught]
    parts += [
        f"stale: an accepted mutant of {mutant.file} is no longer generated, remove it: {mutant.old!r}"
        for mutant in chosen.stale
    ]
    parts += chosen.notes
    return "\n".join([*parts, *(_score_line(score(path, trials, chosen)) for path in _paths(trials))])


def survivor_records(trials: Sequence[Trial], chosen: Chosen) -> str:
    """Unexplained survivors as `[[accepted]]` entries without a reason, to be filled in by hand."""
    return "\n".join(
        f'[[accepted]]\nwhy = ""\nold = {_literal(trial.mutant.old)}\nnew = {_literal(trial.mutant.new)}\n'
        for trial in trials
        if not trial.caught and not trial.stillborn and trial.mutant not in chosen.accepted
    )


def write_jsonl(file: Path, trials: Sequence[Trial], chosen: Chosen) -> None:
    """One object a mutant."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({**asdict(trial), "accepted": chosen.accepted.get(trial.mutant)} for trial in trials)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _paths(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.path for trial in trials))


def _score_line(item: Score) -> str:
    total = item.caught + item.accepted + item.survived
    text = f"{item.path}: {item.caught} of {total} mutants caught ({item.share:.1%})"
    if item.accepted:
        text += f", {item.accepted} accepted with a reason"
    text += f", {item.survived} survived"
    if item.stillborn:
        text += f"; {item.stillborn} more cannot be imported"
    return text


def _caught_table(trials: Sequence[Trial], lines: Mapping[Mutant, int]) -> str:
    """One line a caught mutant: seconds, check, mutant, and the first case that noticed."""
    rows = [("seconds", "check", "mutant", "first case that noticed  (what the mutant stands for)")]
    for trial in trials:
        place = f"{Path(trial.mutant.file).stem}:{lines[trial.mutant]} {trial.mutant.id}"
        rows.append((f"{trial.seconds:.2f}", trial.check, place, f"{trial.case}  ({trial.mutant.why})"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}" for row in rows
    )


def _missed(trial: Trial, lines: Mapping[Mutant, int], chosen: Chosen) -> str:
    """A mutant that no case noticed, with why that is accepted where it is."""
    mutant = trial.mutant
    verdict = f"accepted: {chosen.accepted[mutant]}" if mutant in chosen.accepted else "SURVIVED"
    if trial.stillborn:
        verdict = f"cannot be imported: {trial.reason}"
        if chosen.recorded:
            verdict = f"NO BUG, mend the record: {verdict}"
    old, new = _changed_lines(mutant)
    return f"{verdict}\n  {mutant.file}:{lines[mutant]}  {mutant.id}: {mutant.why}\n  - {old}\n  + {new}"


def _changed_lines(mutant: Mutant) -> tuple[str, str]:
    """The lines that differ, each side joined and stripped."""
    old, new = mutant.old.splitlines(), mutant.new.splitlines()
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " ".join(line.strip() for line in old), " ".join(line.strip() for line in new)


def _literal(text: str) -> str:
    """A TOML string; several lines as a literal block if it can hold them."""
    if "\n" in text and not NOT_IN_A_BLOCK.search(text):
        return f"'''\n{text}'''"
    # TOML knows no surrogates, by which JSON escapes characters, and wants one more escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
