"""Packing and merge by their definition: row after row, its tokens are one branch's or the other's."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Five outputs, room for Td packed tokens taken from decode_out; copies: precision changes nothing.

    cu_seqlens_q_decode [B + 1], batch_id_per_decode_token [Td] and cache_seqlens [B] int32; packed_query
    [Td, H, N + D] and merged [Tp, H, V] in the model's dtype.
    """
    query = tensor(inputs, "query")
    prefill_out, decode_out = tensor(inputs, "prefill_out"), tensor(inputs, "decode_out")
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    sums, batch_ids, lengths = [0], [-1] * len(decode_out), [0] * len(encoder)
    packed_query = torch.zeros((len(decode_out), *query.shape[1:]), dtype=query.dtype, device=query.device)
    merged = torch.zeros(prefill_out.shape, dtype=prefill_out.dtype, device=prefill_out.device)
    for slot, new in enumerate(this_time):
        own = slice(starts[slot], starts[slot] + new)
        if encoder[slot] == 0 and decoder[slot] > 0 and new > 0:
            packed = slice(sums[-1], sums[-1] + new)
            packed_query[packed] = query[own]
            merged[own] = decode_out[packed]
            batch_ids[packed] = [slot] * new
            lengths[slot] = decoder[slot] + new
            sums.append(sums[-1] + new)
        else:
            merged[own] = prefill_out[own]
            sums.append(sums[-1])
    return {
        "cu_seqlens_q_decode": torch.tensor(sums, dtype=torch.int32, device=query.device),
        "batch_id_per_decode_token": torch.tensor(batch_ids, dtype=torch.int32, device=query.device),
        "packed_query": packed_query,
        "merged": merged,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=query.device),
    }


ORACLE = Oracle(
    name="decode_rows",
    operator="decode_rows",
    role="definition",
    source="FastDeploy extract_decoder_token_from_q, insert_decoder_result_back and "
    "merge_prefill_decode_output (O10-O12), REQUIRED forms",
    run=run,
)
