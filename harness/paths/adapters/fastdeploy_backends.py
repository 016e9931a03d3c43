"""FastDeploy's attention backends of MLA, from the installed package, as a step of one layer.

Source, below `fastdeploy.model_executor.layers.attention`: `mla_attention_backend` and
`triton_mla_attention_backend`. As `fastdeploy_ops.py`, all of this was run with a stand-in alone.

| path | backend | variables of its process |
|------|---------|--------------------------|
| `mla_step@mla_attn` | `MLAAttentionBackend` | FD_ATTENTION_BACKEND=MLA_ATTN |
| `mla_step@flash_mla` | the same, whose decode rows go to FlashMLA | and USE_FLASH_MLA=1 |
| `mla_step@triton_mla_attn` | `TritonMLAAttentionBackend` | FD_ATTENTION_BACKEND=TRITON_MLA_ATTN |

A backend lives as long as the steps are of its kind: what one leaves in its buffers, the next finds. Around
its two calls a step stands what `DeepseekV3MLAAttention.forward` does there, in its order:

    1. `init_attention_metadata`, once a step
    2. where a row has prefill tokens: the fused read, keys and values of each head, `forward` with k and v
    3. where a slot has cached tokens: queries absorbed, `forward` without k and v, values projected
    4. where both: `merge_prefill_decode_output`, which gets max_token=1 as the model gives it

Conventions
    metadata: made here, as the contracts of the operators that make it say; negative slots of the cache are
        padding's. The fields of `ForwardMeta` that these backends read, and no other.
    projections: torch's, of w_uk and w_uv, rounded to the model dtype. Values are padded to the keys' width.
    scale: the backend's own, 1 / sqrt(qk_head_dim) times the square of YaRN's factor: `rope_scaling` is
        chosen so that this is the case's.
    prefix hits: of versions with a fused read. Older ones let prefill rows see their new tokens alone.
    cu_seqlens_k: over cached and new keys of every slot, in versions with a fused read; else cu_seqlens_q.
    decode rows: a token each of the step, or one a slot, taken out and put back by `extract_decoder_token_
        from_q` and `insert_decoder_result_back`: as the version's `forward_mixed` expects it. (The model of
        compute capability 9 hands tokens to the Triton backend even where that expects slots.)
    padding: the backends give what they like; the contract's 0 is written here.
    tensor parallelism: one rank, so that no heads are padded to 64.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.adapters._fastdeploy_package import (
    ENVIRONMENT,
    about,
    by_position,
    call,
    default_dtype,
    installed,
)
from harness.paths.adapters._rows import prefix_sum
from harness.paths.adapters.fastdeploy import supports_read
from harness.paths.adapters.fastdeploy_layers import EXTRACT, INSERT, READ
from harness.paths.adapters.fastdeploy_ops import (
    MERGE,
    compute_capability,
    dotted,
    dtype_not_taken,
    launch_buffers,
    lengths,
    longest_draft,
    no_slot,
    supports_merge,
    supports_write,
)
from harness.paths.adapters.fastdeploy_ops import supports_decode as supports_operator

LAYER = SimpleNamespace(layer_id=0)

BLOCK_SHAPES = {"encoder_block_shape_q": 64, "decoder_block_shape_q": 16}
"""As the engine makes a backend; they have no influence on MLA."""

MIXED = SimpleNamespace(
    is_mixed=lambda: True, is_decode=lambda: False, is_prefill=lambda: False, is_native=lambda: False
)
"""`ForwardMode.MIXED`, that of every step on a GPU."""


@dataclass(frozen=True)
class Backend:
    """A backend, and the variables of a process that runs it.

    Attributes:
        name: its class.
        value: of FD_ATTENTION_BACKEND.
        decodes: None, or why its decode rows do not take a case.
        variables: others that differ from `ENVIRONMENT`.
    """

    name: str
    value: str
    decodes: Callable[[Case], str | None]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str | None]:
        """Every variable that counts."""
        return {**ENVIRONMENT, "FD_ATTENTION_BACKEND": self.value, **self.variables}

    @property
    def operators(self) -> tuple[str, ...]:
        """What a step calls."""
        return (self.name, MERGE, *((READ,) if READS else ()), *((EXTRACT, INSERT) if self.by_slot else ()))

    @property
    def by_slot(self) -> bool:
        """Whether some version of it takes decode rows slot by slot."""
        return self is not MLA

    def call(self, name: str, **given: object) -> list[Any]:
        """An operator's results in this process."""
        return owned(call(name, by_position, None, self.environment, **given))


