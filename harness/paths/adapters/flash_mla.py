"""FlashMLA, DeepSeek's CUDA kernels: dense decode, sparse decode from the packed fp8 cache, sparse prefill.

Source: github.com/deepseek-ai/FlashMLA, package `flash_mla`; where that is not installed the copy in vLLM's
wheel, vllm/third_party/flashmla/flash_mla_interface.py over the compiled vllm/_flashmla_C. What the kernels
take stands in csrc/api/{dense_decode,sparse_decode,sparse_fwd}.h. They are called as vLLM calls them in
vllm/v1/attention/backends/mla/{flashmla,flashmla_sparse}.py.

| path | calls | for |
|------|-------|-----|
| `mla_decode` | `flash_mla_with_kvcache(causal=True)` | tokens of decode and draft rows, padding |
| `sparse_decode` | `flash_mla_with_kvcache(is_fp8_kvcache=True, indices=...)` | every token |
| `sparse_prefill` | `flash_mla_sparse_fwd` | every token |

Conventions
    queries: dense decode takes [B, new, H, 576], rows of equally many new tokens: a call for each such
        number, so plain decode is one. Padding tokens are rows of one token without keys, as in a CUDA
        graph of decode rows. Tokens of prefill rows are left out, and the contract's 0 and -inf are written
        here. Sparse decode takes [T, 1, H, 576], a row a token.
    caches: as [nb, bs, 1, width], views. Dense: blocks of 64 tokens; V is the first 512 columns. Packed:
        rows of 656 bytes as `packed_cache_write` lays them out, blocks of any size.
    lengths: keys of a row, its new tokens among them; causal to the bottom right.
    heads: dense decode takes any number. The sparse kernels take 64 or 128; fewer are filled up with zeros
        in every call, as in vLLM.
    lists: dense, in whole tiles of 64 entries in decode and 128 in prefill, filled up with -1. Decode
        compares with -1 alone, and makes an address of anything else: here -1 stands for all entries that
        name no row. Prefill skips what is below 0 or no token. An engine's top-k kernel gives such lists:
        `plan` makes them.
    keys of prefill: one tensor, latents and rotated keys side by side, made in every call.
    scale: the softmax scale, natural exponent, as in the contract.
    LSE: natural, [B, H, new] in decode; in prefill of versions without `attn_sink` there, to base 2. Of
        rows without keys +inf, in prefill of those versions -inf; here -inf is written.
    schedule: `get_mla_metadata` gives tensors, or in later versions an empty object that the first call
        fills and others reuse. Then `plan` makes a first call of its own: a schedule belongs to one step,
        and no `run` makes one.
    outputs: the library's own tensors, copied in every call.

On compute capability 9.0 sparse decode rounds a float32 scale to bf16, and its product with a code again:
keys are those of `rounds_keys` where scales are numbers of bf16, as powers of two are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.adapters._loading import Kernels, Library
from harness.paths.adapters._rows import decode_slots, rows_at, spans

LATENT, ROPE = 512, 64
"""The one pair of kv_lora_rank and qk_rope_head_dim: rows of 576, or of 656 bytes."""

PAGE = 64
"""Tokens of a block in dense decode."""

HEADS = (64, 128)
"""Heads that the sparse kernels take."""

DECODE_TILE, PREFILL_TILE = 64, 128
"""Entries of which a list holds a whole number: `TOPK_BLOCK_SIZE`, and twice `B_TOPK`."""

MAX_ROWS = (227 * 1024 // 4 - 1) // 5
"""Rows of a call. Its schedule is made in up to 5 B + 1 words of a block's 227 KiB of shared memory; a launch
that asks for more can end the process."""

HOPPER, BLACKWELL = 9, 10
"""Compute capabilities that there are kernels for, by their first number: dense decode's for 9 alone."""

UPSTREAM, COPY = Library("flash_mla"), Library("vllm", part="flashmla")
IS_COPY = UPSTREAM.folder is None

