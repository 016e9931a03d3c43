"""A step of MLA attention again, absorbed and token by token.

Shares nothing with the definition: no key and no value is ever made. The query goes to where the latents
are, and what comes back goes through W_UV:

    a     = q_nope w_uk[h]
    s_j   = softmax_scale * (a . c_j + q_pe . r_j)
    out   = (sum_j e^(s_j - m) c_j / sum_j e^(s_j - m)) w_uv[h]

A token's keys are collected from the end of its row backwards, new ones first, then block after block, until
there are as many as its window has. Packed rows are written and read with a table of the numbers of e4m3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references._packed_rows_by_table import packed_row, unpacked_rows
from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, flag, number, tensor, text


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Out [Tp, H, V] in float64 and the cache rows written.

    With a `Precision`, float32 with q_nope w_uk, the weights, the latent output and the output rounded.
    """
    q_nope, q_pe = tensor(inputs, "q_nope"), tensor(inputs, "q_pe")
    dtype = torch.float64 if precision is None else torch.float32
    w_uk, w_uv = tensor(inputs, "w_uk").to(dtype), tensor(inputs, "w_uv").to(dtype)
    cache, new_rows = tensor(inputs, "latent_cache"), _new_rows(inputs)
    tables = tensor(inputs, "block_tables").tolist()
    decoder = tensor(inputs, "seq_lens_decoder").tolist()
    this_time = tensor(inputs, "seq_lens_this_time").tolist()
    softmax_scale, rank = number(inputs, "softmax_scale"), w_uk.shape[2]
    window = int(number(inputs, "window"))
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
        seen = [new_rows[token - index : token + 1].flip(0)]
        left = decoder[slot]
        while left > 0:
            block = (left - 1) // size
            seen.append(cache[tables[slot][block], 0, : left - block * size].flip(0))
            left = block * size
        keys = _numbers(inputs, torch.cat(seen)[: window or None], rank).to(dtype)
        c, r = keys[:, :rank], keys[:, rank:]

        absorbed = narrow(torch.einsum("hn,hnr->hr", q_nope[token].to(dtype), w_uk), model_dtype)
        logit = softmax_scale * (absorbed @ c.T + q_pe[token].to(dtype) @ r.T)
        weight = (logit - logit.max(1, keepdim=True).values).exp()
        total = weight.sum(1, keepdim=True)
        latent_out = narrow(narrow(weight, weight_dtype) @ c / total, model_dtype)
        token_out = narrow(torch.einsum("hr,hrv->hv", latent_out, w_uv), model_dtype)
        out[token] = token_out.to(torch.float64)
    rows_written = torch.tensor(targets, dtype=torch.int64, device=cache.device)
    return {"out": out, "latent_cache": Writes(rows_written, new_rows[: len(targets)])}


def _new_rows(inputs: Inputs) -> Tensor:
    """[Tp, width]: what the cache is to hold of every token of the step."""
    compressed_kv, k_pe = tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")
    if tensor(inputs, "latent_cache").dtype is not torch.uint8:
        return torch.cat([compressed_kv, k_pe], dim=1)
    latents = compressed_kv.float().cpu().numpy()
    ropes = k_pe.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    scale_fmt = text(inputs, "scale_fmt")
    rows = [packed_row(latent, rope, scale_fmt) for latent, rope in zip(latents, ropes, strict=True)]
    width = tensor(inputs, "latent_cache").shape[3]
    return torch.from_numpy(np.array(rows, np.uint8).reshape(-1, width)).to(k_pe.device)


def _numbers(inputs: Inputs, rows: Tensor, rank: int) -> Tensor:
    """[n, width] -> [n, R + D]: what rows of the cache stand for."""
    if rows.dtype is not torch.uint8:
        return rows
    rounded = flag(inputs, "rounds_keys")
    return torch.from_numpy(unpacked_rows(rows.cpu().numpy(), rank, rounded=rounded)).to(rows.device)


ORACLE = Oracle(
    name="mla_step_absorbed",
    operator="mla_step",
    role="derivation",
    source="arXiv:2405.04434, the absorption of W_UK and W_UV in section 2.1.2",
    run=run,
)
