"""A step of MLA attention again, absorbed and token by token.

Shares nothing with the definition: no key and no value is ever made. The query goes to where the latents
are, and what comes back goes through W_UV:

    a     = q_nope w_uk[h]
    s_j   = softmax_scale * (a . c_j + q_pe . r_j)
    out   = (sum_j e^(s_j - m) c_j / sum_j e^(s_j - m)) w_uv[h]

A token's keys are collected from the end of its row backwards, new ones first, then block after block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Out [Tp, H, V] in float64 and the cache rows written.

    With a `Precision`, float32 with q_nope w_uk, the weights, the latent output and the output rounded.
    """
    q_nope, q_pe = tensor(inputs, "q_nope"), tensor(inputs, "q_pe")
    compressed_kv, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    dtype = torch.float64 if precision is None else torch.float32
    w_uk, w_uv = tensor(inputs, "w_uk").to(dtype), tensor(inputs, "w_uv").to(dtype)
    cache = tensor(inputs, "latent_cache")
    tables = tensor(inputs, "block_tables").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    softmax_scale, rank = number(inputs, "softmax_scale"), compressed_kv.shape[1]
    out = torch.zeros(len(q_nope), q_nope.shape[1], w_uv.shape[2], dtype=torch.float64, device=q_nope.device)
    targets: list[int] = []

    def narrow(values: Tensor, to: torch.dtype | None) -> Tensor:
        return values if to is None else values.to(to).to(dtype)

    weight_dtype = None if precision is None else precision.weights
    model_dtype = None if precision is None else precision.output
    owners = [(slot, index) for slot, count in enumerate(this_time) for index in range(count)]
    for token, (slot, index) in enumerate(owners):
        position, size = decoder[slot] + index, cache.shape[2]
        targets.append(tables[slot][position // size] * size + position % size)
        new = slice(token - index, token + 1)
        latents, ropes = [compressed_kv[new].flip(0)], [k_pe[new].flip(0)]
        left = decoder[slot]
        while left > 0:
            block = (left - 1) // size
            rows = cache[tables[slot][block], 0, : left - block * size].flip(0)
            latents.append(rows[:, :rank])
            ropes.append(rows[:, rank:])
            left = block * size
        c, r = torch.cat(latents).to(dtype), torch.cat(ropes).to(dtype)

        absorbed = narrow(torch.einsum("hn,hnr->hr", q_nope[token].to(dtype), w_uk), model_dtype)
        logit = softmax_scale * (absorbed @ c.T + q_pe[token].to(dtype) @ r.T)
        weight = (logit - logit.max(1, keepdim=True).values).exp()
        total = weight.sum(1, keepdim=True)
        latent_out = narrow(narrow(weight, weight_dtype) @ c / total, model_dtype)
        token_out = narrow(torch.einsum("hr,hrv->hv", latent_out, w_uv), model_dtype)
        out[token] = token_out.to(torch.float64)
    rows_written = torch.tensor(targets, dtype=torch.int64, device=cache.device)
    values = torch.cat([compressed_kv[: len(targets)], k_pe[: len(targets)]], dim=1)
    return {"out": out, "latent_cache": Writes(rows_written, values)}


ORACLE = Oracle(
    name="mla_step_absorbed",
    operator="mla_step",
    role="derivation",
    source="arXiv:2405.04434, the absorption of W_UK and W_UV in section 2.1.2",
    run=run,
)
