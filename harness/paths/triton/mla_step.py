"""One layer's attention over a mixed step of Triton's operators. The contract is _mla_step.py's.

R and D are powers of two; bs too, where the cache is not packed.
"""

from __future__ import annotations

from cases import Case
from cases.layers import Layer
from harness.kernel_path import Workspace
from harness.paths._mla_step import Operators, path_of
from harness.paths.triton import latent_cache_write as cache_write
from harness.paths.triton import mla_decode as decode
from harness.paths.triton import packed_cache_write, sparse_decode, swa_indices
from harness.paths.triton.decode_rows import gather_decode_rows, merge_decode_rows, select_decode_rows
from harness.paths.triton.latent_cache_write import latent_cache_write
from harness.paths.triton.padding_offset import padding_offset
from harness.paths.triton.position_ids import place_tokens
from harness.paths.triton.prefill_attention import prefill_attention
from harness.paths.triton.read_cache_interleave import read_cache_interleave
from harness.paths.triton.slot_mapping import map_tokens


def supports(case: Case) -> str | None:
    """None, or why one of the kernels does not take a case."""
    return decode.supports(case) or cache_write.supports(case)


def supports_packed(case: Case) -> str | None:
    """The same of those that work on a packed cache."""
    return sparse_decode.supports(case) or packed_cache_write.supports(case) or swa_indices.supports(case)


def partial_results(layer: Layer, tokens: int, longest: int, slots: int) -> Workspace:
    """What mla_decode needs of scratch, however many slots there are."""
    return decode.partial_results(layer, tokens, longest)


OPERATORS = Operators(
    padding_offset=padding_offset,
    place_tokens=place_tokens,
    map_tokens=map_tokens,
    select_decode_rows=select_decode_rows,
    gather_decode_rows=gather_decode_rows,
    merge_decode_rows=merge_decode_rows,
    latent_cache_write=latent_cache_write,
    read_cache_interleave=read_cache_interleave,
    prefill_attention=prefill_attention,
    mla_decode=decode.run,
    partial_results=partial_results,
    packed_cache_write=packed_cache_write.run,
    swa_indices=swa_indices.run,
    sparse_decode=sparse_decode.run,
    partial_lists=sparse_decode.partial_results,
    supports=supports,
    supports_packed=supports_packed,
)
"""What a step is composed of; adapters put another library's in the place of some."""

PATHS = (path_of(OPERATORS, "triton", lanes=("interpreted", "compiled")),)

run, workspace = PATHS[0].run, PATHS[0].workspace
