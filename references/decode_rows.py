"""Selection and merge by their definition: row after row, its tokens come from one branch or the other."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Merged [Tp, H, V], is_decode [Tp] and cache_seqlens [B] int32; copies, so precision changes nothing."""
    prefill_out, decode_out = tensor(inputs, "prefill_out"), tensor(inputs, "decode_out")
    encoder = tensor(inputs, "seq_lens_encoder").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    starts = tensor(inputs, "cu_seqlens_q").tolist()
    whole = {"dtype": torch.int32, "device": prefill_out.device}
    merged = torch.zeros(prefill_out.shape, dtype=prefill_out.dtype, device=prefill_out.device)
    is_decode = torch.zeros(len(prefill_out), **whole)  # type: ignore[call-overload]
    cache_seqlens = torch.zeros(len(encoder), **whole)  # type: ignore[call-overload]
    for slot, new in enumerate(this_time):
        own = slice(starts[slot], starts[slot] + new)
        if encoder[slot] > 0:
            merged[own] = prefill_out[own]
        elif decoder[slot] > 0 and new > 0:
            merged[own] = decode_out[own]
            is_decode[own] = 1
            cache_seqlens[slot] = decoder[slot] + new
    return {"merged": merged, "is_decode": is_decode, "cache_seqlens": cache_seqlens}


ORACLE = Oracle(
    name="decode_rows",
    operator="decode_rows",
    role="definition",
    source="FastDeploy extract_decoder_token_from_q, insert_decoder_result_back and "
    "merge_prefill_decode_output (O10-O12), REQUIRED forms",
    run=run,
)
