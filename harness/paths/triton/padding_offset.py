"""Exclusive prefix sums of a step's lengths, and the slot of every token.

Inputs
    seq_lens_encoder      [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder      [B] int32      tokens cached before the step, set for any kind of row
    seq_lens_this_time    [B] int32      tokens that the slot adds to the token axis

Outputs
    cu_seqlens_q          [B + 1] int32  sums of seq_lens_this_time
    cu_seqlens_k          [B + 1] int32  sums of seq_lens_this_time + seq_lens_decoder of every slot
    cu_seqlens_k_prefill  [B + 1] int32  the same of prefill rows alone
    batch_id_per_token    [Tp] int32     slot of each token, -1 for the Tp - T behind the last

Any number of slots and tokens, none included: the sums are written even if there is neither. The sums must
fit into int32, and Tp must not be below T. O(B) work for the sums, in one program; O(log B) a token. No host
synchronisation: T is never read back, Tp comes from the shape. Neither B nor Tp recompiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_SLOTS = 1024
"""Slots that are summed at a time: engines rarely have more, so the loop has one turn."""

BLOCK_TOKENS = 256
"""Tokens a program: two for each thread of 4 warps."""


@triton.jit(do_not_specialize=["num_slots"])
def _sum_lengths(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_prefill,
    num_slots,
    BLOCK_SLOTS: tl.constexpr,
):
    """The three prefix sums, BLOCK_SLOTS slots at a time. Grid: (1,)."""
    # 1. Entry 0 of each: all there is to write where no slot is.
    queries = 0
    keys = 0
    prefill_keys = 0
    tl.store(cu_seqlens_q, queries)
    tl.store(cu_seqlens_k, keys)
    tl.store(cu_seqlens_k_prefill, prefill_keys)

    for first in range(0, num_slots, BLOCK_SLOTS):
        # 2. Lengths of the next slots. Cached tokens count in every slot, with and without new ones.
        slots = first + tl.arange(0, BLOCK_SLOTS)
        in_step = slots < num_slots
        encoder = tl.load(seq_lens_encoder + slots, mask=in_step, other=0)
        decoder = tl.load(seq_lens_decoder + slots, mask=in_step, other=0)
        this_time = tl.load(seq_lens_this_time + slots, mask=in_step, other=0)
        lengths = this_time + decoder
        prefill_lengths = tl.where(encoder > 0, lengths, 0)

        # 3. Sums up to and with each slot are the entries behind it.
        tl.store(cu_seqlens_q + 1 + slots, queries + tl.cumsum(this_time, 0), mask=in_step)
        tl.store(cu_seqlens_k + 1 + slots, keys + tl.cumsum(lengths, 0), mask=in_step)
        tl.store(cu_seqlens_k_prefill + 1 + slots, prefill_keys + tl.cumsum(prefill_lengths, 0), mask=in_step)

        # 4. What the next slots begin with.
        queries += tl.sum(this_time, 0)
        keys += tl.sum(lengths, 0)
        prefill_keys += tl.sum(prefill_lengths, 0)


@triton.jit(do_not_specialize=["num_slots", "num_tokens", "num_halvings"])
def _find_slots(
    cu_seqlens_q,
    batch_id_per_token,
    num_slots,
    num_tokens,
    num_halvings,
    BLOCK_TOKENS: tl.constexpr,
):
    """Slots of BLOCK_TOKENS successive tokens. Grid: (ceil(num_tokens / BLOCK_TOKENS),)."""
    # 1. Tokens from the last sum on are padding.
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    in_step = tokens < num_tokens
    is_real = tokens < tl.load(cu_seqlens_q + num_slots)

    # 2. The last slot that begins at or before the token: of slots that begin together, only the last has
    # tokens. Invariant: cu_seqlens_q[low] <= token, and token < cu_seqlens_q[high].
    low = tl.zeros([BLOCK_TOKENS], dtype=tl.int32)
    high = tl.zeros([BLOCK_TOKENS], dtype=tl.int32) + num_slots
    for _ in range(num_halvings):
        # Rounded up to stay above low: a middle that is high already changes nothing.
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens_q + middle)
        low = tl.where(begins <= tokens, middle, low)
        high = tl.where(begins <= tokens, high, middle)

    # 3. The slot of what is real.
    tl.store(batch_id_per_token + tokens, tl.where(is_real, low, -1), mask=in_step)


def padding_offset(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_prefill,
    batch_id_per_token,
) -> None:
    """Launches both kernels; shapes and dtypes as in the module's docstring."""
    num_slots = seq_lens_this_time.shape[0]
    num_tokens = batch_id_per_token.shape[0]
    _sum_lengths[(1,)](
        seq_lens_encoder,
        seq_lens_decoder,
        seq_lens_this_time,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_prefill,
        num_slots,
        BLOCK_SLOTS=BLOCK_SLOTS,
    )
    if num_tokens == 0:
        return
    _find_slots[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        cu_seqlens_q,
        batch_id_per_token,
        num_slots,
        num_tokens,
        # Halvings of an interval of num_slots until its ends are neighbours.
        num_slots.bit_length(),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


def supports(case: Case) -> str | None:
    """None: the kernels take every case."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    padding_offset(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        outputs["cu_seqlens_q"],
        outputs["cu_seqlens_k"],
        outputs["cu_seqlens_k_prefill"],
        outputs["batch_id_per_token"],
    )


PATHS = (
    KernelPath(
        name="triton/padding_offset",
        operator="padding_offset",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
