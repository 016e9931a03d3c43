"""Faults of cache writes: where a token's row goes, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import batch_ids_of, changing, places, read_as_dense
from references.oracle import Inputs, Writes, tensor, text

WRITES = ("latent_cache_write", "packed_cache_write")
LATENT = ("latent_cache_write",)
PACKED = ("packed_cache_write",)
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

TILE = 128
E4M3_MAX = 448.0


def _cache(inputs: Inputs) -> tuple[str, Tensor]:
    name = "latent_cache" if "latent_cache" in inputs else "packed_cache"
    return name, tensor(inputs, name)


def _num_rows(inputs: Inputs) -> int:
    _, cache = _cache(inputs)
    return cache.shape[0] * cache.shape[2]


def _slots(
    name: str, summary: str, source: str, change: Callable[[Inputs, Tensor], Tensor], form: str = ""
) -> Fault:
    """The fault of other slots; one outside of the cache cannot be told from a crash."""

    def changed(inputs: Inputs) -> dict[str, Tensor | float | str | None]:
        slots = change(inputs, tensor(inputs, "slot_mapping").clone())
        if bool((slots >= _num_rows(inputs)).any()):
            raise IndexError("a slot behind the cache")
        return {"slot_mapping": slots}

    return changing(name, WRITES, summary, source, changed, form)


def _shifted(slots: Tensor, step: int) -> Tensor:
    """[Tp]: of each token the slot of the one so many places behind it, -1 where there is none."""
    moved = torch.full_like(slots, -1)
    if step > 0:
        moved[:-step] = slots[step:]
    else:
        moved[-step:] = slots[:step]
    return moved


def _replaced(slots: Tensor, where: Tensor, value: int) -> Tensor:
    return torch.where(where, torch.full_like(slots, value), slots)


def _by_table(inputs: Inputs, row_of: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Tensor:
    """[Tp] int64: slots made anew: (tables, slots, positions, block size) of real tokens -> rows."""
    slots = tensor(inputs, "slot_mapping")
    ids = tensor(inputs, "batch_id_per_token").long()
    real = ids >= 0
    positions = tensor(inputs, "seq_lens_decoder").long()[ids.clamp_min(0)] + places(ids)
    _, cache = _cache(inputs)
    made = slots.clone()
    made[real] = row_of(tensor(inputs, "block_tables").long(), ids[real], positions[real], cache.shape[2])
    return made


def _is_prefill(inputs: Inputs) -> Tensor:
    """[Tp] bool: whose tokens are of a prompt's chunk."""
    ids = tensor(inputs, "batch_id_per_token").long()
    return (tensor(inputs, "seq_lens_encoder") > 0)[ids.clamp_min(0)] & (ids >= 0)


