"""Faults of selecting decode rows: their sums and their list, and what is packed and merged by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import anew, batch_ids_of, empty_unwritten, places, starts, unwritten
from references.oracle import Inputs, tensor

DECODE_ROWS = ("decode_rows",)
SUMS = "cu_seqlens_q_decode"
LIST = "batch_id_per_decode_token"


def _decode_counts(inputs: Inputs) -> Tensor:
    """[B] int64: tokens of decode rows, 0 of all others."""
    encoder, cached, new = (
        tensor(inputs, f"seq_lens_{name}") for name in ("encoder", "decoder", "this_time")
    )
    return torch.where((encoder == 0) & (cached > 0), new, 0).long()


def selected(
    question: Question,
    *,
    sums: Tensor | None = None,
    ids: Tensor | None = None,
    is_listed: Callable[[Tensor], Tensor] | None = None,
    listed_at: Callable[[Tensor, Tensor], Tensor] | None = None,
    is_unused: Callable[[Tensor, int], Tensor] | None = None,
    unused: int = -1,
    is_followed: bool = True,
) -> Answers:
    """The selection with something else, and what kernels pack and merge by it.

    Args:
        sums: [B + 1] int64, in the place of the right ones.
        ids: [Tp], slots of tokens as they are listed.
        is_listed: tokens -> bool. listed_at: (places, tokens) -> the same.
        is_unused: (places, the last sum) -> bool. unused: what stands there.
        is_followed: whether anything is packed and merged by it; else the right rows are.

    Raises:
        IndexError: something is listed or read outside of its tensor, or by what was never written.
    """
    inputs = question.inputs
    query, decode_out = tensor(inputs, "query"), tensor(inputs, "decode_out")
    begins, room, count = tensor(inputs, "cu_seqlens_q").long(), len(decode_out), len(query)
    sums = starts(_decode_counts(inputs)).long() if sums is None else sums.long()
    of_tokens, tokens = batch_ids_of(inputs, count), torch.arange(count, device=query.device)

    # 1. The list; of tokens at one place the last.
    rows = of_tokens if ids is None else ids
    at, listed = _placed(sums, begins, rows, tokens, room)
    if is_listed is not None:
        listed = listed & is_listed(tokens)
    at = (at if listed_at is None else listed_at(at, tokens))[listed]
    if bool((at < 0).any()):
        raise IndexError("a place in front of the list")
    inside = at < room
    newest = torch.full((room,), -1, dtype=torch.int64, device=query.device)
    newest.scatter_reduce_(0, at[inside], tokens[listed][inside], "amax")
    found = torch.where(newest >= 0, rows[newest.clamp_min(0)], -1) if count else newest
    all_places = torch.arange(room, device=query.device)
    behind = all_places >= sums[-1] if is_unused is None else is_unused(all_places, int(sums[-1]))
    found = torch.where(behind, unused, found)

    answers = {
        **question.truth,
        SUMS: sums.to(torch.int32),
        LIST: Unwritten(found.to(torch.int32), behind | (newest >= 0)),
    }
    if not is_followed:
        return answers
    if not bool((behind | (newest >= 0)).all()):
        raise IndexError("a slot that was never written")

    # 2. The queries of what is listed.
    packed = torch.zeros((room, *query.shape[1:]), dtype=query.dtype, device=query.device)
    real = found >= 0
    sources = begins[found[real]] + all_places[real] - sums[found[real]]
    if bool(((sources < 0) | (sources >= count)).any()):
        raise IndexError("a query outside of the step")
    packed[real] = query[sources]

    # 3. The outputs.
    at, decodes = _placed(sums, begins, of_tokens, tokens, room)
    if bool((at[decodes] < 0).any()):
        raise IndexError("an output in front of the packed ones")
    merged = tensor(inputs, "prefill_out").clone()
    merged[(of_tokens < 0) | _is_counted(sums, of_tokens)] = 0
    merged[decodes] = decode_out[at[decodes]]
    return {**answers, "packed_query": packed, "merged": merged}


def _is_counted(sums: Tensor, rows: Tensor) -> Tensor:
    """[n] bool: rows that the sums count a token of."""
    if len(sums) < 2:
        return torch.zeros_like(rows, dtype=torch.bool)
    return (rows >= 0) & (sums.diff()[rows.clamp_min(0)] > 0)


def _placed(sums: Tensor, begins: Tensor, rows: Tensor, tokens: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Of tokens in these rows [n]: where they are packed, and whether they are, and there is room."""
    if len(sums) < 2:
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    at = sums[rows.clamp_min(0)] + tokens - begins[rows.clamp_min(0)]
    return at, _is_counted(sums, rows) & (at < room)


def _selection(
    name: str, summary: str, source: str, apply: Callable[[Question], Answers | None], form: str = ""
) -> Fault:
    return Fault(name, DECODE_ROWS, summary, source, apply, form)


