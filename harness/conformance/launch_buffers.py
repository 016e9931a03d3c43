"""Room for the tile lists of a stack of layers, made once before any length is known: P7, B64.

An engine allocates the lists of its attention kernels once for all layers and steps. Layers differ in KV
heads, so that a token has more query rows in one than in the next: the room must cover each of them, for any
rows that the slots may hold. How many tiles a step really has is counted by operator `launch_buffers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cases.operators.launch_buffers import LISTS
from harness.conformance.facts import Fact
from references.oracle import oracle_for


@dataclass(frozen=True)
class Stack:
    """A stack of layers on one rank, and one step that its lists must hold.

    Attributes:
        heads, kv_heads, block_sizes: of each layer, query heads, KV heads and tokens a cache block.
        slots: the most rows of a step. max_row_tokens: the most tokens of a row, cached and new.
        rows: (new prefill tokens, cached tokens, new tokens) of each row of the step, one a slot.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    block_sizes: tuple[int, ...]
    slots: int
    max_row_tokens: int
    rows: tuple[tuple[int, int, int], ...]

    def __str__(self) -> str:
        return (
            f"heads {list(self.heads)}, KV heads {list(self.kv_heads)}, blocks of {list(self.block_sizes)}, "
            f"{self.slots} slots of up to {self.max_row_tokens:,} tokens, rows {list(self.rows)}"
        )

    def tiles(self, layer: int) -> dict[str, int]:
        """How many entries each list has in one layer's launch."""
        lengths = torch.tensor(self.rows, dtype=torch.int32).view(-1, 3).unbind(1)
        names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
        counted = oracle_for("launch_buffers", "derivation").run(
            {
                **dict(zip(names, lengths, strict=True)),
                "num_attention_heads": self.heads[layer],
                "num_key_value_heads": self.kv_heads[layer],
                "block_size": self.block_sizes[layer],
                "max_row_tokens": self.max_row_tokens,
            },
            None,
        )["num_tiles"]
        if not isinstance(counted, Tensor):
            raise TypeError("the oracle of launch_buffers must return num_tiles as a tensor")
        return dict(zip(LISTS, counted.tolist(), strict=True))


class LaunchBuffers(Protocol):
    """An engine's plan of its tile lists, made from shapes."""

    def __call__(self, stack: Stack) -> Mapping[str, int]:
        """Room, in tiles, of the lists `encoder`, `decoder` and `kv`; the stack's rows are not known yet."""
        ...


# The prompt of P7: 192 tiles are room for groups of 3, and the second layer, in groups of 6, takes 197.
OVERFLOWING = Stack((24, 24), (8, 4), (64, 64), 1, 4096, ((2100, 0, 2100),))
STACKS = (
    OVERFLOWING,
    # The fewest KV heads in the first layer, in the middle, and other query heads too.
    Stack((24, 24), (4, 8), (64, 64), 1, 4096, ((2100, 0, 2100),)),
    Stack((24, 24, 24), (8, 2, 4), (16, 32, 64), 2, 512, ((512, 0, 512), (0, 400, 1))),
    Stack((64, 16), (8, 8), (64, 64), 3, 130, ((130, 0, 130), (0, 120, 5), (2, 128, 2))),
)
FULL = (
    # Every slot as full as it can be, as new tokens of a prefill, and as a draft.
    Stack((24, 24), (8, 4), (64, 16), 3, 100, ((100, 0, 100),) * 3),
    Stack((24, 24), (8, 4), (16, 64), 3, 100, ((0, 91, 9), (0, 99, 1), (0, 95, 5))),
    Stack((5, 12), (1, 1), (1, 1), 2, 33, ((33, 0, 33), (0, 28, 5))),
)


def _every_layer_covered(subject: LaunchBuffers, stack: Stack) -> str | None:
    room = subject(stack)
    for layer in range(len(stack.heads)):
        for name, count in stack.tiles(layer).items():
            if count > room[name]:
                return f"layer {layer} writes {count:,} tiles into the {name} list: room for {room[name]:,}"
    return None


def _lengths_not_asked_for(subject: LaunchBuffers, stack: Stack) -> str | None:
    """Room is made before a step is known: it may not depend on the step's rows."""
    rows = ((0, 0, 0),) * len(stack.rows)
    other = Stack(stack.heads, stack.kv_heads, stack.block_sizes, stack.slots, stack.max_row_tokens, rows)
    room, again = dict(subject(stack)), dict(subject(other))
    return None if room == again else f"room for these rows is {room}, for idle ones {again}"


def _order_of_layers_irrelevant(subject: LaunchBuffers, stack: Stack) -> str | None:
    backward = Stack(
        stack.heads[::-1],
        stack.kv_heads[::-1],
        stack.block_sizes[::-1],
        stack.slots,
        stack.max_row_tokens,
        stack.rows,
    )
    room, again = dict(subject(stack)), dict(subject(backward))
    return None if room == again else f"room is {room}, and {again} with the layers in the other order"


FACTS: tuple[Fact[LaunchBuffers, Stack], ...] = (
    Fact("the_lists_cover_every_layer_of_a_stack", "B64, P7, L36", STACKS, _every_layer_covered),
    Fact("full_slots_are_covered", "O05, P7", FULL, _every_layer_covered),
    Fact("room_depends_on_shapes_alone", "O05", (*STACKS, *FULL), _lengths_not_asked_for),
    Fact("the_order_of_layers_changes_no_room", "B63, B64", STACKS, _order_of_layers_irrelevant),
)