NAMES = ("get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_sparse_fwd")


def load() -> Kernels:
    """The library's functions from the package, or else from vLLM's files."""
    if not IS_COPY:
        return UPSTREAM.imported(NAMES)
    if COPY.folder is None:
        return Kernels({}, f"flash_mla is not installed, and {COPY.lacking}")
    return COPY.load({"_flashmla_C": (), "third_party.flashmla.flash_mla_interface": NAMES}, {})


def versions() -> dict[str, str]:
    """What a verdict says of it: the package's version, or vLLM's behind its name."""
    if not IS_COPY:
        return UPSTREAM.versions
    return {"flash_mla": f"vllm {COPY.versions['vllm']}"} if COPY.versions else {}


KERNELS = load()


# ---- what the library claims ---------------------------------------------------------------------


def compute_capability() -> tuple[int, int] | None:
    """That of the current device, None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _refusal(case: Case, what: str, majors: Sequence[int], max_rows: int | None) -> str | None:
    """None, or what all kernels refuse of a device, of widths, of a number of tokens."""
    capability = compute_capability()
    if capability is not None and capability[0] not in majors:
        named = " and ".join(map(str, majors))
        return f"{what} is for compute capability {named}, this device has {capability[0]}.{capability[1]}"
    for layer in case.layers:
        widths = (layer.kv_lora_rank, layer.qk_rope_head_dim)
        if widths != (LATENT, ROPE):
            return f"{what} takes rows of {LATENT} + {ROPE} columns, got {widths[0]} + {widths[1]}"
    tokens = sum(row.new for row in case.steps[0])
    if max_rows is not None and tokens > max_rows:
        return f"{what} schedules at most {max_rows:,} rows, got {tokens:,} tokens"
    return None


def supports_decode(case: Case) -> str | None:
    """None, or why dense decode does not take a case."""
    for layer in case.layers:
        if layer.dtype == "fp32":
            return "FlashMLA's dense decode is for bf16 and fp16, got fp32"
        if layer.block_size != PAGE:
            return f"FlashMLA's dense decode takes blocks of {PAGE} tokens, got {layer.block_size}"
    return _refusal(case, "FlashMLA's dense decode", (HOPPER,), MAX_ROWS)


def supports_sparse_decode(case: Case) -> str | None:
    """None, or why sparse decode does not take a case."""
    what = "FlashMLA's sparse decode"
    return _heads_refusal(case, what) or _refusal(case, what, (HOPPER, BLACKWELL), MAX_ROWS)


def supports_sparse_prefill(case: Case) -> str | None:
    """None, or why sparse prefill does not take a case."""
    what = "FlashMLA's sparse prefill"
    for layer in case.layers:
        if layer.dtype != "bf16":
            return f"{what} is for bf16, got {layer.dtype}"
    return _heads_refusal(case, what) or _refusal(case, what, (HOPPER, BLACKWELL), None)


def _heads_refusal(case: Case, what: str) -> str | None:
    for layer in case.layers:
        if layer.num_attention_heads > HEADS[-1]:
            return f"{what} takes at most {HEADS[-1]} heads, got {layer.num_attention_heads}"
    return None


# ---- calls ---------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What one call of `flash_mla_with_kvcache` gets beside queries and cache.

    Attributes:
        tokens: [B new] int64, rising: those that it attends for, row by row.
        new: tokens of each row.
        seq_lens: [B] int32, keys of each row; of sparse decode not looked at.
        block_table: [B, blocks] int32; of sparse decode not looked at.
        schedule: what `get_mla_metadata` gave.
        has_empty: whether a row has no key.
        lists: [B, new, entries] int32 of sparse decode, None of dense.
    """

    tokens: Tensor
    new: int
    seq_lens: Tensor
    block_table: Tensor
    schedule: tuple[Any, Any]
    has_empty: bool
    lists: Tensor | None = None


