"""Attention over lists of every row kind, of the CUDA operators. The contract is _static_attention.py's.

(R, D) is one of sparse_decode's; any H and bs, K up to 2^30.
"""

from __future__ import annotations

from harness.paths._static_attention import Operators, path_of
from harness.paths.cuda import decode_rows, packed_cache_write, sparse_decode, sparse_prefill

PATHS = (
    path_of(
        Operators(
            select_rows=decode_rows.KERNELS.select_decode_rows,
            gather_rows=decode_rows.KERNELS.gather_decode_rows,
            merge_rows=decode_rows.KERNELS.merge_decode_rows,
            packed_cache_write=packed_cache_write.run,
            sparse_prefill=sparse_prefill.run,
            sparse_decode=sparse_decode.run,
            partial_results=sparse_decode.partial_results,
            # What it takes, the other operators take too.
            supports=sparse_decode.supports,
        ),
        "cuda",
        lanes=("host", "compiled"),
    ),
)