def _sums() -> Iterator[Fault]:
    for slots in (256, 1024):
        for carried, name, summary in (
            (0, "sums-begin-anew", "sums begin anew behind as many slots as a block of threads has"),
            (
                1,
                "sums-carry-one-block",
                "a block of slots goes on from the sum of the block before it, not of all before it",
            ),
        ):
            yield _selection(
                name,
                summary,
                "B05",
                lambda question, slots=slots, carried=carried: selected(
                    question, sums=anew(starts(_decode_counts(question.inputs)), slots, carried)
                ),
                f"blocks of {slots}",
            )
        yield _selection(
            "slots-limited",
            "sums and lengths of slots behind a fixed number of them are never written",
            "B05",
            lambda question, slots=slots: _limited(question, slots),
            f"behind {slots}",
        )
    yield _selection(
        "inclusive-sums",
        "every sum lacks the tokens of the last row that it should count",
        "B76",
        lambda question: selected(question, sums=_a_slot_late(_decode_counts(question.inputs))),
        "and tokens are packed by them",
    )
    yield from _both(
        "paused-rows-packed",
        "a slot without a token is packed as if it had one",
        "B20",
        lambda question, is_followed: selected(
            question, is_followed=is_followed, sums=starts(_with_paused(question.inputs))
        ),
    )
    yield _selection(
        "one-token-a-slot",
        "of a decode row only the first token is packed",
        "B21, M2",
        lambda question: selected(question, sums=starts(_decode_counts(question.inputs).clamp_max(1))),
        "and its others in the places of the rows behind it",
    )
    yield empty_unwritten(
        "decode_rows",
        "a step without a slot leaves its outputs as memory had them",
        "E1, B75",
        (SUMS,),
        lambda question: len(tensor(question.inputs, "seq_lens_this_time")) == 0,
    )


def _a_slot_late(counts: Tensor) -> Tensor:
    sums = starts(counts)
    return torch.cat([sums[:1], sums[:-1]])


def _with_paused(inputs: Inputs) -> Tensor:
    encoder, cached, new = (
        tensor(inputs, f"seq_lens_{name}") for name in ("encoder", "decoder", "this_time")
    )
    return torch.where((encoder == 0) & (cached > 0), new.clamp_min(1), 0)


def _limited(question: Question, slots: int) -> Answers:
    """Sums behind a slot are what memory had, and larger than any place: rows behind it count nothing."""
    sums = starts(_decode_counts(question.inputs)).long()
    if len(sums) - 1 <= slots:
        return question.truth
    at = torch.arange(len(sums), device=sums.device)
    answers = selected(question, sums=torch.where(at <= slots, sums, torch.iinfo(torch.int32).max))
    lengths = tensor(dict(question.truth), "cache_seqlens")  # type: ignore[arg-type]
    return {
        **answers,
        SUMS: Unwritten(sums.to(torch.int32), at <= slots),
        "cache_seqlens": Unwritten(lengths, at[1:] <= slots),
    }


def _both(
    name: str, summary: str, source: str, apply: Callable[[Question, bool], Answers], form: str = ""
) -> Iterator[Fault]:
    """Faults of (question, whether the list is followed): of what is left unwritten nobody may follow it."""
    for word, is_followed in (("", True), ("in the list alone", False)):

        def asked(question: Question, is_followed: bool = is_followed) -> Answers:
            return apply(question, is_followed)

        yield _selection(name, summary, source, asked, ", ".join(part for part in (form, word) if part))