def attend(call: Call, inputs: Tensors, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B new, H, 512] and LSE [B new, H] of a call's tokens. cache: [nb, 1, bs, width]."""
    query = rows_at(inputs["q"], call.tokens)
    metadata, num_splits = call.schedule
    heads, sparse = query.shape[1], {}
    if call.lists is not None:
        query = filled_up(query)
        sparse = {"is_fp8_kvcache": True, "indices": call.lists}
    out, lse = KERNELS.flash_mla_with_kvcache(
        query.view(len(call.seq_lens), call.new, *query.shape[1:]),
        cache.transpose(1, 2),
        call.block_table,
        call.seq_lens,
        LATENT,
        metadata,
        num_splits,
        softmax_scale=inputs["softmax_scale"],
        causal=call.lists is None,
        **sparse,
    )
    return out.flatten(0, 1)[:, :heads], lse.transpose(1, 2).flatten(0, 1)[:, :heads]


def scheduled(call: Call, inputs: Tensors, cache: Tensor) -> Call:
    """The same call with its schedule made: where that is an empty object yet, a first call fills it."""
    if not isinstance(call.schedule[0], Tensor):
        attend(call, inputs, cache)
    return call


def filled_up(query: Tensor) -> Tensor:
    """[T, H, W] -> [T, 64 or 128, W]: heads of zeros behind the others."""
    heads = query.shape[1]
    wanted = next(count for count in HEADS if heads <= count)
    return pad(query, (0, 0, 0, wanted - heads)) if heads < wanted else query


def whole_tiles(lists: Tensor, tile: int) -> Tensor:
    """[T, 1, K] -> [T, 1, a multiple of tile] int32, dense: entries of no key, -1, behind the others."""
    return pad(lists, (0, -lists.shape[2] % tile), value=-1).contiguous()


def write(
    outputs: Tensors, out: Tensor, lse: Tensor, *, has_empty: bool, tokens: Tensor | None = None
) -> None:
    """Outputs of some tokens, rising, or of all; +inf, the library's LSE of no key, becomes -inf."""
    if has_empty:
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    if tokens is None or len(tokens) == len(outputs["out"]):
        outputs["out"].copy_(out)
        outputs["lse"].copy_(lse)
    else:
        outputs["out"][tokens] = out
        outputs["lse"][tokens] = lse


# ---- dense decode --------------------------------------------------------------------------------


def plan_decode(inputs: Tensors) -> Tensors:
    """A call for each number of new tokens that rows have; padding is among the rows of one."""
    slots, starts = decode_slots(inputs), inputs["cu_seqlens_q"].long()
    new = starts.diff()[slots]
    padding = (inputs["batch_id_per_token"] < 0).nonzero().flatten()
    counts = set(new.tolist()) | ({1} if len(padding) > 0 else set())
    cache, calls = inputs["latent_cache"], []
    for count in sorted(counts):
        rows = slots[new == count]
        tokens = spans(starts[rows], torch.full_like(rows, count))
        lengths = inputs["seq_lens_decoder"][rows] + count
        table = inputs["block_tables"][rows]
        is_padded = count == 1 and len(padding) > 0
        if is_padded:
            tokens = torch.cat([tokens, padding])
            lengths = pad(lengths, (0, len(padding)))
            # The first block of a row is fetched even if it has no key.
            table = pad(table, (0, 0, 0, len(padding)))
        heads, lengths = inputs["q"].shape[1], lengths.int()
        schedule = KERNELS.get_mla_metadata(lengths, count * heads, 1)
        call = Call(tokens, count, lengths, table, schedule, is_padded)
        calls.append(scheduled(call, inputs, cache))
    return {"calls": calls}


def run_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`flash_mla_with_kvcache` on the step's rows, a call for each number of new tokens."""
    calls: list[Call] = workspace["calls"]
    if sum(len(call.tokens) for call in calls) < len(outputs["out"]):
        outputs["out"].zero_()
        outputs["lse"].fill_(-torch.inf)
    for call in calls:
        out, lse = attend(call, inputs, inputs["latent_cache"])
        write(outputs, out, lse, has_empty=call.has_empty, tokens=call.tokens)


