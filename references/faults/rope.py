"""Faults of rotation: which angle, which pairs, which way round, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import places, read_as_dense, tokens_unwritten
from references.oracle import Inputs, number, tensor

ROPE = ("rope",)


def _asked(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs], Mapping[str, Tensor | float]],
    form: str = "",
) -> Fault:
    """The fault of a right rotation of other inputs; none where the model rotates nothing."""

    def apply(question: Question) -> Answers | None:
        if question.inputs["cos_sin_cache"] is None:
            return None
        return question.with_inputs(**change(question.inputs))

    return Fault(name, ROPE, summary, source, apply, form)


def _table(inputs: Inputs) -> tuple[Tensor, Tensor]:
    cos, sin = tensor(inputs, "cos_sin_cache").chunk(2, dim=-1)
    return cos, sin


def _ids(inputs: Inputs) -> Tensor:
    return tensor(inputs, "batch_id_per_token").long()


def _positions(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | float]:
    """Other positions of real tokens. Raises IndexError outside of the table."""
    real = _ids(inputs) >= 0
    positions = tensor(inputs, "position_ids").long().clone()
    positions[real] = change(positions)[real]
    if bool(((positions < 0) | (positions >= len(tensor(inputs, "cos_sin_cache"))))[real].any()):
        raise IndexError("a position outside of the table")
    return {"position_ids": positions}


def _angles() -> Iterator[Fault]:
    yield _asked(
        "pairing-exchanged",
        "pairs are taken half split where the model interleaves them, or the other way round",
        "L45, B47, X3",
        lambda inputs: {"is_neox": 1 - int(number(inputs, "is_neox"))},
    )
    yield _asked(
        "sine-sign",
        "pairs are turned the other way",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat([_table(inputs)[0], -_table(inputs)[1]], dim=-1)},
    )
    yield _asked(
        "sines-first",
        "rows of the table are taken for [sin | cos]",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat(_table(inputs)[::-1], dim=-1)},
    )
    yield _asked(
        "cosine-for-sine",
        "the cosine stands in the place of the sine",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat([_table(inputs)[0]] * 2, dim=-1)},
    )
    for step in (1, -1):
        yield _asked(
            "a-pair-too-far",
            "a pair turns by the angle of the one beside it",
            "X3",
            lambda inputs, step=step: {
                "cos_sin_cache": torch.cat([part.roll(-step, -1) for part in _table(inputs)], dim=-1)
            },
            f"of the one {'behind' if step == 1 else 'before'}",
        )
        yield _asked(
            "position-off-by-one",
            "tokens turn as if they stood one position beside their own",
            "C1",
            lambda inputs, step=step: _positions(inputs, lambda at: at + step),
            f"{'behind' if step == 1 else 'before'} it",
        )
        yield _asked(
            "neighbours-position",
            "a token turns by the position of the token beside it",
            "B07",
            lambda inputs, step=step: _positions(inputs, lambda at: at.roll(step)),
            f"of the one {'before' if step == 1 else 'behind'}",
        )
    yield _asked(
        "position-off-by-one",
        "tokens turn as if they stood one position beside their own",
        "C1",
        lambda inputs: _positions(inputs, lambda at: (at - 1).clamp_min(0)),
        "before it, the first at its own",
    )
    for pairs in (1, 2, 4, 8):
        yield _asked(
            "angles-of-the-first-pairs",
            "every thread takes the angles of a head's first pairs",
            "X3",
            lambda inputs, pairs=pairs: {
                "cos_sin_cache": torch.cat(
                    [part[:, torch.arange(part.shape[1]) % pairs] for part in _table(inputs)], dim=-1
                )
            },
            f"threads of {pairs}",
        )
    yield _asked(
        "positions-from-0",
        "positions are counted from the row's first new token",
        "B01, C1",
        lambda inputs: _positions(inputs, lambda at: places(_ids(inputs))),
    )
    yield _asked(
        "place-in-step",
        "a token's place in the step is taken for its position",
        "P8",
        lambda inputs: _positions(inputs, lambda at: torch.arange(len(at), device=at.device)),
    )
    yield _asked(
        "first-position-for-all",
        "every token of a row turns like its first",
        "M2",
        lambda inputs: _positions(inputs, lambda at: at - places(_ids(inputs))),
    )
    yield _asked(
        "first-position-for-all",
        "every token of a row turns like its first",
        "M2",
        lambda inputs: _positions(inputs, lambda at: at - places(_ids(inputs)).clamp_max(1)),
        "but for one before it",
    )
    for length in (2048, 4096, 8192, 32768):
        yield _asked(
            "position-clamped",
            "positions are kept below the length that the table was made for",
            "L45",
            lambda inputs, length=length: _positions(inputs, lambda at: at.clamp_max(length - 1)),
            f"below {length}",
        )
    for name, dtype in (("table-through-fp16", torch.float16), ("table-through-bf16", torch.bfloat16)):
        yield _asked(
            name,
            "the table is kept in half precision",
            "D7",
            lambda inputs, dtype=dtype: {"cos_sin_cache": tensor(inputs, "cos_sin_cache").to(dtype)},
        )
        yield _asked(
            name,
            "the table is kept in half precision",
            "D7",
            lambda inputs, dtype=dtype: {
                "cos_sin_cache": torch.cat(
                    [_table(inputs)[0].to(dtype).to(torch.float32), _table(inputs)[1]], dim=-1
                )
            },
            "the cosines alone",
        )


# ---- what is rotated -----------------------------------------------------------------------------

PARTS = (("query", ("q_pe",)), ("key", ("k_pe",)), ("both", ("q_pe", "k_pe")))


def _turned(
    name: str, summary: str, source: str, change: Callable[[Question, str], Tensor | None], form: str = ""
) -> Iterator[Fault]:
    """Faults of one output or both: (question, output) -> its values [Tp, ..., D] float64."""
    for part, outputs in PARTS:

        def apply(question: Question, outputs: tuple[str, ...] = outputs) -> Answers | None:
            if question.inputs["cos_sin_cache"] is None:
                return None
            answers = dict(question.truth)
            real = _ids(question.inputs) >= 0
            for output in outputs:
                values, right = change(question, output), answers[output]
                if values is None or not isinstance(right, Tensor):
                    return None
                answers[output] = torch.where(real.view(-1, *[1] * (right.dim() - 1)), values, right)
                products = answers[f"{output}_products"]
                if name == "rotated-twice" and isinstance(products, Tensor):
                    # Each of the two rotations rounds, and the second turns what the first is off by.
                    answers[f"{output}_products"] = products + products.flip(-1).sum(-1, keepdim=True)
            return answers

        yield Fault(name, ROPE, summary, source, apply, ", ".join(word for word in (part, form) if word))


def _raw(question: Question, output: str) -> Tensor:
    return tensor(question.inputs, f"{output}_raw").double()


def _right(question: Question, output: str) -> Tensor:
    return tensor(dict(question.truth), output)  # type: ignore[arg-type]


def _pairs(question: Question, values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> the first and the second column of every pair, [..., D / 2] each."""
    if number(question.inputs, "is_neox"):
        low, high = values.chunk(2, dim=-1)
        return low, high
    return values[..., 0::2], values[..., 1::2]


