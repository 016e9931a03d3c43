"""Rotation again, in NumPy: each token's parts times a D x D matrix, which turns every pair's plane.

The matrix is made from the token's row of the table alone. That a table holds what its model asks for is
another question: `table` works out a model's cosines and sines from the wavelengths of its pairs, and tests
compare what the harness hands out with it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cases.models import Model
from references.oracle import Inputs, Oracle, Precision, number, tensor

Float64 = npt.NDArray[np.float64]


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """q_pe [Tp, H, D] and k_pe [Tp, D], float64, on the host.

    Raises:
        ValueError: an emulation is asked for; the definition has them.
    """
    if precision is not None:
        raise ValueError("rotation by matrices is float64 only")
    query, key = (tensor(inputs, name).to(torch.float64).cpu().numpy() for name in ("q_pe_raw", "k_pe_raw"))
    width = key.shape[1]
    q_pe, k_pe = np.zeros(query.shape), np.zeros(key.shape)
    for token, slot in enumerate(tensor(inputs, "batch_id_per_token").tolist()):
        if slot < 0:
            continue
        matrix = np.eye(width)
        if inputs["cos_sin_cache"] is not None:
            position = int(tensor(inputs, "position_ids")[token])
            row = tensor(inputs, "cos_sin_cache")[position].to(torch.float64).cpu().numpy()
            matrix = rotation_matrix(row, is_neox=number(inputs, "is_neox") == 1)
        q_pe[token] = query[token] @ matrix.T
        k_pe[token] = matrix @ key[token]
    return {"q_pe": torch.from_numpy(q_pe), "k_pe": torch.from_numpy(k_pe)}


def rotation_matrix(row: Float64, *, is_neox: bool) -> Float64:
    """[D, D]: what turns every pair by the angle whose cosine and sine stand in a table's row [D]."""
    pairs = len(row) // 2
    cosines, sines = row[:pairs], row[pairs:]
    matrix = np.zeros((len(row), len(row)))
    for pair in range(pairs):
        plane = (pair, pair + pairs) if is_neox else (2 * pair, 2 * pair + 1)
        turn = np.array([[cosines[pair], -sines[pair]], [sines[pair], cosines[pair]]])
        matrix[np.ix_(plane, plane)] = turn
    return matrix


def table(model: Model, positions: npt.NDArray[np.int64]) -> Float64:
    """[n, D] float64: rows [cos | sin] of a model's table, whole turns not taken off the angles.

    A pair's wavelength is 2 pi theta^(2i / D). YaRN leaves those alone of which the original length holds
    more than beta_fast and stretches those of which it holds fewer than beta_slow; between the whole pairs
    next to these bounds the frequency moves over in equal steps. longrope stretches each by its own factor.
    """
    pairs = model.qk_rope_head_dim // 2
    places = np.arange(pairs, dtype=np.float64)
    wavelengths = 2 * np.pi * np.power(model.rope_theta, places / pairs)
    frequencies, scale, scaling = 2 * np.pi / wavelengths, 1.0, model.rope_scaling
    if scaling is not None and scaling.type == "yarn":
        bounds = [
            pairs
            * math.log(scaling.original_max_position_embeddings / (count * 2 * math.pi), model.rope_theta)
            for count in (scaling.beta_fast, scaling.beta_slow)
        ]
        first, last = max(0, math.floor(bounds[0])), min(2 * pairs - 1, math.ceil(bounds[1]))
        stretched = np.clip((places - first) / max(last - first, 0.001), 0.0, 1.0)
        frequencies = frequencies * ((1.0 - stretched) + stretched / scaling.factor)
        if scaling.factor > 1:
            mscales = [
                0.1 * part * math.log(scaling.factor) + 1 for part in (scaling.mscale, scaling.mscale_all_dim)
            ]
            scale = mscales[0] / mscales[1]
    elif scaling is not None:
        is_long = scaling.factor > 1
        frequencies = frequencies / np.array(scaling.long_factor if is_long else scaling.short_factor)
        if is_long:
            length = math.log(scaling.original_max_position_embeddings)
            scale = math.sqrt(1 + math.log(scaling.factor) / length)
    turned = np.exp(1j * positions[:, None].astype(np.float64) * frequencies)
    return scale * np.concatenate([turned.real, turned.imag], axis=1)


ORACLE = Oracle(
    name="rope_by_matrices",
    operator="rope",
    role="derivation",
    source="arXiv:2104.09864 equation 15; tables: arXiv:2309.00071 section 3.2, arXiv:2402.13753",
    run=run,
)
