"""Rotary position embedding of the query's and the key's rope parts: FastDeploy's P1 before attention.

For every real token t at position p = position_ids[t], of the query's heads and of the key alike, with
[cos | sin] = cos_sin_cache[p] and i < D / 2:

    out[low]  = raw[low] cos[i] - raw[high] sin[i]
    out[high] = raw[high] cos[i] + raw[low] sin[i]

where pair i is (2i, 2i + 1), interleaved, if is_neox is 0 and (i, i + D / 2), half split, if it is 1. A model
that rotates nothing passes no table: its parts are copied, bit for bit. Padding tokens (batch id -1) are 0;
their positions are stale and say nothing.

Engines rotate in place. Here the outputs are tensors of their own: an oracle that is asked after the path
must still find what was rotated, and an element that is not written shows as poison, where in place it would
be taken for one that was copied.

The table is an input, in the model dtype, and right as stored: a path that keeps it wider takes the same
numbers. It ends right behind the last position of the step; rows of positions that no token has hold poison.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import BATCH_ID_PER_TOKEN


def work(case: Case, layer: Layer) -> Work:
    """Every real token's parts and row of the table read, every token's parts written, padding too."""
    tokens = sum(row.new for row in case.steps[0])
    real = sum(row.seq_lens_this_time for row in case.steps[0])
    part = layer.qk_rope_head_dim * ITEM_BYTES[layer.dtype]
    heads = layer.num_attention_heads + 1
    rotates = layer.model.rope != "none"
    moved = ((real + tokens) * heads + real * rotates) * part
    return Work(bytes=moved + 8 * tokens, flops=3 * real * heads * layer.qk_rope_head_dim * rotates)


_QUERY = ("tokens", "num_attention_heads", "qk_rope_head_dim")
_KEY = ("tokens", "qk_rope_head_dim")

OPERATOR = Operator(
    name="rope",
    summary="rotary position embedding of the query's and the key's rope parts at the tokens' positions",
    source="arXiv:2104.09864 section 3.4; FastDeploy P1, fused_rotary_position_encoding",
    inputs=(
        TensorSpec(
            "q_pe_raw",
            _QUERY,
            "model",
            "queries' rope parts before rotation, often a slice of wider queries; padding holds NaN",
            fill=Fill.RAW_QUERY,
            strided=True,
        ),
        TensorSpec(
            "k_pe_raw",
            _KEY,
            "model",
            "the rope part that all heads' keys share, before rotation; padding holds NaN",
            fill=Fill.RAW_KEY,
            strided=True,
        ),
        TensorSpec(
            "position_ids",
            ("tokens",),
            "int32",
            "absolute position of each token in its sequence; of padding, anything",
            fill=Fill.POSITIONS,
        ),
        BATCH_ID_PER_TOKEN,
        TensorSpec(
            "cos_sin_cache",
            ("table_positions", "qk_rope_head_dim"),
            "model",
            "[cos | sin] of the angles of every position; None where nothing is rotated",
            fill=Fill.ROPE_TABLE,
            strided=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "q_pe",
            _QUERY,
            "model",
            "queries' rotated parts",
            judge=Judge.ROTATION,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "k_pe",
            _KEY,
            "model",
            "the keys' rotated part",
            judge=Judge.ROTATION,
            strided=True,
            when_empty="0",
        ),
    ),
    attributes=("is_neox",),
    options=("model", "heads", "layers", "dtype", "data", "seed", "poison", "strided", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "pages": "the operator reads no cache: there are no blocks to move",
        "poison": "there is no block table: option poison fills the table's unused rows",
    },
)
