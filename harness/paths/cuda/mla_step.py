"""One layer's attention over a mixed step of the CUDA operators. The contract is _mla_step.py's.

(R, D) is one of mla_decode's, N+D and V are at most 256; of a packed cache (R, D) is one of sparse_decode's
and the others are any. Any block size.
"""

from __future__ import annotations

from cases import Case
from harness.paths._mla_step import Operators, path_of
from harness.paths.cuda import (
    decode_rows,
    latent_cache_write,
    mla_decode,
    packed_cache_write,
    padding_offset,
    position_ids,
    prefill_attention,
    read_cache_interleave,
    slot_mapping,
    sparse_decode,
    swa_indices,
)


def supports(case: Case) -> str | None:
    """None, or why one of the kernels does not take a case."""
    return mla_decode.supports(case) or prefill_attention.supports(case)


def supports_packed(case: Case) -> str | None:
    """The same of those that work on a packed cache."""
    return sparse_decode.supports(case) or packed_cache_write.supports(case) or swa_indices.supports(case)


PATHS = (
    path_of(
        Operators(
            padding_offset=padding_offset.KERNELS.padding_offset,
            place_tokens=position_ids.KERNELS.place_tokens,
            map_tokens=slot_mapping.KERNELS.map_tokens,
            select_decode_rows=decode_rows.KERNELS.select_decode_rows,
            gather_decode_rows=decode_rows.KERNELS.gather_decode_rows,
            merge_decode_rows=decode_rows.KERNELS.merge_decode_rows,
            latent_cache_write=latent_cache_write.KERNELS.latent_cache_write,
            read_cache_interleave=read_cache_interleave.KERNELS.read_cache_interleave,
            prefill_attention=prefill_attention.prefill_attention,
            mla_decode=mla_decode.run,
            partial_results=mla_decode.partial_results,
            packed_cache_write=packed_cache_write.run,
            swa_indices=swa_indices.run,
            sparse_decode=sparse_decode.run,
            partial_lists=sparse_decode.partial_results,
            supports=supports,
            supports_packed=supports_packed,
        ),
        "cuda",
        lanes=("host", "compiled"),
    ),
)