def _list() -> Iterator[Fault]:
    yield from _both(
        "token-as-slot",
        "token t is listed as one of slot t",
        "B56",
        lambda question, is_followed: selected(
            question, is_followed=is_followed, ids=_own_slots(question.inputs)
        ),
    )
    for form, listed_at in (
        ("while there is room", lambda question, tokens: tokens),
        (
            "the last ones at the last place",
            lambda question, tokens: tokens.clamp_max(len(tensor(question.inputs, "decode_out")) - 1),
        ),
    ):
        yield from _both(
            "listed-by-token",
            "a decode token is listed at its place in the step, not among the packed",
            "B56",
            lambda question, is_followed, listed_at=listed_at: selected(
                question, is_followed=is_followed, listed_at=lambda at, tokens: listed_at(question, tokens)
            ),
            form,
        )
    yield from _both(
        "later-drafts-unlisted",
        "of a decode row only the first token is listed, though there is room for all",
        "B21",
        lambda question, is_followed: selected(
            question,
            is_followed=is_followed,
            is_listed=lambda tokens: places(batch_ids_of(question.inputs, len(tokens))) == 0,
        ),
    )
    behind: list[tuple[str, Callable[[Tensor, int], Tensor]]] = [
        ("all of them", lambda at, total: at < 0),
        ("the first of them", lambda at, total: at > total),
    ]
    for form, is_unused in behind:
        yield from _both(
            "unused-unwritten",
            "places behind the last decode token are never written",
            "E16, M9",
            lambda question, is_followed, is_unused=is_unused: selected(
                question, is_followed=is_followed, is_unused=is_unused
            ),
            form,
        )
    yield _selection(
        "unused-are-slot-0",
        "places behind the last decode token are slot 0's",
        "B31",
        lambda question: selected(question, unused=0),
        "and its queries are packed there",
    )
    for size in (128, 256):
        yield from _both(
            "launch-limited",
            "what lies behind a fixed number of tokens is never listed",
            "B05, L3",
            lambda question, is_followed, size=size: selected(
                question,
                is_followed=is_followed,
                is_listed=lambda tokens: tokens < size,
                is_unused=lambda at, total: (at >= total) & (at < size),
            ),
            f"behind {size}",
        )
        yield from _both(
            "launch-by-packed-tokens",
            "what lies behind as many tokens as are packed is never listed",
            "B05, X2",
            lambda question, is_followed, size=size: selected(
                question,
                is_followed=is_followed,
                is_listed=lambda tokens: (
                    tokens < -(-len(tensor(question.inputs, "decode_out")) // size) * size
                ),
            ),
            f"programs of {size}",
        )


def _own_slots(inputs: Inputs) -> Tensor:
    """[Tp] int64: of every token its number, -1 where there is no such slot."""
    tokens = torch.arange(len(tensor(inputs, "query")))
    return torch.where(tokens < len(tensor(inputs, "seq_lens_this_time")), tokens, -1)


def _merged() -> Iterator[Fault]:
    def with_merged(question: Question, merged_of: Callable[[Tensor, Tensor], Tensor]) -> Answers:
        """(slots of tokens, whether they are decode tokens) -> merged."""
        ids = batch_ids_of(question.inputs, len(tensor(question.inputs, "query")))
        counts = starts(_decode_counts(question.inputs)).long()
        return {**question.truth, "merged": merged_of(ids, _is_counted(counts, ids))}

    def right(question: Question) -> Tensor:
        return tensor(dict(question.truth), "merged")  # type: ignore[arg-type]

    yield _selection(
        "prefill-branch-alone",
        "decode rows have what the prefill branch left for them",
        "B23",
        lambda question: with_merged(
            question, lambda ids, decodes: right(question).masked_fill(_rows_of(decodes), 0)
        ),
        "which is not read there: 0",
    )
    yield _selection(
        "decode-branch-alone",
        "prefill rows are 0: what the prefill branch left for them is not merged",
        "B25",
        lambda question: with_merged(
            question, lambda ids, decodes: right(question).masked_fill(_rows_of(~decodes), 0)
        ),
    )
    yield _selection(
        "chunk-has-a-decode-output",
        "the first token of a prefill row has the output of the decode row behind it",
        "B22",
        lambda question: with_merged(question, lambda ids, decodes: _bogus(question, ids, decodes)),
    )
    for keeps_bits, form in ((True, "as it was"), (False, "as the sum has it")):
        yield _selection(
            "nan-times-zero",
            "both branches are multiplied by 0 or 1 and added: NaN in the other one stays NaN",
            "B52",
            lambda question, keeps_bits=keeps_bits: with_merged(
                question, lambda ids, decodes: _added(question, ids, decodes, keeps_bits=keeps_bits)
            ),
            form,
        )
    yield unwritten(
        "decode_rows",
        "prefill-rows-unwritten",
        "tokens of prefill rows are never written",
        "B22",
        ("merged",),
        lambda question, count: (
            ~_is_counted(
                starts(_decode_counts(question.inputs)).long(), batch_ids_of(question.inputs, count)
            ).cpu()
        ),
        "nor is padding",
    )
    for size in (32, 64, 128):
        for output in ("packed_query", "merged"):
            yield _selection(
                "launch-rounded-down",
                "the last heads of the last tokens, which fill no program of their own, are never written",
                "D3, D6",
                lambda question, size=size, output=output: _rows_lost(question, size, output),
                f"{output} in programs of {size}",
            )


def _rows_of(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1)


def _bogus(question: Question, ids: Tensor, decodes: Tensor) -> Tensor:
    decode_out = tensor(question.inputs, "decode_out")
    merged = tensor(dict(question.truth), "merged").clone()  # type: ignore[arg-type]
    at = starts(_decode_counts(question.inputs)).long()[ids.clamp_min(0)]
    first = (places(ids) == 0) & (ids >= 0) & ~decodes & (at < len(decode_out))
    merged[first] = decode_out[at[first]]
    return merged


def _added(question: Question, ids: Tensor, decodes: Tensor, *, keeps_bits: bool) -> Tensor:
    """In float32, as kernels add; the decode branch is 0 where it has no output. NaN may keep its bits."""
    prefill = tensor(question.inputs, "prefill_out")
    right = tensor(dict(question.truth), "merged")  # type: ignore[arg-type]
    from_decode = right.masked_fill(_rows_of(~decodes), 0)
    from_prefill = prefill.float() * _rows_of((ids >= 0) & ~decodes)
    added = (from_prefill + from_decode.float() * _rows_of(decodes)).to(right.dtype)
    return torch.where(prefill.isnan(), prefill, added) if keeps_bits else added


def _rows_lost(question: Question, size: int, output: str) -> Answers:
    right = tensor(dict(question.truth), output)  # type: ignore[arg-type]
    count = right.shape[0] * right.shape[1]
    rows = torch.arange(count, device=right.device).view(right.shape[:2])
    return {**question.truth, output: Unwritten(right, rows < max(size, count // size * size))}


FAULTS = (*_sums(), *_list(), *_merged())
