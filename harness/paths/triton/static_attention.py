"""Attention over lists of every row kind, of Triton's operators. The contract is _static_attention.py's.

R is a power of two from 128 on, D one from 16 on; any H, K and bs. Compiled, it needs compute capability 8.9
or later.
"""

from __future__ import annotations

from harness.paths._static_attention import Operators, path_of
from harness.paths.triton import packed_cache_write, sparse_decode, sparse_prefill
from harness.paths.triton.decode_rows import gather_decode_rows, merge_decode_rows, select_decode_rows

PATHS = (
    path_of(
        Operators(
            select_rows=select_decode_rows,
            gather_rows=gather_decode_rows,
            merge_rows=merge_decode_rows,
            packed_cache_write=packed_cache_write.run,
            sparse_prefill=sparse_prefill.run,
            sparse_decode=sparse_decode.run,
            partial_results=sparse_decode.partial_results,
            # What it takes, the other operators take too.
            supports=sparse_decode.supports,
        ),
        "triton",
        lanes=("interpreted", "compiled"),
    ),
)