def owned(results: list[Any]) -> list[Any]:
    """The results, copied: Paddle 3.3.1 blocks for ever when it frees a view of a view of its own memory."""
    return [one.clone() if isinstance(one, Tensor) else one for one in results]


READS = READ in installed().capabilities
"""Whether the version has the fused read, without which it has no prefix hits."""


# ---- what is not claimed -------------------------------------------------------------------------


def supports(backend: Backend, case: Case) -> str | None:
    """None, or why a backend does not take a case."""
    rows = case.steps[0]
    if not READS and any(row.seq_lens_encoder and row.cached for row in rows):
        return "this version has no fused read: prefill rows see their new tokens alone, got a prefix hit"
    reason = supports_layers(case) or no_slot(case) or dtype_not_taken(case)
    if READS:
        reason = reason or supports_read(case)
    if any(row.seq_lens_encoder for row in rows) and any(row.cached for row in rows):
        reason = reason or supports_merge(case)
    return reason or backend.decodes(case)


def supports_layers(case: Case) -> str | None:
    """None, or why no backend takes one of the layers."""
    for layer in case.layers:
        if layer.cache == "packed":
            return "the backends keep latents in the model dtype, got cache=packed"
        if layer.window:
            return f"the backends have no window, got window={layer.window}"
        if layer.v_head_dim > layer.qk_head_dim:
            return f"values are padded to {layer.qk_head_dim} columns, got {layer.v_head_dim}"
    return None


def supports_mla(case: Case) -> str | None:
    """None, or why the compiled operators that the backend calls do not take a case."""
    return supports_write(case) or supports_operator(case)


def supports_triton(case: Case) -> str | None:
    """None, or why the Triton kernels that the backend calls do not take a case."""
    if any(row.is_decode and row.new > 1 for row in case.steps[0]):
        return "a decode row has one query here, got drafts"
    return None


def supports_flash_mla(case: Case) -> str | None:
    """None, or why the backend does not take a case when FlashMLA computes its decode rows."""
    capability = compute_capability()
    if capability is not None and capability[0] != 9:
        return f"FlashMLA is called on compute capability 9.0, this device has {dotted(capability)}"
    for layer in case.layers:
        if (layer.kv_lora_rank, layer.qk_rope_head_dim) != (512, 64):
            return f"FlashMLA takes rows of 512 + 64, got {layer.kv_lora_rank} + {layer.qk_rope_head_dim}"
        if layer.block_size != 64:
            return f"FlashMLA takes blocks of 64 tokens, got {layer.block_size}"
    return supports_write(case) or supports_triton(case)


MLA = Backend("MLAAttentionBackend", "MLA_ATTN", supports_mla)
FLASH = Backend("MLAAttentionBackend", "MLA_ATTN", supports_flash_mla, {"USE_FLASH_MLA": "1"})
TRITON = Backend("TritonMLAAttentionBackend", "TRITON_MLA_ATTN", supports_triton)


# ---- what the engine knows of a step -------------------------------------------------------------


