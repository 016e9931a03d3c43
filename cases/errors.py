"""The two ways a case can be wrong, each one sentence."""

from __future__ import annotations


class RuleError(ValueError):
    """A row or an option breaks a rule of the language; the text it came from is not known here.

    Attributes:
        message: one sentence: what, expected, got, what to do.
        step: index of the step the offending row is in, or None when an option is at fault.
        slot: index of the offending row within its step, or None.
        option: key of the offending option, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        slot: int | None = None,
        option: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.step = step
        self.slot = slot
        self.option = option


class CaseError(ValueError):
    """A text that is not a valid case. `str()` is the sentence and the text, underlined.

    Attributes:
        message: one sentence: what, expected, got, what to do.
        text: the whole text that was read.
        start, end: the offending part, `text[start:end]`; at least one character is underlined.
    """

    def __init__(self, message: str, text: str, start: int, end: int) -> None:
        self.message = message
        self.text = text
        self.start = start
        self.end = max(end, start + 1)
        # One column a character, so that the underline stays below what it marks.
        shown = "".join(character if character.isprintable() else "?" for character in text)
        underline = " " * start + "^" * (self.end - start)
        super().__init__(f"{message}\n  {shown}\n  {underline}")

    def __reduce__(self) -> tuple[type[CaseError], tuple[str, str, int, int]]:
        return type(self), (self.message, self.text, self.start, self.end)
