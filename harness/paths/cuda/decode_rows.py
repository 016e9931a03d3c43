"""Pack decode rows' tokens and queries, and put their outputs among those of prefill rows, bit for bit.

Inputs
    query                      [Tp, H, W]     model dtype, token and head strides free, last axis dense
    prefill_out                [Tp, H, V]     the same
    decode_out                 [Td, H, V]     the same; packed
    seq_lens_encoder           [B] int32      > 0: a prefill row
    seq_lens_decoder           [B] int32      tokens cached before this step
    seq_lens_this_time         [B] int32      new tokens
    cu_seqlens_q               [B + 1] int32  exclusive prefix sum of the new tokens
    batch_id_per_token         [Tp] int32     slot of each token, negative for padding
Outputs
    cu_seqlens_q_decode        [B + 1] int32  exclusive prefix sum of decode rows' new tokens
    batch_id_per_decode_token  [Td] int32     slot of each packed token, -1 behind the last
    packed_query               [Td, H, W]     model dtype, token and head strides free; 0 behind the last
    merged                     [Tp, H, V]     model dtype, token and head strides free, last axis dense
    cache_seqlens              [B] int32      cached plus new tokens of decode rows, 0 of all others

A row without prefill tokens, with cached ones and with new ones is a decode row. All of its tokens are
decode tokens: packed, they follow one another as they do in the step. merged holds their decode_out, the
prefill_out of all other real tokens, and 0 at padding. Of the two branches only the one chosen is read: what
the other holds, NaN even, is nothing. Merged in place (prefill_out None), only decode tokens are written.

Td is room, from a shape. REQUIRED: no fewer than decode tokens. Were there more, nothing leaves its tensor:
those behind the Td-th are not packed, and their merged is 0 or, in place, stays as it was.

Any H, W and V, any Tp, Td and B, none included. The sum must fit into int32. Tensors beyond 2^32
elements. O(B) work for the sum, in one block. Fastest where strides and widths are multiples of 16 bytes. No
host synchronisation. `select_decode_rows` is the same for all layers of a step.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: selection, gather and merge on the harness's tensors."""
    KERNELS.select_decode_rows(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["cu_seqlens_q_decode"],
        outputs["batch_id_per_decode_token"],
        outputs["cache_seqlens"],
    )
    KERNELS.gather_decode_rows(
        inputs["query"],
        inputs["cu_seqlens_q"],
        outputs["cu_seqlens_q_decode"],
        outputs["batch_id_per_decode_token"],
        outputs["packed_query"],
    )
    KERNELS.merge_decode_rows(
        inputs["prefill_out"],
        inputs["decode_out"],
        inputs["cu_seqlens_q"],
        outputs["cu_seqlens_q_decode"],
        inputs["batch_id_per_token"],
        outputs["merged"],
    )


PATHS = (
    KernelPath(
        name="cuda/decode_rows",
        operator="decode_rows",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
