"""`Launch`: one path on one batch, with everything poisoned before and snapshots to compare with after."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from cases.contract import Fill, Operator, contract_of
from harness import bounds
from harness.batch import Batch, LayerBatch, materialise
from harness.buffers import Buffer, bytes_of
from harness.kernel_path import KernelPath, Tensors, to_scale
from harness.lanes import Lane
from harness.metadata import slot_mapping
from harness.tensors import DTYPES, allocate
from references.oracle import Inputs, Outputs, Precision, oracle_for


@dataclass
class LayerLaunch:
    """One layer's tensors of a launch.

    Attributes:
        before: the inputs' bytes as they were.
        rounds_keys: whether the path rounds the keys that it dequantises.
        scale: the softmax scale that the path's library takes, None for the contract's.
        history: of a cache that earlier steps have filled, the rows they left and what a recompute of
            every sequence gives, both [n, width].
    """

    batch: LayerBatch
    outputs: dict[str, Buffer]
    workspace: dict[str, Buffer]
    before: dict[str, Tensor]
    rounds_keys: bool = False
    scale: float | None = None
    history: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """Tensors and scalars as the path gets them."""
        return {**self.batch.tensors, **self.batch.attributes}

    @property
    def question(self) -> dict[str, Any]:
        """The same as an oracle gets them: with what the path says of its keys and of its scale."""
        asked = {**self.inputs, "rounds_keys": self.rounds_keys}
        if self.scale is not None:
            asked["q"] = to_scale(asked["q"], asked["softmax_scale"] / self.scale)
            asked["softmax_scale"] = self.scale
        return asked


@dataclass
class Launch:
    """A path on one step of a case. `prepare` makes it, `run` launches it, `reset` makes it as new.

    Attributes:
        has_ended: whether a run came to its end, so that the outputs are what the path made of them.
    """

    case: Case
    operator: Operator
    path: KernelPath
    lane: Lane
    batch: Batch
    layers: tuple[LayerLaunch, ...]
    step: int = 0
    run_seconds: float = 0.0
    oracle_seconds: float = 0.0
    has_ended: bool = False
    _expected: dict[tuple[int, str], Outputs] = field(default_factory=dict)
    _emulated: dict[int, Outputs] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, case: Case, path: KernelPath, lane: Lane, step: int = 0, earlier: Launch | None = None
    ) -> Launch:
        """Inputs filled, outputs and workspace poisoned, nothing launched.

        Args:
            step: which step of the case.
            earlier: the launch of the step before, whose caches this one goes on with.
        """
        contract = contract_of(case)
        batch = materialise(case, contract, torch.device(lane.device), step)
        given = tuple(spec for spec in contract.outputs if spec.name not in path.omits)
        operator = replace(contract, outputs=given)
        alone = case.one_step(step)
        layers = tuple(
            _prepare_layer(
                alone if operator.is_stack else alone.one_layer(layer.layer.index),
                operator,
                path,
                batch,
                layer,
                None if earlier is None else earlier.layers[index],
            )
            for index, layer in enumerate(batch.layers)
        )
        return cls(case, operator, path, lane, batch, layers, step)

    def run(self) -> None:
        """Launches layer after layer and waits for the device.

        Raises:
            OutOfBounds: an interpreted kernel left the tensors of its launch.
            PathFailure: the path or the device raised.
        """
        started = time.perf_counter()
        self.has_ended = False
        try:
            self.enqueue()
            with blaming_the_path():
                self.lane.synchronize()
            self.has_ended = True
        finally:
            self.run_seconds += time.perf_counter() - started

    def plan(self) -> list[Tensors]:
        """What the path makes of the metadata of each layer before it launches. Raises as `run` does."""
        with blaming_the_path():
            return [self.path.plan(layer.inputs) for layer in self.layers]

    def enqueue(self, plans: Sequence[Tensors] | None = None) -> None:
        """Launches without waiting, but for what a path's plan waits for. Raises as `run` does.

        Args:
            plans: what `plan` gave for these inputs; made here if not given.
        """
        planned = self.plan() if plans is None else plans
        for layer, plan in zip(self.layers, planned, strict=True):
            outputs = {name: buffer.view for name, buffer in layer.outputs.items()}
            workspace = {name: buffer.view for name, buffer in layer.workspace.items()}
            with blaming_the_path():
                self.path.run(layer.inputs, outputs, {**workspace, **plan})

    def reset(self) -> None:
        """Poisons outputs and workspace again and restores what was written in place."""
        for layer in self.layers:
            for name, buffer in layer.outputs.items():
                if name in self.operator.in_place:
                    buffer.restore(layer.before[name])
                else:
                    buffer.poison()
            for buffer in layer.workspace.values():
                buffer.poison()

    def expected(self, layer: int, role: str = "definition") -> Outputs:
        """The oracle's outputs for a layer, computed on first use: never before the path has run."""
        if (layer, role) not in self._expected:
            started = time.perf_counter()
            inputs: Inputs = self.layers[layer].question
            self._expected[layer, role] = oracle_for(self.operator.name, role).run(inputs, None)
            self.oracle_seconds += time.perf_counter() - started
        return self._expected[layer, role]

    def emulated(self, layer: int) -> Outputs:
        """The definition's outputs for a layer in its dtype, as one pass rounds: the budgets' baseline."""
        if layer not in self._emulated:
            dtype = DTYPES[self.layers[layer].batch.layer.dtype]
            definition = oracle_for(self.operator.name, "definition")
            self._emulated[layer] = definition.run(self.layers[layer].question, Precision(dtype, dtype))
        return self._emulated[layer]

    def tensor_label(self, name: str, layer: int) -> str:
        """How a tensor is called in reports: with its layer where there are several."""
        return f"{name}[{layer}]" if len(self.layers) > 1 else name

    def token_rows(self, name: str, layer: int) -> Tensor:
        """An output by its first axis; of a cache the new tokens' rows, wherever they lie: [T, width].

        Of a cache with several heads all of a token's side by side, of a stack's caches those of every layer:
        [L T, width].
        """
        launch = self.layers[layer]
        view = launch.outputs[name].view
        if name not in self.operator.in_place:
            return view
        real = int(self.batch.metadata.cu_seqlens_q[-1])
        # From the table that the launch has, which a replayed graph loads with another batch's.
        tables = launch.batch.tensors["block_tables"].cpu().numpy()
        slots = slot_mapping(self.batch.metadata, tables, launch.batch.layer.block_size)[:real]
        rows = torch.from_numpy(slots).to(view.device)
        if self.operator.is_stack:
            rows_of_a_layer = launch.batch.axes["num_blocks"] * launch.batch.axes["block_size"]
            rows = torch.cat([rows + number * rows_of_a_layer for number in range(len(view))])
            return view.view(-1, view.shape[-1])[rows]
        block_size = launch.batch.layer.block_size
        return view[rows // block_size, :, rows % block_size].flatten(1)

    def outputs_digest(self) -> str:
        """32 hex digits that depend on every output bit."""
        state = hashlib.blake2b(digest_size=16)
        for index, layer in enumerate(self.layers):
            for name in layer.outputs:
                dense = self.token_rows(name, index).contiguous()
                state.update(bytes_of(dense.flatten()).cpu().numpy().tobytes())
        return state.hexdigest()


class PathFailure(Exception):
    """A path, or the device under it, raised; the message says what, in one sentence."""


@contextmanager
def blaming_the_path() -> Iterator[None]:
    """Turns what a path raises into PathFailure; lack of memory is nobody's fault."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        _raise_violation()
        raise PathFailure(_sentence(error)) from error
    # The path may have caught it.
    _raise_violation()


def _raise_violation() -> None:
    """Raises the out-of-bounds access behind an interpreter's exception, if there was one."""
    violation = bounds.take_violation()
    if violation is not None:
        raise violation from None


def _sentence(error: Exception) -> str:
    """What a path raised, with its cause where the interpreter wraps it."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    # A compiler's first line says where, its last what.
    text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return f"the path raised {type(cause).__name__}: {text}"


def _prepare_layer(
    case: Case,
    operator: Operator,
    path: KernelPath,
    batch: Batch,
    layer: LayerBatch,
    earlier: LayerLaunch | None,
) -> LayerLaunch:
    strided = case.options.strided == "1"
    outputs = {
        spec.name: layer.inputs[spec.name]
        if spec.name in operator.in_place
        else allocate(spec, layer.layer, layer.axes, batch.device, strided=strided)
        for spec in operator.outputs
    }
    with blaming_the_path():
        wanted = path.workspace(case)
    workspace = {
        name: Buffer.allocate(shape, getattr(torch, dtype), batch.device)
        for name, (shape, dtype) in wanted.items()
    }
    history = {} if earlier is None else _carry_over(operator, layer, earlier)
    before = {name: buffer.snapshot() for name, buffer in layer.inputs.items()}
    scale = None if path.scale is None else path.scale(case)
    return LayerLaunch(layer, outputs, workspace, before, path.rounds_keys, scale, history)


def _carry_over(
    operator: Operator, layer: LayerBatch, earlier: LayerLaunch
) -> dict[str, tuple[Tensor, Tensor]]:
    """Puts what earlier steps left in a cache in the place of what a recompute gives; returns both.

    What only a path can compute is there to go on with and not to be compared: its steps were.
    Everything else of the cache stays hostile: freed blocks and rejected drafts are poison again.
    """
    history = {}
    fills = {spec.name: spec.fill for spec in operator.inputs}
    for name in operator.in_place:
        cache, left = layer.inputs[name].view, earlier.outputs[name].view
        rows = cache.view(-1, cache.shape[-1])
        recomputed, carried = rows[layer.carried], left.view(-1, left.shape[-1])[layer.carried]
        rows[layer.carried] = carried
        if fills[name] is not Fill.COMPUTED_CACHE:
            history[name] = (carried, recomputed)
    return history
