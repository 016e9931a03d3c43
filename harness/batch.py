"""`Batch`: the tensors of one case on one device, made from the operator's contract."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import Case, Row
from cases.contract import Operator
from cases.layers import Layer
from cases.schedule import Sequence as HeldSequence
from cases.schedule import sequences
from harness.buffers import Buffer
from harness.fill import Filler
from harness.metadata import StepMetadata, step_metadata
from harness.model_data import model_numbers, withheld_weights
from harness.paging import Pages, lay_out
from harness.rope_data import is_neox

PLAN_MULTIPROCESSORS = 132
"""Multiprocessors that step plans are made for, an H100 SXM's: plans do not depend on the machine."""


@dataclass(frozen=True)
class LayerBatch:
    """One layer of a batch.

    Attributes:
        inputs: the buffer of every input of the contract.
        attributes: the scalars that go with them; None for an input that the case withholds.
        axes: size of every axis name.
        pages: where the layer's blocks are.
        carried: [n] int64, rows of the cache that earlier steps of the case have filled.
    """

    layer: Layer
    inputs: dict[str, Buffer]
    attributes: dict[str, float | int | str | None]
    axes: dict[str, int]
    pages: Pages
    carried: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs as a path or an oracle gets them."""
        return {name: buffer.view for name, buffer in self.inputs.items()}


@dataclass(frozen=True)
class Batch:
    """One step of a case, materialised.

    Attributes:
        rows: the step's rows, padding last.
        metadata: the step's metadata on the host.
        layers: one set of tensors a layer.
    """

    case: Case
    operator: Operator
    rows: tuple[Row, ...]
    metadata: StepMetadata
    layers: tuple[LayerBatch, ...]
    device: torch.device

    def digest(self) -> str:
        """32 hex digits that depend on every input byte, equal on every machine for one case."""
        state = hashlib.blake2b(digest_size=16)
        for layer in self.layers:
            for name, buffer in layer.inputs.items():
                view = buffer.view
                state.update(f"{layer.layer.index}/{name}/{view.dtype}/{tuple(view.shape)}".encode())
                dense = buffer.snapshot() if buffer.sparse else view.contiguous().flatten()
                state.update(dense.view(torch.uint8).cpu().numpy().tobytes())
            for key, value in layer.attributes.items():
                text = f"{value:.12g}" if isinstance(value, float) else str(value)
                state.update(f"{key}={text}".encode())
        return state.hexdigest()


def materialise(case: Case, operator: Operator, device: torch.device, step: int = 0) -> Batch:
    """The tensors of one step of a case.

    Raises:
        torch.OutOfMemoryError: the device has no room; `required_bytes` tells beforehand.
    """
    rows = case.steps[step]
    metadata = step_metadata(rows)
    held = sequences(case.steps)[step]
    # Layers of a stack do not differ: one set of tensors holds all of them.
    apart = case.layers[:1] if operator.is_stack else case.layers
    layers = tuple(
        _layer_batch(case, operator, rows, metadata, held, layer, lay_out(case, layer)[step], device)
        for layer in apart
    )
    return Batch(case, operator, rows, metadata, layers, device)


def _layer_batch(
    case: Case,
    operator: Operator,
    rows: tuple[Row, ...],
    metadata: StepMetadata,
    held: Sequence[HeldSequence | None],
    layer: Layer,
    pages: Pages,
    device: torch.device,
) -> LayerBatch:
    num_layers = case.options.layers if operator.is_stack else 1
    filler = Filler(case, rows, metadata, held, layer, pages, device, num_layers)
    withheld = {"block_tables"} if case.options.table == "none" else set()
    withheld |= {"cos_sin_cache"} if layer.model.rope == "none" else set()
    withheld |= set() if layer.has_sinks else {"sinks"}
    withheld |= withheld_weights(layer) if operator.is_stack else set()
    inputs = {spec.name: filler.fill(spec) for spec in operator.inputs if spec.name not in withheld}
    available = {
        "softmax_scale": layer.softmax_scale,
        "kv_lora_rank": layer.kv_lora_rank,
        "qk_nope_head_dim": layer.qk_nope_head_dim,
        "v_head_dim": layer.v_head_dim,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "total_num_key_value_heads": layer.total_num_key_value_heads,
        "max_row_tokens": filler.axes["max_blocks"] * layer.block_size,
        "qk_head_dim": layer.qk_head_dim,
        "tensor_parallel_size": layer.tensor_parallel_size,
        "block_size": layer.block_size,
        "window": layer.window,
        "splits": case.options.splits,
        "num_tokens": metadata.tokens,
        "plan_tiles": filler.axes["plan_tiles"],
        "multiprocessors": PLAN_MULTIPROCESSORS,
        "scale_fmt": case.options.scale_fmt,
        "is_neox": is_neox(layer),
        **model_numbers(layer),
    }
    attributes: dict[str, float | int | str | None] = {
        **{name: available[name] for name in operator.attributes},
        **{spec.name: None for spec in operator.inputs if spec.name in withheld},
    }
    return LayerBatch(layer, inputs, attributes, filler.axes, pages, filler.carried())
