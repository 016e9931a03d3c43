"""Faults of splitting weights: whose heads a rank has, which part is which, and which way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def _of_the_other_layout(question: Question, layout: str) -> Answers:
    """One layout's halves taken out of its memory as if that were the other's."""
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    weight = tensor(question.inputs, f"kv_b_proj_{layout}")
    made = question.with_inputs(**{f"kv_b_proj_{other}": weight.reshape(weight.shape[::-1])})
    halves = ("k_b_proj_weight", "v_b_proj_weight")
    return {**question.truth, **{f"{half}_{layout}": made[f"{half}_{other}"] for half in halves}}


def _copies() -> Iterator[Fault]:
    for layout in LAYOUTS:
        yield Fault(
            "layout-ignored",
            SPLIT,
            "a checkpoint is read as the other layout's",
            "L40",
            lambda question, layout=layout: _of_the_other_layout(question, layout),
            f"{layout}'s as the other",
        )
    for halves, word in (("k", "keys"), ("v", "values"), ("kv", "both")):
        yield _copied(
            "through-another-dtype",
            "numbers pass through float16 on their way",
            "D7",
            lambda right: right.to(torch.float16).to(right.dtype),
            halves,
            word,
        )
        yield _copied(
            "transposed",
            "a half is laid out the other way round in memory of the right shape",
            "O22",
            lambda right: right.mT.reshape(right.shape),
            halves,
            word,
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


def _heads(inputs: Inputs, rank: int) -> _Heads:
    names = ("tensor_parallel_size", "num_attention_heads", "total_num_key_value_heads", "qk_head_dim")
    ranks, heads, kv_heads, keys = (int(number(inputs, name)) for name in names)
    return _Heads(rank, ranks, heads, kv_heads, keys, int(number(inputs, "v_head_dim")))


def _cut(question: Question, parts_of: Callable[[_Heads], Parts]) -> Answers:
    """Every rank's parts one after another, as wide as the projection is; what is told of them, too.

    Raises:
        IndexError: a part leaves the checkpoint, or all of them the projection.
    """
    answers = dict(question.truth)
    offsets = tensor(answers, "qkv_offsets")  # type: ignore[arg-type]
    weight = tensor(question.inputs, "qkvg_proj_paddle")
    ranks = range(len(offsets))
    parts = [parts_of(_heads(question.inputs, rank)) for rank in ranks]
    for count, name in ((3, "qkv"), (4, "qkvg")):
        taken = [
            torch.cat([torch.arange(first, first + size) for first, size in own[:count]]) for own in parts
        ]
        for layout in LAYOUTS:
            output = f"{name}_proj_weight_{layout}"
            right = tensor(answers, output)  # type: ignore[arg-type]
            width = right.shape[2]
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
        yield Fault(
            name, QKV, summary, source, lambda question, parts_of=parts_of: _cut(question, parts_of), form
        )
    yield Fault(
        "heads-of-the-first-layer",
        QKV,
        "the KV heads of the layer that is loaded first are kept for all",
        "B63",
        _of_the_first_layer,
    )
    for form, (told, taken) in (("paddle", LAYOUTS), ("torch", LAYOUTS[::-1])):
        yield Fault(
            "layout-ignored",
            QKV,
            "a checkpoint is read as the other layout's",
            "L40",
            lambda question, told=told, taken=taken: _other_layout(question, told, taken),
            f"{form}'s as the other",
        )
    for size in (16, 32, 64, 128):
        yield Fault(
            "launch-rounded-down",
            QKV,
            "the last features, which fill no tile of their own, are never written",
            "D6",
            lambda question, size=size: _features_unwritten(question, size),
            f"tiles of {size}",
        )
    for dtype in (torch.float16, torch.bfloat16):
        yield Fault(
            "through-another-dtype",
            QKV,
            "weights pass through another dtype on their way",
            "D7",
            lambda question, dtype=dtype: {
                name: values
                if name == "qkv_offsets" or not isinstance(values, Tensor)
                else values.to(dtype).to(values.dtype)
                for name, values in question.truth.items()
            },
            f"through {str(dtype).removeprefix('torch.')}",
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


def _behind_narrow_keys(heads: _Heads) -> Parts:
    """Values and gates that begin as much earlier as keys would be narrower."""
    queries, keys, values, gates = heads.parts()
    early = heads.kv_heads * (heads.keys - heads.values)
    return queries, keys, (values[0] - early, values[1]), (gates[0] - early, gates[1])


def _of_the_first_layer(question: Question) -> Answers | None:
    if not question.first:
        return None
    first = int(number(question.first, "total_num_key_value_heads"))
    return _cut(question, lambda heads: _with_kv_heads(heads, first))


def _other_layout(question: Question, told: str, taken: str) -> Answers:
    """One layout's weights taken out of its memory as if that were the other's."""
    weight = tensor(question.inputs, f"qkvg_proj_{taken}")
    inputs = {"qkvg_proj_paddle": weight.reshape(weight.shape[::-1])}
    if told == "torch":
        inputs = {"qkvg_proj_torch": weight.reshape(weight.shape[::-1])}
    made = question.with_inputs(**inputs)
    return {
        **question.truth,
        **{f"{name}_proj_weight_{taken}": made[f"{name}_proj_weight_{told}"] for name in ("qkv", "qkvg")},
    }


def _features_unwritten(question: Question, size: int) -> Answers:
    answers: dict[str, object] = dict(question.truth)
    for name, values in question.truth.items():
        if name != "qkv_offsets" and isinstance(values, Tensor):
            width = values.shape[2]
            written = torch.arange(width) < max(size, width // size * size)
            answers[name] = Unwritten(values, written.expand_as(values))
    return answers  # type: ignore[return-value]


FAULTS = (*_features(), *_copies(), *_projections())