def step_of(inputs: Tensors) -> dict[str, Tensor]:
    """The step's metadata: what the engine makes of its lengths, once for all layers."""
    new, cached = inputs["seq_lens_this_time"], inputs["seq_lens_decoder"]
    tables, block_size = inputs["block_tables"].contiguous(), inputs["latent_cache"].shape[2]
    tokens, begins = len(inputs["q_nope"]), prefix_sum(new)
    slots = torch.full((tokens,), -1, dtype=torch.int32, device=new.device)
    ids = torch.repeat_interleave(torch.arange(len(new), device=new.device, dtype=torch.int32), new)
    slots[: len(ids)] = ids
    own = ids.long()
    position = torch.arange(len(ids), device=new.device) - begins[own] + cached[own]
    block = tables[own, position // block_size].long()
    slot_mapping = torch.full((tokens,), -1, dtype=torch.int64, device=new.device)
    slot_mapping[: len(ids)] = block * block_size + position % block_size
    return {
        **lengths(inputs),
        "block_tables": tables,
        "cu_seqlens_q": begins,
        "cu_seqlens_k": prefix_sum(new + cached) if READS else begins,
        "batch_id_per_token": slots,
        "slot_mapping": slot_mapping,
    }


def settings_of(inputs: Tensors) -> dict[str, Any]:
    """What of a step is a model's or an engine's: a backend is made for it."""
    heads, _, rank = inputs["w_uk"].shape
    slots, most = inputs["block_tables"].shape
    return {
        "dtype": str(inputs["q_nope"].dtype).rpartition(".")[2],
        "heads": heads,
        "nope": inputs["q_nope"].shape[2],
        "rope": inputs["q_pe"].shape[2],
        "rank": rank,
        "softmax_scale": inputs["softmax_scale"],
        "slots": slots,
        "blocks": most,
        "block_size": inputs["latent_cache"].shape[2],
        "drafts": max(longest_draft(inputs) - 1, 0),
    }


def config_of(settings: Mapping[str, Any]) -> SimpleNamespace:
    """`FDConfig`, as far as the backends read it."""
    head_dim = settings["nope"] + settings["rope"]
    longest = settings["blocks"] * settings["block_size"]
    drafts = settings["drafts"]
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            block_size=settings["block_size"], max_block_num_per_seq=settings["blocks"]
        ),
        model_config=SimpleNamespace(
            max_model_len=longest,
            rope_theta=10000.0,
            causal=True,
            head_dim=head_dim,
            num_hidden_layers=1,
            start_layer_index=0,
            kv_lora_rank=settings["rank"],
            qk_nope_head_dim=settings["nope"],
            qk_rope_head_dim=settings["rope"],
            rope_scaling=rope_scaling(settings["softmax_scale"] * math.sqrt(head_dim)),
        ),
        speculative_config=SimpleNamespace(
            method="ngram" if drafts else None, num_speculative_tokens=drafts, model_type="main"
        ),
        parallel_config=SimpleNamespace(
            max_model_len=longest,
            tensor_parallel_size=1,
            tensor_parallel_rank=0,
            local_data_parallel_id=0,
            pd_disaggregation_mode="None",
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=settings["slots"]),
        enable_rope_3d_runtime=False,
    )


def rope_scaling(ratio: float) -> dict[str, float] | None:
    """What makes a backend's softmax scale so many times 1 / sqrt(qk_head_dim).

    It multiplies by the square of YaRN's factor, 0.1 mscale_all_dim ln(factor) + 1 (arXiv:2309.00071,
    section 3.4, as DeepSeek-V2 applies it).
    """
    if math.isclose(ratio, 1.0, rel_tol=1e-9):
        return None
    return {"factor": math.e, "mscale_all_dim": 10 * (math.sqrt(ratio) - 1)}


# ---- the backend, on Paddle's side ---------------------------------------------------------------


class Engine:
    """The backend of this process, what it was made for, and what it was told of the step."""

    settings: Mapping[str, Any] | None = None
    backend: Any = None
    meta: Any = None


