"""Zeros behind values, for attention kernels whose heads have one width: FastDeploy's O07.

Values are padded to the keys' width where theirs is smaller, and then alone. Equal widths (256/256, 128/128)
are no padding of width 0: nothing is copied. Wider values are refused.

Source: FastDeploy O07; SGLang and vLLM pad in the same way for kernels of one width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harness.checks._check import bits_differ
from harness.conformance.facts import Fact, refuses
from harness.conformance.kv_b_loading import numbers
from harness.tensors import DTYPES
from references.oracle import AGREEMENT, oracle_for

HEADS = 3
TOKENS = 6


class ValuePadding(Protocol):
    """An engine's two functions around an attention kernel."""

    def pad_values(self, values: Tensor, qk_head_dim: int) -> Tensor:
        """[T, H, V] -> [T, H, qk_head_dim], or the values as they are where the widths agree."""
        ...

    def crop_output(self, out: Tensor, v_head_dim: int) -> Tensor:
        """[T, H, qk_head_dim] -> [T, H, V]."""
        ...


@dataclass(frozen=True)
class Widths:
    """Widths of one head's keys and values, and the dtype of both."""

    keys: int
    values: int
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"keys of width {self.keys}, values of width {self.values} in {self.dtype}"

    def tensor(self) -> Tensor:
        """[T, H, V]: values, cut out of a wider tensor as kv_b_proj's output is."""
        wide = numbers("values", TOKENS, HEADS, self.keys + self.values, dtype=DTYPES[self.dtype])
        return wide[..., self.keys :]


# DeepSeek-V3, MiniCPM3, dots3-note's sliding layers; then GLM-5 and Mistral-Small-4.
NARROWER = (Widths(192, 128), Widths(96, 64, "fp16"), Widths(256, 128, "fp32"))
EQUAL = (Widths(256, 256), Widths(128, 128, "fp16"))
WIDER = (Widths(128, 192), Widths(96, 128))


def _zeros_behind(subject: ValuePadding, widths: Widths) -> str | None:
    values = widths.tensor()
    before = values.clone()
    padded = subject.pad_values(values, widths.keys)
    expected = (TOKENS, HEADS, widths.keys)
    if tuple(padded.shape) != expected or padded.dtype is not values.dtype:
        return f"padded to {tuple(padded.shape)} in {padded.dtype}, expected {expected} in {values.dtype}"
    if bool(bits_differ(padded[..., : widths.values], before).any()):
        return "the first columns are not the values"
    if bool((padded[..., widths.values :] != 0).any()):
        return "the columns behind the values are not 0"
    return "the values themselves were changed" if bool(bits_differ(values, before).any()) else None


def _nothing_copied(subject: ValuePadding, widths: Widths) -> str | None:
    values = widths.tensor()
    padded = subject.pad_values(values, widths.keys)
    if padded.shape != values.shape:
        return f"values of shape {tuple(values.shape)} became {tuple(padded.shape)}"
    if padded.data_ptr() != values.data_ptr() or padded.stride() != values.stride():
        return "values were copied that need no padding"
    return None


def _wider_refused(subject: ValuePadding, widths: Widths) -> str | None:
    return refuses(
        lambda: subject.pad_values(widths.tensor(), widths.keys), str(widths.keys), str(widths.values)
    )


def _attention_unchanged(subject: ValuePadding, widths: Widths) -> str | None:
    """Attention over padded values, cropped, is attention over values; what is cropped is 0."""
    values, dtype = widths.tensor(), DTYPES[widths.dtype]
    inputs = {
        "query": numbers("query", TOKENS, HEADS, widths.keys, dtype=dtype),
        "key": numbers("key", TOKENS, HEADS, widths.keys, dtype=dtype),
        "seq_lens_encoder": torch.tensor([TOKENS], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([0], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, TOKENS], dtype=torch.int32),
        "cu_seqlens_k_prefill": torch.tensor([0, TOKENS], dtype=torch.int32),
        "softmax_scale": widths.keys**-0.5,
    }
    attend = oracle_for("prefill_attention", "definition").run
    alone = attend({**inputs, "value": values}, None)["out"]
    padded = attend({**inputs, "value": subject.pad_values(values, widths.keys)}, None)["out"]
    if not isinstance(alone, Tensor) or not isinstance(padded, Tensor):
        raise TypeError("the oracle of prefill_attention must return a tensor for out")
    cropped = subject.crop_output(padded, widths.values)
    if cropped.shape != alone.shape:
        return f"the cropped output has shape {tuple(cropped.shape)}, expected {tuple(alone.shape)}"
    if bool((padded[..., widths.values :] != 0).any()):
        return "columns of the output behind the values are not exactly 0"
    error = float((cropped - alone).abs().max() / alone.abs().max())
    return None if error <= AGREEMENT else f"the cropped output differs by {error:.1e}"


FACTS: tuple[Fact[ValuePadding, Widths], ...] = (
    Fact("narrower_values_have_zeros_behind_them", "O07, L38", NARROWER, _zeros_behind),
    Fact("equal_widths_are_neither_padded_nor_copied", "O07, D7", EQUAL, _nothing_copied),
    Fact("wider_values_are_refused", "O07", WIDER, _wider_refused),
    Fact("padding_changes_no_attention", "O07", (*NARROWER, *EQUAL), _attention_unchanged),
)
