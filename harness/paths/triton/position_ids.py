"""Absolute positions of a step's tokens.

Inputs
    seq_lens_decoder    [B] int32        tokens cached before the step
    cu_seqlens_q        [B + 1] int32    exclusive prefix sum of the slots' new tokens
    batch_id_per_token  [Tp] int32       slot of each token, negative for padding

Output
    position_ids        [Tp] int32

Token t of slot b gets seq_lens_decoder[b] + t - cu_seqlens_q[b], whatever the row's kind: continued chunks
and prefix hits begin behind their cached tokens. Padding gets -1, so nothing stale is left in the buffer.

Any number of slots and tokens (none: no launch). No host synchronisation; lengths do not recompile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_TOKENS = 256
"""Tokens a program: two for each thread of 4 warps."""


@triton.jit(do_not_specialize=["num_tokens"])
def _place_tokens(
    seq_lens_decoder,
    cu_seqlens_q,
    batch_id_per_token,
    position_ids,
    num_tokens,
    BLOCK_TOKENS: tl.constexpr,
):
    """Positions of BLOCK_TOKENS successive tokens. Grid: (ceil(num_tokens / BLOCK_TOKENS),)."""
    # 1. Whose the tokens are. Padding has no slot: nothing is read for it.
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_step = tokens < num_tokens
    slots = tl.load(batch_id_per_token + tokens, mask=in_step, other=-1)
    is_real = slots >= 0

    # 2. Where the slot's new tokens begin, in its sequence and on the token axis.
    cached = tl.load(seq_lens_decoder + slots, mask=is_real, other=0)
    starts = tl.load(cu_seqlens_q + slots, mask=is_real, other=0)

    # 3. The position.
    positions = tl.where(is_real, cached + tokens - starts, -1)
    tl.store(position_ids + tokens, positions, mask=in_step)


def place_tokens(seq_lens_decoder, cu_seqlens_q, batch_id_per_token, position_ids) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens = batch_id_per_token.shape[0]
    if num_tokens == 0:
        return
    _place_tokens[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        seq_lens_decoder,
        cu_seqlens_q,
        batch_id_per_token,
        position_ids,
        num_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


def supports(case: Case) -> str | None:
    """None: the kernel takes every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    place_tokens(
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["position_ids"],
    )


PATHS = (
    KernelPath(
        name="triton/position_ids",
        operator="position_ids",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
