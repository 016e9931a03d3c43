"""`Fact`: one thing that must hold of an object, and `findings`, what became of each.

A subject is a factory or a pair of functions of the engine's. A fact asks it of every circumstance it holds
in; the first that contradicts ends it. Whatever the subject raises contradicts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Subject = TypeVar("Subject")
Circumstance = TypeVar("Circumstance")


@dataclass(frozen=True)
class Fact(Generic[Subject, Circumstance]):
    """One thing that must hold.

    Attributes:
        name: what holds, in words joined by `_`.
        source: where it comes from, or the recorded bug that it finds.
        circumstances: what it holds in, each with a text that says so.
        contradiction: (subject, circumstance) -> None, or one sentence on what holds instead.
    """

    name: str
    source: str
    circumstances: Sequence[Circumstance]
    contradiction: Callable[[Subject, Circumstance], str | None]


@dataclass(frozen=True)
class Finding:
    """What became of a fact: `reason` is None where it holds."""

    fact: str
    source: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.fact}: {self.reason or 'holds'} ({self.source})"


def findings(subject: Subject, facts: Sequence[Fact[Subject, Circumstance]]) -> list[Finding]:
    """One finding a fact, in their order."""
    return [Finding(fact.name, fact.source, _reason(fact, subject)) for fact in facts]


def _reason(fact: Fact[Subject, Circumstance], subject: Subject) -> str | None:
    for circumstance in fact.circumstances:
        try:
            reason = fact.contradiction(subject, circumstance)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            return f"{circumstance}: {reason}"
    return None


def refuses(action: Callable[[], object], *said: str) -> str | None:
    """None if an action raises ValueError with all these words, else what it does instead."""
    try:
        action()
    except ValueError as error:
        missing = [word for word in said if word not in str(error)]
        if not missing:
            return None
        return f"the ValueError does not say {' or '.join(missing)}: {error}"
    except Exception as error:
        return f"expected a ValueError, got {type(error).__name__}: {error}"
    return "expected a ValueError, got none"