def _joined(question: Question, low: Tensor, high: Tensor) -> Tensor:
    if number(question.inputs, "is_neox"):
        return torch.cat([low, high], dim=-1)
    return torch.stack([low, high], dim=-1).flatten(-2)


def _exchanged(question: Question, output: str) -> Tensor:
    low, high = _pairs(question, _right(question, output))
    return _joined(question, high, low)


def _twice(question: Question, output: str) -> Tensor:
    """Rotated, stored in the inputs' dtype, and rotated again."""
    raw = tensor(question.inputs, f"{output}_raw")
    once = _right(question, output).to(raw.dtype)
    return tensor(dict(question.with_inputs(**{f"{output}_raw": once})), output)  # type: ignore[arg-type]


def _twice_at_once(question: Question, output: str) -> Tensor:
    """Rotated by two angles without being stored in between."""
    once = _right(question, output)
    return tensor(dict(question.with_inputs(**{f"{output}_raw": once})), output)  # type: ignore[arg-type]


def _reflected(question: Question, output: str) -> Tensor:
    """The first columns turned the other way, the second as they should."""
    cos, sin = _table(question.inputs)
    turned = question.with_inputs(cos_sin_cache=torch.cat([cos, -sin], dim=-1))
    low, _ = _pairs(question, tensor(dict(turned), output))  # type: ignore[arg-type]
    _, high = _pairs(question, _right(question, output))
    return _joined(question, low, high)


