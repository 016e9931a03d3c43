"""What a launch has of each token: how far it stands in its row, its blocks and its splits."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.launch import Launch
from harness.pattern import Boundaries, Place, pattern
from harness.verdict import ranges

PARTIAL = "partial_sum"
"""The workspace [tokens, heads, splits] by which a path says into how many splits it divides keys."""


def row_pattern(launch: Launch, index: int, failing: Tensor) -> str:
    """The rule that failing rows of a layer follow. failing: [tokens] or [tokens, heads] bool."""
    if len(failing) != launch.batch.metadata.tokens:
        return ""
    layer = launch.layers[index].batch.layer
    boundaries = Boundaries(layer.block_size, layer.window)
    return pattern(failing.cpu(), places(launch, index), boundaries)


def places(launch: Launch, index: int) -> list[Place]:
    """Where each token stands, padding last."""
    metadata, layer = launch.batch.metadata, launch.layers[index]
    used = used_splits(launch, index)
    splits = None if used is None else used.any(1).sum(-1).tolist()
    width = next((layer.batch.tensors[name].shape[-1] for name in _caches(launch)), 0)
    found = []
    for token, slot in enumerate(metadata.batch_id_per_token.tolist()):
        if slot < 0:
            found.append(Place(slot))
            continue
        blocks = blocks_of(launch, index, token)
        found.append(
            Place(
                slot,
                token - int(metadata.cu_seqlens_q[slot]),
                int(metadata.seq_lens_decoder[slot]),
                int(metadata.seq_lens_this_time[slot]),
                bool(metadata.seq_lens_encoder[slot] > 0),
                ((max(blocks) + 1) * layer.batch.layer.block_size * width - 1) if blocks else 0,
                0 if splits is None else splits[token],
            )
        )
    return found


def _caches(launch: Launch) -> list[str]:
    """Names of the caches that the operator finds rows of by itself."""
    names = {spec.name for spec in launch.operator.inputs}
    return [name for name in ("latent_cache", "packed_cache") if name in names and "indices" not in names]


def blocks_of(launch: Launch, index: int, token: int) -> list[int]:
    """Physical blocks that a token's row reads for it, or the one that it is written to."""
    metadata, layer = launch.batch.metadata, launch.layers[index].batch
    slot = int(metadata.batch_id_per_token[token])
    if slot < 0 or not _caches(launch):
        return []
    names = {spec.name for spec in launch.operator.inputs}
    last = int(metadata.position_ids[token]) // layer.layer.block_size
    reads = names & {"q", "q_nope"}
    blocks: list[int] = layer.pages.blocks[slot].tolist()
    return blocks[: last + 1] if reads else blocks[last : last + 1]


def failing_blocks(launch: Launch, index: int, failing: Tensor) -> str:
    """Blocks of failing tokens that no passing token has."""
    if len(failing) != launch.batch.metadata.tokens:
        return ""
    tokens = failing.reshape(len(failing), -1).any(1).tolist()
    has = {True: set[int](), False: set[int]()}
    for token, fails in enumerate(tokens):
        has[fails] |= set(blocks_of(launch, index, token))
    return ranges(has[True] - has[False])


def used_splits(launch: Launch, index: int) -> Tensor | None:
    """[tokens, heads, splits] bool: partial results that the path has written; None where it has none."""
    buffer = launch.layers[index].workspace.get(PARTIAL)
    if buffer is None or buffer.view.dim() != 3 or len(buffer.view) != launch.batch.metadata.tokens:
        return None
    return ~buffer.holds_poison().cpu()


def failing_splits(launch: Launch, index: int, failing: Tensor) -> str:
    """Splits of failing rows that no passing row has."""
    used = used_splits(launch, index)
    if used is None or failing.shape != used.shape[:2]:
        return ""
    failing = failing.cpu()
    alone = used[failing].any(0) & ~used[~failing].any(0)
    return ranges(torch.nonzero(alone).flatten().tolist())
