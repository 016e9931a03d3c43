"""Prefill attention by Triton's kernel, values padded. The contract is _prefill_attention_padded.py's."""

from __future__ import annotations

from harness.paths._prefill_attention_padded import path_of
from harness.paths.triton.prefill_attention import prefill_attention, supports

PATHS = (path_of(prefill_attention, supports, "triton", lanes=("interpreted", "compiled")),)