def begin(
    backend: Backend, settings: Mapping[str, Any], kind: Any, arguments: Tensors, given: Tensors
) -> tuple[bool]:
    """Tells the backend of a step, made anew where its settings differ; whether decode rows go slot by slot.

    Raises:
        RuntimeError: its cache has another shape.
    """
    with default_dtype(settings["dtype"]):
        if Engine.settings != settings or type(Engine.backend) is not kind:
            # Two at once would need the room of two.
            Engine.backend = None
            Engine.backend, Engine.settings = kind(**arguments), settings
        cache = given["latent_cache"]
        shape = Engine.backend.get_kv_cache_shape(cache.shape[0])
        wanted = shape[0] if isinstance(shape[0], list | tuple) else shape
        if list(wanted) != list(cache.shape):
            raise RuntimeError(
                f"{backend.name} must keep its cache in {list(cache.shape)}, but asks for {list(wanted)}"
            )
        fields = {name: value for name, value in given.items() if name != "latent_cache"}
        Engine.meta = SimpleNamespace(
            **fields,
            caches=[cache],
            forward_mode=MIXED,
            rotary_embs=None,
            attn_mask=None,
            pre_caches_length=0,
            is_dummy_or_profile_run=False,
            step_use_cudagraph=False,
        )
        Engine.backend.init_attention_metadata(Engine.meta)
    return (takes_slots(backend, kind),)


def takes_slots(backend: Backend, kind: Any) -> bool:
    """Whether a version's `forward_mixed` expects a decode query for each slot, and not for each token."""
    read = kind.forward_mixed.__code__.co_names
    if backend is TRITON:
        # One that looks for decode rows' tokens gets the step's.
        return "cu_seqlens_q" not in read
    return backend is FLASH and EXTRACT not in read


def attend(settings: Mapping[str, Any], _kind: Any, _arguments: Tensors, given: Tensors) -> Any:
    """What the backend's `forward` gives: of k and v, or of queries that are absorbed."""
    Engine.meta.cache_seqlens = given["cache_seqlens"]
    with default_dtype(settings["dtype"]):
        return Engine.backend.forward(
            given["q"],
            given["k"],
            given["v"],
            None,
            given["compressed_kv"],
            given["k_pe"],
            LAYER,
            Engine.meta,
        )


# ---- a step --------------------------------------------------------------------------------------


