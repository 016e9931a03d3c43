"""`Batch`: the tensors of one case on one device, made from the operator's contract."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cases import Case, Row
from cases.blocks import blocks_needed
from cases.contract import Fill, Operator, TensorSpec
from cases.layers import Layer
from cases.schedule import Sequence as HeldSequence
from cases.schedule import sequences
from harness.buffers import SPARSE_BYTES, Buffer
from harness.data import HeadSource, ProjectedSource, Source
from harness.hashing import text_seed
from harness.kv_b_data import kv_b_rows
from harness.metadata import Int64, StepMetadata, slot_mapping, step_metadata
from harness.paging import Pages, lay_out

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PADDING_NAN = {
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
}
"""The NaN of padding tokens' rows, other bits than the poison around them: a padding row that is copied
into the cache shows even where it lands on poison or in a guard band."""

FINITE_POISON = 16384.0
"""Large, finite, and a number of every dtype."""

CHUNK_ELEMENTS = 1 << 24
"""Data are made this many elements at a time: the int64 intermediates stay under about a GiB."""


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
    attributes: dict[str, float | int | None]
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


def axis_sizes(layer: Layer, metadata: StepMetadata, pages: Pages) -> dict[str, int]:
    """The size of every axis that a contract may name."""
    return {
        "one": 1,
        "tokens": metadata.tokens,
        "slots": metadata.slots,
        "slots_plus_one": metadata.slots + 1,
        "num_attention_heads": layer.num_attention_heads,
        "prefill_keys": int(metadata.cu_seqlens_k_prefill[-1]),
        "decode_tokens": len(metadata.packed_tokens),
        "kv_lora_rank": layer.kv_lora_rank,
        "qk_rope_head_dim": layer.qk_rope_head_dim,
        "latent_width": layer.latent_width,
        "qk_nope_head_dim": layer.qk_nope_head_dim,
        "qk_head_dim": layer.qk_head_dim,
        "v_head_dim": layer.v_head_dim,
        "num_blocks": pages.num_blocks,
        "block_size": layer.block_size,
        "max_blocks": pages.block_tables.shape[1],
        "plan_tiles": _plan_tiles(metadata.slots, pages.block_tables.shape[1], layer.block_size),
        "maxima": 9,
        "tensor_parallel_size": layer.tensor_parallel_size,
        "kv_b_proj_width": layer.kv_b_proj_width,
    }


def _plan_tiles(slots: int, max_blocks: int, block_size: int) -> int:
    """Room for every tile of a decode plan, from shapes alone.

    A tile is a whole number of blocks, so a row has no more tiles than its table has entries; but one
    slot alone is cut into tiles of 64 tokens whatever the block size.
    """
    return -(-max_blocks * block_size // 64) if slots == 1 else slots * max_blocks


def tensor_dtype(spec: TensorSpec, layer: Layer) -> torch.dtype:
    """The dtype of a contract's tensor in one layer."""
    if spec.dtype in ("model", "cache"):
        return DTYPES[layer.dtype]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def allocate(
    spec: TensorSpec, layer: Layer, axes: Mapping[str, int], device: torch.device, *, strided: bool
) -> Buffer:
    """A poisoned buffer for one tensor of a contract."""
    shape = [axes[axis] for axis in spec.axes]
    return Buffer.allocate(shape, tensor_dtype(spec, layer), device, strided=strided and spec.strided)


