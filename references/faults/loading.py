"""Faults of splitting weights: whose heads a rank has, which part is which, and which way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import changing, read_as_dense
from references.oracle import Inputs, number, tensor

SPLIT = ("kv_b_split",)
LAYOUTS = ("paddle", "torch")


def _columns(
    name: str, summary: str, source: str, order: Callable[[Inputs, Tensor], Tensor], form: str = ""
) -> Fault:
    """The fault of other features: of [ranks, heads, N + V] numbers of features, those that are taken."""

    def changed(inputs: Inputs) -> dict[str, Tensor | float | str | None]:
        ranks, heads = (int(number(inputs, key)) for key in ("tensor_parallel_size", "num_attention_heads"))
        width = int(number(inputs, "qk_nope_head_dim")) + int(number(inputs, "v_head_dim"))
        features = torch.arange(ranks * heads * width).view(ranks, heads, width)
        taken = order(inputs, features).flatten()
        if bool(((taken < 0) | (taken >= len(taken))).any()):
            raise IndexError("a feature outside of the checkpoint")
        return {
            "kv_b_proj_paddle": tensor(inputs, "kv_b_proj_paddle")[:, taken],
            "kv_b_proj_torch": tensor(inputs, "kv_b_proj_torch")[taken],
        }

    return changing(name, SPLIT, summary, source, changed, form)


def _nope(inputs: Inputs) -> int:
    return int(number(inputs, "qk_nope_head_dim"))


def _wider(inputs: Inputs, features: Tensor) -> int:
    """By how much values are wider than keys."""
    return features.shape[2] - 2 * _nope(inputs)


def _all_keys_first(inputs: Inputs, features: Tensor) -> Tensor:
    """The checkpoint read as [keys of all heads | values of all heads]."""
    nope = _nope(inputs)
    heads = features.shape[0] * features.shape[1]
    keys = torch.arange(heads * nope).view(*features.shape[:2], nope)
    values = heads * nope + torch.arange(heads * (features.shape[2] - nope)).view(*features.shape[:2], -1)
    return torch.cat([keys, values], dim=2)


def _features() -> Iterator[Fault]:
    for step in (1, -1):
        yield _columns(
            "neighbours-head",
            "a head has the weights of the one beside it",
            "O22, L40",
            lambda inputs, features, step=step: features.flatten(0, 1).roll(step, 0),
            f"of the head {'before' if step == 1 else 'behind'}",
        )
    yield _columns(
        "neighbours-head",
        "a head has the weights of the one beside it",
        "O22",
        lambda inputs, features: features + features.shape[2],
        "of the head behind, the last's behind the checkpoint",
    )
    yield _columns(
        "slice-one-head-early",
        "ranks but the first begin with the last head of the rank before",
        "O22",
        lambda inputs, features: torch.stack(
            [
                features.flatten(0, 1)[torch.arange(features.shape[1]) + max(0, rank * features.shape[1] - 1)]
                for rank in range(features.shape[0])
            ]
        ),
    )
    yield _columns(
        "rank-ignored",
        "every rank has the first rank's heads",
        "O22",
        lambda inputs, features: features[:1].expand_as(features),
    )
    yield _columns(
        "ranks-dealt-heads",
        "a rank begins one head behind the rank before",
        "O22",
        lambda inputs, features: torch.stack(
            [features.flatten(0, 1)[rank : rank + features.shape[1]] for rank in range(features.shape[0])]
        ),
    )
    yield _columns(
        "ranks-as-wide-as-the-model",
        "a rank begins behind as many heads for each rank before it as the model has",
        "O22",
        lambda inputs, features: (
            features[:1] + torch.arange(features.shape[0]).view(-1, 1, 1) * features.numel()
        ),
    )
    yield _columns(
        "ranks-interleaved",
        "heads are dealt out to ranks in turn, not in blocks",
        "O22",
        lambda inputs, features: (
            features.flatten(0, 1).view(features.shape[1], features.shape[0], -1).transpose(0, 1)
        ),
    )
    yield _columns(
        "halves-exchanged",
        "a head's block is taken to hold values before keys",
        "L40",
        lambda inputs, features: features.roll(_nope(inputs), 2),
    )
    yield _columns(
        "keys-for-values",
        "values are read from where keys begin",
        "L40",
        lambda inputs, features: torch.cat(
            [features[..., : _nope(inputs)], features[..., : features.shape[2] - _nope(inputs)]], dim=2
        ),
    )
    yield _columns(
        "keys-as-wide-as-values",
        "values are looked for behind keys as wide as they are",
        "L38, L40",
        lambda inputs, features: torch.cat(
            [features[..., : _nope(inputs)], features[..., _nope(inputs) :] + _wider(inputs, features)], dim=2
        ),
    )
    yield _columns(
        "keys-behind-values",
        "keys are read from where they would be behind the values",
        "L40",
        lambda inputs, features: torch.cat(
            [
                features[..., :1] + features.shape[2] - _nope(inputs) + torch.arange(_nope(inputs)),
                features[..., _nope(inputs) :],
            ],
            dim=2,
        ),
    )
    yield _columns(
        "all-keys-before-all-values",
        "the checkpoint is read as the keys of all heads before the values of all heads",
        "L40",
        _all_keys_first,
    )
    yield _columns(
        "all-keys-before-all-values",
        "the checkpoint is read as the keys of all heads before the values of all heads",
        "L40",
        lambda inputs, features: (
            torch.arange(features.shape[0] * features.shape[1]).view(*features.shape[:2], 1) * _nope(inputs)
            + torch.arange(features.shape[2])
        ),
        "the values right behind a head's keys",
    )
    yield _columns(
        "heads-as-wide-as-keys",
        "heads are taken to begin as far apart as if values were as wide as keys",
        "L38, L40",
        lambda inputs, features: (
            torch.arange(features.shape[0] * features.shape[1]).view(*features.shape[:2], 1)
            * 2
            * _nope(inputs)
            + torch.arange(features.shape[2])
        ),
    )
    yield _columns(
        "features-dealt-to-heads",
        "features are dealt out to heads in turn, not in blocks",
        "L40",
        lambda inputs, features: features.flatten().view(features.shape[2], -1).T.reshape(features.shape),
    )


def _copied(
    name: str, summary: str, source: str, change: Callable[[Tensor], Tensor], halves: str, form: str
) -> Fault:
    """The fault of copies that are not: of one half of both layouts."""

    def apply(question: Question) -> Answers:
        answers = dict(question.truth)
        for layout in LAYOUTS:
            for half in halves:
                output = f"{half}_b_proj_weight_{layout}"
                right = answers[output]
                if isinstance(right, Tensor):
                    answers[output] = change(right)
        return answers

    return Fault(name, SPLIT, summary, source, apply, form)


def _of_the_other_layout(question: Question, layout: str, *, by_its_stride: bool) -> Answers:
    """One layout's halves taken out of its memory as if that were the other's."""
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    weight = _turned(tensor(question.inputs, f"kv_b_proj_{layout}"), by_its_stride=by_its_stride)
    made = question.with_inputs(**{f"kv_b_proj_{other}": weight})
    halves = ("k_b_proj_weight", "v_b_proj_weight")
    return {**question.truth, **{f"{half}_{layout}": made[f"{half}_{other}"] for half in halves}}


def _turned(weight: Tensor, *, by_its_stride: bool) -> Tensor:
    """A checkpoint's memory taken for the other layout's: rows follow one another, or keep their distance.

    Raises:
        IndexError: rows that keep their distance leave the checkpoint.
    """
    if not by_its_stride:
        return weight.reshape(weight.shape[::-1])
    (rows, columns), step = weight.shape, weight.stride(0)
    if (columns - 1) * step + rows > (rows - 1) * step + columns:
        raise IndexError("features outside of the checkpoint")
    return weight.as_strided((columns, rows), (step, 1))


STRIDES = (("", False), (", rows as far apart as its own", True))
"""Forms of a layout that is ignored."""


def _copies() -> Iterator[Fault]:
    for layout in LAYOUTS:
        for form, by_its_stride in STRIDES:
            yield Fault(
                "layout-ignored",
                SPLIT,
                "a checkpoint is read as the other layout's",
                "L40",
                lambda question, layout=layout, by_its_stride=by_its_stride: _of_the_other_layout(
                    question, layout, by_its_stride=by_its_stride
                ),
                f"{layout}'s as the other{form}",
            )
    for halves, word in (("k", "keys"), ("v", "values"), ("kv", "both")):
        for dtype in (torch.float16, torch.bfloat16):
            yield _copied(
                "through-another-dtype",
                "numbers pass through another dtype on their way",
                "D7",
                lambda right, dtype=dtype: right.to(dtype).to(right.dtype),
                halves,
                f"{word} through {_word(dtype)}",
            )
        yield _copied(
            "transposed",
            "a half is laid out the other way round in memory of the right shape",
            "O22",
            lambda right: right.mT.reshape(right.shape),
            halves,
            word,
        )

    yield _copied(
        "never-loaded",
        "parameters stay as they were made, 0",
        "B40",
        torch.zeros_like,
        "kv",
        "",
    )
    yield from read_as_dense("kv_b_split", ("kv_b_proj_paddle", "kv_b_proj_torch"))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- tiles ---------------------------------------------------------------------------------------

AXES = {"heads": (1, 1), "features": (2, 3), "latent columns": (3, 2)}
"""Axes of the two halves, of keys and of values."""


def _tiles() -> Iterator[Fault]:
    sizes: dict[str, tuple[Sequence[int], Sequence[int]]] = {
        "heads": ((1, 2, 4, 8), (1,)),
        "features": ((64, 128, 256), (64, 128)),
        "latent columns": ((64, 128, 256, 512), (64, 128)),
    }
    for what, (bounds, tiles) in sizes.items():
        for halves, word in (("k", " of keys"), ("v", " of values"), ("kv", "")):
            for bound in bounds:
                yield _unwritten_behind(
                    what, halves, lambda size, bound=bound: bound, f"{what}{word} behind {bound}"
                )
            for tile in tiles:
                yield _unwritten_behind(
                    what,
                    halves,
                    lambda size, tile=tile: max(size - 1, 0) // tile * tile,
                    f"the last tile of {tile} {what}{word}",
                )


def _too_wide(size: int, tile: int) -> None:
    """Nothing. Raises IndexError where tiles do not end with what they are of."""
    if size % tile:
        raise IndexError("a tile behind the last feature")


def _unwritten_behind(what: str, halves: str, written_of: Callable[[int], int], form: str) -> Fault:
    """The fault of an axis whose entries behind the first are never written: size -> how many are."""

    def apply(question: Question) -> Answers | None:
        answers: dict[str, object] = dict(question.truth)
        is_made = False
        for layout in LAYOUTS:
            for half in halves:
                output = f"{half}_b_proj_weight_{layout}"
                right, axis = tensor(dict(question.truth), output), AXES[what][half == "v"]  # type: ignore[arg-type]
                size = right.shape[axis]
                written = torch.arange(size, device=right.device) < written_of(size)
                is_made = is_made or not bool(written.all())
                shape = [size if number_of == axis else 1 for number_of in range(right.dim())]
                answers[output] = Unwritten(right, written.view(shape).expand_as(right))
        return answers if is_made else None  # type: ignore[return-value]

    return Fault(
        "last-tiles-unwritten", SPLIT, "the last tiles of an axis are never written", "D3, D6", apply, form
    )


# ---- queries, keys, values and gates -------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """What a rank of a projection of q, k, v and gates is cut by.

    Attributes:
        rank, ranks: of how many. heads: query heads of a rank. kv_heads: of the layer, on all ranks.
        keys, values: widths of a head.
    """

    rank: int
    ranks: int
    heads: int
    kv_heads: int
    keys: int
    values: int

    @property
    def own(self) -> int:
        """KV heads of the rank."""
        return max(1, self.kv_heads // self.ranks)

    @property
    def first(self) -> int:
        """The first of them: where there are fewer than ranks, neighbours have the same."""
        return self.rank * self.kv_heads // self.ranks

    @property
    def begins(self) -> tuple[int, int, int]:
        """Where keys, values and gates begin in the checkpoint."""
        keys = self.ranks * self.heads * self.keys
        values = keys + self.kv_heads * self.keys
        return keys, values, values + self.kv_heads * self.values

    def parts(self) -> Parts:
        """Of q, k, v and gate: the first feature in the checkpoint, and how many."""
        keys, values, gates = self.begins
        return (
            (self.rank * self.heads * self.keys, self.heads * self.keys),
            (keys + self.first * self.keys, self.own * self.keys),
            (values + self.first * self.values, self.own * self.values),
            (gates + self.rank * self.heads * self.values, self.heads * self.values),
        )


Parts = tuple[tuple[int, int], ...]

QKV = ("qkv_split",)
FILLS = (("", False), ("as many as the projection has", True))
"""Forms of parts that are not as wide as they should be."""


def _heads(inputs: Inputs, rank: int) -> _Heads:
    names = ("tensor_parallel_size", "num_attention_heads", "total_num_key_value_heads", "qk_head_dim")
    ranks, heads, kv_heads, keys = (int(number(inputs, name)) for name in names)
    return _Heads(rank, ranks, heads, kv_heads, keys, int(number(inputs, "v_head_dim")))


def _joined(parts: Parts, width: int, *, fills: bool) -> Tensor:
    """Features of the checkpoint, part behind part.

    Args:
        fills: whether there are as many as the projection has: cut off at its end, or the last part goes on.
    """
    if not fills:
        return torch.cat([torch.arange(first, first + size) for first, size in parts])
    features = torch.arange(width)
    joined, target = features, 0
    for first, size in parts:
        joined = torch.where(features >= target, features - target + first, joined)
        target += size
    return joined


def _cut(question: Question, parts_of: Callable[[_Heads], Parts], *, fills: bool = False) -> Answers:
    """Every rank's parts one after another, as wide as the projection is; what is told of them, too.

    Args:
        fills: whether each feature of the projection is looked for in the part that it lies in.

    Raises:
        IndexError: a part leaves the checkpoint, or all of them the projection.
    """
    answers = dict(question.truth)
    offsets = tensor(answers, "qkv_offsets")  # type: ignore[arg-type]
    weight = tensor(question.inputs, "qkvg_proj_paddle")
    ranks = range(len(offsets))
    parts = [parts_of(_heads(question.inputs, rank)) for rank in ranks]
    for count, name in ((3, "qkv"), (4, "qkvg")):
        width = tensor(answers, f"{name}_proj_weight_paddle").shape[2]  # type: ignore[arg-type]
        taken = [_joined(own if fills else own[:count], width, fills=fills) for own in parts]
        for layout in LAYOUTS:
            output = f"{name}_proj_weight_{layout}"
            right = tensor(answers, output)  # type: ignore[arg-type]
            if any(len(columns) > width or int(columns.max()) >= weight.shape[1] for columns in taken):
                raise IndexError("features outside of the checkpoint or of the projection")
            made = [
                torch.cat([weight[:, own], right[rank, :, len(own) :]], 1) for rank, own in enumerate(taken)
            ]
            written = torch.stack([torch.arange(width) < len(own) for own in taken])
            answers[output] = Unwritten(torch.stack(made), written.unsqueeze(1).expand_as(right))  # type: ignore[assignment]
    rows = []
    for own in parts:
        targets = [sum(size for _, size in own[:number_of]) for number_of in range(4)]
        rows.append([(first, at, size) for (first, size), at in zip(own, targets, strict=True)])
    answers["qkv_offsets"] = torch.tensor(rows, dtype=offsets.dtype, device=offsets.device)
    return answers


def _with_kv_heads(heads: _Heads, kv_heads: int) -> Parts:
    return replace(heads, kv_heads=kv_heads).parts()


def _exchanged_parts(heads: _Heads) -> Parts:
    queries, keys, values, gates = heads.parts()
    return queries, (values[0], keys[1]), (keys[0], values[1]), gates


def _moved(heads: _Heads, part: int, first: int) -> Parts:
    """The parts with another first feature of one."""
    return tuple(
        (first, size) if number_of == part else (begin, size)
        for number_of, (begin, size) in enumerate(heads.parts())
    )


def _projections() -> Iterator[Fault]:
    cuts: list[tuple[str, str, str, Callable[[_Heads], Parts], str]] = [
        *(
            (
                "kv-heads-of-another-layer",
                "the layer is taken to have another number of KV heads, the model's",
                "B63",
                lambda heads, count=count: _with_kv_heads(heads, count),
                f"{count}",
            )
            for count in (1, 2, 4, 8)
        ),
        (
            "replica-of-the-wrong-rank",
            "copies of KV heads are dealt out to ranks in turn, not in blocks",
            "B65a",
            lambda heads: _of_kv_head(heads, heads.rank * heads.own % heads.kv_heads),
            "",
        ),
        (
            "replicas-of-the-first-head",
            "where KV heads are copied every rank has the first",
            "B65a",
            lambda heads: _of_kv_head(heads, heads.rank * (heads.kv_heads // heads.ranks)),
            "",
        ),
        (
            "rank-ignored",
            "every rank has the first rank's heads",
            "B63",
            lambda heads: replace(heads, rank=0).parts(),
            "",
        ),
        (
            "kv-heads-not-divided",
            "every rank takes as many KV heads as all ranks have together",
            "B63",
            lambda heads: _of_kv_heads(heads, heads.kv_heads),
            "",
        ),
        (
            "no-kv-head-left",
            "fewer KV heads than ranks leave none for a rank",
            "B65a",
            lambda heads: _of_kv_heads(heads, heads.kv_heads // heads.ranks),
            "",
        ),
        (
            "values-as-wide-as-keys",
            "a rank's first value is found by the width of keys",
            "B65a",
            lambda heads: _moved(heads, 2, heads.begins[1] + heads.first * heads.keys),
            "where they begin",
        ),
        (
            "values-as-wide-as-keys",
            "a rank's first value is found by the width of keys",
            "B65a",
            lambda heads: _moved(
                heads,
                2,
                heads.begins[1]
                + heads.first * (heads.keys if heads.kv_heads < heads.ranks else heads.values),
            ),
            "where they begin, of copies",
        ),
        (
            "values-as-wide-as-keys",
            "a rank's slice of the values is as wide as that of keys",
            "B49, B65c",
            lambda heads: tuple(
                (first, heads.own * heads.keys if part == 2 else size)
                for part, (first, size) in enumerate(heads.parts())
            ),
            "how many",
        ),
        (
            "keys-as-wide-as-values",
            "values are looked for behind keys as wide as they are",
            "B65c",
            lambda heads: _moved(
                heads,
                2,
                heads.begins[0] + heads.kv_heads * heads.values + heads.first * heads.values,
            ),
            "gates apart",
        ),
        (
            "keys-as-wide-as-values",
            "values are looked for behind keys as wide as they are",
            "B65c",
            _behind_narrow_keys,
            "",
        ),
        (
            "gates-behind-wide-values",
            "gates are looked for behind values as wide as keys",
            "B65b",
            lambda heads: _moved(
                heads,
                3,
                heads.begins[1] + heads.kv_heads * heads.keys + heads.rank * heads.heads * heads.values,
            ),
            "",
        ),
        (
            "gates-as-wide-as-keys",
            "a rank's gates are sliced as its queries are, by the width of keys",
            "B65b",
            lambda heads: _moved(heads, 3, heads.begins[2] + heads.rank * heads.heads * heads.keys),
            "",
        ),
        (
            "values-before-keys",
            "the projection is taken to hold values before keys",
            "P7",
            _exchanged_parts,
            "",
        ),
        (
            "values-before-keys",
            "the projection is taken to hold values before keys",
            "P7",
            lambda heads: (heads.parts()[0], heads.parts()[2], heads.parts()[1], heads.parts()[3]),
            "each as wide as it is",
        ),
        (
            "ranks-dealt-heads",
            "a rank's queries begin one head behind the rank before's",
            "P7",
            lambda heads: _moved(heads, 0, heads.rank * heads.keys),
            "",
        ),
    ]
    for name, summary, source, parts_of, form in cuts:
        for word, fills in FILLS:
            yield Fault(
                name,
                QKV,
                summary,
                source,
                lambda question, parts_of=parts_of, fills=fills: _cut(question, parts_of, fills=fills),
                ", ".join(part for part in (form, word) if part),
            )
    for word, fills in FILLS:
        yield Fault(
            "heads-of-the-first-layer",
            QKV,
            "the KV heads of the layer that is loaded first are kept for all",
            "B63",
            lambda question, fills=fills: _of_the_first_layer(question, fills=fills),
            word,
        )


def _whole_projections() -> Iterator[Fault]:
    """Of all parts alike."""
    for layout in LAYOUTS:
        for form, by_its_stride in STRIDES:
            yield Fault(
                "layout-ignored",
                QKV,
                "a checkpoint is read as the other layout's",
                "L40",
                lambda question, layout=layout, by_its_stride=by_its_stride: _other_layout(
                    question, layout, by_its_stride=by_its_stride
                ),
                f"{layout}'s as the other{form}",
            )
    for layouts in (LAYOUTS, LAYOUTS[:1], LAYOUTS[1:]):
        of_layout = f", {layouts[0]}'s alone" if len(layouts) == 1 else ""
        for size in (16, 32, 64, 128):
            yield Fault(
                "launch-rounded-down",
                QKV,
                "the last features, which fill no tile of their own, are never written",
                "D6",
                lambda question, size=size, layouts=layouts: _features_unwritten(question, size, layouts),
                f"tiles of {size}{of_layout}",
            )
        for size in (1024, 2048, 4096, 8192):
            yield Fault(
                "launch-rounded-down",
                QKV,
                "the last numbers, which fill no program of their own, are never written",
                "D6",
                lambda question, size=size, layouts=layouts: _numbers_unwritten(question, size, layouts),
                f"programs of {size} numbers{of_layout}",
            )
        passes: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            (f"through {_word(dtype)}", lambda right, dtype=dtype: right.to(dtype).to(right.dtype))
            for dtype in (torch.float16, torch.bfloat16)
        ]
        for form, change in (*passes, ("which has no subnormal numbers", _without_subnormals)):
            yield Fault(
                "through-another-dtype",
                QKV,
                "weights pass through another dtype on their way",
                "D7",
                lambda question, change=change, layouts=layouts: _weights_changed(question, change, layouts),
                f"{form}{of_layout}",
            )


def _projection_tiles() -> Iterator[Fault]:
    for size in (2, 4, 8, 16, 32, 64, 128):
        for layouts in (LAYOUTS, LAYOUTS[:1], LAYOUTS[1:]):
            yield Fault(
                "part-of-the-tile",
                QKV,
                "features that are moved together come from the part that the first of them is in",
                "P7",
                lambda question, size=size, layouts=layouts: _parts_of_tiles(question, size, layouts),
                f"{size} at a time" + (f", {layouts[0]}'s alone" if len(layouts) == 1 else ""),
            )
    for size in (16, 32, 64, 128):
        yield Fault(
            "tile-stored-whole",
            QKV,
            "a tile of features that is not full is stored whole, behind the last input's too",
            "D6",
            lambda question, size=size: _too_wide(
                tensor(dict(question.truth), "qkv_proj_weight_paddle").shape[2],
                size,
            ),
            f"tiles of {size}",
        )
    yield Fault(
        "places-of-the-checkpoint",
        QKV,
        "what is told of a part's place in the projection is its place in the checkpoint",
        "P7",
        lambda question: {
            **question.truth,
            "qkv_offsets": tensor(dict(question.truth), "qkv_offsets")[..., [0, 0, 2]],  # type: ignore[arg-type]
        },
    )
    yield from read_as_dense("qkv_split", ("qkvg_proj_paddle", "qkvg_proj_torch"))


def _of_kv_head(heads: _Heads, first: int) -> Parts:
    """The parts of a rank whose KV heads begin elsewhere."""
    keys, values, _ = heads.begins
    queries, _keys, _values, gates = heads.parts()
    return (
        queries,
        (keys + first * heads.keys, heads.own * heads.keys),
        (values + first * heads.values, heads.own * heads.values),
        gates,
    )


def _of_kv_heads(heads: _Heads, count: int) -> Parts:
    """The parts of a rank that has another number of KV heads of its own."""
    queries, keys, values, gates = heads.parts()
    return queries, (keys[0], count * heads.keys), (values[0], count * heads.values), gates


def _behind_narrow_keys(heads: _Heads) -> Parts:
    """Values and gates that begin as much earlier as keys would be narrower."""
    queries, keys, values, gates = heads.parts()
    early = heads.kv_heads * (heads.keys - heads.values)
    return queries, keys, (values[0] - early, values[1]), (gates[0] - early, gates[1])


def _of_the_first_layer(question: Question, *, fills: bool) -> Answers | None:
    if not question.first:
        return None
    first = int(number(question.first, "total_num_key_value_heads"))
    return _cut(question, lambda heads: _with_kv_heads(heads, first), fills=fills)


def _other_layout(question: Question, layout: str, *, by_its_stride: bool) -> Answers:
    """One layout's weights taken out of its memory as if that were the other's."""
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    weight = _turned(tensor(question.inputs, f"qkvg_proj_{layout}"), by_its_stride=by_its_stride)
    made = question.with_inputs(**{f"qkvg_proj_{other}": weight})
    names = ("qkv_proj_weight", "qkvg_proj_weight")
    return {**question.truth, **{f"{name}_{layout}": made[f"{name}_{other}"] for name in names}}


def _projected(question: Question, layouts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and right contents of the ranks' projections, [TP, inputs, features]."""
    for layout in layouts:
        for name in ("qkv", "qkvg"):
            output = f"{name}_proj_weight_{layout}"
            yield output, tensor(dict(question.truth), output)  # type: ignore[arg-type]


