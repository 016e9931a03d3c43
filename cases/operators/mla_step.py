"""One layer's attention over one step, every row kind at once: FastDeploy's P1 between the projections.

From what the projections give, rotated and normalised, to what o_proj takes. For every real token t of any
row b, at position p = seq_lens_decoder[b] + t - cu_seqlens_q[b], and head h, with c_j the latent and r_j the
rotated key part of b's token at position j, read from the cache where it is cached and from the inputs where
it is new:

    k_j = [w_uk[h] c_j | r_j]            v_j = w_uv[h]^T c_j
    s_j = softmax_scale * (q_nope[t, h] . (w_uk[h] c_j) + q_pe[t, h] . r_j)
    out = sum_j softmax(s)_j v_j            both over j <= p, and with a window over p - window < j <= p alone

Afterwards the cache row of position p holds [compressed_kv[t] | k_pe[t]], and no other byte has changed.
Padding tokens: out 0, nothing written. A step may compute a row from keys (unabsorbed) or from latents
(absorbed): in exact arithmetic they are the same.

Where the layer's cache is packed, a row holds what `packed_cache_write` makes of a token, byte for byte, and
c_j and r_j are what row j stands for, whether it was cached or is new: a token gets the same answer whatever
chunk its keys came in. A path that rounds dequantised latents to bf16 says so, as of `sparse_decode`, and is
judged by latents so rounded. A window counts the token itself, hides keys and frees none: rows behind it hold
what they held. Layers have windows, caches, block sizes and heads of their own.
"""

from cases.cache_layout import layer_caches
from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import BLOCK_TABLES, SEQ_LENS_DECODER, SEQ_LENS_ENCODER, SEQ_LENS_THIS_TIME
from cases.rows import MAX_LENGTH, Row


def work(case: Case, layer: Layer) -> Work:
    """Every tensor and every visible history read once; prefill rows from keys, decode rows from latents.

    From latents alone where the cache is packed: new tokens are read back from it too.
    """
    heads, rank, rope = layer.num_attention_heads, layer.kv_lora_rank, layer.qk_rope_head_dim
    nope, values = layer.qk_nope_head_dim, layer.v_head_dim
    rows = case.steps[0]
    tokens = sum(row.new for row in rows)
    real = sum(row.seq_lens_this_time for row in rows)
    # The first new token of a row sees furthest back.
    history = sum(min(row.cached, _reach(layer) - 1) for row in rows if row.seq_lens_this_time)
    elements = heads * (nope + values) * rank + tokens * heads * (nope + rope + values)
    elements += real * layer.latent_width
    read_back = real if layer.cache == "packed" else 0
    cached = (real + history + read_back) * layer_caches(layer)[0].row_bytes
    flops = 0
    for row in rows:
        pairs = _pairs(row, layer)
        if row.seq_lens_encoder and layer.cache != "packed":
            keys = row.new + min(row.cached, _reach(layer) - 1)
            flops += keys * rank * (nope + values) + pairs * (nope + rope + values)
        elif row.seq_lens_this_time:
            flops += row.new * rank * (nope + values) + pairs * (layer.latent_width + rank)
    return Work(bytes=elements * ITEM_BYTES[layer.dtype] + cached, flops=2 * flops * heads)


def _reach(layer: Layer) -> int:
    """The most keys that a token sees."""
    return layer.window or MAX_LENGTH


def _pairs(row: Row, layer: Layer) -> int:
    """Keys that a row's new tokens see, all together."""
    whole = row.new * row.cached + row.new * (row.new + 1) // 2
    # The last tokens are more than the window behind the row's beginning: as many keys as they are behind it.
    hidden = max(0, row.length - _reach(layer))
    fewer = max(0, row.cached - _reach(layer))
    return whole - (hidden * (hidden + 1) - fewer * (fewer + 1)) // 2


SHORT_SPLIT, LONG_SPLIT = 128, 4096
"""Fewest keys that are worth a partial result: where the rows alone do not fill a device, where they do."""

DEVICE_HEADS = 2 * 132 * 64
"""(token, head, split) that fill a device: two programs of 64 heads on each of 132 multiprocessors."""


