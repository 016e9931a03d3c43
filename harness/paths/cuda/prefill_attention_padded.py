"""Prefill attention by the CUDA kernel, values padded. The contract is _prefill_attention_padded.py's."""

from __future__ import annotations

from harness.paths._prefill_attention_padded import path_of
from harness.paths.cuda.prefill_attention import prefill_attention, supports

PATHS = (path_of(prefill_attention, supports, "cuda", lanes=("host", "compiled")),)
