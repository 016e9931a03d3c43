"""Attention of query heads in groups as a running softmax in NumPy, a key at a time along the block table.

Shares nothing with the definition: no score matrix and no mask ever exist. A sink is where the running sum
begins: a key of weight 1 and value 0, at the sink's logit. A token's kind is not asked for, its slot and its
position are: `batch_id_per_token` says which tokens are a row's, and each key is shown to those that see it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, maybe_tensor, number, tensor

Float64 = npt.NDArray[np.float64]


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V] and lse [Tp, H], float64, on the host.

    Raises:
        ValueError: a precision other than float64 is asked for.
    """
    if precision is not None:
        raise ValueError("the online derivation exists in float64 only, got a Precision")
    queries = tensor(inputs, "query")
    k_cache, v_cache = tensor(inputs, "k_cache"), tensor(inputs, "v_cache")
    tables = tensor(inputs, "block_tables").tolist()
    slots = np.array(tensor(inputs, "batch_id_per_token").tolist(), np.int64)
    held = tensor(inputs, "seq_lens_decoder").tolist()
    softmax_scale, window = number(inputs, "softmax_scale"), int(number(inputs, "window"))
    heads, block_size = queries.shape[1], k_cache.shape[2]
    sinks = maybe_tensor(inputs, "sinks")
    begin = np.full(heads, -np.inf) if sinks is None else _host(sinks)
    out = np.zeros((*queries.shape[:2], v_cache.shape[3]))
    lse = np.full(queries.shape[:2], -np.inf)

    for slot in sorted(set(slots[slots >= 0].tolist())):
        mine = np.flatnonzero(slots == slot)
        q = _host(queries[torch.from_numpy(mine).to(queries.device)])
        positions = held[slot] + np.arange(len(mine))
        maximum = np.tile(begin, (len(mine), 1))
        total = np.where(np.isfinite(maximum), 1.0, 0.0)
        accumulator = np.zeros((len(mine), heads, v_cache.shape[3]))
        oldest = positions[0] - window + 1 if window else 0
        for position in range(max(0, oldest), int(positions[-1]) + 1):
            block, offset = tables[slot][position // block_size], position % block_size
            group = heads // k_cache.shape[1]
            key = np.repeat(_host(k_cache[block, :, offset]), group, axis=0)
            value = np.repeat(_host(v_cache[block, :, offset]), group, axis=0)
            age = positions - position
            sees = np.flatnonzero((age >= 0) & ((age < window) if window else True))
            score = softmax_scale * np.einsum("thk,hk->th", q[sees], key)
            larger = np.maximum(maximum[sees], score)
            keep, add = np.exp(maximum[sees] - larger), np.exp(score - larger)
            total[sees] = total[sees] * keep + add
            accumulator[sees] = accumulator[sees] * keep[..., None] + add[..., None] * value
            maximum[sees] = larger
        out[mine] = accumulator / total[..., None]
        lse[mine] = maximum + np.log(total)
    return {"out": torch.from_numpy(out), "lse": torch.from_numpy(lse)}


def _host(values: Tensor) -> Float64:
    widened: Float64 = values.to("cpu", torch.float64).numpy()
    return widened


ORACLE = Oracle(
    name="gqa_step_online",
    operator="gqa_step",
    role="derivation",
    source="arXiv:1805.02867 algorithm 3; heads in groups as HuggingFace's repeat_kv",
    run=run,
)
