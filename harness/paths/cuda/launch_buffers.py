"""List the tiles of one layer's launch: of prefill rows' and decode rows' queries, and of all rows' keys.

Inputs
    seq_lens_encoder     [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder     [B] int32      tokens cached before the step
    seq_lens_this_time   [B] int32      tokens that the slot adds to the step
Outputs
    encoder_batch_ids    [N_e] int32    slot of each tile of 64 query rows of a prefill row
    decoder_batch_ids    [N_d] int32    slot of each tile of 16 query rows of another row
    kv_batch_ids         [N_k] int32    slot of each block of keys of a row with new tokens
    *_tile_ids           as their lists int32: number of the tile within its row; both -1 behind the last
    num_tiles, capacity  [3] int32      of encoder, decoder and kv: entries in use, and room
Workspace
    tile_starts          [3, B + 1] int32  tiles of the rows before each

A token has as many query rows as a KV head of the layer has query heads. O(B) work in one block a list,
O(log B) an entry, in two launches. No host synchronisation; without a slot, num_tiles and capacity are still
written.

Nothing is written behind the room of a list: where it is too small, num_tiles says more than capacity. How
long lists must be is a matter of shapes alone, `capacity` of harness/paths/triton/launch_buffers.py.
"""

from __future__ import annotations

from cases import Case
from cases.operators.launch_buffers import LISTS
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors, Workspace

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None: the kernels take every case."""
    return None


def workspace(case: Case) -> Workspace:
    """Prefix sums of the three lists' tiles."""
    slots = sum(row.is_slot for row in case.steps[0])
    return {"tile_starts": ((len(LISTS), slots + 1), "int32")}


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    KERNELS.list_tiles(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        *(outputs[f"{name}_{kind}"] for name in LISTS for kind in ("batch_ids", "tile_ids")),
        outputs["num_tiles"],
        outputs["capacity"],
        workspace["tile_starts"],
        inputs["num_attention_heads"],
        inputs["num_key_value_heads"],
        inputs["block_size"],
    )


PATHS = (
    KernelPath(
        name="cuda/launch_buffers",
        operator="launch_buffers",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
    ),
)
