"""Step metadata: rows -> the arrays every engine hands to its attention kernels.

Names and meanings are FastDeploy's. NumPy on the host; `batch.py` puts them on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from cases import Row

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

PADDING_SLOTS = (-1, -63, -64, -(2**31) - 1)
"""Slots of padding tokens, in turn. All mean "not written". -1 to -63 land inside block 0 under C's
truncating division, -64 just before it, the last one wraps to a positive int32."""


@dataclass(frozen=True)
class StepMetadata:
    """Metadata of one step over B slots, T real tokens and Tp >= T tokens with padding.

    Attributes:
        seq_lens_encoder: [B] int32, new prefill tokens.
        seq_lens_decoder: [B] int32, tokens cached before the step, whatever the row's kind.
        seq_lens_this_time: [B] int32, tokens the slot adds to the token axis.
        cu_seqlens_q: [B + 1] int32, exclusive prefix sum of seq_lens_this_time.
        cu_seqlens_k: [B + 1] int32, exclusive prefix sum of this + decoder, for every slot.
        cu_seqlens_k_prefill: [B + 1] int32, the same with prefill rows alone: what their attention reads.
        batch_id_per_token: [Tp] int32, slot of each token, -1 for padding.
        position_ids: [Tp] int32, absolute position; padding keeps a stale one, here the last real.
    """

    seq_lens_encoder: Int32
    seq_lens_decoder: Int32
    seq_lens_this_time: Int32
    cu_seqlens_q: Int32
    cu_seqlens_k: Int32
    cu_seqlens_k_prefill: Int32
    batch_id_per_token: Int32
    position_ids: Int32

    @property
    def tokens(self) -> int:
        """Tp: real and padding tokens."""
        return len(self.batch_id_per_token)

    @property
    def slots(self) -> int:
        """B: rows of every per-sequence tensor."""
        return len(self.seq_lens_encoder)

    @property
    def packed_tokens(self) -> Int64:
        """[Td] int64, token of each packed place: decode rows' in the order of the step, then padding's."""
        # Id -1 takes the entry that is appended.
        decodes = np.append((self.seq_lens_encoder == 0) & (self.seq_lens_decoder > 0), False)
        decoded = np.flatnonzero(decodes[self.batch_id_per_token])
        padding = np.flatnonzero(self.batch_id_per_token < 0)
        return np.concatenate([decoded, padding]).astype(np.int64)


def step_metadata(step: tuple[Row, ...]) -> StepMetadata:
    """The metadata of one step."""
    slots = [row for row in step if row.is_slot]
    padding = sum(row.new for row in step if not row.is_slot)
    this_time = [row.seq_lens_this_time for row in slots]
    held = [row.seq_lens_this_time + row.seq_lens_decoder for row in slots]
    prefilled = [length if row.seq_lens_encoder else 0 for row, length in zip(slots, held, strict=True)]
    batch_ids = np.repeat(np.arange(len(slots)), this_time)
    positions = np.concatenate(
        [np.arange(row.cached, row.cached + row.seq_lens_this_time) for row in slots]
        or [np.empty(0, np.int64)]
    )
    stale = positions[-1] if len(positions) else 0
    return StepMetadata(
        seq_lens_encoder=_int32([row.seq_lens_encoder for row in slots]),
        seq_lens_decoder=_int32([row.seq_lens_decoder for row in slots]),
        seq_lens_this_time=_int32(this_time),
        cu_seqlens_q=_int32([0, *accumulate(this_time)]),
        cu_seqlens_k=_int32([0, *accumulate(held)]),
        cu_seqlens_k_prefill=_int32([0, *accumulate(prefilled)]),
        batch_id_per_token=_int32([*batch_ids, *[-1] * padding]),
        position_ids=_int32([*positions, *[stale] * padding]),
    )


def slot_mapping(metadata: StepMetadata, block_tables: Int32, block_size: int) -> Int64:
    """[Tp] int64: `block_tables[b, p // block_size] * block_size + p % block_size`, padding negative.

    Source: FastDeploy O16, with its REQUIRED value for padding (any negative number).
    """
    slots = np.empty(metadata.tokens, np.int64)
    real = metadata.batch_id_per_token >= 0
    positions = metadata.position_ids[real].astype(np.int64)
    blocks = block_tables[metadata.batch_id_per_token[real], positions // block_size]
    slots[real] = blocks.astype(np.int64) * block_size + positions % block_size
    padding = int((~real).sum())
    slots[~real] = np.resize(np.array(PADDING_SLOTS, np.int64), padding)
    return slots


def _int32(values: list[int]) -> Int32:
    return np.asarray(values, dtype=np.int32)
