"""Absorbed attention over lists, every row kind in one step: FastDeploy's O20, REQUIRED form.

First, as `packed_cache_write` does, cache row slot_mapping[t] becomes the packed [compressed_kv[t] | k_pe[t]]
of every token t with 0 <= slot_mapping[t] < blocks * block_size. Then each token attends to the keys that
its list indices[t, 0] names. What an entry i means depends on the token's row:

    | row                                       | i is a key if             | k_i                            |
    |-------------------------------------------|---------------------------|--------------------------------|
    | nothing cached: first chunks              | 0 <= i < tokens           | [compressed_kv[i] | k_pe[i]]   |
    | anything cached: decode, drafts, prefix   | 0 <= i < blocks *         | packed row i, dequantised as   |
    | hits and continued chunks                 |      block_size           | `sparse_decode` does           |

    s_i = softmax_scale * q[t, h] . k_i
    lse = ln sum_i exp(s_i)                             over the list's keys
    out = sum_i exp(s_i - lse) k_i[:R]

with R = kv_lora_rank. Any other entry is no key, wherever it stands; an index that occurs twice is two keys.
A list of rows may name this step's tokens: the cache holds them by then. Chunks with a history belong to the
second kind, because no token of the step could stand for what they have cached (B39): seq_lens_decoder > 0
decides, not seq_lens_encoder.

One tensor holds the lists of both kinds, and neither kind may follow those of the other (B71): nothing is
read for them, and nothing stays of what they would give. A list without a key: out 0, lse -inf, whatever the
query holds. Padding's lists name no key in either meaning. A step with rows of neither kind has outputs too
(B36): 0 and -inf at padding, of the shape they always have.

Keys of first chunks are not rounded. Whether those of the cache are is said by the path, as of
`sparse_decode`. A `window` makes the lists those of `swa_indices`: the newest keys, the oldest of them first.
"""

from cases.cache_layout import packed_row_bytes
from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    BLOCK_TABLES,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def work(case: Case, layer: Layer) -> Work:
    """New rows written, keys read once, packed where they are cached; queries, lists, outputs; every pair."""
    heads, width, rank = layer.num_attention_heads, layer.latent_width, layer.kv_lora_rank
    packed = packed_row_bytes(rank, layer.qk_rope_head_dim)
    rows = case.steps[0]
    tokens = sum(row.new for row in rows)
    item = ITEM_BYTES[layer.dtype]
    total = sum(row.seq_lens_this_time for row in rows) * (item * width + packed + 8)
    pairs = 0
    for row in rows:
        positions = range(row.cached, row.cached + row.seq_lens_this_time)
        named = sum(
            min(layer.index_topk, layer.window or position + 1, position + 1) for position in positions
        )
        pairs += named
        if row.cached:
            total += min(named, row.length) * packed
    total += tokens * (heads * (item * (width + rank) + 4) + 4 * layer.index_topk)
    return Work(bytes=total, flops=2 * pairs * heads * (width + rank))


SHORT_SPLIT, LONG_SPLIT = 256, 2048
"""Fewest entries that are worth a partial result: where tokens alone do not fill a device, where they do."""

DEVICE_HEADS = 2 * 132 * 64
"""(token, head, split) that fill a device: two programs of 64 heads on each of 132 multiprocessors."""


def scratch(case: Case, layer: Layer) -> int:
    """Partial results of tokens with a history; beside first chunks, their queries, lists and outputs packed.

    Beside them, first chunks have their own lists too. Rows of one kind alone are computed where they lie.
    """
    heads, topk = layer.num_attention_heads, layer.index_topk
    rows = [row for row in case.steps[0] if row.seq_lens_this_time]
    tokens = sum(row.new for row in case.steps[0])
    cached = sum(row.new for row in rows if row.cached)
    has_both = 0 < cached < sum(row.new for row in rows)
    attended = cached if has_both else tokens * (cached > 0)
    most, fewest = (attended * heads * -(-topk // entries) for entries in (SHORT_SPLIT, LONG_SPLIT))
    splits = min(most, max(fewest, DEVICE_HEADS)) if topk > SHORT_SPLIT else 0
    total = splits * (layer.kv_lora_rank + 2) * 4
    if has_both:
        width = layer.latent_width + layer.kv_lora_rank
        total += cached * heads * (width * ITEM_BYTES[layer.dtype] + 4) + (tokens + cached) * topk * 4
    return total


_CACHE = ("num_blocks", "one", "block_size", "packed_width")

OPERATOR = Operator(
    name="static_attention",
    summary="absorbed attention over lists of every row kind, new tokens packed into the fp8 cache first",
    source="FastDeploy O20 (DSAAttentionBackend.forward_static), REQUIRED form; DeepSeek-V3.2 section 2.1",
    inputs=(
        TensorSpec(
            "q",
            ("tokens", "num_attention_heads", "latent_width"),
            "model",
            "absorbed query, bf16; rows of padding tokens hold NaN",
            fill=Fill.LISTED_QUERY,
            strided=True,
        ),
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each token, bf16; rows of padding hold NaN",
            fill=Fill.PACKABLE_LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each token, bf16; rows of padding hold NaN",
            fill=Fill.ROPE_KEY,
            strided=True,
        ),
        TensorSpec(
            "indices",
            ("tokens", "one", "index_topk"),
            "int32",
            "keys of each token: tokens of the step where its row has nothing cached, else rows of the cache",
            fill=Fill.LISTED_BY_HISTORY,
            strided=True,
        ),
        TensorSpec(
            "packed_cache",
            _CACHE,
            "uint8",
            "paged cache of packed rows, written in place; poison in rows that no list names",
            fill=Fill.PACKED_LISTED_BEFORE,
        ),
        TensorSpec(
            "slot_mapping",
            ("tokens",),
            "int64",
            "physical row of each token: block * block_size + offset; negative: not written",
            fill=Fill.METADATA,
        ),
        BLOCK_TABLES,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "out",
            ("tokens", "num_attention_heads", "kv_lora_rank"),
            "model",
            "attention over the latents",
            judge=Judge.ATTENTION,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "lse",
            ("tokens", "num_attention_heads"),
            "float32",
            "log-sum-exp of the scaled logits, natural log",
            judge=Judge.LSE,
            when_empty="-inf",
        ),
        TensorSpec(
            "packed_cache",
            _CACHE,
            "uint8",
            "the cache with the new tokens' rows written",
            judge=Judge.BITS,
        ),
    ),
    attributes=("softmax_scale", "kv_lora_rank", "scale_fmt"),
    options=(
        "model",
        "heads",
        "layers",
        "block",
        "window",
        "scale_fmt",
        "data",
        "seed",
        "pool",
        "pages",
        "tail",
        "poison",
        "strided",
        "tp",
        "topk",
    ),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
    scratch=scratch,
)
