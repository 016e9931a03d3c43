"""The tiles of one layer's launch and the room that their lists need: FastDeploy's O05 beside MLA, and P7.

A layer whose query heads read KV heads in groups of g = H / G works on query rows: a token has g of them a KV
head. With cached = seq_lens_decoder[b] and new = seq_lens_this_time[b], row b of the step has

    | list    | of rows                      | tiles of row b                    | room                   |
    |---------|------------------------------|-----------------------------------|------------------------|
    | encoder | with seq_lens_encoder > 0    | ceil(new g / 64)                  | B ceil(M g / 64)       |
    | decoder | with new > 0, not the former | ceil(new g / 16)                  | B ceil(M g / 16)       |
    | kv      | with new > 0                 | ceil((cached + new) / block_size) | B ceil(M / block_size) |

of 64 or 16 query rows or one block of keys each. B is the number of slots and M the most tokens that a row
can have, here what its block table holds: max_blocks * block_size. Entry n of a list is (batch_ids[n],
tile_ids[n]): a slot and a number within the row, rows in the order of the slots, -1 from the list's number
of tiles on. `num_tiles` has these numbers, `capacity` the rooms: encoder, decoder, kv.

g is the layer's own. Room made once for a stack must cover every layer: it follows from the smallest number
of KV heads, the largest group, and not from the largest number. With 24 heads and 8 KV heads in one layer,
4 in the next, M = 4096 and one slot, room for groups of 3 is 192 tiles, and a prompt of 2,100 tokens takes
197 in the second layer (B64). `harness/conformance/launch_buffers.py` asks that of an engine's own plan.

FastDeploy's decoder lists have 1,024 times the room that a step's tokens need; these have what they need.
"""

from cases.case import Case
from cases.contract import Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import SEQ_LENS_DECODER, SEQ_LENS_ENCODER, SEQ_LENS_THIS_TIME

ENCODER_TILE, DECODER_TILE = 64, 16
"""Query rows a tile."""

LISTS = ("encoder", "decoder", "kv")


def work(case: Case, layer: Layer) -> Work:
    """Three lengths of every slot read; the lists depend on the plan and are left out."""
    slots = sum(row.is_slot for row in case.steps[0])
    return Work(bytes=12 * slots, flops=0)


def _lists() -> tuple[TensorSpec, ...]:
    numbers = {"batch_ids": "slot of each tile", "tile_ids": "number of each tile within its row"}
    return tuple(
        TensorSpec(f"{name}_{kind}", (f"{name}_tiles",), "int32", doc, judge=Judge.EXACT, when_empty="-1")
        for name in LISTS
        for kind, doc in numbers.items()
    )


OPERATOR = Operator(
    name="launch_buffers",
    summary="tiles of a layer's query rows and keys, and the room that their lists need whatever the lengths",
    source="FastDeploy O05, its branch without MLA, and allocate_launch_related_buffer; P7, B64",
    inputs=(
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
    ),
    outputs=(
        *_lists(),
        TensorSpec("num_tiles", ("tile_lists",), "int32", "entries of each list in use", judge=Judge.EXACT),
        TensorSpec("capacity", ("tile_lists",), "int32", "room of each list", judge=Judge.EXACT),
    ),
    attributes=("num_attention_heads", "num_key_value_heads", "block_size", "max_row_tokens"),
    options=("model", "heads", "kv_heads", "layers", "block", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "idle": "the outputs name slots, and an idle slot has room of its own",
        "permute": "the outputs name slots, in their order",
        "pages": "no block table is read",
        "poison": "neither a cache nor a block table is read",
    },
)
