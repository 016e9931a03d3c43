"""What faults of several groups say of the tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.oracle import Inputs, Outputs, tensor

BY_DENSITY = "P17"


def places(batch_ids: Tensor) -> Tensor:
    """[Tp] int64: the place of each token in its row, from 0; of padding, 0."""
    tokens = torch.arange(len(batch_ids), device=batch_ids.device)
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[1:] = batch_ids[1:] != batch_ids[:-1]
    begins = torch.where(is_first, tokens, 0).cummax(0).values if len(tokens) else tokens
    return torch.where(batch_ids >= 0, tokens - begins, 0)


def starts(lengths: Tensor) -> Tensor:
    """[B] -> [B + 1] int32: the sum of what stands before each, and of all."""
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    sums[1:] = lengths.long().cumsum(0)
    return sums.to(torch.int32)


def entry(tables: Tensor, slots: int | Tensor, columns: Tensor) -> Tensor:
    """[n] int64: entries of the table where they would lie in memory: beside those of a row, another's.

    Raises:
        IndexError: one lies outside of the table.
    """
    count = (len(tables) - 1) * tables.stride(0) + tables.shape[1] if len(tables) else 0
    places_of = slots * tables.stride(0) + columns
    if bool(((places_of < 0) | (places_of >= count)).any()):
        raise IndexError("an entry outside of the block table")
    return tables.as_strided((count,), (1,), tables.storage_offset())[places_of].long()


def batch_ids_of(inputs: Inputs, count: int) -> Tensor:
    """[count] int64: the slot of each token, from the lengths of the rows; -1 behind the last."""
    lengths = tensor(inputs, "cu_seqlens_q").long().diff()
    found = torch.full((count,), -1, dtype=torch.int64, device=lengths.device)
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    found[: len(rows)] = rows
    return found


def has_history(inputs: Inputs) -> Tensor:
    """[Tp] bool: whose list names rows of the cache; of an operator with both kinds, by the row's history."""
    if "batch_id_per_token" not in inputs:
        lists = tensor(inputs, "indices")
        return torch.full((len(lists),), "packed_cache" in inputs, device=lists.device)
    ids = tensor(inputs, "batch_id_per_token").long()
    cached = tensor(inputs, "seq_lens_decoder")
    return (ids >= 0) & (cached[ids.clamp_min(0)] > 0) if len(cached) else ids >= 0


def changing(
    name: str,
    operators: Sequence[str],
    summary: str,
    source: str,
    change: Callable[[Inputs], Mapping[str, Tensor | float | str | None]],
    form: str = "",
) -> Fault:
    """The fault of an operator that answers rightly to other inputs."""
    return Fault(
        name,
        tuple(operators),
        summary,
        source,
        lambda question: question.with_inputs(**change(question.inputs)),
        form,
    )


def read_as_dense(operator: str, names: Sequence[str]) -> Iterator[Fault]:
    """A strided input read as if its tokens, its heads, or both followed one another: each input, and all."""
    groups: list[tuple[Sequence[str], str]] = [((name,), name) for name in names]
    if len(names) > 1:
        groups.append((tuple(names), "every input"))
    for group, label in groups:
        for axes, form in (((0,), ""), ((1,), "by head"), ((0, 1), "by token and head")):

            def apply(
                question: Question, group: Sequence[str] = group, axes: tuple[int, ...] = axes
            ) -> Outputs | None:
                dense = {name: _as_dense(question.inputs.get(name), axes) for name in group}
                changes = {name: value for name, value in dense.items() if value is not None}
                # One input of several is another form.
                return question.with_inputs(**changes) if len(changes) > (len(group) > 1) else None

            yield Fault(
                "read-as-dense",
                (operator,),
                "an input that is a slice of a wider tensor is read as if it were contiguous",
                BY_DENSITY,
                apply,
                f"{label} {form}".strip(),
            )


