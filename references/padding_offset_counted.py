"""Prefix sums and slots of tokens again, counted up slot after slot in plain Python."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_prefill [B + 1], batch_id_per_token [Tp], all int32."""
    new = tensor(inputs, "seq_lens_this_time")
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    rows = zip(*(tensor(inputs, name).tolist() for name in names), strict=True)
    queries, keys, prefill_keys, batch_ids = [0], [0], [0], []
    for slot, (encoder, cached, this_time) in enumerate(rows):
        batch_ids += [slot] * this_time
        queries.append(len(batch_ids))
        keys.append(keys[-1] + cached + this_time)
        prefill_keys.append(prefill_keys[-1])
        if encoder:
            prefill_keys[-1] += cached + encoder
    batch_ids += [-1] * (int(number(inputs, "num_tokens")) - len(batch_ids))
    counted = {
        "cu_seqlens_q": queries,
        "cu_seqlens_k": keys,
        "cu_seqlens_k_prefill": prefill_keys,
        "batch_id_per_token": batch_ids,
    }
    return {
        name: torch.tensor(values, dtype=torch.int32, device=new.device) for name, values in counted.items()
    }


ORACLE = Oracle(
    name="padding_offset_counted",
    operator="padding_offset",
    role="derivation",
    source="FastDeploy get_padding_offset (O02), token by token",
    run=run,
)
