"""Gather the cached and the new latents of every prefill row into dense tensors, bit for bit.

Inputs
    latent_cache          [nb, 1, bs, R+D]  model dtype, contiguous; the new tokens are not in it yet
    block_tables          [B, max_blocks]   int32, row stride free; entries past a row's cached tokens unread;
                                            None, or of width 0, where no prefill row has cached tokens
    compressed_kv         [Tp, R]           model dtype, token stride free, last axis dense
    k_pe                  [Tp, D]           model dtype, token stride free, last axis dense
    seq_lens_decoder      [B] int32         tokens cached before this step
    cu_seqlens_q          [B + 1] int32     exclusive prefix sum of the new tokens of every row
    cu_seqlens_k_prefill  [B + 1] int32     the same of cached and new tokens, prefill rows alone
Outputs
    full_compressed_kv    [Tk, R]           model dtype, row stride free, last axis dense
    full_k_pe             [Tk, D]           model dtype, row stride free, last axis dense

Row b's keys are rows cu_seqlens_k_prefill[b] to cu_seqlens_k_prefill[b + 1] of the outputs: first its
cached tokens in order of position, then its new ones. Rows of the outputs behind the last key become 0:
a captured graph may be replayed with fewer keys than the outputs have rows.

Any R and D: a tile is the next power of two wide. Any bs, B and Tk (none: no launch); caches and outputs
beyond 2^32 elements. No host synchronisation; numbers of keys, rows, blocks and tokens in a block do not
recompile.

Not: quantised caches, histories of decode rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_KEYS = 8
"""Keys a program: 8 rows of 1,152 bytes keep 4 warps' 16-byte accesses in flight."""


@triton.jit
def _row_of(keys, cu_seqlens_k_prefill, num_rows, search_steps):
    """[n] int32: the last row that begins at or before each key, in 2^search_steps > num_rows - 1 rows.

    A row without keys begins where the next one does, and one behind the last key begins behind it: the
    last row that begins early enough is the one that holds the key.
    """
    rows = tl.zeros_like(keys)
    for step in range(search_steps):
        later = rows + (1 << (search_steps - 1 - step))
        is_row = later < num_rows
        begins = tl.load(cu_seqlens_k_prefill + later, mask=is_row, other=0)
        rows = tl.where(is_row & (begins <= keys), later, rows)
    return rows


@triton.jit(do_not_specialize=["table_stride", "num_keys", "num_rows", "search_steps", "block_size"])
def _gather_keys(
    latent_cache,
    block_tables,
    table_stride,
    compressed_kv,
    compressed_kv_stride,
    k_pe,
    k_pe_stride,
    seq_lens_decoder,
    cu_seqlens_q,
    cu_seqlens_k_prefill,
    full_compressed_kv,
    full_compressed_kv_stride,
    full_k_pe,
    full_k_pe_stride,
    num_keys,
    num_rows,
    search_steps,
    block_size,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Copies the rows of BLOCK_KEYS successive keys. Grid: (ceil(num_keys / BLOCK_KEYS),)."""
    LATENT_WIDTH: tl.constexpr = KV_LORA_RANK + QK_ROPE_HEAD_DIM

    # 1. The row that each key belongs to, and its position there.
    keys = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    is_written = keys < num_keys
    is_key = is_written & (keys < tl.load(cu_seqlens_k_prefill + num_rows))
    rows = _row_of(keys, cu_seqlens_k_prefill, num_rows, search_steps)
    positions = keys - tl.load(cu_seqlens_k_prefill + rows, mask=is_key, other=0)
    cached = tl.load(seq_lens_decoder + rows, mask=is_key, other=0)
    first_tokens = tl.load(cu_seqlens_q + rows, mask=is_key, other=0)

    # 2. Where it lies: in the cache, or among the new tokens; rows * width passes 2^32 in large caches.
    is_cached = is_key & (positions < cached)
    is_new = is_key & (positions >= cached)
    entries = block_tables + rows.to(tl.int64) * table_stride + positions // block_size
    blocks = tl.load(entries, mask=is_cached, other=0).to(tl.int64)
    cache_rows = latent_cache + (blocks * block_size + positions % block_size)[:, None] * LATENT_WIDTH
    tokens = (first_tokens + positions - cached).to(tl.int64)[:, None]
    targets = keys.to(tl.int64)[:, None]

    # 3. The latent part. Of the two loads of a row one is masked off whole: it moves nothing. A choice
    # between the pointers instead would hide from the compiler that both are aligned.
    columns = tl.arange(0, BLOCK_R)[None, :]
    is_column = columns < KV_LORA_RANK
    old = tl.load(cache_rows + columns, mask=is_cached[:, None] & is_column, other=0.0)
    new_rows = compressed_kv + tokens * compressed_kv_stride
    new = tl.load(new_rows + columns, mask=is_new[:, None] & is_column, other=0.0)
    full_rows = full_compressed_kv + targets * full_compressed_kv_stride
    latent = tl.where(is_cached[:, None], old, new)
    tl.store(full_rows + columns, latent, mask=is_written[:, None] & is_column)

    # 4. The rotated key part, behind the latent in the cache.
    columns = tl.arange(0, BLOCK_D)[None, :]
    is_column = columns < QK_ROPE_HEAD_DIM
    old = tl.load(cache_rows + KV_LORA_RANK + columns, mask=is_cached[:, None] & is_column, other=0.0)
    new = tl.load(k_pe + tokens * k_pe_stride + columns, mask=is_new[:, None] & is_column, other=0.0)
    full_rows = full_k_pe + targets * full_k_pe_stride
    rope = tl.where(is_cached[:, None], old, new)
    tl.store(full_rows + columns, rope, mask=is_written[:, None] & is_column)


def read_cache_interleave(
    latent_cache,
    block_tables,
    compressed_kv,
    k_pe,
    seq_lens_decoder,
    cu_seqlens_q,
    cu_seqlens_k_prefill,
    full_compressed_kv,
    full_k_pe,
) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_keys, rank = full_compressed_kv.shape
    if num_keys == 0:
        return
    table_stride = 0
    if block_tables is None:
        # No key is cached, so nothing is read through it: any pointer to int32 will do.
        block_tables = seq_lens_decoder
    else:
        table_stride = block_tables.stride(0)
    num_rows = cu_seqlens_k_prefill.shape[0] - 1
    rope = full_k_pe.shape[1]
    _gather_keys[(triton.cdiv(num_keys, BLOCK_KEYS),)](
        latent_cache,
        block_tables,
        table_stride,
        compressed_kv,
        compressed_kv.stride(0),
        k_pe,
        k_pe.stride(0),
        seq_lens_decoder,
        cu_seqlens_q,
        cu_seqlens_k_prefill,
        full_compressed_kv,
        full_compressed_kv.stride(0),
        full_k_pe,
        full_k_pe.stride(0),
        num_keys,
        num_rows,
        max(num_rows - 1, 0).bit_length(),
        latent_cache.shape[2],
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=rope,
        BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_D=triton.next_power_of_2(rope),
        BLOCK_KEYS=BLOCK_KEYS,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    read_cache_interleave(
        inputs["latent_cache"],
        inputs["block_tables"],
        inputs["compressed_kv"],
        inputs["k_pe"],
        inputs["seq_lens_decoder"],
        inputs["cu_seqlens_q"],
        inputs["cu_seqlens_k_prefill"],
        outputs["full_compressed_kv"],
        outputs["full_k_pe"],
    )


PATHS = (
    KernelPath(
        name="triton/read_cache_interleave",
        operator="read_cache_interleave",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