def _as_dense(given: object, axes: tuple[int, ...]) -> Tensor | None:
    """A strided tensor with the strides of a contiguous one along some axes; None of another."""
    if not isinstance(given, Tensor) or given.is_contiguous() or given.numel() == 0:
        return None
    if given.dim() <= max(axes) + 1:
        return None
    strides = list(given.stride())
    dense = torch.empty(given.shape, device="meta").stride()
    for axis in axes:
        strides[axis] = dense[axis]
    return given.as_strided(given.shape, strides, given.storage_offset())


def unwritten(
    operator: str,
    name: str,
    summary: str,
    source: str,
    outputs: Sequence[str],
    is_lost: Callable[[Question, int], Tensor],
    form: str = "",
) -> Fault:
    """The fault of leaving some entries of outputs' first axis as they were.

    Args:
        is_lost: (question, entries) -> [entries] bool.
    """

    def apply(question: Question) -> Answers:
        answers: dict[str, object] = dict(question.truth)
        for output in outputs:
            values = answers[output]
            if isinstance(values, Tensor):
                answers[output] = Unwritten(values, ~is_lost(question, len(values)))
        return answers  # type: ignore[return-value]

    return Fault(name, (operator,), summary, source, apply, form)


def tokens_unwritten(operator: str, outputs: Sequence[str], sizes: Sequence[int]) -> Iterator[Fault]:
    """Launches without the last entries: those behind a fixed number, or those that fill no program."""
    for size in sizes:

        def behind(_: Question, count: int, size: int = size) -> Tensor:
            return torch.arange(count) >= size

        def ragged(_: Question, count: int, size: int = size) -> Tensor:
            return torch.arange(count) >= max(size, count // size * size)

        yield unwritten(
            operator,
            "launch-limited",
            "what lies behind a fixed number of tokens is never written",
            "B05, L3",
            outputs,
            behind,
            f"behind {size}",
        )
        yield unwritten(
            operator,
            "launch-rounded-down",
            "the last tokens, which fill no program of their own, are never written",
            "E2",
            outputs,
            ragged,
            f"programs of {size}",
        )


def empty_unwritten(
    operator: str,
    summary: str,
    source: str,
    outputs: Sequence[str],
    is_empty: Callable[[Question], bool],
    form: str = "",
) -> Fault:
    """The fault of returning before anything is written, where a step has nothing of some kind."""

    def apply(question: Question) -> Answers | None:
        if not is_empty(question):
            return None
        answers: dict[str, object] = dict(question.truth)
        for output in outputs:
            values = answers[output]
            if isinstance(values, Tensor):
                answers[output] = Unwritten(values, torch.zeros(len(values), dtype=torch.bool))
        return answers  # type: ignore[return-value]

    return Fault("empty-step-unwritten", (operator,), summary, source, apply, form)


def begun(begins: Tensor, at: Tensor, *, upper: bool) -> Tensor:
    """[n] int64: the last thing that begins at or before each place, as a kernel halves an interval for it.

    Args:
        begins: [B + 1], where each thing begins, and where the last ends. In sums that do not ascend another
            middle finds another thing.
        upper: whether of two middles the upper one is taken.
    """
    low = torch.zeros_like(at, dtype=torch.int64)
    high = torch.full_like(low, len(begins) - 1)
    for _ in range((len(begins) - 1).bit_length()):
        middle = (low + high + 1) // 2 if upper else low + (high - low) // 2
        is_open = (high - low > 1) | upper
        is_begun = begins[middle] <= at
        low = torch.where(is_open & is_begun, middle, low)
        high = torch.where(is_open & ~is_begun, middle, high)
    return low


def anew(sums: Tensor, slots: int, carried: int = 0) -> Tensor:
    """[B + 1]: sums that begin anew every so many slots, or carry the sum of so many such blocks alone."""
    at = torch.arange(len(sums), device=sums.device)
    blocks = (at - 1).clamp_min(0) // slots
    begins: Tensor = sums - sums[(blocks - carried).clamp_min(0) * slots]
    return begins
