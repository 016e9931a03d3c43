"""What a checkpoint's kv_b_proj holds: weights of a trained size, some of them hard to copy.

One row a latent column, one column an output feature; a weight depends on (seed, layer, row, column) alone,
not on how many heads there are or on the layout that it is handed out in. Most are bell-shaped integers
/ 2^12, of standard deviation 0.036, next to 1 / sqrt(R). One in 256 is a number that arithmetic on the way
would change: a negative zero or a subnormal number, which many units flush.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.hashing import bits, normal_integers, row_seeds

WEIGHT_UNIT = 2.0**-12
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
INTEGERS = {2: torch.int16, 4: torch.int32}


def weight_rows(
    name: str, rows: Tensor, width: int, dtype: torch.dtype, *, seed: int, layer: int = 0
) -> Tensor:
    """[n, width] of a dtype: rows of the named weight, a row an input feature; rows: [n] int64."""
    seeds = row_seeds(seed, f"{name}.{layer}", torch.zeros_like(rows), rows)
    values = (normal_integers(seeds, width).to(torch.float32) * WEIGHT_UNIT).to(dtype)
    words = bits(seeds, width)
    # As bits: a conversion from float32 might flush them.
    integer = INTEGERS[dtype.itemsize]
    hard = hard_numbers(dtype, rows.device)
    # The lowest byte chooses where, higher ones which.
    chosen = hard[(words >> 8) % len(hard)]
    return torch.where((words & 0xFF) == 0, chosen, values.view(integer)).view(dtype)


def hard_numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[5] integers of the dtype's size: bits of -0, and of the least and largest subnormals of both signs."""
    integer = INTEGERS[dtype.itemsize]
    sign, largest = torch.iinfo(integer).min, 2 ** MANTISSA_BITS[dtype] - 1
    numbers = [sign, 1, sign + 1, largest, sign + largest]
    return torch.tensor(numbers, dtype=integer, device=device)
