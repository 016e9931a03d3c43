"""Attention over lists of every row kind by its definition, one token's list at a time.

    new = the packed rows of this step's tokens, at slot_mapping
    K   = [compressed_kv | k_pe] of the list's tokens, where the token's row has nothing cached;
          else the list's rows, new ones before what the cache holds, codes times their tiles' scales
    s   = softmax_scale * q K^T
    lse = ln sum_i exp(s_i)
    out = sum_i exp(s_i - lse) K_i[:R]

Stored bytes become float64: a code times a scale is exact there. Where the path rounds its keys, the product
is rounded to float32 and then to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references._listed_attention import attend
from references._packed_rows import dequantised, packed_rows
from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, flag, number, tensor, text


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """What `attend` gives, in float64, and the cache rows written."""
    q, cache, indices = tensor(inputs, "q"), tensor(inputs, "packed_cache"), tensor(inputs, "indices").long()
    latents, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    slots, batch_ids = tensor(inputs, "slot_mapping"), tensor(inputs, "batch_id_per_token").tolist()
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    rank, rounded = int(number(inputs, "kv_lora_rank")), flag(inputs, "rounds_keys")
    stored = cache.view(-1, cache.shape[3])
    is_written = (slots >= 0) & (slots < len(stored))
    new_slots = slots[is_written]
    new_rows = packed_rows(latents[is_written], k_pe[is_written], text(inputs, "scale_fmt"))
    keys_of_step = torch.cat([latents, k_pe], dim=1)

    def keys_of(token: int) -> Tensor:
        slot, entries = batch_ids[token], indices[token, 0]
        if slot < 0:
            return keys_of_step[:0]
        if cached[slot] == 0:
            return keys_of_step[entries[(entries >= 0) & (entries < len(q))]]
        listed = entries[(entries >= 0) & (entries < len(stored))]
        rows = stored[listed]
        key, place = (listed.unsqueeze(1) == new_slots).nonzero(as_tuple=True)
        rows[key] = new_rows[place]
        return dequantised(rows, rank, rounded=rounded)

    outputs = attend(q, keys_of, number(inputs, "softmax_scale"), rank, precision)
    return {**outputs, "packed_cache": Writes(new_slots, new_rows)}


ORACLE = Oracle(
    name="static_attention",
    operator="static_attention",
    role="definition",
    source="FastDeploy O20, REQUIRED form; arXiv:2405.04434 section 2.1.3 over the rows of section 3.3",
    run=run,
)
