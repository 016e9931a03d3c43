"""Faults of splitting kv_b_proj: whose heads a rank has, which half is which, and which way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import changing
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


def _copies() -> Iterator[Fault]:
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


FAULTS = (*_features(), *_copies())