def run(backend: Backend, inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """What the model does between its projections; what is called allocates what it returns."""
    out = outputs["out"]
    tokens, heads, values = out.shape
    if tokens == 0:
        return
    settings, step = settings_of(inputs), step_of(inputs)
    cache = inputs["latent_cache"]
    (by_slot,) = call(
        backend.name,
        partial(begin, backend, settings),
        {**step, **launch_buffers(inputs, heads), "latent_cache": cache},
        backend.environment,
        fd_config=config_of(settings),
        kv_num_heads=1,
        num_heads=heads,
        head_dim=settings["nope"] + settings["rope"],
        **BLOCK_SHAPES,
    )

    def forward(q: Tensor, **given: Tensor | None) -> Tensor:
        beside = {
            "k": None,
            "v": None,
            "cache_seqlens": None,
            **given,
            "q": q,
            "compressed_kv": inputs["compressed_kv"].contiguous(),
            "k_pe": inputs["k_pe"].unsqueeze(1).contiguous(),
            "latent_cache": cache,
        }
        (attended,) = owned(call(backend.name, partial(attend, settings), beside, backend.environment))
        result: Tensor = attended
        return result

    has_prefill = bool((inputs["seq_lens_encoder"] > 0).any())
    # As the model decides: a slot that has cached tokens, whether it decodes or not.
    has_decode = bool((inputs["seq_lens_decoder"] > 0).any())
    prefilled = decoded = None
    if has_prefill:
        query = torch.cat([inputs["q_nope"], inputs["q_pe"]], 2)
        attended = forward(query, **keys_and_values(backend, inputs, step))
        prefilled = attended.reshape(tokens, heads, -1)[:, :, :values]
    if has_decode:
        decoded = decode(forward, backend, inputs, step, by_slot=by_slot)
    if prefilled is not None and decoded is not None:
        out.copy_(merged(backend, inputs, step, prefilled, decoded))
    elif prefilled is not None or decoded is not None:
        out.copy_(decoded if prefilled is None else prefilled)
    else:
        out.zero_()
    out[step["batch_id_per_token"] < 0] = 0


def keys_and_values(backend: Backend, inputs: Tensors, step: Tensors) -> dict[str, Tensor]:
    """Keys and values of each head: [Tk, H, qk_head_dim] both, of cached and new tokens if they are read."""
    latents, rope_keys = inputs["compressed_kv"].contiguous(), inputs["k_pe"].contiguous()
    w_uk, w_uv = inputs["w_uk"], inputs["w_uv"]
    if READS:
        latents, rope_keys = backend.call(
            READ,
            latent_cache=inputs["latent_cache"],
            block_tables=step["block_tables"],
            new_compressed_kv=latents,
            new_k_pe=rope_keys,
            cu_seqlens_k=step["cu_seqlens_k"],
            cu_seqlens_q=step["cu_seqlens_q"],
            kv_lora_rank=latents.shape[1],
            qk_rope_head_dim=rope_keys.shape[1],
            block_size=inputs["latent_cache"].shape[2],
        )
    # [H, Tk, R], one latent for all heads.
    shared = latents.expand(len(w_uk), -1, -1)
    nope = torch.bmm(shared, w_uk.transpose(1, 2)).transpose(0, 1)
    key = torch.cat([nope, rope_keys.unsqueeze(1).expand(-1, len(w_uk), -1)], 2)
    value = torch.bmm(shared, w_uv).transpose(0, 1)
    padded = torch.nn.functional.pad(value, (0, key.shape[2] - value.shape[2]))
    return {"k": key.contiguous(), "v": padded.contiguous()}


def decode(
    forward: Callable[..., Tensor], backend: Backend, inputs: Tensors, step: Tensors, *, by_slot: bool
) -> Tensor:
    """[Tp, H, V]: decode rows' outputs at their tokens, anything elsewhere."""
    w_uk, w_uv = inputs["w_uk"], inputs["w_uv"]
    absorbed = torch.bmm(inputs["q_nope"].transpose(0, 1), w_uk).transpose(0, 1)
    query = torch.cat([absorbed, inputs["q_pe"]], 2).flatten(1)
    if by_slot:
        rows = {name: step[name] for name in ("cu_seqlens_q", "seq_lens_encoder", "seq_lens_decoder")}
        by_slots, cache_seqlens = backend.call(EXTRACT, q=query, **rows)
        result = forward(by_slots, cache_seqlens=cache_seqlens)
        (latents,) = backend.call(
            INSERT,
            decoder_result=result.reshape(len(cache_seqlens), 1, len(w_uk), -1),
            **rows,
            mixed_token_num=len(query),
        )
    else:
        latents = forward(query)
    by_head = latents.reshape(len(query), len(w_uv), -1).transpose(0, 1)
    return torch.bmm(by_head, w_uv).transpose(0, 1)


def merged(backend: Backend, inputs: Tensors, step: Tensors, prefilled: Tensor, decoded: Tensor) -> Tensor:
    """[Tp, H, V]: what prefill gave, with decode rows' tokens as decode gave them."""
    tokens, heads, width = prefilled.shape
    result = prefilled.reshape(tokens, heads * width)
    backend.call(
        MERGE,
        **lengths(inputs),
        encoder_res=result,
        decoder_res=decoded.reshape(tokens, heads * width),
        cu_seq_q=step["cu_seqlens_q"],
        head_num=heads,
        head_dim=width,
        max_token=1,
    )
    return result.view(prefilled.shape)


# ---- paths ---------------------------------------------------------------------------------------


def path_of(backend: Backend, variant: str, lacking: str | None = None) -> KernelPath:
    """The path of a backend; `lacking` says what it needs beside FastDeploy."""
    told = about(*backend.operators, environment=backend.environment)
    return KernelPath(
        name=f"adapters/fastdeploy/mla_step@{variant}",
        operator="mla_step",
        supports=partial(supports, backend),
        run=partial(run, backend),
        allocates=True,
        **{**told, "unavailable": told["unavailable"] or lacking},
    )


NO_FLASH_MLA = None if importlib.util.find_spec("flash_mla") else "flash_mla is not installed"

PATHS = (
    path_of(MLA, "mla_attn"),
    path_of(FLASH, "flash_mla", NO_FLASH_MLA),
    path_of(TRITON, "triton_mla_attn"),
)