# ---- sparse decode -------------------------------------------------------------------------------


def plan_sparse_decode(inputs: Tensors) -> Tensors:
    """One call, a row a token: lists that name rows of the cache or -1, and the schedule."""
    cache, lists = inputs["packed_cache"], inputs["indices"]
    tokens = len(lists)
    if tokens == 0:
        return {"call": None}
    named = (lists >= 0) & (lists.long() < cache.shape[0] * cache.shape[2])
    lists = whole_tiles(lists.masked_fill(~named, -1), DECODE_TILE)
    heads = filled_up(inputs["q"][:1]).shape[1]
    # Arguments that older versions ask for; with lists nothing is read of them.
    seq_lens = torch.full((tokens,), lists.shape[2], dtype=torch.int32, device=lists.device)
    table = torch.zeros((tokens, 1), dtype=torch.int32, device=lists.device)
    schedule = KERNELS.get_mla_metadata(
        seq_lens, heads, 1, num_heads_q=heads, is_fp8_kvcache=True, topk=lists.shape[2]
    )
    every = torch.arange(tokens, device=lists.device)
    has_empty = not bool(named.any(-1).all())
    call = Call(every, 1, seq_lens, table, schedule, has_empty, lists)
    return {"call": scheduled(call, inputs, cache)}


def run_sparse_decode(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`flash_mla_with_kvcache` with lists, on the packed cache."""
    call: Call | None = workspace["call"]
    if call is not None:
        out, lse = attend(call, inputs, inputs["packed_cache"])
        write(outputs, out, lse, has_empty=call.has_empty)


# ---- sparse prefill ------------------------------------------------------------------------------


def lse_unit() -> float:
    """What a unit of sparse prefill's LSE is in nats."""
    return 1.0 if "attn_sink" in signature(KERNELS.flash_mla_sparse_fwd).parameters else math.log(2)


def plan_sparse_prefill(inputs: Tensors) -> Tensors:
    """Lists in whole tiles, and whether one names no token."""
    lists = inputs["indices"]
    named = (lists >= 0) & (lists < len(lists))
    has_empty = not bool(named.any(-1).all())
    return {"lists": whole_tiles(lists, PREFILL_TILE), "has_empty": has_empty, "unit": lse_unit()}


def run_sparse_prefill(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """`flash_mla_sparse_fwd` on the step's tokens."""
    query, lists, unit = inputs["q"], workspace["lists"], workspace["unit"]
    if len(query) == 0:
        return
    keys = torch.cat([inputs["compressed_kv"], inputs["k_pe"]], dim=1).unsqueeze(1)
    out, _, lse = KERNELS.flash_mla_sparse_fwd(filled_up(query), keys, lists, inputs["softmax_scale"])
    heads = query.shape[1]
    lse = lse[:, :heads] if unit == 1 else lse[:, :heads] * unit
    write(outputs, out[:, :heads], lse, has_empty=workspace["has_empty"])


ABOUT: dict[str, Any] = {
    "lanes": ("compiled",),
    "libraries": versions(),
    "unavailable": KERNELS.unavailable,
    "allocates": True,
}
"""What all paths of the library have in common."""

PATHS = (
    KernelPath(
        name="adapters/flash_mla/mla_decode",
        operator="mla_decode",
        supports=supports_decode,
        run=run_decode,
        plan=plan_decode,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/flash_mla/sparse_decode",
        operator="sparse_decode",
        supports=supports_sparse_decode,
        run=run_sparse_decode,
        plan=plan_sparse_decode,
        rounds_keys=True,
        **ABOUT,
    ),
    KernelPath(
        name="adapters/flash_mla/sparse_prefill",
        operator="sparse_prefill",
        supports=supports_sparse_prefill,
        run=run_sparse_prefill,
        plan=plan_sparse_prefill,
        **ABOUT,
    ),
)
