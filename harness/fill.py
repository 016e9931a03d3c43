"""`Filler`: what the inputs of one layer hold, each by its contract's `Fill`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cases import Case, Row
from cases.contract import Fill, TensorSpec
from cases.layers import Layer
from cases.schedule import Sequence as HeldSequence
from harness.buffers import Buffer
from harness.data import HeadSource, ProjectedSource, Source
from harness.gqa_data import GroupSource
from harness.hashing import text_seed
from harness.kv_b_data import weight_rows
from harness.list_data import listed_keys, no_keys
from harness.metadata import Int64, StepMetadata, slot_mapping
from harness.model_data import model_weight, token_ids
from harness.paging import Pages
from harness.rope_data import rope_table, stale_positions
from harness.state_data import STATE_LSES, STATE_OUTPUTS, StateSource
from harness.tensors import allocate, axis_sizes, tensor_dtype
from harness.tile_data import hard_rope_keys, tiled_latents, whole_scales
from references._packed_rows import packed_rows

PADDING_NAN = {
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
}
"""The NaN of padding tokens' rows, other bits than the poison around them: a padding row that is copied
into the cache shows even where it lands on poison or in a guard band."""

FINITE_POISON = 16384.0
"""Large, finite, and a number of every dtype."""

POISONS = {"nan": float("nan"), "finite": FINITE_POISON, "zero": 0.0}
"""What option poison says of floats."""

FINITE_BYTE = 0x47
"""The same for bytes: 3.75 in e4m3, 51,015 in float32 and 50,944 in bf16."""

GROUP_CACHES = (Fill.KEYS_BEFORE, Fill.VALUES_BEFORE, Fill.KEYS_SEEN, Fill.VALUES_SEEN)
CACHES = (
    Fill.CACHE_BEFORE,
    Fill.CACHE_AFTER,
    Fill.COMPUTED_CACHE,
    Fill.PACKED_BEFORE,
    Fill.PACKED_LISTED,
    Fill.PACKED_LISTED_BEFORE,
    *GROUP_CACHES,
)

LATENTS = (Fill.LATENT, Fill.PACKABLE_LATENT, Fill.TILED_LATENT)
ROPE_KEYS = (Fill.ROPE_KEY, Fill.RAW_KEY, Fill.HARD_ROPE_KEY)

LISTS = (Fill.LISTED_ROWS, Fill.LISTED_TOKENS, Fill.LISTED_BY_HISTORY)

CHUNK_ELEMENTS = 1 << 24
"""Data are made this many elements at a time: the int64 intermediates stay under about a GiB."""


class Filler:
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
        num_layers: int,
    ) -> None:
        self.case = case
        self.rows = [row for row in rows if row.is_slot]
        self.metadata = metadata
        self.held = held
        self.layer = layer
        self.pages = pages
        self.device = device
        self.axes = axis_sizes(layer, metadata, pages, num_layers)
        self.source = Source(layer, case.options.data, case.options.seed)
        self.heads = HeadSource(layer, case.options.data, case.options.seed)
        self.projected = ProjectedSource(layer, case.options.data, case.options.seed)
        self.groups = GroupSource(layer, case.options.data, case.options.seed)
        self.states = StateSource(layer, case.options.data, case.options.seed)
        self.strided = case.options.strided == "1"
        self.arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
            **vars(metadata),
            "block_tables": pages.block_tables,
            "slot_mapping": slot_mapping(metadata, pages.block_tables, layer.block_size),
        }

    def fill(self, spec: TensorSpec) -> Buffer:
        """The buffer of one input, filled."""
        if spec.fill in CACHES:
            return self._group_cache(spec) if spec.fill in GROUP_CACHES else self._cache(spec)
        if spec.fill is Fill.ROPE_TABLE:
            return self._rope_table(spec)
        buffer = allocate(spec, self.layer, self.axes, self.device, strided=self.strided)
        write = self._write_tokens
        if spec.fill in (Fill.METADATA, Fill.POSITIONS):
            write = self._write_metadata
        elif spec.fill in (Fill.HEAD_KEY, Fill.HEAD_VALUE):
            write = self._write_heads
        elif spec.fill in (Fill.KEY_WEIGHT, Fill.VALUE_WEIGHT, Fill.SINK):
            write = self._write_weights
        elif spec.fill in (Fill.KV_B_WEIGHT, Fill.QKV_WEIGHT):
            write = self._write_kv_b
        elif spec.fill is Fill.MODEL_WEIGHT:
            write = self._write_model_weight
        elif spec.fill in (Fill.NEW_IDS, Fill.HISTORY_IDS):
            write = self._write_ids
        elif spec.fill in LISTS:
            write = self._write_lists
        write(spec, buffer)
        return buffer

    def _write_metadata(self, spec: TensorSpec, buffer: Buffer) -> None:
        is_stale = spec.fill is Fill.POSITIONS
        array = stale_positions(self.metadata) if is_stale else self.arrays[spec.name]
        buffer.view.copy_(torch.from_numpy(array))

    def _write_weights(self, spec: TensorSpec, buffer: Buffer) -> None:
        make = self.groups.sinks
        if spec.fill is not Fill.SINK:
            make = self.projected.w_uk if spec.fill is Fill.KEY_WEIGHT else self.projected.w_uv
        buffer.view.copy_(make(self.device))

    def _write_model_weight(self, spec: TensorSpec, buffer: Buffer) -> None:
        shape = tuple(self.axes[axis] for axis in spec.axes)
        buffer.view.copy_(model_weight(spec.name, shape, self.layer, self.case.options.seed, self.device))

    def _write_ids(self, spec: TensorSpec, buffer: Buffer) -> None:
        """Ids of the new tokens, padding's 0; or of all that the slots hold."""
        if spec.fill is Fill.HISTORY_IDS:
            places = _token_places([row.length for row in self.rows])
            slots, positions = (torch.from_numpy(array).to(self.device) for array in places)
        else:
            slots, positions = self._on_device("batch_id_per_token"), self._on_device("position_ids")
            real = slots >= 0
            slots, positions = slots[real], positions[real]
        buffer.view.zero_()
        buffer.view[: len(slots)] = token_ids(
            self._position_keys(slots, positions), positions, self.case.options.seed
        )

    def _write_tokens(self, spec: TensorSpec, buffer: Buffer) -> None:
        """A row a token; behind the real ones padding's NaN."""
        tokens = self._real_tokens(spec)
        for part in self._chunks(torch.arange(len(tokens), device=self.device), self._token_elements(spec)):
            buffer.view[part] = self._token_rows(spec, tokens[part]).to(buffer.view.dtype)
        if spec.fill is Fill.PREFILL_OUTPUT:
            self._poison_unselected(buffer)
        integer, nan = PADDING_NAN[buffer.view.dtype]
        if spec.fill in STATE_LSES:
            # Padding has seen no key.
            buffer.view[len(tokens) :] = -torch.inf
            return
        buffer.view[len(tokens) :].view(integer).fill_(nan)

    def _write_kv_b(self, spec: TensorSpec, buffer: Buffer) -> None:
        """The same weights in either layout: [inputs, outputs of all ranks] or its transpose."""
        by_rank = buffer.view if spec.axes[0] in ("kv_lora_rank", "hidden_size") else buffer.view.T
        name = "kv_b_proj" if spec.fill is Fill.KV_B_WEIGHT else "qkvg_proj"
        width, dtype = by_rank.shape[1], buffer.view.dtype
        seed, index = self.case.options.seed, self.layer.index
        for part in self._chunks(torch.arange(len(by_rank), device=self.device), width):
            by_rank[part] = weight_rows(name, part, width, dtype, seed=seed, layer=index)

    def _write_lists(self, spec: TensorSpec, buffer: Buffer) -> None:
        """What each token's list names, rows of the cache or tokens of the step, and what names nothing."""
        slots, positions, names = self._listed(of_step=spec.fill is Fill.LISTED_TOKENS)
        cached = self._on_device("seq_lens_decoder")[slots]
        of_step = torch.full_like(names[:, :1], spec.fill is Fill.LISTED_TOKENS)
        if spec.fill is Fill.LISTED_BY_HISTORY:
            of_step = cached == 0
        tokens, rows = len(buffer.view), self.pages.num_blocks * self.layer.block_size
        # What lies behind the last token, or row, of what a list is of; behind both for padding.
        numbers = torch.arange(tokens, device=self.device)
        behind = torch.full_like(numbers, tokens if spec.fill is Fill.LISTED_TOKENS else rows)
        if spec.fill is Fill.LISTED_BY_HISTORY:
            behind.clamp_(min=tokens)
            behind[: len(slots)] = torch.where(of_step[:, 0], tokens, rows)
        seed, layer = self.case.options.seed, self.layer.index
        entries = no_keys((tokens, self.axes["index_topk"]), behind, numbers, seed=seed, layer=layer)
        step_entries = self._on_device("cu_seqlens_q")[slots] + positions - cached
        named = torch.where(of_step, step_entries, self._physical(slots, positions))
        entries[: len(slots)] = torch.where(names, named, entries[: len(slots)])
        buffer.view[:, 0] = entries.to(buffer.view.dtype)

    def _listed(self, *, of_step: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of real tokens [n, 1]; positions that their lists name, and whether they do, [n, index_topk].

        `of_step`, positions are those of the row's new tokens, and prefill rows' alone.
        """
        slots, positions = self._on_device("batch_id_per_token"), self._on_device("position_ids")
        real = slots >= 0
        slots, positions = slots[real], positions[real]
        oldest, seen = self._seen(slots, positions, of_step=of_step)
        numbers, names = listed_keys(
            seen.tolist(),
            self.axes["index_topk"],
            self._slot_keys()[slots],
            positions,
            seed=self.case.options.seed,
            layer=self.layer.index,
            ascending=self.layer.window > 0,
        )
        return slots.unsqueeze(1), oldest.unsqueeze(1) + numbers, names

    def _seen(self, slots: Tensor, positions: Tensor, *, of_step: bool) -> tuple[Tensor, Tensor]:
        """[n] int64 each: the oldest position that tokens see, and how many: of the row, within the window.

        `of_step`, of a prefill row's new tokens.
        """
        oldest = self._on_device("seq_lens_decoder")[slots] * of_step
        if self.layer.window:
            oldest = torch.maximum(oldest, positions + 1 - self.layer.window)
        sees = (self._on_device("seq_lens_encoder")[slots] > 0) | (not of_step)
        return oldest, (positions + 1 - oldest) * sees

    def _physical(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows of the cache where positions of slots lie; slots broadcast."""
        tables = torch.from_numpy(self.pages.block_tables).to(self.device, torch.int64)
        size = self.layer.block_size
        return tables[slots, positions // size] * size + positions % size

    def _real_tokens(self, spec: TensorSpec) -> Tensor:
        """[n] int64: the real token of each leading row of an input; what lies behind is padding's."""
        real = int(self.metadata.cu_seqlens_q[-1])
        if spec.axes[0] != "decode_tokens":
            return torch.arange(real, device=self.device)
        packed = self.metadata.packed_tokens
        return torch.from_numpy(packed[packed < real]).to(self.device)

    def _token_elements(self, spec: TensorSpec) -> int:
        if spec.fill in (Fill.QKV, Fill.GROUP_QUERY):
            return self.layer.qkv_width
        if spec.fill in STATE_OUTPUTS:
            return self.layer.num_attention_heads * self.layer.v_head_dim
        has_heads = spec.axes[1] == "num_attention_heads"
        return (self.layer.num_attention_heads if has_heads else 1) * self.layer.latent_width

    def _poison_unselected(self, buffer: Buffer) -> None:
        """Tokens that the prefill branch did not compute hold NaN, or what option poison says."""
        prefills = self._on_device("seq_lens_encoder") > 0
        slots = self._on_device("batch_id_per_token")
        slots = slots[slots >= 0]
        buffer.view[: len(slots)][~prefills[slots]] = POISONS[self.case.options.poison]

    def _write_heads(self, spec: TensorSpec, buffer: Buffer) -> None:
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
        is_planted = self.case.options.data == "planted"
        if is_planted and spec.fill in (Fill.TILED_LATENT, Fill.HARD_ROPE_KEY):
            is_latent = spec.fill is Fill.TILED_LATENT
            make, width = (
                (tiled_latents, rank) if is_latent else (hard_rope_keys, self.layer.qk_rope_head_dim)
            )
            return make(row_keys, positions, width, self.case.options.seed, self.layer.index)
        if spec.fill in (*LATENTS, *ROPE_KEYS):
            is_packed = self.layer.cache == "packed" or spec.fill is Fill.PACKABLE_LATENT
            rows = self._cache_rows(row_keys, positions, is_packed=is_packed)
            return rows[:, rank:] if spec.fill in ROPE_KEYS else rows[:, :rank]
        if spec.fill in (Fill.PREFILL_OUTPUT, Fill.DECODE_OUTPUT):
            return self.heads.values(row_keys, positions)
        if spec.fill in (*STATE_OUTPUTS, *STATE_LSES):
            return self._states(spec.fill, slots, positions, row_keys)
        return self._queries(spec, slots, positions, row_keys)

    def _states(self, fill: Fill, slots: Tensor, positions: Tensor, row_keys: Tensor) -> Tensor:
        """Outputs of one part of the keys, poison where it is empty, or its log-sum-exps."""
        cached = self._on_device("seq_lens_decoder")[slots]
        lses = self.states.lses(fill, row_keys, positions, cached)
        if fill in STATE_LSES:
            return lses
        outputs = self.states.outputs(fill, row_keys, positions)
        outputs[lses.isinf()] = POISONS[self.case.options.poison]
        return outputs

    def _queries(self, spec: TensorSpec, slots: Tensor, positions: Tensor, row_keys: Tensor) -> Tensor:
        """Queries of tokens at some positions of some slots."""
        keys = self._slot_keys()[slots]
        window = self.layer.window
        first, seen = self._seen(slots, positions, of_step=spec.fill is Fill.STEP_LISTED_QUERY)
        if spec.fill in (Fill.QKV, Fill.GROUP_QUERY):
            make = self.groups.projected if spec.fill is Fill.QKV else self.groups.queries
            return make(keys, row_keys, positions, self._position_keys(slots, first))
        oldest = self._position_keys(slots, first)
        if spec.fill in (Fill.NOPE_QUERY, Fill.ROPE_QUERY, Fill.RAW_QUERY):
            # Both are cut from one draw: apart, neither would point at the keys that stand out.
            hidden = self._position_keys(slots, (first - 1).clamp_min(0)) if window else None
            whole = self.projected.queries(keys, row_keys, positions, oldest, first, hidden)
            nope = self.layer.qk_nope_head_dim
            return whole[..., :nope] if spec.fill is Fill.NOPE_QUERY else whole[..., nope:]
        if spec.fill in (Fill.LISTED_QUERY, Fill.STEP_LISTED_QUERY):
            visible = seen.clamp(1, self.layer.index_topk)
            return self.source.queries(keys, row_keys, positions, oldest, oldest=first, visible=visible)
        source = self.heads if spec.fill is Fill.HEAD_QUERY else self.source
        return source.queries(keys, row_keys, positions, oldest)

    def _cache(self, spec: TensorSpec) -> Buffer:
        shape = [self.axes[axis] for axis in spec.axes]
        used = torch.from_numpy(self.pages.used)
        dtype = tensor_dtype(spec, self.layer)
        buffer = Buffer.allocate(
            shape, dtype, self.device, used_rows=None if spec.fill is Fill.COMPUTED_CACHE else used
        )
        self._poison_unread(buffer)
        if spec.fill is Fill.COMPUTED_CACHE:
            return buffer
        with_new = spec.fill in (Fill.CACHE_AFTER, Fill.PACKED_LISTED)
        slots, positions, physical = self._cached_tokens(with_new=with_new)
        if spec.fill in (Fill.PACKED_LISTED, Fill.PACKED_LISTED_BEFORE):
            listed = self._listed_rows(physical)
            slots, positions, physical = slots[listed], positions[listed], physical[listed]
        flat = buffer.view.view(-1, buffer.view.shape[-1])
        everything = torch.arange(len(slots), device=self.device)
        for part in self._chunks(everything, self.layer.latent_width):
            keys = self._position_keys(slots[part], positions[part])
            rows = self._cache_rows(keys, positions[part], is_packed=dtype is torch.uint8)
            if dtype is torch.uint8:
                rank, stored = self.layer.kv_lora_rank, rows.bfloat16()
                rows = packed_rows(stored[:, :rank], stored[:, rank:], self.case.options.scale_fmt)
            flat[physical[part]] = rows.to(dtype)
        return buffer

    def _cache_rows(self, keys: Tensor, positions: Tensor, *, is_packed: bool) -> Tensor:
        """[n, R + D] float32: latents and rotated keys of tokens, before they are rounded or packed.

        Packed, and logits are to be equal: codes must be exact.
        """
        rows, rank = self.source.cache_rows(keys, positions), self.layer.kv_lora_rank
        if is_packed and self.case.options.data == "deep":
            rows[:, :rank] = whole_scales(rows[:, :rank])
        return rows

    def _group_cache(self, spec: TensorSpec) -> Buffer:
        """Keys or values of every KV head: of what was cached, or of what the step's tokens see."""
        shape = [self.axes[axis] for axis in spec.axes]
        used = torch.from_numpy(self.pages.used)
        buffer = Buffer.allocate(shape, tensor_dtype(spec, self.layer), self.device, used_rows=used)
        self._poison_unread(buffer)
        is_seen = spec.fill in (Fill.KEYS_SEEN, Fill.VALUES_SEEN)
        slots, positions, physical = self._cached_tokens(with_new=is_seen)
        if is_seen:
            visible = positions >= self._oldest_seen()[slots]
            slots, positions, physical = slots[visible], positions[visible], physical[visible]
        is_key = spec.fill in (Fill.KEYS_BEFORE, Fill.KEYS_SEEN)
        make = self.groups.keys if is_key else self.groups.values
        everything = torch.arange(len(slots), device=self.device)
        for part in self._chunks(everything, self.layer.num_key_value_heads * shape[-1]):
            keys = self._position_keys(slots[part], positions[part])
            blocks, offsets = physical[part] // self.layer.block_size, physical[part] % self.layer.block_size
            buffer.view[blocks, :, offsets] = make(keys, positions[part]).to(buffer.view.dtype)
        return buffer

    def _oldest_seen(self) -> Tensor:
        """[B] int64: the oldest position that a token of each slot sees; behind all of them without one."""
        window = self.layer.window
        oldest = [
            (max(0, row.cached - window + 1) if window else 0) if row.seq_lens_this_time else row.length
            for row in self.rows
        ]
        return torch.tensor(oldest, dtype=torch.int64, device=self.device)

    def _poison_unread(self, buffer: Buffer) -> None:
        """Fills a fresh cache with what option poison says; NaN it holds already."""
        if self.case.options.poison == "nan" or buffer.sparse:
            return
        finite = FINITE_BYTE if buffer.view.dtype is torch.uint8 else FINITE_POISON
        buffer.view.fill_(finite if self.case.options.poison == "finite" else 0)

    def _listed_rows(self, physical: Tensor) -> Tensor:
        """[n] bool: which rows of the cache, [n] int64, some token's list names."""
        slots, positions, names = self._listed()
        named = self._physical(slots, positions)[names]
        return torch.isin(physical, named)

    def _rope_table(self, spec: TensorSpec) -> Buffer:
        poison = {"nan": None, "finite": FINITE_POISON, "zero": 0.0}[self.case.options.poison]
        dtype = tensor_dtype(spec, self.layer)
        return rope_table(
            spec, self.layer, self.metadata, dtype, self.device, strided=self.strided, poison=poison
        )

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
        # A shared row once; in a stack, those of every layer.
        rows = torch.unique(rows)
        rows_of_a_layer = self.pages.num_blocks * self.layer.block_size
        return torch.cat([rows + layer * rows_of_a_layer for layer in range(self.axes["num_layers"])])

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
