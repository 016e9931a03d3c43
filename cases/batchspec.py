"""vLLM's batch-spec strings, read as rows and never printed.

A segment is `[count]q<len>[k][s<len>[k]]`: `count` requests with q new tokens and sequence length s
after the step (s = q where it is left out); `k` multiplies by 1,024. q = s is a prefill, q = 1 a
decode with s - 1 cached tokens, anything else a hit with s - q cached tokens.

Source: vllm-project/vllm, benchmarks/attention_benchmarks/batch_spec.py (the grammar only).
"""

from __future__ import annotations

import re

from cases.errors import RuleError
from cases.rows import Kind, Row

_SEGMENT = re.compile(r"(?P<count>[0-9]*)q(?P<q>[0-9]+)(?P<qk>k?)(?:s(?P<s>[0-9]+)(?P<sk>k?))?")


def parse_batchspec(segment: str, *, room: int) -> list[Row]:
    """The rows of one segment; at most `room` of them.

    Raises:
        RuleError: the segment does not fit the grammar, or its lengths contradict each other.
    """
    match = _SEGMENT.fullmatch(segment)
    if match is None:
        raise RuleError("a batch-spec segment is [count]q<len>[k][s<len>[k]], joined by '_'")
    count = int(match["count"] or 1)
    new = int(match["q"]) * (1024 if match["qk"] else 1)
    length = new if match["s"] is None else int(match["s"]) * (1024 if match["sk"] else 1)
    if not 1 <= count <= room:
        raise RuleError(f"a count is at least 1 and the step has room for {room:,} rows, got {count}")
    if not 1 <= new <= length:
        raise RuleError(f"q must be between 1 and s, got q={new} and s={length}")
    if new == length:
        return [Row(Kind.PREFILL, new=new)] * count
    if new == 1:
        return [Row(Kind.DECODE, cached=length - 1)] * count
    return [Row(Kind.HIT, cached=length - new, new=new)] * count
