"""Faults of the tiles that a step is cut into: how many a row has, which are listed, and their room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases.operators.launch_buffers import DECODER_TILE, ENCODER_TILE
from references.faults._fault import Answers, Fault, Question, Unwritten
from references.oracle import Inputs, number, tensor

BUFFERS = ("launch_buffers",)
LISTS = ("encoder", "decoder", "kv")


@dataclass(frozen=True)
class _Plan:
    """What the lists are made of.

    Attributes:
        rows: of each list the rows of every slot [B]. tiles: rows of a tile. most: rows that a slot may have.
        group: query heads of a KV head.
    """

    rows: dict[str, Tensor]
    tiles: dict[str, int]
    most: dict[str, int]
    group: int
    encoder: Tensor
    cached: Tensor
    new: Tensor
    longest: int
    block_size: int

    def with_rows(self, **rows: Tensor) -> _Plan:
        """Other rows in some lists."""
        return replace(self, rows={**self.rows, **rows})


def _plan(inputs: Inputs, group: int | None = None) -> _Plan:
    """The right plan, or that of groups of another size."""
    encoder, cached, new = (
        tensor(inputs, f"seq_lens_{name}").long() for name in ("encoder", "decoder", "this_time")
    )
    if group is None:
        group = int(number(inputs, "num_attention_heads")) // int(number(inputs, "num_key_value_heads"))
    block_size, longest = int(number(inputs, "block_size")), int(number(inputs, "max_row_tokens"))
    return _Plan(
        {
            "encoder": torch.where(encoder > 0, new * group, 0),
            "decoder": torch.where(encoder > 0, 0, new * group),
            "kv": torch.where(new > 0, cached + new, 0),
        },
        {"encoder": ENCODER_TILE, "decoder": DECODER_TILE, "kv": block_size},
        {"encoder": longest * group, "decoder": longest * group, "kv": longest},
        group,
        encoder,
        cached,
        new,
        longest,
        block_size,
    )


def _made(question: Question, plan: _Plan, *, rounds_up: bool = True) -> Answers:
    """The lists of a plan, in the room that they have.

    Raises:
        IndexError: a list does not fit into its room.
    """
    answers = dict(question.truth)
    numbers, rooms = [], []
    for name in LISTS:
        rows, tile = plan.rows[name], plan.tiles[name]
        tiles = (rows + tile - 1) // tile if rounds_up else rows // tile
        total = int(tiles.sum())
        batch_ids = tensor(answers, f"{name}_batch_ids")  # type: ignore[arg-type]
        if total > len(batch_ids):
            raise IndexError("more tiles than there is room for")
        begins = (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
        ids, numbers_of = torch.full_like(batch_ids, -1), torch.full_like(batch_ids, -1)
        ids[:total] = torch.arange(len(tiles), device=ids.device).repeat_interleave(tiles).to(ids.dtype)
        numbers_of[:total] = (torch.arange(total, device=ids.device) - begins).to(ids.dtype)
        answers[f"{name}_batch_ids"], answers[f"{name}_tile_ids"] = ids, numbers_of
        numbers.append(total)
        rooms.append(len(tiles) * -(-plan.most[name] // tile))
    right = tensor(answers, "num_tiles")  # type: ignore[arg-type]
    answers["num_tiles"] = torch.tensor(numbers, dtype=right.dtype, device=right.device)
    answers["capacity"] = torch.tensor(rooms, dtype=right.dtype, device=right.device)
    return answers


def _told(question: Question, plan: _Plan) -> Answers:
    """The lists of a plan beside the right room: where the lists alone are wrong."""
    return {**_made(question, plan), "capacity": question.truth["capacity"]}


def _planned(name: str, summary: str, source: str, change: Callable[[_Plan], _Plan], form: str = "") -> Fault:
    """The fault of another plan."""
    return Fault(
        name,
        BUFFERS,
        summary,
        source,
        lambda question: _made(question, change(_plan(question.inputs))),
        form,
    )


def _groups() -> Iterator[Fault]:
    def of_group(
        group_of: Callable[[Question], int | None], *, room_too: bool
    ) -> Callable[[Question], Answers | None]:
        def apply(question: Question) -> Answers | None:
            group = group_of(question)
            if group is None:
                return None
            plan = _plan(question.inputs, group)
            return _made(question, plan) if room_too else _told(question, plan)

        return apply

    for room_too, word in ((True, ""), (False, "in the lists alone")):
        yield Fault(
            "heads-of-the-first-layer",
            BUFFERS,
            "the group size of the layer that is launched first is kept for all",
            "B64",
            of_group(_first_group, room_too=room_too),
            word,
        )
        for size in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
            yield Fault(
                "groups-of-another-size",
                BUFFERS,
                "a group is taken to have another number of heads",
                "B63, B64, P7",
                of_group(lambda _, size=size: size, room_too=room_too),
                ", ".join(part for part in (f"of {size}", word) if part),
            )
        yield Fault(
            "groups-of-another-size",
            BUFFERS,
            "a group is taken to have another number of heads",
            "P7",
            of_group(_power_of_two, room_too=room_too),
            ", ".join(part for part in ("rounded up to a power of two", word) if part),
        )


def _power_of_two(question: Question) -> int:
    """The group size rounded up."""
    return 1 << (_plan(question.inputs).group - 1).bit_length()


def _first_group(question: Question) -> int | None:
    if not question.first:
        return None
    return int(number(question.first, "num_attention_heads")) // int(
        number(question.first, "num_key_value_heads")
    )


def _rows() -> Iterator[Fault]:
    plans: list[tuple[str, str, str, Callable[[_Plan], _Plan], str]] = [
        (
            "tokens-for-query-rows",
            "a token is counted as one query row",
            "B64",
            lambda plan: plan.with_rows(encoder=torch.where(plan.encoder > 0, plan.new, 0)),
            "of prefill rows",
        ),
        (
            "tokens-for-query-rows",
            "a token is counted as one query row",
            "B64",
            lambda plan: plan.with_rows(decoder=torch.where(plan.encoder > 0, 0, plan.new)),
            "of decode rows",
        ),
        (
            "history-is-prefilled",
            "the cached tokens of a continued chunk are counted among its query rows",
            "O05",
            lambda plan: plan.with_rows(
                encoder=torch.where(plan.encoder > 0, (plan.cached + plan.new) * plan.group, 0)
            ),
            "",
        ),
        (
            "chunks-in-both-lists",
            "a chunk with a history is taken for a decode row, too",
            "O05, C3",
            lambda plan: plan.with_rows(
                decoder=torch.where((plan.encoder > 0) & (plan.cached == 0), 0, plan.new * plan.group)
            ),
            "",
        ),
        (
            "cache-means-decode",
            "a row with a cache is taken for a decode row: prefix hits are no prefill rows",
            "B20",
            lambda plan: plan.with_rows(
                encoder=torch.where(plan.cached > 0, 0, plan.new * plan.group) * (plan.encoder > 0),
                decoder=torch.where((plan.encoder > 0) & (plan.cached == 0), 0, plan.new * plan.group),
            ),
            "",
        ),
        (
            "paused-rows-have-a-length",
            "keys of a slot without a token are listed",
            "E3, B07",
            lambda plan: plan.with_rows(kv=plan.cached + plan.new),
            "",
        ),
        (
            "length-without-the-new",
            "a row's keys are counted without its new tokens",
            "B66",
            lambda plan: plan.with_rows(kv=torch.where(plan.new > 0, plan.cached, 0)),
            "",
        ),
        (
            "keys-without-the-cache",
            "a row's keys are counted without what is cached",
            "B04",
            lambda plan: plan.with_rows(kv=plan.new),
            "",
        ),
        (
            "length-of-one-token",
            "a draft is counted as one token",
            "B12",
            lambda plan: plan.with_rows(
                decoder=torch.where(plan.encoder > 0, 0, plan.new.clamp_max(1) * plan.group)
            ),
            "",
        ),
        (
            "tiles-of-the-other-rows",
            "decode rows are cut into tiles as large as those of prefill rows, or the other way round",
            "O05",
            lambda plan: _tiled(plan, decoder=ENCODER_TILE),
            "decode rows",
        ),
        (
            "tiles-of-the-other-rows",
            "decode rows are cut into tiles as large as those of prefill rows, or the other way round",
            "O05",
            lambda plan: _tiled(plan, encoder=DECODER_TILE),
            "prefill rows",
        ),
        *(
            (
                "block-size-is-a-literal",
                "the block size is taken for another number",
                "B38",
                lambda plan, size=size: _tiled(plan, kv=size),
                f"for {size}",
            )
            for size in (16, 32, 64, 128)
        ),
    ]
    for name, summary, source, change, form in plans:
        yield _planned(name, summary, source, change, form)
    for size in (16, 32, 64, 128):
        yield Fault(
            "block-size-is-a-literal",
            BUFFERS,
            "the block size is taken for another number",
            "B38",
            lambda question, size=size: _told(question, _tiled(_plan(question.inputs), kv=size)),
            f"for {size}, in the lists alone",
        )
    yield Fault(
        "tiles-rounded-down",
        BUFFERS,
        "a row's last tile that is not full is left out",
        "O05",
        lambda question: _made(question, _plan(question.inputs), rounds_up=False),
    )
    for slots in (16, 32, 64, 128, 256, 512, 1024):
        yield _planned(
            "slots-limited",
            "slots behind a fixed number of them are not counted",
            "B05",
            lambda plan, slots=slots: plan.with_rows(
                **{
                    name: rows * (torch.arange(len(rows), device=rows.device) < slots)
                    for name, rows in plan.rows.items()
                }
            ),
            f"behind {slots}",
        )


def _tiled(plan: _Plan, **tiles: int) -> _Plan:
    return replace(plan, tiles={**plan.tiles, **tiles})


def _lists() -> Iterator[Fault]:
    yield Fault(
        "numbers-of-the-list",
        BUFFERS,
        "a tile has its number in the list, not in its row",
        "O05",
        lambda question: _changed(
            question,
            "tile_ids",
            lambda ids: torch.where(ids >= 0, torch.arange(len(ids), device=ids.device), -1).to(ids.dtype),
        ),
    )
    for form, kinds in (
        ("", ("batch_ids", "tile_ids")),
        ("slots", ("batch_ids",)),
        ("numbers", ("tile_ids",)),
    ):
        yield Fault(
            "unused-unwritten",
            BUFFERS,
            "entries behind the last tile are never written",
            "O05, E16",
            lambda question, kinds=kinds: _tail_unwritten(question, kinds),
            form,
        )
    for size in (64, 128, 256, 512, 1024):
        yield Fault(
            "launch-limited",
            BUFFERS,
            "entries behind those that the launch has programs for are never written",
            "B64",
            lambda question, size=size: _entries_unwritten(
                question, lambda rooms, size=size: -(-rooms["encoder"] // size) * size
            ),
            f"as many as the list of prefill rows needs, in programs of {size}",
        )
        yield Fault(
            "launch-rounded-down",
            BUFFERS,
            "the last entries, which fill no program of their own, are never written",
            "B64",
            lambda question, size=size: _entries_unwritten(
                question, lambda rooms, size=size: max(rooms.values()) // size * size
            ),
            f"programs of {size}",
        )
    for size in (256, 512, 1024):
        yield Fault(
            "sums-begin-anew",
            BUFFERS,
            "sums begin anew behind as many slots as a block of threads has",
            "B05",
            lambda question, size=size: _last_turn_told(question, size),
            f"every {size}, what is told alone",
        )
    yield Fault(
        "unused-are-slot-0",
        BUFFERS,
        "entries behind the last tile are slot 0's",
        "B31",
        lambda question: _changed(question, "batch_ids", lambda ids: ids.clamp_min(0)),
    )
    yield Fault(
        "room-told-as-used",
        BUFFERS,
        "the room of a list is what this step needs of it, not what must be there",
        "B64",
        lambda question: {**question.truth, "capacity": question.truth["num_tiles"]},
    )


def _changed(question: Question, kind: str, change: Callable[[Tensor], Tensor]) -> Answers:
    """All lists of one kind changed."""
    answers = dict(question.truth)
    for name in LISTS:
        answers[f"{name}_{kind}"] = change(tensor(answers, f"{name}_{kind}"))  # type: ignore[arg-type]
    return answers


def _tail_unwritten(question: Question, kinds: tuple[str, ...]) -> Answers:
    answers: dict[str, object] = dict(question.truth)
    for name in LISTS:
        for kind in kinds:
            values = tensor(dict(question.truth), f"{name}_{kind}")  # type: ignore[arg-type]
            answers[f"{name}_{kind}"] = Unwritten(values, values >= 0)
    return answers  # type: ignore[return-value]


def _entries_unwritten(question: Question, written_of: Callable[[dict[str, int]], int]) -> Answers:
    """Of all lists the first entries alone: (rooms) -> how many."""
    answers: dict[str, object] = dict(question.truth)
    rooms = {name: len(tensor(answers, f"{name}_batch_ids")) for name in LISTS}  # type: ignore[arg-type]
    for name in LISTS:
        for kind in ("batch_ids", "tile_ids"):
            values = tensor(dict(question.truth), f"{name}_{kind}")  # type: ignore[arg-type]
            answers[f"{name}_{kind}"] = Unwritten(
                values, torch.arange(len(values)) < max(1, written_of(rooms))
            )
    return answers  # type: ignore[return-value]


def _last_turn_told(question: Question, size: int) -> Answers | None:
    """The number of tiles of the last slots alone; none of more turns, whose lists are wrong, too."""
    plan = _plan(question.inputs)
    if not size < len(plan.new) <= 2 * size:
        return None
    right = tensor(dict(question.truth), "num_tiles")  # type: ignore[arg-type]
    told = [int((-(-plan.rows[name][size:] // plan.tiles[name])).sum()) for name in LISTS]
    return {**question.truth, "num_tiles": torch.tensor(told, dtype=right.dtype, device=right.device)}


FAULTS = (*_groups(), *_rows(), *_lists())