def _features_unwritten(question: Question, size: int, layouts: Sequence[str]) -> Answers | None:
    if all(values.shape[2] % size == 0 for _, values in _projected(question, layouts)):
        return None
    answers: dict[str, object] = dict(question.truth)
    for name, values in _projected(question, layouts):
        width = values.shape[2]
        written = torch.arange(width) < max(size, width // size * size)
        answers[name] = Unwritten(values, written.expand_as(values))
    return answers  # type: ignore[return-value]


def _numbers_unwritten(question: Question, size: int, layouts: Sequence[str]) -> Answers | None:
    """A rank's projection number by number, the last ones as they were."""
    if all(values[0].numel() % size == 0 for _, values in _projected(question, layouts)):
        return None
    answers: dict[str, object] = dict(question.truth)
    for name, values in _projected(question, layouts):
        count = values[0].numel()
        written = torch.arange(count) < max(size, count // size * size)
        answers[name] = Unwritten(values, written.view(values.shape[1:]).expand_as(values))
    return answers  # type: ignore[return-value]


def _weights_changed(
    question: Question, change: Callable[[Tensor], Tensor], layouts: Sequence[str]
) -> Answers:
    return {**question.truth, **{name: change(right) for name, right in _projected(question, layouts)}}


def _without_subnormals(weights: Tensor) -> Tensor:
    """0 of its sign in the place of every number below the dtype's smallest normal one."""
    is_subnormal = weights.abs() < torch.finfo(weights.dtype).smallest_normal
    return torch.where(is_subnormal, torch.zeros_like(weights).copysign(weights), weights)


def _parts_of_tiles(question: Question, size: int, layouts: Sequence[str]) -> Answers | None:
    """Projections whose features come from the part of the first of their tile, from its own tile on."""
    answers = dict(question.truth)
    is_made = False
    for name, right in _projected(question, layouts):
        weight, width = tensor(question.inputs, "qkvg_proj_paddle"), right.shape[2]
        if width % size or weight.shape[1] % size:
            continue
        ranks = []
        for rank in range(len(right)):
            sources = _joined(_heads(question.inputs, rank).parts(), width, fills=True)
            firsts = sources[::size] // size * size
            taken = (firsts.unsqueeze(1) + torch.arange(size)).flatten()
            is_made = is_made or not torch.equal(taken, sources)
            ranks.append(weight[:, taken])
        answers[name] = torch.stack(ranks)
    return answers if is_made else None


FAULTS = (*_features(), *_copies(), *_tiles(), *_projections(), *_whole_projections(), *_projection_tiles())
