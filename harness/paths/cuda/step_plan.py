"""Plan a step on the device: maxima of its lengths, and the tiles that decode rows' keys are cut into.

Inputs
    seq_lens_encoder    [B] int32      new prefill tokens; > 0 marks a prefill row
    seq_lens_decoder    [B] int32      tokens cached before the step
    seq_lens_this_time  [B] int32      tokens that the slot adds to the step
    block_size, multiprocessors        of the cache; of the GPU, or what plans shall be made for

Outputs
    max_lens            [9] int32      largest this_time, encoder, decoder; decoder + this_time of active
                                       slots; decoder of decode rows; decoder + this_time of active slots
                                       with a cache; three zeros
    decoder_batch_ids   [N] int32      slot of each tile
    decoder_tile_ids    [N] int32      its number within the row; both -1 from decoder_num_tiles on
    decoder_num_tiles   [1] int32
    decoder_chunk_size  [1] int32      tokens a tile

Workspace
    tile_starts         [B + 1] int32  tiles of the rows before each

A slot is active with this_time > 0, a decode row if besides encoder = 0. Tiles 0..ceil(keys / chunk) - 1 of
each decode row, keys = decoder + this_time, in the order of the slots. The chunk is 64 if B = 1, else the
block_size * 2^i, i = 0..11, with the most tiles modulo multiprocessors, on a tie the larger.

N must hold every tile: slots * max_blocks is enough, with one slot ceil(max_blocks * block_size / 64);
tiles past it would be lost. block_size * 2^11 must fit into int32. O(B) work in one block, O(log B) an
entry of the list. No host synchronisation; without a slot everything is still written.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors, Workspace

KERNELS = kernels_beside(__file__)


def supports(case: Case) -> str | None:
    """None, or why the kernels do not take a case."""
    for layer in case.layers:
        if layer.block_size << 11 >= 1 << 31:
            return f"block_size * 2^11 must fit into int32, got block_size {layer.block_size}"
    return None


def workspace(case: Case) -> Workspace:
    """Where each row's tiles begin."""
    slots = sum(row.is_slot for row in case.steps[0])
    return {"tile_starts": ((slots + 1,), "int32")}


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernels on the harness's tensors."""
    KERNELS.plan_step(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        outputs["max_lens"],
        outputs["decoder_batch_ids"],
        outputs["decoder_tile_ids"],
        outputs["decoder_num_tiles"],
        outputs["decoder_chunk_size"],
        workspace["tile_starts"],
        inputs["block_size"],
        inputs["multiprocessors"],
    )


PATHS = (
    KernelPath(
        name="cuda/step_plan",
        operator="step_plan",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        workspace=workspace,
        batch_invariant=True,
    ),
)
