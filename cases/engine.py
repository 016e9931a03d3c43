"""Random schedules as a serving engine makes them: every step's rows follow from the requests it serves.

Requests arrive with a prompt and are admitted into free slots, compute it in chunks, decode one token or
verify drafts of which some are rejected, wait in their slot without a token, lose their blocks under
pressure and recompute what they had, and end. Prompts may begin with a prefix that others share. What is
decided by chance asks `choose`, so that a test's strategy and a suite's seed play the same engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from cases.rows import Kind, Row

Choose = Callable[[int, int], int]
"""(least, most) -> an integer within, both included."""

Step = tuple[Row, ...]

TAGS = ("a", "sys")
MAX_DRAFT = 5
MAX_ANSWER = 12
MAX_PADDING = 4


@dataclass
class _Request:
    """One request.

    Attributes:
        key: data key of its tokens; a request that recomputes has the tokens it had.
        prompt: tokens to be computed before it decodes.
        cached: tokens in the cache.
        answer: steps that it still decodes.
        tag: prefix that it shares, or None.
        drafts: whether it verifies drafts.
        tagged: how many of its first tokens are its tag's: those of its first row.
        is_new: whether this step is its first.
    """

    key: int
    prompt: int
    cached: int
    answer: int
    tag: str | None
    drafts: bool
    tagged: int = 0
    is_new: bool = True


def random_schedule(
    choose: Choose, *, steps: int, slots: int, tokens: int, computed: int = 0
) -> tuple[Step, ...]:
    """The steps of an engine.

    Args:
        choose: decides everything that is left to chance.
        steps: how many.
        slots: most requests at a time.
        tokens: most tokens of a prompt, cached or not.
        computed: a block size, if histories are found only where the engine itself has computed them: whole
            blocks of a prefix that another slot holds. 0: anything may be found in the cache.
    """
    engine = _Engine(choose, slots, tokens, computed)
    return tuple(engine.step() for _ in range(steps))


def chunked_prompt(tokens: int, size: int, decodes: int) -> tuple[Step, ...]:
    """The steps of one prompt that is computed `size` tokens at a time, and of some tokens after it."""
    steps = []
    for begin in range(0, tokens, size):
        new = min(size, tokens - begin)
        steps.append((Row(Kind.HIT, begin, new) if begin else Row(Kind.PREFILL, new=new),))
    return (*steps, *((Row(Kind.DECODE, tokens + number),) for number in range(decodes)))


def seeded_schedules(
    seed: int, count: int, *, steps: int, slots: int, tokens: int, computed: int = 0
) -> list[tuple[Step, ...]]:
    """Schedules from a seed, the same on every machine and with every supported Python."""
    # Of `random` only the sequence of random() for a text is promised to stay.
    source = random.Random(f"schedules {seed}")  # noqa: S311

    def choose(least: int, most: int) -> int:
        return least + int(source.random() * (most - least + 1))

    sizes = {"steps": steps, "slots": slots, "tokens": tokens, "computed": computed}
    return [random_schedule(choose, **sizes) for _ in range(count)]


class _Engine:
    """The slots, and the requests that wait for one."""

    def __init__(self, choose: Choose, slots: int, tokens: int, computed: int) -> None:
        self.choose = choose
        self.tokens = tokens
        self.computed = computed
        self.slots: list[_Request | None] = [None] * slots
        self.preempted: list[_Request] = []
        self.arrived = 0

    def step(self) -> Step:
        """One step's rows, in order of the slots, with padding behind them or not."""
        rows = [self._row(slot) for slot in range(len(self.slots))]
        while rows and rows[-1].kind is Kind.IDLE and self._by_chance(2):
            rows.pop()
        if self._by_chance(4):
            rows.append(Row(Kind.PAD, new=self.choose(1, MAX_PADDING)))
        return tuple(rows)

    def _row(self, slot: int) -> Row:
        request = self.slots[slot]
        if request is None:
            return self._admit(slot) if self._by_chance(2) else Row(Kind.IDLE)
        request.is_new = False
        if request.answer == 0:
            # Its slot stays empty for a step, so that one with a history may follow.
            self.slots[slot] = None
            return Row(Kind.IDLE)
        if self._by_chance(10):
            return Row(Kind.PAUSED, request.cached)
        if self._by_chance(16) and request.tag is None:
            request.prompt = request.cached
            self.slots[slot] = None
            self.preempted.append(request)
            return Row(Kind.IDLE)
        return self._compute(request)

    def _admit(self, slot: int) -> Row:
        """A request's first row in a free slot: with a history that was found, or without."""
        if self.preempted and self._by_chance(2):
            request = self.preempted.pop(0)
            request.cached = 0
        else:
            request = self._arrive(slot)
        self.slots[slot] = request
        request.is_new, request.tagged = True, request.cached
        if request.cached >= request.prompt:
            # It was prefilled elsewhere.
            request.answer -= 1
            request.cached += 1
            return Row(Kind.DECODE, request.cached - 1, tag=request.tag, key=request.key)
        new = self._chunk(request)
        request.cached += new
        if request.cached == new:
            request.tagged = new
            return Row(Kind.PREFILL, new=new, tag=request.tag, key=request.key)
        return Row(Kind.HIT, request.cached - new, new, tag=request.tag, key=request.key)

    def _arrive(self, slot: int) -> _Request:
        self.arrived += 1
        prompt = self.choose(1, self.tokens)
        found = self.choose(1, prompt) if self._by_chance(3) else 0
        answer = self.choose(1, MAX_ANSWER)
        tag = TAGS[self.choose(0, len(TAGS) - 1)] if self._by_chance(2) else None
        if self.computed:
            found, prompt = self._found(slot, tag, prompt)
        return _Request(
            key=self.arrived,
            prompt=prompt,
            cached=found,
            answer=answer,
            tag=tag,
            drafts=self._by_chance(3),
        )

    def _found(self, slot: int, tag: str | None, prompt: int) -> tuple[int, int]:
        """(tokens found, prompt): whole blocks of a tag's prefix that a slot before this one goes on with."""
        held = [
            request.tagged
            for request in self.slots[:slot]
            if request is not None and tag is not None and request.tag == tag and not request.is_new
        ]
        blocks = max(held, default=0) // self.computed
        found = self.choose(0, blocks) * self.computed if blocks else 0
        # At least one token is new.
        return found, max(prompt, found + 1)

    def _compute(self, request: _Request) -> Row:
        """The next row of a request in its slot. Key and tag are those it was admitted with."""
        cached = request.cached
        if cached < request.prompt:
            new = self._chunk(request)
            request.cached += new
            return Row(Kind.HIT, cached, new)
        request.answer -= 1
        if not request.drafts:
            request.cached += 1
            return Row(Kind.DECODE, cached)
        new = self.choose(1, MAX_DRAFT)
        request.cached += self.choose(1, new)
        return Row(Kind.DRAFT, cached, new)

    def _chunk(self, request: _Request) -> int:
        """How many tokens of a prompt are computed next: all that are left, or some."""
        left = request.prompt - request.cached
        return left if self._by_chance(2) else self.choose(1, left)

    def _by_chance(self, one_in: int) -> bool:
        return self.choose(1, one_in) == 1
