"""One row of a batch: a slot of the engine and what it does this step.

| kind          | seq_lens_encoder, seq_lens_decoder, seq_lens_this_time | meaning                    |
|---------------|--------------------------------------------------------|----------------------------|
| `prefill:N`   | N, 0, N  | first chunk, nothing cached                                              |
| `hit:C+N`     | N, C, N  | continued chunk or prefix hit: C tokens cached, N new                    |
| `decode:C`    | 0, C, 1  | decode with C cached tokens                                              |
| `draft:C+N`   | 0, C, N  | speculative decode: N new tokens, causal among themselves                |
| `idle`        | 0, 0, 0  | empty slot                                                               |
| `paused:C`    | 0, C, 0  | resident, contributes no token this step                                 |
| `pad:N`       | -        | N CUDA-graph padding tokens, batch id -1; not a slot; once, last         |

`seq_lens_decoder` is the cached length, not "is decoding": it is set for `hit` and `paused` too.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from cases.errors import RuleError

MAX_LENGTH = 2**31 - 1
"""Lengths are int32 in the metadata of every engine."""

MAX_DIGITS = 18
"""Digits of the longest number of the language: data keys and seeds fit into int64."""


class Kind(enum.Enum):
    """What a row does, with the lengths its text carries."""

    PREFILL = ("prefill", ("new",))
    HIT = ("hit", ("cached", "new"))
    DECODE = ("decode", ("cached",))
    DRAFT = ("draft", ("cached", "new"))
    IDLE = ("idle", ())
    PAUSED = ("paused", ("cached",))
    PAD = ("pad", ("new",))

    def __init__(self, word: str, lengths: tuple[str, ...]) -> None:
        self.word = word
        self.lengths = lengths

    @property
    def form(self) -> str:
        """How a row of this kind is written, e.g. `hit:C+N`."""
        letters = "+".join({"cached": "C", "new": "N"}[length] for length in self.lengths)
        return f"{self.word}:{letters}" if letters else self.word


@dataclass(frozen=True)
class Row:
    """One row: kind, lengths in tokens, prefix tag and data key.

    `cached` counts the tokens that are in the cache before the step, `new` those the step adds (for
    `pad`, the padding tokens). `tag` names a shared prefix. `key` picks the row's data; None means
    the slot index, or for a continued sequence the key it began with.

    Raises:
        RuleError: a length that the kind does not allow (rule V1: every length that is written is
            at least 1, because `decode:0` would contribute a token to an empty sequence); a tag or
            key that cannot be written.
    """

    kind: Kind
    cached: int = 0
    new: int = 0
    tag: str | None = None
    key: int | None = None

    def __post_init__(self) -> None:
        if self.kind is Kind.DECODE and self.new == 0:
            object.__setattr__(self, "new", 1)
        for name in ("cached", "new"):
            value: int = getattr(self, name)
            written = name in self.kind.lengths
            if written and not 1 <= value <= MAX_LENGTH:
                raise RuleError(
                    f"{self.kind.form} needs {_LETTER[name]} between 1 and {MAX_LENGTH:,}, "
                    f"got {value} (rule V1){_INSTEAD.get((self.kind, name), '')}"
                )
            implied = 1 if self.kind is Kind.DECODE and name == "new" else 0
            if not written and value != implied:
                raise RuleError(f"{self.kind.form} has no {name} length, got {value}")
        if self.cached + self.new > MAX_LENGTH:
            raise RuleError(f"C + N must be at most {MAX_LENGTH:,} tokens, got {self.length:,}")
        if self.tag is not None and self.kind in (Kind.IDLE, Kind.PAD):
            raise RuleError(f"{self.kind.word} holds no sequence, so it takes no tag")
        if self.key is not None and self.kind in (Kind.IDLE, Kind.PAD):
            raise RuleError(f"{self.kind.word} holds no sequence, so it takes no data key")
        if self.tag is not None and not re.fullmatch(r"[a-z][a-z0-9]*", self.tag):
            raise RuleError(f"a tag is lower-case letters and digits, a letter first, got {self.tag!r}")
        if self.key is not None and not 0 <= self.key < 10**MAX_DIGITS:
            raise RuleError(f"a data key has no sign and at most {MAX_DIGITS} digits, got {self.key}")

    @property
    def is_slot(self) -> bool:
        """Whether the row is a slot of the engine; padding is not."""
        return self.kind is not Kind.PAD

    @property
    def is_prefill(self) -> bool:
        """Whether the row's new tokens count as prefill (`seq_lens_encoder` > 0)."""
        return self.kind in (Kind.PREFILL, Kind.HIT)

    @property
    def is_decode(self) -> bool:
        """Whether the row's new tokens are computed by a decode kernel."""
        return self.kind in (Kind.DECODE, Kind.DRAFT)

    @property
    def seq_lens_encoder(self) -> int:
        """New prefill tokens of this step."""
        return self.new if self.is_prefill else 0

    @property
    def seq_lens_decoder(self) -> int:
        """Tokens in the cache before this step, whatever the kind."""
        return self.cached

    @property
    def seq_lens_this_time(self) -> int:
        """Tokens that the slot adds to the flattened token axis."""
        return self.new if self.is_slot else 0

    @property
    def length(self) -> int:
        """Tokens that the sequence holds after the step."""
        return self.cached + self.new

    def text(self, count: int = 1) -> str:
        """The row as it is written, `count` equal rows merged."""
        parts = [self.kind.word]
        if self.kind.lengths:
            parts.append(":" + "+".join(str(getattr(self, name)) for name in self.kind.lengths))
        if count > 1:
            parts.append(f"x{count}")
        if self.tag is not None:
            parts.append(f"@{self.tag}")
        if self.key is not None:
            parts.append(f".k{self.key}")
        return "".join(parts)

    def __str__(self) -> str:
        return self.text()


_LETTER = {"cached": "C", "new": "N"}
_INSTEAD = {
    (Kind.DECODE, "cached"): "; a sequence's first token is prefill:1",
    (Kind.HIT, "cached"): "; with nothing cached write prefill:N",
    (Kind.HIT, "new"): "; with nothing new write paused:C",
    (Kind.DRAFT, "cached"): "; with nothing cached write prefill:N",
    (Kind.DRAFT, "new"): "; with nothing new write paused:C",
    (Kind.PREFILL, "new"): "; an empty slot is idle",
    (Kind.PAUSED, "cached"): "; an empty slot is idle",
    (Kind.PAD, "new"): "; without padding leave the row out",
}