def _in_place_too_early(question: Question, output: str) -> Tensor:
    """The second column from the first one's new value."""
    ids = _ids(question.inputs)
    at = tensor(question.inputs, "position_ids").long() * (ids >= 0)
    cos, sin = (part[at].double() for part in _table(question.inputs))
    low, high = _pairs(question, _raw(question, output))
    if low.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first = low * cos - high * sin
    return _joined(question, first, high * cos + first * sin)


def _half(question: Question, output: str, others: float = 1.0) -> Tensor:
    """Half of the pairs turned, the others so many times what they were."""
    low, high = _pairs(question, _right(question, output))
    raw_low, raw_high = _pairs(question, _raw(question, output) * others)
    turns = torch.arange(low.shape[-1], device=low.device) < low.shape[-1] // 2
    return _joined(question, torch.where(turns, low, raw_low), torch.where(turns, high, raw_high))


def _of_first(question: Question, output: str, values: Tensor) -> Tensor:
    """Other values in the first column of each pair, the right ones in the second."""
    first, _ = _pairs(question, values)
    _, second = _pairs(question, _right(question, output))
    return _joined(question, first, second)


def _cut(question: Question, output: str) -> Tensor:
    """Results in the inputs' dtype, the nearest that is not larger in magnitude."""
    right, dtype = _right(question, output), tensor(question.inputs, f"{output}_raw").dtype
    rounded = right.to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    # A sign and a magnitude: one less is the number before it on the way to zero.
    smaller = (rounded.view(bits) - 1).view(dtype)
    return torch.where(rounded.double().abs() > right.abs(), smaller, rounded).double()


def _from_the_query(question: Question) -> Answers | None:
    query = tensor(question.inputs, "q_pe_raw")
    if query.shape[1] == 0:
        return None
    made = question.with_inputs(k_pe_raw=query[:, 0])
    return {**question.truth, "k_pe": made["k_pe"], "k_pe_products": made["k_pe_products"]}


def _pairs_unwritten(
    question: Question, pairs: int, threads_of: Callable[[int, int, int], int]
) -> Answers | None:
    """Some pairs a thread, of every token its query's heads and its key: what has no thread is not written.

    Args:
        threads_of: (tokens, heads, threads a head) -> how many threads there are.
    """
    query = _right(question, "q_pe")
    tokens, heads, width = query.shape
    if width // 2 % pairs:
        return None
    packs = width // 2 // pairs
    threads = torch.arange(tokens * (heads + 1) * packs, device=query.device)
    written = (threads < threads_of(tokens, heads, packs)).view(tokens, heads + 1, packs)
    written = written.repeat_interleave(pairs, -1)
    columns = _joined(question, written, written)
    return {
        **question.truth,
        "q_pe": Unwritten(query, columns[:, :heads]),
        "k_pe": Unwritten(_right(question, "k_pe"), columns[:, heads]),
    }


