"""Maxima of the step's lengths and the tile list of its decode rows: FastDeploy's O05, MLA branch.

`max_lens` holds, 0 where no slot qualifies:

    | i   | largest          | over slots with                                  |
    |-----|------------------|--------------------------------------------------|
    | 0   | this_time        | any                                              |
    | 1   | encoder          | any                                              |
    | 2   | decoder          | any: prefix hits and paused rows too             |
    | 3   | decoder + this   | this_time > 0                                    |
    | 4   | decoder          | encoder = 0 and this_time > 0                    |
    | 5   | decoder + this   | this_time > 0 and decoder > 0                    |
    | 6-8 | 0                |                                                  |

Decode rows are those with encoder = 0 and this_time > 0; they have decoder + this_time keys. Their keys
are cut into tiles of `decoder_chunk_size` tokens: 64 if the step has one slot, else the candidate
block_size * 2^i, i = 0..11, for which the number of tiles modulo the multiprocessors is largest, the
larger candidate on a tie. Every decode row b, in the order of the slots, has tiles
0..ceil((decoder + this) / chunk) - 1: entry n of the list is (decoder_batch_ids[n], decoder_tile_ids[n]),
entries from `decoder_num_tiles` on are -1.

The lists have room for `plan_tiles` entries, known from shapes alone: slots * max_blocks, for a tile is at
least a block; with one slot ceil(max_blocks * block_size / 64).
"""

from cases.case import Case
from cases.contract import Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import SEQ_LENS_DECODER, SEQ_LENS_ENCODER, SEQ_LENS_THIS_TIME


def work(case: Case, layer: Layer) -> Work:
    """Three lengths of every slot read; the lists depend on the plan and are left out."""
    slots = sum(row.is_slot for row in case.steps[0])
    return Work(bytes=12 * slots, flops=0)


def _tile_list(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, ("plan_tiles",), "int32", doc, judge=Judge.EXACT, when_empty="-1")


OPERATOR = Operator(
    name="step_plan",
    summary="maxima of the step's lengths and the tiles that its decode rows' keys are cut into",
    source="FastDeploy O05, MLA branch; max_len_tensor_cpu, here on the device",
    inputs=(
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
    ),
    outputs=(
        TensorSpec(
            "max_lens",
            ("maxima",),
            "int32",
            "largest lengths of the step, in the order of FastDeploy's max_len_tensor_cpu",
            judge=Judge.EXACT,
            when_empty="0",
        ),
        _tile_list("decoder_batch_ids", "slot of each tile"),
        _tile_list("decoder_tile_ids", "number of each tile within its row"),
        TensorSpec("decoder_num_tiles", ("one",), "int32", "entries of the list in use", judge=Judge.EXACT),
        TensorSpec("decoder_chunk_size", ("one",), "int32", "tokens a tile", judge=Judge.EXACT),
    ),
    attributes=("block_size", "multiprocessors", "plan_tiles"),
    options=("layers", "block"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "idle": "the outputs name slots, and a slot alone is cut otherwise than one beside an idle slot",
        "permute": "the outputs name slots, in their order",
        "pages": "no block table is read",
        "poison": "neither a cache nor a block table is read",
    },
)