def materialise(case: Case, operator: Operator, device: torch.device, step: int = 0) -> Batch:
    """The tensors of one step of a case.

    Raises:
        torch.OutOfMemoryError: the device has no room; `required_bytes` tells beforehand.
    """
    rows = case.steps[step]
    metadata = step_metadata(rows)
    held = sequences(case.steps)[step]
    layers = tuple(
        _layer_batch(case, operator, rows, metadata, held, layer, lay_out(case, layer)[step], device)
        for layer in case.layers
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
    filler = _Filler(case, rows, metadata, held, layer, pages, device)
    withheld = {"block_tables"} if case.options.table == "none" else set()
    inputs = {spec.name: filler.fill(spec) for spec in operator.inputs if spec.name not in withheld}
    axes = axis_sizes(layer, metadata, pages)
    available = {
        "softmax_scale": layer.softmax_scale,
        "kv_lora_rank": layer.kv_lora_rank,
        "qk_nope_head_dim": layer.qk_nope_head_dim,
        "v_head_dim": layer.v_head_dim,
        "num_attention_heads": layer.num_attention_heads,
        "tensor_parallel_size": layer.tensor_parallel_size,
        "block_size": layer.block_size,
        "splits": case.options.splits,
        "num_tokens": metadata.tokens,
        "plan_tiles": axes["plan_tiles"],
        "multiprocessors": PLAN_MULTIPROCESSORS,
    }
    attributes = {
        **{name: available[name] for name in operator.attributes},
        **{spec.name: None for spec in operator.inputs if spec.name in withheld},
    }
    return LayerBatch(layer, inputs, attributes, axes, pages, filler.carried())


class _Filler:
    """Makes the inputs of one layer, each by its contract's `Fill`."""

    def __init__(
        self,
        case: Case,
        rows: tuple[Row, ...],
        metadata: StepMetadata,
        held: Sequence[HeldSequence | None],
        layer: Layer,
        pages: Pages,
        device: torch.device,
    ) -> None:
        self.case = case
        self.rows = [row for row in rows if row.is_slot]
        self.metadata = metadata
        self.held = held
        self.layer = layer
        self.pages = pages
        self.device = device
        self.axes = axis_sizes(layer, metadata, pages)
        self.source = Source(layer, case.options.data, case.options.seed)
        self.heads = HeadSource(layer, case.options.data, case.options.seed)
        self.projected = ProjectedSource(layer, case.options.data, case.options.seed)
        self.strided = case.options.strided == "1"
        self.arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
            **vars(metadata),
            "block_tables": pages.block_tables,
            "slot_mapping": slot_mapping(metadata, pages.block_tables, layer.block_size),
        }

    def fill(self, spec: TensorSpec) -> Buffer:
        """The buffer of one input, filled."""
        if spec.fill in (Fill.CACHE_BEFORE, Fill.CACHE_AFTER):
            return self._cache(spec)
        buffer = allocate(spec, self.layer, self.axes, self.device, strided=self.strided)
        if spec.fill is Fill.METADATA:
            buffer.view.copy_(torch.from_numpy(self.arrays[spec.name]))
            return buffer
        if spec.fill in (Fill.HEAD_KEY, Fill.HEAD_VALUE):
            self._fill_heads(spec, buffer)
            return buffer
        if spec.fill is Fill.KV_B_WEIGHT:
            self._fill_kv_b(spec, buffer)
            return buffer
        if spec.fill in (Fill.KEY_WEIGHT, Fill.VALUE_WEIGHT):
            make = self.projected.w_uk if spec.fill is Fill.KEY_WEIGHT else self.projected.w_uv
            buffer.view.copy_(make(self.device))
            return buffer
        tokens = self._real_tokens(spec)
        for part in self._chunks(torch.arange(len(tokens), device=self.device), self._token_elements(spec)):
            buffer.view[part] = self._token_rows(spec, tokens[part]).to(buffer.view.dtype)
        if spec.fill is Fill.PREFILL_OUTPUT:
            self._poison_unselected(buffer)
        integer, nan = PADDING_NAN[buffer.view.dtype]
        buffer.view[len(tokens) :].view(integer).fill_(nan)
        return buffer

    def _fill_kv_b(self, spec: TensorSpec, buffer: Buffer) -> None:
        """The same weights in either layout: [R, H_total (N + V)] or its transpose."""
        by_rank = buffer.view if spec.axes[0] == "kv_lora_rank" else buffer.view.T
        width, dtype = self.layer.kv_b_proj_width, buffer.view.dtype
        seed, index = self.case.options.seed, self.layer.index
        for part in self._chunks(torch.arange(len(by_rank), device=self.device), width):
            by_rank[part] = kv_b_rows(part, width, dtype, seed=seed, layer=index)

    def _real_tokens(self, spec: TensorSpec) -> Tensor:
        """[n] int64: the real token of each leading row of an input; what lies behind is padding's."""
        real = int(self.metadata.cu_seqlens_q[-1])
        if spec.axes[0] != "decode_tokens":
            return torch.arange(real, device=self.device)
        packed = self.metadata.packed_tokens
        return torch.from_numpy(packed[packed < real]).to(self.device)

    def _token_elements(self, spec: TensorSpec) -> int:
        has_heads = spec.axes[1] == "num_attention_heads"
        return (self.layer.num_attention_heads if has_heads else 1) * self.layer.latent_width

    def _poison_unselected(self, buffer: Buffer) -> None:
        """Tokens that the prefill branch did not compute hold NaN, or what option poison says."""
        prefills = self._on_device("seq_lens_encoder") > 0
        slots = self._on_device("batch_id_per_token")
        slots = slots[slots >= 0]
        values = {"nan": torch.nan, "finite": FINITE_POISON, "zero": 0.0}
        buffer.view[: len(slots)][~prefills[slots]] = values[self.case.options.poison]

    def _fill_heads(self, spec: TensorSpec, buffer: Buffer) -> None:
        """Keys or values of every token that prefill rows attend to, row after row."""
        lengths = [row.length if row.seq_lens_encoder else 0 for row in self.rows]
        slots, positions = (torch.from_numpy(array).to(self.device) for array in _token_places(lengths))
        make = self.heads.keys if spec.fill is Fill.HEAD_KEY else self.heads.values
        everything = torch.arange(len(slots), device=self.device)
        for part in self._chunks(everything, self.layer.num_attention_heads * self.layer.qk_head_dim):
            keys = self._position_keys(slots[part], positions[part])
            buffer.view[part] = make(keys, positions[part]).to(buffer.view.dtype)

    def _token_rows(self, spec: TensorSpec, tokens: Tensor) -> Tensor:
        """What the named input holds for some real tokens."""
        slots, positions = self._on_device("batch_id_per_token"), self._on_device("position_ids")
        slots, positions = slots[tokens], positions[tokens]
        row_keys = self._position_keys(slots, positions)
        rank = self.layer.kv_lora_rank
        if spec.fill is Fill.LATENT:
            return self.source.cache_rows(row_keys, positions)[:, :rank]
        if spec.fill is Fill.ROPE_KEY:
            return self.source.cache_rows(row_keys, positions)[:, rank:]
        if spec.fill in (Fill.PREFILL_OUTPUT, Fill.DECODE_OUTPUT):
            return self.heads.values(row_keys, positions)
        oldest = self._position_keys(slots, torch.zeros_like(positions))
        if spec.fill in (Fill.NOPE_QUERY, Fill.ROPE_QUERY):
            # Both are cut from one draw: apart, neither would point at the keys that stand out.
            whole = self.projected.queries(self._slot_keys()[slots], row_keys, positions, oldest)
            nope = self.layer.qk_nope_head_dim
            return whole[..., :nope] if spec.fill is Fill.NOPE_QUERY else whole[..., nope:]
        source = self.heads if spec.fill is Fill.HEAD_QUERY else self.source
        return source.queries(self._slot_keys()[slots], row_keys, positions, oldest)

    def _cache(self, spec: TensorSpec) -> Buffer:
        shape = [self.axes[axis] for axis in spec.axes]
        used = torch.from_numpy(self.pages.used)
        dtype = tensor_dtype(spec, self.layer)
        buffer = Buffer.allocate(shape, dtype, self.device, used_rows=used)
        if self.case.options.poison != "nan" and not buffer.sparse:
            buffer.view.fill_(FINITE_POISON if self.case.options.poison == "finite" else 0.0)
        slots, positions, physical = self._cached_tokens(with_new=spec.fill is Fill.CACHE_AFTER)
        flat = buffer.view.view(-1, self.layer.latent_width)
        everything = torch.arange(len(slots), device=self.device)
        for part in self._chunks(everything, self.layer.latent_width):
            keys = self._position_keys(slots[part], positions[part])
            rows = self.source.cache_rows(keys, positions[part])
            flat[physical[part]] = rows.to(dtype)
        return buffer

    def _cached_tokens(self, *, with_new: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, position and physical row of every token that the cache holds, each int64 [n]."""
        block_size = self.layer.block_size
        counts = [row.length if with_new else row.cached for row in self.rows]
        slots, positions = _token_places(counts)
        blocks = [
            self.pages.blocks[slot][np.arange(count, dtype=np.int64) // block_size]
            for slot, count in enumerate(counts)
        ]
        physical = np.concatenate(blocks or [_EMPTY]) * block_size + positions % block_size
        tensors = [torch.from_numpy(array).to(self.device) for array in (slots, positions, physical)]
        return tensors[0], tensors[1], tensors[2]

    def carried(self) -> Tensor:
        """[n] int64: rows of the cache that hold tokens from earlier steps."""
        _, _, physical = self._cached_tokens(with_new=False)
        kept = torch.from_numpy(self.pages.kept).to(self.device)
        rows: Tensor = physical[torch.isin(physical // self.layer.block_size, kept)]
        # A shared row once.
        return torch.unique(rows)  # type: ignore[no-any-return]

    def _slot_keys(self) -> Tensor:
        """[B] int64: data key of each slot."""
        keys = [0 if sequence is None else sequence.key for sequence in self._held_slots()]
        return torch.tensor(keys, dtype=torch.int64, device=self.device)

    def _position_keys(self, slots: Tensor, positions: Tensor) -> Tensor:
        """[n] int64: data key of the cache row at a position of a slot: the tag's within its prefix.

        The prefix ends at the last block boundary that any layer shares, so that all layers agree on
        which tokens are common.
        """
        tagged, ends = [], []
        block_sizes = [layer.block_size for layer in self.case.layers]
        for sequence in self._held_slots():
            has_tag = sequence is not None and sequence.tag is not None
            tagged.append(text_seed(f"tag.{sequence.tag}") if sequence and has_tag else 0)
            cached = sequence.tagged_tokens if sequence and has_tag else 0
            ends.append(max(cached // size * size for size in block_sizes))
        tag_keys = torch.tensor(tagged, dtype=torch.int64, device=self.device)
        end = torch.tensor(ends, dtype=torch.int64, device=self.device)
        return torch.where(positions < end[slots], tag_keys[slots], self._slot_keys()[slots])

    def _held_slots(self) -> list[HeldSequence | None]:
        return list(self.held[: len(self.rows)])

    def _on_device(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(self.device, torch.int64)

    def _chunks(self, indices: Tensor, elements: int) -> tuple[Tensor, ...]:
        if not len(indices):
            return ()
        return torch.split(indices, max(1, CHUNK_ELEMENTS // elements))


_EMPTY = np.empty(0, np.int64)


def _token_places(lengths: Sequence[int]) -> tuple[Int64, Int64]:
    """Slot and position of every token of rows of these lengths, row after row. int64 [n] each."""
    slots = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths] or [_EMPTY])
    return slots, positions


def required_bytes(case: Case, operator: Operator, device: str) -> int:
    """About how much memory judging a case takes: tensors, snapshots, float64 copies for the oracle.

    Of a cache so large that only the blocks in use are watched, the host makes no more than these real;
    a GPU allocates it whole, once. From step to step the tensors of two steps are held.
    """
    steps = [_step_bytes(case, rows, operator, device) for rows in case.steps]
    return max(steps) * (2 if len(steps) > 1 else 1)


def _step_bytes(case: Case, rows: tuple[Row, ...], operator: Operator, device: str) -> int:
    """The same of one step."""
    tokens = sum(row.new for row in rows)
    longest = max((row.length for row in rows), default=0)
    fills = {spec.fill for spec in operator.inputs}
    attends = Fill.QUERY in fills
    has_cache = not fills.isdisjoint((Fill.CACHE_BEFORE, Fill.CACHE_AFTER))
    pairs = max((row.new * row.length for row in rows if row.is_decode), default=0)
    prefill_pairs = max((row.new * row.length for row in rows if row.seq_lens_encoder), default=0)
    prefill_keys = sum(row.length for row in rows if row.seq_lens_encoder)
    total = CHUNK_ELEMENTS * 8 * 6
    for layer in case.layers:
        item = DTYPES[layer.dtype].itemsize
        needed = blocks_needed(case.steps, layer.block_size)
        block = layer.block_size * layer.latent_width * item
        cache = (case.options.pool or needed + needed // 2 + 3) * block if has_cache else 0
        if cache > SPARSE_BYTES:
            # Each used block with its two neighbours, and two snapshots of them.
            total += 9 * needed * block + (cache if device == "cuda" else 0)
        else:
            total += 3 * cache
        total += longest * layer.latent_width * 8 + tokens * layer.latent_width * 4 * item
        if attends:
            queries = tokens * layer.latent_width * (4 * item + 3 * 8)
            total += (queries + pairs * 8 * 3) * layer.num_attention_heads
        if any("prefill_keys" in spec.axes for spec in operator.outputs):
            # Output, its poisoned copy, two references and what they are compared as.
            total += prefill_keys * layer.latent_width * item * 6
        if Fill.DECODE_OUTPUT in fills:
            # Outputs of two branches with their snapshots, one merged, two references and what they are
            # compared as; queries with their snapshot, and the same of them packed.
            width = 10 * layer.v_head_dim + 8 * layer.qk_head_dim
            total += tokens * layer.num_attention_heads * width * item
        if Fill.KEY_WEIGHT in fills:
            # Weights with their snapshots and float64 copies, both emulations; keys, values and scores of the
            # longest row; queries, outputs and what a path makes of them.
            weights = layer.kv_lora_rank * (layer.qk_nope_head_dim + layer.v_head_dim)
            wide = layer.latent_width + layer.qk_head_dim + layer.v_head_dim
            history = (longest + prefill_keys) * (layer.qk_head_dim + layer.v_head_dim)
            all_pairs = max((row.new * row.length for row in rows), default=0)
            elements = weights * 4 + tokens * wide * 4 + history * 3 + all_pairs * 4
            total += elements * 8 * layer.num_attention_heads
        if Fill.KV_B_WEIGHT in fills:
            # Both layouts and what is made of each, with gaps, snapshots, two references and bytes compared.
            total += layer.kv_b_proj_width * layer.kv_lora_rank * item * 40
        if Fill.HEAD_KEY in fills:
            # Tensors, snapshots and float64 copies of queries, keys and values; scores of one row.
            elements = (tokens + prefill_keys) * (layer.qk_head_dim + layer.v_head_dim)
            total += (elements * (3 * item + 8) + prefill_pairs * 8 * 3) * layer.num_attention_heads
    return total
