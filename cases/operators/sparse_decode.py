"""Absorbed attention over chosen rows of the packed fp8 cache, with LSE: FastDeploy's O19, REQUIRED form.

Of token t, entry j of its list indices[t, 0] names a key if 0 <= i < blocks * block_size, with
i = indices[t, 0, j]: physical row i of the cache, whatever block it lies in. Any other entry is no key, -1,
other negative numbers and rows that the cache does not have alike, wherever in the list it stands; nothing
is read for it. An index that occurs twice is two keys. With R = kv_lora_rank, D = qk_rope_head_dim,
and row i as `packed_cache_write` lays it out,

    k_i = [ e4m3(codes[c]) * scales[c // 128] for c < R | k_pe in bf16 ]
    s_i = softmax_scale * q[t, h] . k_i
    lse = ln sum_i exp(s_i)                                                 over the list's keys
    out = sum_i exp(s_i - lse) k_i[:R]

A list without a key: out 0, lse -inf, whatever the query holds; padding's are so. All heads share a list.
A token is computed by its list alone, whatever its row's kind: prefill rows too, whose history lies in the
cache. Scales are any float32, powers of two or not. Rows that no list names hold poison, and so do those of
blocks that no row has. A list has `index_topk` entries, any number.

Most kernels multiply a code and its scale in float32 and round the product to bf16, nearest even, before it
meets a tensor core. That moves an LSE by 1e-3 to 1e-2, fifty to a hundred times its budget. A path that does
so says so (`KernelPath.rounds_keys`), and is judged by the k_i rounded so: float32 first, then bf16. Budgets
are the same for both; where every product is a number of bf16, as with scales that are powers of two, so are
the answers.
"""

from cases.cache_layout import packed_row_bytes
from cases.case import Case
from cases.contract import Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer


def work(case: Case, layer: Layer) -> Work:
    """Named rows read once, queries and lists read, outputs written; q K^T and P V of every named key."""
    heads, width, rank = layer.num_attention_heads, layer.latent_width, layer.kv_lora_rank
    tokens = sum(row.new for row in case.steps[0])
    pairs = rows = 0
    for row in case.steps[0]:
        positions = range(row.cached, row.cached + row.seq_lens_this_time)
        named = sum(min(layer.index_topk, position + 1) for position in positions)
        pairs += named
        rows += min(named, row.length)
    packed = rows * packed_row_bytes(rank, layer.qk_rope_head_dim)
    ends = 2 * heads * (width + rank) + 4 * heads + 4 * layer.index_topk
    return Work(bytes=packed + tokens * ends, flops=2 * pairs * heads * (width + rank))


OPERATOR = Operator(
    name="sparse_decode",
    summary="absorbed attention over listed rows of the packed fp8 cache, with LSE",
    source="FastDeploy O19 (FlashMLA's sparse fp8 decode), REQUIRED form; DeepSeek-V3.2 section 2.1",
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
            "packed_cache",
            ("num_blocks", "one", "block_size", "packed_width"),
            "uint8",
            "paged cache of packed rows, new tokens written; poison in rows that no list names; read only",
            fill=Fill.PACKED_LISTED,
        ),
        TensorSpec(
            "indices",
            ("tokens", "one", "index_topk"),
            "int32",
            "physical rows of each token's keys, block * block_size + offset; what is outside names none",
            fill=Fill.LISTED_ROWS,
            strided=True,
        ),
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
    ),
    attributes=("softmax_scale", "kv_lora_rank", "splits"),
    # `tail` changes nothing here: there is no table. Check `poison` sets it together with `poison`.
    options=(
        "model",
        "heads",
        "layers",
        "block",
        "scale_fmt",
        "data",
        "seed",
        "pool",
        "pages",
        "tail",
        "poison",
        "strided",
        "splits",
        "tp",
        "topk",
    ),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
)