def scratch(case: Case, layer: Layer) -> int:
    """Keys and values of prefill rows, absorbed queries and partial results of decode rows.

    Histories of decode rows are read where they lie: nothing here grows with them but the splits. Values are
    as wide as keys, for a kernel that demands it, only where the two differ. Where the cache is packed, every
    row is computed as decode rows are, from lists of the keys that its tokens see.
    """
    heads, item = layer.num_attention_heads, ITEM_BYTES[layer.dtype]
    rows = [row for row in case.steps[0] if row.seq_lens_this_time]
    prefilled = [row for row in rows if row.seq_lens_encoder and layer.cache != "packed"]
    decoded = [row for row in rows if row.is_decode or layer.cache == "packed"]
    tokens = sum(row.new for row in case.steps[0])
    prefill_keys = sum(row.length for row in prefilled)
    elements = prefill_keys * layer.latent_width
    if prefilled:
        values = max(layer.v_head_dim, layer.qk_head_dim)
        elements += (prefill_keys + tokens) * heads * (layer.qk_head_dim + values)
    queries = sum(row.new for row in decoded) if prefilled else tokens
    widths = layer.qk_nope_head_dim + layer.latent_width + layer.kv_lora_rank + layer.v_head_dim
    partial = lists = 0
    if decoded:
        elements += queries * heads * widths
        longest = min(max(row.length for row in decoded), _reach(layer))
        if layer.cache == "packed":
            lists = queries * -(-longest // LIST_TILE) * LIST_TILE
        most, fewest = (queries * heads * -(-longest // keys) for keys in (SHORT_SPLIT, LONG_SPLIT))
        partial = min(most, max(fewest, DEVICE_HEADS)) * (layer.kv_lora_rank + 2)
    return elements * item + (partial + lists) * 4


LIST_TILE = 128
"""A list of keys has a multiple of this many entries."""

_CACHE = ("num_blocks", "one", "block_size", "cache_width")

OPERATOR = Operator(
    name="mla_step",
    summary="one layer's attention over a mixed batch, from projected queries and latents to o_proj's input",
    source="arXiv:2405.04434 section 2.1; FastDeploy P1, O22",
    inputs=(
        TensorSpec(
            "q_nope",
            ("tokens", "num_attention_heads", "qk_nope_head_dim"),
            "model",
            "queries' parts that are not rotated; rows of padding tokens hold NaN",
            fill=Fill.NOPE_QUERY,
            strided=True,
        ),
        TensorSpec(
            "q_pe",
            ("tokens", "num_attention_heads", "qk_rope_head_dim"),
            "model",
            "queries' rotated parts; rows of padding tokens hold NaN",
            fill=Fill.ROPE_QUERY,
            strided=True,
        ),
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each new token; rows of padding hold NaN",
            fill=Fill.LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each new token; rows of padding hold NaN",
            fill=Fill.ROPE_KEY,
            strided=True,
        ),
        TensorSpec(
            "w_uk",
            ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank"),
            "model",
            "kv_b_proj's half for keys: k_nope = w_uk[h] c",
            fill=Fill.KEY_WEIGHT,
        ),
        TensorSpec(
            "w_uv",
            ("num_attention_heads", "kv_lora_rank", "v_head_dim"),
            "model",
            "kv_b_proj's half for values: v = w_uv[h]^T c",
            fill=Fill.VALUE_WEIGHT,
        ),
        TensorSpec(
            "latent_cache",
            _CACHE,
            "cache",
            "paged cache of [latent | k_pe] rows or of packed ones, holding what was cached before the step",
            fill=Fill.CACHE_BEFORE,
        ),
        BLOCK_TABLES,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
    ),
    outputs=(
        TensorSpec(
            "out",
            ("tokens", "num_attention_heads", "v_head_dim"),
            "model",
            "attention over the values",
            judge=Judge.LAYER,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "latent_cache",
            _CACHE,
            "cache",
            "the cache with the new tokens' rows written",
            judge=Judge.BITS,
        ),
    ),
    attributes=("softmax_scale", "window", "scale_fmt"),
    options=(
        "model",
        "heads",
        "layers",
        "block",
        "window",
        "dtype",
        "cache",
        "scale_fmt",
        "data",
        "seed",
        "pool",
        "pages",
        "tail",
        "poison",
        "strided",
        "tp",
    ),
    checks=("inputs", "guard", "values"),
    work=work,
    scratch=scratch,
    plays_schedules=True,
)