def _what() -> Iterator[Fault]:
    yield from _turned("unrotated", "a part is handed on as the projection left it", "O1, P17", _raw)
    yield from _turned("rotated-twice", "what is rotated already is rotated again", "O1", _twice)
    yield from _turned(
        "rotated-twice", "what is rotated already is rotated again", "O1", _twice_at_once, "at once"
    )
    yield from _turned(
        "columns-exchanged", "the two columns of each pair come back in each other's place", "X3", _exchanged
    )
    yield from _turned("reflected", "one of the two signs of a rotation is lost", "X3", _reflected)
    yield from _turned(
        "in-place-too-early",
        "the second column of a pair is made from the first one's new value",
        "O1",
        _in_place_too_early,
    )
    yield from _turned("first-columns-alone", "half of the pairs are rotated", "X3", _half)
    yield from _turned(
        "first-columns-alone",
        "half of the pairs are rotated",
        "X3",
        lambda question, output: _half(question, output, others=0.0),
        "the others are 0",
    )
    yield from _turned("rounded-toward-zero", "results are cut off where they should be rounded", "D7", _cut)
    yield from _turned(
        "rounded-toward-zero",
        "results are cut off where they should be rounded",
        "D7",
        lambda question, output: _of_first(question, output, _cut(question, output)),
        "the first column of each pair",
    )
    yield Fault(
        "key-from-the-query", ROPE, "the key is made from the query's first head", "P17", _from_the_query
    )
    for pairs in (1, 2, 4, 8):
        yield Fault(
            "key-without-a-thread",
            ROPE,
            "threads are counted without the key: the last pairs of a step are never written",
            "O1",
            lambda question, pairs=pairs: _pairs_unwritten(
                question, pairs, lambda tokens, heads, packs: -(-tokens * heads * packs // 256) * 256
            ),
            f"{pairs} pairs a thread, 256 threads",
        )
        yield Fault(
            "launch-rounded-down",
            ROPE,
            "the last pairs of a step, which fill no program of their own, are never written",
            "D3, D6",
            lambda question, pairs=pairs: _pairs_unwritten(
                question,
                pairs,
                lambda tokens, heads, packs: max(tokens * (heads + 1) * packs // 256, 1) * 256,
            ),
            f"{pairs} pairs a thread, 256 threads",
        )
    for form, outputs in PARTS:

        def unwritten(question: Question, outputs: tuple[str, ...] = outputs) -> Answers:
            answers: dict[str, object] = dict(question.truth)
            for output in outputs:
                right = _right(question, output)
                answers[output] = Unwritten(right, torch.zeros(len(right), dtype=torch.bool))
            return answers  # type: ignore[return-value]

        yield Fault("part-unwritten", ROPE, "a part is never written", "D3", unwritten, form)
    yield Fault(
        "padding-unwritten",
        ROPE,
        "tokens of padding are never written",
        "B22, E9",
        lambda question: {
            **question.truth,
            **{
                name: Unwritten(_right(question, name), _ids(question.inputs) >= 0)
                for name in ("q_pe", "k_pe")
            },
        },
    )
    yield Fault(
        "padding-copied",
        ROPE,
        "tokens of padding are handed on in the place of 0",
        "B31",
        lambda question: {
            **question.truth,
            **{name: _with_padding(question, name) for name in ("q_pe", "k_pe")},
        },
    )
    for heads in (1, 2, 4, 8, 16, 32, 64):
        yield Fault(
            "later-heads-unwritten",
            ROPE,
            "heads that fill no program of their own are never written",
            "D3, D6",
            lambda question, heads=heads: _later_heads(question, heads),
            f"programs of {heads}",
        )
    for step in (1, -1):
        yield Fault(
            "wrong-head",
            ROPE,
            "a head has the results of the one beside it",
            "D6",
            lambda question, step=step: {**question.truth, "q_pe": _right(question, "q_pe").roll(step, 1)},
            f"of the head {'before' if step == 1 else 'behind'}",
        )
    yield Fault(
        "zeros-where-nothing-turns",
        ROPE,
        "a model that rotates nothing gets zeros",
        "L45",
        lambda question: (
            None
            if question.inputs["cos_sin_cache"] is not None
            else {**question.truth, **{name: _right(question, name) * 0 for name in ("q_pe", "k_pe")}}
        ),
    )
    for dtype in (torch.bfloat16, torch.float16):
        word = str(dtype).removeprefix("torch.")
        for form, outputs in PARTS:
            yield Fault(
                "through-another-dtype",
                ROPE,
                "numbers pass through another dtype on their way",
                "D7",
                lambda question, dtype=dtype, outputs=outputs: {
                    **question.truth,
                    **{name: _right(question, name).to(dtype).double() for name in outputs},
                },
                f"{form} through {word}",
            )
        yield Fault(
            "through-another-dtype",
            ROPE,
            "numbers pass through another dtype on their way",
            "D7",
            lambda question, dtype=dtype: {
                **question.truth,
                **{
                    name: _of_first(question, name, _right(question, name).to(dtype).double())
                    for name in ("q_pe", "k_pe")
                },
            },
            f"the first column of each pair through {word}",
        )
    yield from read_as_dense("rope", ("q_pe_raw", "k_pe_raw", "cos_sin_cache"))
    yield from tokens_unwritten("rope", ("q_pe", "k_pe"), (128, 1024))


def _with_padding(question: Question, name: str) -> Tensor:
    right = _right(question, name)
    real = (_ids(question.inputs) >= 0).view(-1, *[1] * (right.dim() - 1))
    return torch.where(real, right, _raw(question, name))


def _later_heads(question: Question, heads: int) -> Answers | None:
    right = _right(question, "q_pe")
    count = right.shape[1]
    written = torch.arange(count, device=right.device) < max(heads, count // heads * heads)
    return {**question.truth, "q_pe": Unwritten(right, written.expand(right.shape[:2]))}


FAULTS = (*_angles(), *_what())
