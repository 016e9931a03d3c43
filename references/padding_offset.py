"""Prefix sums and slots of tokens by their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_prefill [B + 1], batch_id_per_token [Tp], all int32."""
    this_time = tensor(inputs, "seq_lens_this_time").long()
    lengths = this_time + tensor(inputs, "seq_lens_decoder").long()
    is_prefill = tensor(inputs, "seq_lens_encoder") > 0
    slots = torch.arange(len(this_time), device=this_time.device)
    batch_ids = this_time.new_full((int(number(inputs, "num_tokens")),), -1)
    batch_ids[: int(this_time.sum())] = slots.repeat_interleave(this_time)
    return {
        "cu_seqlens_q": _exclusive(this_time),
        "cu_seqlens_k": _exclusive(lengths),
        "cu_seqlens_k_prefill": _exclusive(torch.where(is_prefill, lengths, 0)),
        "batch_id_per_token": batch_ids.to(torch.int32),
    }


def _exclusive(lengths: Tensor) -> Tensor:
    """[B] int64 -> [B + 1] int32: the sum of what stands before each, and of all."""
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    sums[1:] = lengths.cumsum(0)
    return sums.to(torch.int32)


ORACLE = Oracle(
    name="padding_offset",
    operator="padding_offset",
    role="definition",
    source="FastDeploy get_padding_offset (O02), REQUIRED form",
    run=run,
)