def _where() -> Iterator[Fault]:
    for step in (1, -1):
        yield _slots(
            "neighbours-slot",
            "a token's row goes to the slot of the token beside it",
            "B07",
            lambda _, slots, step=step: _shifted(slots, step),
            f"of the one {'behind' if step == 1 else 'before'}",
        )
    yield _slots(
        "padding-in-the-last-row",
        "padding's rows go to the last row of the cache",
        "B31",
        lambda inputs, slots: _replaced(slots, slots < 0, _num_rows(inputs) - 1),
    )
    yield _slots(
        "padding-in-row-0",
        "padding's rows go to row 0 of the cache",
        "E12",
        lambda _, slots: _replaced(slots, slots < 0, 0),
    )
    yield _slots(
        "row-0-unwritten",
        "row 0 of the cache is taken for the mark of padding",
        "E12",
        lambda _, slots: _replaced(slots, slots == 0, -1),
    )
    yield _slots(
        "table-ignored",
        "a token's position is taken for its row of the cache",
        "P8",
        lambda inputs, _: _by_table(inputs, lambda tables, slots, at, block: at),
    )
    yield _slots(
        "blocks-in-a-line",
        "a row's blocks are taken to lie behind its first",
        "P13",
        lambda inputs, _: _by_table(inputs, lambda tables, slots, at, block: tables[slots, 0] * block + at),
    )
    yield _slots(
        "block-is-a-row",
        "a block's number is taken for the number of its first row",
        "P7",
        lambda inputs, _: _by_table(
            inputs, lambda tables, slots, at, block: tables[slots, at // block] + at % block
        ),
    )
    for size in (16, 32, 64, 128):
        yield _slots(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B32",
            lambda inputs, _, size=size: _by_table(
                inputs, lambda tables, slots, at, block: tables[slots, at // size] * size + at % size
            ),
            f"for {size}",
        )
    for step in (1, -1):
        yield _slots(
            "neighbours-table",
            "a row is written through the block table of another slot",
            "B56",
            lambda inputs, _, step=step: _by_table(
                inputs,
                lambda tables, slots, at, block: (
                    tables[(slots + step).clamp_min(0), at // block] * block + at % block
                ),
            ),
            f"of the slot {'behind' if step == 1 else 'before'}",
        )
    yield _slots(
        "position-in-chunk",
        "a token's place in its chunk is taken for its position: a later chunk overwrites the first",
        "P8, B01",
        lambda inputs, _: _by_table(
            inputs,
            lambda tables, slots, at, block: (
                tables[slots, (own := at - tensor(inputs, "seq_lens_decoder").long()[slots]) // block] * block
                + own % block
            ),
        ),
    )
    yield _slots(
        "one-position-too-far",
        "a token is written one position behind its own",
        "C7",
        lambda inputs, _: _by_table(
            inputs,
            lambda tables, slots, at, block: tables[slots, (at + 1) // block] * block + (at + 1) % block,
        ),
    )
    yield _slots(
        "prefill-rows-unwritten",
        "tokens of prompts are not written",
        "C7",
        lambda inputs, slots: _replaced(slots, _is_prefill(inputs), -1),
    )
    yield _slots(
        "decode-rows-unwritten",
        "tokens of decode rows are not written",
        "C7",
        lambda inputs, slots: _replaced(slots, ~_is_prefill(inputs), -1),
    )
    yield _slots(
        "later-tokens-unwritten",
        "of a decode row only the first token is written",
        "B21",
        lambda inputs, slots: _replaced(
            slots, ~_is_prefill(inputs) & (places(tensor(inputs, "batch_id_per_token").long()) > 0), -1
        ),
    )
    for size in SIZES:
        yield _slots(
            "launch-limited",
            "what lies behind a fixed number of tokens is never written",
            "B05, L3",
            lambda _, slots, size=size: _replaced(
                slots, torch.arange(len(slots), device=slots.device) >= size, -1
            ),
            f"behind {size}",
        )
        yield _slots(
            "launch-rounded-down",
            "the last tokens, which fill no program of their own, are never written",
            "E2",
            lambda _, slots, size=size: _replaced(
                slots,
                torch.arange(len(slots), device=slots.device) >= max(size, len(slots) // size * size),
                -1,
            ),
            f"programs of {size}",
        )
    for size in (2, 4, 8, 16, 32, 64):
        yield _slots(
            "stop-at-padding",
            "a program that has a token without a slot writes none of its tokens",
            "B08",
            lambda _, slots, size=size: _replaced(slots, _with_padding(slots, size), -1),
            f"programs of {size}",
        )


def _with_padding(slots: Tensor, size: int) -> Tensor:
    """[Tp] bool: tokens of whose program, so many tokens, one has no slot; places past the end have none."""
    programs = torch.arange(len(slots), device=slots.device) // size
    lacking = torch.zeros(-(-len(slots) // size), dtype=torch.bool, device=slots.device)
    lacking[programs[slots < 0]] = True
    if len(slots) % size:
        lacking[-1] = True
    return lacking[programs]


# ---- what a row holds ----------------------------------------------------------------------------


def _rows(
    name: str, summary: str, source: str, change: Callable[[Question, Writes, Tensor], Tensor], form: str = ""
) -> Fault:
    """The fault of other contents: of what should be written, and what stood there [n, W]."""

    def apply(question: Question) -> Answers | None:
        writes = question.truth["latent_cache"]
        if not isinstance(writes, Writes):
            return None
        _, cache = _cache(question.inputs)
        stood = cache.view(-1, cache.shape[3])[writes.rows]
        return {**question.truth, "latent_cache": Writes(writes.rows, change(question, writes, stood))}

    return Fault(name, ("latent_cache_write", "mla_step"), summary, source, apply, form)


def _rank(question: Question) -> int:
    return tensor(question.inputs, "compressed_kv").shape[1]


def _what() -> Iterator[Fault]:
    def split(question: Question, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, : _rank(question)], rows[:, _rank(question) :]

    yield _rows(
        "nothing-written",
        "no row is written",
        "C7, P1",
        lambda question, writes, stood: stood,
    )
    yield _rows(
        "rope-unwritten",
        "the rope part of the rows is not written",
        "M7",
        lambda question, writes, stood: torch.cat(
            [split(question, writes.values)[0], split(question, stood)[1]], dim=1
        ),
    )
    yield _rows(
        "rope-is-zero",
        "the rope part of the rows is written as zeros",
        "M7",
        lambda question, writes, stood: torch.cat(
            [split(question, writes.values)[0], split(question, writes.values)[1] * 0], dim=1
        ),
    )
    yield _rows(
        "latent-unwritten",
        "the latent part of the rows is not written",
        "M7",
        lambda question, writes, stood: torch.cat(
            [split(question, stood)[0], split(question, writes.values)[1]], dim=1
        ),
    )
    yield _rows(
        "rope-over-latent", "the rope part is written over the first columns of the latent", "Q1", _over
    )
    yield _rows(
        "rope-first",
        "the rope part is written in front of the latent",
        "Q1",
        lambda question, writes, stood: writes.values.roll(writes.values.shape[1] - _rank(question), 1),
    )
    for form, inverse in (("interleaved for half-split", False), ("half-split for interleaved", True)):
        yield _rows(
            "rope-written-reordered",
            "columns of the rope part are written in the other order of pairs",
            "X3",
            lambda question, writes, stood, inverse=inverse: _pairs(question, writes.values, inverse=inverse),
            form,
        )
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        word = str(dtype).removeprefix("torch.")
        for part in ("latent", "rope", ""):
            yield _rows(
                "through-another-dtype",
                "numbers pass through another dtype on their way",
                "D7",
                lambda question, writes, stood, dtype=dtype, part=part: _through(
                    writes.values, dtype, _rank(question), part
                ),
                f"{part or 'all'} through {word}",
            )


def _words_limited(question: Question, threads: int, word_bytes: int, tokens: int = 16) -> Answers | None:
    """Of the rows of so many tokens the first words."""
    writes = question.truth["latent_cache"]
    if not isinstance(writes, Writes):
        return None
    stood, slots = _stood(question, writes), tensor(question.inputs, "slot_mapping")
    written = ((slots >= 0) & (slots < _num_rows(question.inputs))).nonzero().flatten()
    width, size = stood.shape[1], stood.element_size()
    at = (written % tokens * width).unsqueeze(1) + torch.arange(width, device=stood.device)
    values = torch.where(at * size < threads * word_bytes, writes.values, stood)
    return {**question.truth, "latent_cache": Writes(writes.rows, values)}


def _over(question: Question, writes: Writes, stood: Tensor) -> Tensor:
    values, rank = writes.values.clone(), _rank(question)
    values[:, : values.shape[1] - rank] = writes.values[:, rank:]
    values[:, rank:] = stood[:, rank:]
    return values


def _pairs(question: Question, values: Tensor, *, inverse: bool) -> Tensor:
    rank = _rank(question)
    half = (values.shape[1] - rank) // 2
    at = torch.arange(2 * half, device=values.device)
    target = at % half * 2 + at // half if inverse else at // 2 + at % 2 * half
    changed = values.clone()
    changed[:, rank + target] = values[:, rank:]
    return changed


def _through(values: Tensor, dtype: torch.dtype, rank: int, part: str) -> Tensor:
    changed = values.clone()
    columns = {"latent": slice(rank), "rope": slice(rank, None), "": slice(None)}[part]
    changed[:, columns] = values[:, columns].to(dtype).to(values.dtype)
    return changed


def _row_stride(question: Question, stride_of: Callable[[Question, int], int]) -> Answers | None:
    """Rows begin as many bytes apart as is said of the right number of them, one token after another."""
    name, cache = _cache(question.inputs)
    writes = question.truth[name]
    if not isinstance(writes, Writes) or cache.numel() > 2**26:
        return None
    flat = cache.flatten().clone().view(torch.uint8)
    values = writes.values.to(cache.dtype).contiguous().view(torch.uint8)
    width = values.shape[1]
    stride = stride_of(question, width)
    if len(writes.rows) and int(writes.rows.max()) * stride + width > len(flat):
        raise IndexError("a row behind the cache")
    for row, own in zip(writes.rows.tolist(), values, strict=True):
        flat[row * stride : row * stride + width] = own
    return {**question.truth, name: flat.view(cache.dtype).view(cache.shape)}


def _strides() -> Iterator[Fault]:
    for word_bytes in (16, 8, 4, 2):
        yield Fault(
            "words-limited",
            LATENT,
            "of 16 tokens as many words are written as a program has threads, and no more",
            "B05",
            lambda question, word_bytes=word_bytes: _words_limited(question, 256, word_bytes),
            f"256 threads, words of {word_bytes} bytes",
        )
    yield Fault(
        "row-stride-is-the-rank",
        LATENT,
        "rows of the cache are taken to lie a latent's rank apart, without their rope part",
        "B35",
        lambda question: _row_stride(
            question, lambda asked, width: _rank(asked) * _cache(asked.inputs)[1].element_size()
        ),
    )
    yield Fault(
        "row-stride-is-a-literal",
        PACKED,
        "rows of the cache are taken for those of rank 512 and rope width 64, 656 bytes",
        "O17",
        lambda question: _row_stride(question, lambda asked, width: 656),
    )
    yield Fault(
        "row-stride-of-another-layout",
        PACKED,
        "rows of the cache are taken to lie as far apart as if numbers of two bytes were kept",
        "B35, B60",
        lambda question: _row_stride(
            question, lambda asked, width: 2 * (_rank(asked) + tensor(asked.inputs, "k_pe").shape[1])
        ),
    )


def _read_as_dense() -> Iterator[Fault]:
    """Tokens of strided latents or keys read as if they were contiguous."""
    for operator in WRITES:
        yield from read_as_dense(operator, ("compressed_kv", "k_pe"))


# ---- a whole step --------------------------------------------------------------------------------


def _step_positions(question: Question) -> Answers | None:
    """Chunks with a history written from position 0 on."""
    writes = question.truth["latent_cache"]
    inputs = question.inputs
    if not isinstance(writes, Writes):
        return None
    lengths = tensor(inputs, "seq_lens_this_time")
    sums = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))
    ids = batch_ids_of({"cu_seqlens_q": sums}, len(writes.rows))
    cached = tensor(inputs, "seq_lens_decoder").long() * (tensor(inputs, "seq_lens_encoder") == 0)
    at = cached[ids] + places(ids)
    tables, cache = tensor(inputs, "block_tables").long(), tensor(inputs, "latent_cache")
    rows = tables[ids, at // cache.shape[2]] * cache.shape[2] + at % cache.shape[2]
    return {**question.truth, "latent_cache": Writes(rows, writes.values)}


# ---- quantising ----------------------------------------------------------------------------------


def _quantising(
    name: str,
    summary: str,
    source: str,
    *,
    scales_of: Callable[[Tensor, Tensor, str], Tensor] | None = None,
    codes_of: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    stored_scales: Callable[[Tensor], Tensor] | None = None,
    of_step: Callable[[Tensor], Tensor] | None = None,
    form: str = "",
) -> Fault:
    """The fault of other scales or codes.

    Args:
        of_step: largest numbers of all tokens' tiles [Tp, tiles] -> what scales are made of in their place.
        scales_of: (tiles [n, tiles, 128], right scales [n, tiles], scale_fmt) -> scales.
        codes_of: (tiles, scales, right codes [n, tiles, 128] uint8) -> codes.
        stored_scales: what is stored of the scales that were divided by.
    """

    def apply(question: Question) -> Answers | None:
        writes = question.truth["packed_cache"]
        if not isinstance(writes, Writes):
            return None
        rank = _rank(question)
        slots = tensor(question.inputs, "slot_mapping")
        written = (slots >= 0) & (slots < _num_rows(question.inputs))
        every = tensor(question.inputs, "compressed_kv").float()
        every = every.view(len(every), rank // TILE, TILE)
        tiles = every[written]
        scales = writes.values[:, rank : rank + rank // 32].contiguous().view(torch.float32)
        if of_step is not None:
            scales = _scales(of_step(_amax(every))[written], text(question.inputs, "scale_fmt"))
        if scales_of is not None:
            scales = scales_of(tiles, scales, text(question.inputs, "scale_fmt"))
        codes = quantised(tiles, scales)
        if codes_of is not None:
            codes = codes_of(tiles, scales, codes)
        stored = scales if stored_scales is None else stored_scales(scales)
        rest = writes.values[:, rank + rank // 32 :]
        rows = torch.cat(
            [codes.flatten(1), stored.clone(memory_format=torch.contiguous_format).view(torch.uint8), rest],
            dim=1,
        )
        return {"packed_cache": Writes(writes.rows, rows)}

    return Fault(name, PACKED, summary, source, apply, form)


def quantised(tiles: Tensor, scales: Tensor) -> Tensor:
    """[n, tiles, 128], [n, tiles] float32 -> [n, tiles, 128] uint8: codes of e4m3, NaN as 0x7F."""
    ratios = tiles / scales.unsqueeze(-1)
    codes = ratios.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(ratios.isnan(), 0x7F, codes)


def _amax(tiles: Tensor) -> Tensor:
    return torch.where(tiles.isnan(), 0.0, tiles.abs()).amax(-1)


def _exponents(scales: Tensor, add: int) -> Tensor:
    """[...] float32: after something is added to their bits, their exponents alone."""
    return ((scales.contiguous().view(torch.int32) + add) & 0x7F800000).view(torch.float32)


def _by(amax: Tensor, largest: float) -> Tensor:
    return (amax / torch.full_like(amax, largest)).clamp_min(2.0**-126)


def _least(tiles: Tensor) -> Tensor:
    amax = _amax(tiles).clamp_min(1e-4)
    return amax / torch.full_like(amax, E4M3_MAX)


def _scales(amax: Tensor, form: str) -> Tensor:
    """The right scales of tiles with these largest numbers."""
    if form != "ue8m0":
        return _by(amax, E4M3_MAX)
    return _exponents(amax.clamp_min(1e-4) / torch.full_like(amax, E4M3_MAX), 0x7FFFFF)


def _beside(amax: Tensor) -> Tensor:
    """[Tp, tiles]: the larger one of every two tokens, 2 t and 2 t + 1."""
    even = torch.nn.functional.pad(amax, (0, 0, 0, len(amax) % 2))
    return even.view(-1, 2, even.shape[1]).amax(1).repeat_interleave(2, 0)[: len(amax)]


def _behind_nan(tiles: Tensor) -> Tensor:
    """[n, tiles]: the largest of those behind the last NaN of every 8; 8 whose last is NaN have none."""
    eights = tiles.view(*tiles.shape[:2], TILE // 8, 8)
    nan_behind = eights.isnan().flip(-1).cummax(-1).values.flip(-1)
    largest: Tensor = torch.where(nan_behind, 0.0, eights.abs()).amax((-1, -2))
    return largest


def _own_halves(tiles: Tensor, scales: Tensor, codes: Tensor, form: str) -> Tensor:
    """Codes of each half of a tile by its own largest number."""
    half = TILE // 2
    later = quantised(tiles, _scales(_amax(tiles[..., half:]), form))
    return torch.cat([codes[..., :half], later[..., half:]], dim=-1)


def _packed() -> Iterator[Fault]:
    yield _quantising(
        "scales-are-powers-of-two",
        "scales are rounded up to powers of two where any number is asked for",
        "FlashMLA #184",
        scales_of=lambda tiles, scales, form: _exponents(_least(tiles), 0x7FFFFF),
    )
    yield _quantising(
        "scales-are-powers-of-two",
        "scales are rounded up to powers of two where any number is asked for",
        "FlashMLA #184",
        scales_of=lambda tiles, scales, form: torch.where(
            _amax(tiles) > 0, _exponents(_least(tiles), 0x7FFFFF), scales
        ),
        form="but of tiles of zeros",
    )
    yield _quantising(
        "scale-is-the-next-power-of-two",
        "a scale that is a power of two already is doubled",
        "O17 (c)",
        scales_of=lambda tiles, scales, form: (
            _exponents(_least(tiles), 0x800000) if form == "ue8m0" else scales
        ),
    )
    yield _quantising(
        "no-least-scale",
        "scales have no least: a tile of zeros is divided by zero",
        "E19",
        scales_of=lambda tiles, scales, form: (
            scales if form == "ue8m0" else (amax := _amax(tiles)) / torch.full_like(amax, E4M3_MAX)
        ),
    )
    yield _quantising(
        "scale-of-two-tokens",
        "two tokens that stand side by side have the scales of the larger one",
        "B34",
        of_step=_beside,
    )
    yield _quantising(
        "subnormal-numbers-flushed",
        "numbers below 2^-126 are read as zeros",
        "E19",
        scales_of=lambda tiles, scales, form: _scales(_amax(_flushed(tiles)), form),
        codes_of=lambda tiles, scales, codes: quantised(_flushed(tiles), scales),
    )
    yield _quantising(
        "codes-exchanged",
        "the first four of every eight codes are stored behind the last four",
        "B34",
        codes_of=lambda tiles, scales, codes: (
            codes.view(*codes.shape[:2], TILE // 8, 2, 4).flip(-2).flatten(-3)
        ),
    )
    for first in (1, 2, 4, 8):
        yield Fault(
            "later-tiles-unwritten",
            PACKED,
            "tiles behind a fixed number of them are never written, nor their scales",
            "O17",
            lambda question, first=first: _later_tiles(question, first),
            f"behind {first}",
        )
    for shift in (2, 4, 8, 16):
        for tokens in (1, 4):
            yield Fault(
                "rope-shifted",
                PACKED,
                "the rope part is written too far behind, over the row behind it",
                "Q1",
                lambda question, shift=shift, tokens=tokens: _rope_shifted(question, shift, tokens),
                f"by {shift} bytes, in programs of {tokens}",
            )
    yield Fault(
        "rope-over-scales",
        PACKED,
        "the rope part is written right behind the latents, over their scales",
        "Q1",
        lambda question: _rope_shifted(question, -_rank(question) // 32, 1),
    )
    yield _quantising(
        "scales-are-any-number",
        "scales are any number where powers of two are asked for",
        "O17",
        scales_of=lambda tiles, scales, form: _by(_amax(tiles), E4M3_MAX),
    )
    yield _quantising(
        "scale-rounded-down",
        "scales are rounded down to powers of two: the largest numbers saturate",
        "vllm#54563",
        scales_of=lambda tiles, scales, form: _exponents(_least(tiles) if form == "ue8m0" else scales, 0),
    )
    yield _quantising(
        "scale-of-the-neighbour",
        "two tiles' scales are stored in each other's place",
        "O17",
        stored_scales=lambda scales: scales[:, torch.arange(scales.shape[1], device=scales.device) ^ 1],
    )
    yield _quantising(
        "scale-of-the-row",
        "one scale a token, of the largest number in any of its tiles",
        "O17",
        scales_of=lambda tiles, scales, form: scales.amax(-1, keepdim=True).expand_as(scales),
    )
    yield _quantising(
        "scale-inverted",
        "what numbers are multiplied by is stored in the place of what codes are multiplied by",
        "O17",
        stored_scales=lambda scales: 1.0 / scales,
    )
    yield _quantising(
        "scale-left-out",
        "numbers are cast without a scale, and scales are stored that do not belong to them",
        "O17",
        codes_of=lambda tiles, scales, codes: quantised(tiles, torch.ones_like(scales)),
    )
    yield _quantising(
        "scale-left-out",
        "numbers are cast without a scale, and scales are stored that do not belong to them",
        "O17",
        codes_of=lambda tiles, scales, codes: torch.where(
            codes == 0x7F, 0x7F, quantised(tiles, torch.ones_like(scales))
        ),
        form="but for what has no number with one",
    )
    for epsilon in (1e-5, 1e-6):
        yield _quantising(
            "epsilon-added",
            "a small number is added to the largest of a tile",
            "O17 (b)",
            scales_of=lambda tiles, scales, form, epsilon=epsilon: _by(_amax(tiles) + epsilon, E4M3_MAX),
            form=f"{epsilon:g}",
        )
    yield _quantising(
        "amax-of-at-least-1e-4",
        "the largest number of a tile is taken for 1e-4 where it is less",
        "O17 (c)",
        scales_of=lambda tiles, scales, form: _by(_amax(tiles).clamp_min(1e-4), E4M3_MAX),
    )
    yield _quantising(
        "no-least-amax",
        "scales are powers of two without the least that there should be",
        "O17 (c)",
        scales_of=lambda tiles, scales, form: _exponents(
            _amax(tiles).clamp_min(1e-30) / torch.full_like(_amax(tiles), E4M3_MAX), 0x7FFFFF
        ),
    )
    yield _quantising(
        "times-the-reciprocal",
        "the largest number of a tile is multiplied by 1 / 448, not divided by 448",
        "O17",
        scales_of=lambda tiles, scales, form: (
            _amax(tiles) * torch.tensor(1 / 448, dtype=torch.float32)
        ).clamp_min(2.0**-126),
    )
    yield _quantising(
        "codes-times-the-reciprocal",
        "numbers are multiplied by the reciprocal of their scale, not divided by it",
        "O17",
        codes_of=lambda tiles, scales, codes: quantised(
            tiles * (1.0 / scales).unsqueeze(-1), torch.ones_like(scales)
        ),
    )
    yield _quantising(
        "largest-code-is-240",
        "scales are made for the largest number of another 8-bit format",
        "O17",
        scales_of=lambda tiles, scales, form: _by(_amax(tiles), 240.0),
    )
    yield _quantising(
        "scale-of-half-a-tile",
        "the largest number is looked for in half of a tile",
        "B34",
        scales_of=lambda tiles, scales, form: _scales(_amax(tiles[..., : TILE // 2]), form),
    )
    for scale_fmt in ("fp32", "ue8m0"):
        yield _quantising(
            "scale-of-half-a-tile",
            "the largest number is looked for in half of a tile",
            "B34",
            scales_of=lambda tiles, scales, form: _scales(_amax(tiles[..., : TILE // 2]), form),
            codes_of=lambda tiles, scales, codes, scale_fmt=scale_fmt: _own_halves(
                tiles, scales, codes, scale_fmt
            ),
            form=f"each half by its own, {scale_fmt}",
        )
    yield _quantising(
        "amax-with-a-sign",
        "the largest number of a tile is taken, not the largest magnitude",
        "E19",
        scales_of=lambda tiles, scales, form: _scales(torch.where(tiles.isnan(), 0.0, tiles).amax(-1), form),
    )
    yield _quantising(
        "codes-are-zero",
        "codes are 0 beside scales that are right",
        "B33",
        codes_of=lambda tiles, scales, codes: torch.zeros_like(codes),
    )
    for code in (0xFE, 0xFF, 0x7E):
        yield _quantising(
            "another-code-for-nan",
            "NaN has another code",
            "E19",
            codes_of=lambda tiles, scales, codes, code=code: torch.where(
                (tiles / scales.unsqueeze(-1)).isnan(), code, codes
            ),
            form=f"{code:#x}",
        )
    yield _quantising(
        "nan-spoils-its-tile",
        "NaN counts as the largest magnitude of its tile",
        "E19",
        scales_of=lambda tiles, scales, form: torch.where(tiles.isnan().any(-1), torch.inf, scales),
    )
    yield _quantising(
        "nan-spoils-its-tile",
        "NaN counts as the largest magnitude of its tile",
        "E19",
        scales_of=lambda tiles, scales, form: _scales(_behind_nan(tiles), form),
        form="until the next number of its thread's 8",
    )
    yield _quantising(
        "sign-of-zero-lost",
        "minus zero becomes zero",
        "E19",
        codes_of=lambda tiles, scales, codes: torch.where(codes == 0x80, 0, codes),
    )
    yield Fault(
        "rope-written-reordered",
        PACKED,
        "columns of the rope part are written in the other order of pairs",
        "X3",
        _packed_pairs,
    )
    yield Fault(
        "rope-through-another-dtype",
        PACKED,
        "numbers of the rope part pass through float16 on their way",
        "D7",
        lambda question: _packed_rope(question, lambda rope: rope.to(torch.float16).to(rope.dtype)),
    )


def _packed_rope(question: Question, change: Callable[[Tensor], Tensor]) -> Answers | None:
    writes, rank = question.truth["packed_cache"], _rank(question)
    if not isinstance(writes, Writes):
        return None
    begin = rank + rank // 32
    rope = change(writes.values[:, begin:].contiguous().view(torch.bfloat16))
    rows = torch.cat([writes.values[:, :begin], rope.contiguous().view(torch.uint8)], dim=1)
    return {"packed_cache": Writes(writes.rows, rows)}


def _flushed(tiles: Tensor) -> Tensor:
    return torch.where(tiles.abs() < 2.0**-126, 0.0, tiles)


def _stood(question: Question, writes: Writes) -> Tensor:
    """[n, W]: what stood in the rows that are written."""
    _, cache = _cache(question.inputs)
    rows: Tensor = cache.view(-1, cache.shape[3])[writes.rows]
    return rows


def _later_tiles(question: Question, first: int) -> Answers | None:
    writes, rank = question.truth["packed_cache"], _rank(question)
    if not isinstance(writes, Writes):
        return None
    at = torch.arange(writes.values.shape[1], device=writes.values.device)
    tile = torch.where(at < rank, at // TILE, (at - rank) // 4)
    lost = (tile >= first) & (at < rank + rank // 32)
    values = torch.where(lost, _stood(question, writes), writes.values)
    return {"packed_cache": Writes(writes.rows, values)}


def _rope_shifted(question: Question, shift: int, tokens: int) -> Answers | None:
    """Rope parts so many bytes behind their own place, program after program: its codes, then its ropes."""
    writes, rank = question.truth["packed_cache"], _rank(question)
    _, cache = _cache(question.inputs)
    if not isinstance(writes, Writes) or cache.numel() > 2**26:
        return None
    flat, width, begin = cache.flatten().clone(), cache.shape[3], rank + rank // 32
    slots = tensor(question.inputs, "slot_mapping")
    written = ((slots >= 0) & (slots < _num_rows(question.inputs))).nonzero().flatten()
    programs = (written // tokens).tolist()
    starts = (writes.rows * width).tolist()
    if starts and max(starts) + width + shift > len(flat):
        raise IndexError("a rope part behind the cache")
    for program in sorted(set(programs)):
        own = [at for at, of in enumerate(programs) if of == program]
        for at in own:
            flat[starts[at] : starts[at] + begin] = writes.values[at, :begin]
        for at in own:
            flat[starts[at] + begin + shift : starts[at] + width + shift] = writes.values[at, begin:]
    return {"packed_cache": flat.view(cache.shape)}


def _packed_pairs(question: Question) -> Answers | None:
    def reorder(rope: Tensor) -> Tensor:
        at = torch.arange(rope.shape[1], device=rope.device)
        changed = rope.clone()
        changed[:, at // 2 + at % 2 * (rope.shape[1] // 2)] = rope
        return changed

    return _packed_rope(question, reorder)


FAULTS = (
    *_where(),
    *_what(),
    *_strides(),
    *_read_as_dense(),
    Fault(
        "chunks-written-from-position-0",
        ("mla_step",),
        "a chunk with a history is written over that history",
        "B01",
        _step_positions,
    ),
    *_packed(),
)
