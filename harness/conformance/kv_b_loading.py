"""The life of a loaded kv_b_proj, whatever the engine: construction, loading, processing, use.

    from harness.conformance.facts import findings
    from harness.conformance.kv_b_loading import FACTS

    def make(request):                      # an engine's loader as a `KVBLoader`
        ...

    for finding in findings(make, FACTS):   # or facts("cuda"), for loaders that live on a GPU
        assert finding.reason is None, finding

The factory gives the object as the engine has it once the checkpoint's tensors have been read and before
`process_weights_after_loading`. What an engine calls otherwise, an adapter in the factory renames.

Source: FastDeploy O22 and its bugs B40 and B41; arXiv:2405.04434 section 2.1 for the two uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from harness.budgets import judge_rows, row_errors
from harness.checks._check import bits_differ
from harness.conformance.facts import Fact, refuses
from harness.data import UNIT
from harness.hashing import normal_integers, row_seeds
from harness.kv_b_data import weight_rows
from harness.tensors import DTYPES
from references.oracle import Inputs, oracle_for

ROPE = 16
TOKENS = 5
"""Tokens of a use; each is a row of its own."""


@dataclass(frozen=True)
class LoadRequest:
    """What a loader is made for.

    Attributes:
        num_attention_heads: of the model, all ranks together.
        qk_nope_head_dim, v_head_dim, kv_lora_rank: N, V and R; V is None where a config lacks it.
        tensor_parallel_size, tensor_parallel_rank: ranks, and this one.
        load_choice: `default_v0`, `default_v1` or `dummy`.
        layout: how the checkpoint stores weights, `paddle` (input features first) or `torch`.
        dtype: `bf16`, `fp16` or `fp32`, of checkpoint and parameters.
        device: where checkpoint, parameters and what is projected lie.
    """

    num_attention_heads: int = 4
    qk_nope_head_dim: int = 24
    v_head_dim: int | None = 40
    kv_lora_rank: int = 32
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0
    load_choice: str = "default_v1"
    layout: str = "torch"
    dtype: str = "bf16"
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            f"load_choice {self.load_choice}, layout {self.layout}, {self.dtype}, "
            f"rank {self.tensor_parallel_rank} of {self.tensor_parallel_size}, "
            f"{self.num_attention_heads} heads of N {self.qk_nope_head_dim} and V {self.v_head_dim}, "
            f"R {self.kv_lora_rank}, on {self.device}"
        )

    @property
    def heads(self) -> int:
        """Heads of the rank."""
        return self.num_attention_heads // self.tensor_parallel_size

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of k_b_proj_weight and v_b_proj_weight."""
        rank = self.kv_lora_rank
        return (self.heads, self.qk_nope_head_dim, rank), (self.heads, rank, self.v_head_dim or 0)

    @property
    def kv_b_proj(self) -> Tensor | None:
        """The checkpoint's weight of all ranks' heads in the asked layout; None in a dummy load."""
        if self.load_choice == "dummy":
            return None
        weight = self.by_rank if self.layout == "paddle" else self.by_rank.T.contiguous()
        return weight.to(self.device)

    @property
    def by_rank(self) -> Tensor:
        """[R, H_total (N + V)] on the host: the checkpoint's weight, input features first."""
        width = self.num_attention_heads * (self.qk_nope_head_dim + (self.v_head_dim or 0))
        rows = torch.arange(self.kv_lora_rank)
        return weight_rows("kv_b_proj", rows, width, DTYPES[self.dtype], seed=0)

    def numbers(self, name: str, *shape: int) -> Tensor:
        """As `numbers`, in this dtype and on this device."""
        return numbers(name, *shape, dtype=DTYPES[self.dtype]).to(self.device)


class KVBLoader(Protocol):
    """An engine's object that holds one rank's kv_b_proj."""

    @property
    def k_b_proj_weight(self) -> Tensor:
        """[H, N, R]."""
        ...

    @property
    def v_b_proj_weight(self) -> Tensor:
        """[H, R, V]."""
        ...

    def process_weights_after_loading(self) -> None:
        """What the engine calls once its weights are there; in a dummy load, where none are, too."""
        ...

    def forward(self, x: Tensor, proj_type: str) -> Tensor:
        """Absorbed use: `k` [H, T, N] -> [H, T, R], `v` [H, T, R] -> [H, T, V]."""
        ...

    def expand_keys(self, latents: Tensor) -> Tensor:
        """Unabsorbed use: [T, R] -> [T, H, N]."""
        ...

    def expand_values(self, latents: Tensor) -> Tensor:
        """Unabsorbed use: [T, R] -> [T, H, V]."""
        ...


Factory = Callable[[LoadRequest], KVBLoader]

DUMMY = tuple(
    LoadRequest(load_choice="dummy", tensor_parallel_size=size, tensor_parallel_rank=size - 1, dtype=dtype)
    for size, dtype in ((1, "bf16"), (4, "fp16"), (2, "fp32"))
)
LOADED = tuple(
    LoadRequest(
        load_choice=choice,
        layout=layout,
        tensor_parallel_size=size,
        tensor_parallel_rank=rank,
        # Equal widths too: they are the common ones, and a swap of halves fits them.
        v_head_dim=value,
    )
    for choice, layout, (size, rank), value in product(
        ("default_v0", "default_v1"), ("paddle", "torch"), ((1, 0), (2, 0), (2, 1), (4, 2)), (24, 40)
    )
)
USED = tuple(
    LoadRequest(
        layout=layout,
        dtype=dtype,
        tensor_parallel_size=2,
        tensor_parallel_rank=1,
        kv_lora_rank=256,
    )
    for layout, dtype in product(("paddle", "torch"), DTYPES)
)


def processed(make: Factory, request: LoadRequest) -> KVBLoader:
    """A loader after processing."""
    loader = make(request)
    loader.process_weights_after_loading()
    return loader


def numbers(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """Bell-shaped values of deviation 1.15 from the hash, of any shape, on the host."""
    rows = torch.arange(prod(shape[:-1]))
    seeds = row_seeds(0, name, torch.zeros_like(rows), rows)
    return (normal_integers(seeds, shape[-1]).to(torch.float32) * UNIT).to(dtype).view(*shape)


# ---- dummy load ----------------------------------------------------------------------------------


def parameters_differ(loader: KVBLoader, request: LoadRequest) -> str | None:
    """None if both parameters have the request's shapes and dtype."""
    parameters = {"k_b_proj_weight": loader.k_b_proj_weight, "v_b_proj_weight": loader.v_b_proj_weight}
    for (name, parameter), shape in zip(parameters.items(), request.shapes, strict=True):
        if tuple(parameter.shape) != shape:
            return f"{name} has shape {tuple(parameter.shape)}, expected {shape}"
        if parameter.dtype is not DTYPES[request.dtype]:
            return f"{name} is {parameter.dtype}, expected {DTYPES[request.dtype]}"
    return None


def parameters_not_zero(loader: KVBLoader, request: LoadRequest) -> str | None:
    """None if both parameters are 0 everywhere."""
    for name in ("k_b_proj_weight", "v_b_proj_weight"):
        others = int((getattr(loader, name) != 0).sum())
        if others:
            return f"{others:,} elements of {name} are not 0"
    return None


def _dummy_parameters(make: Factory, request: LoadRequest) -> str | None:
    return parameters_differ(make(request), request)


def _dummy_zeros(make: Factory, request: LoadRequest) -> str | None:
    return parameters_not_zero(make(request), request)


def _dummy_processing(make: Factory, request: LoadRequest) -> str | None:
    loader = make(request)
    for _ in range(2):
        loader.process_weights_after_loading()
        reason = parameters_differ(loader, request) or parameters_not_zero(loader, request)
        if reason is not None:
            return f"after process_weights_after_loading {reason}"
    return None


def _dummy_decode(make: Factory, request: LoadRequest) -> str | None:
    loader, (heads, nope, rank) = processed(make, request), request.shapes[0]
    latents, rope = request.numbers("latents", 9, rank), request.numbers("rope", 9, ROPE)
    absorbed = loader.forward(request.numbers("q_nope", heads, TOKENS, nope), "k")
    if bool(absorbed.any()):
        return "absorbed queries are not 0"
    logits = request.numbers("q_pe", heads, TOKENS, ROPE).double() @ rope.double().T
    latent_out = torch.softmax(logits + absorbed.double() @ latents.double().T, -1) @ latents.double()
    out = loader.forward(latent_out.to(latents.dtype), "v")
    expected = (heads, TOKENS, request.v_head_dim)
    if tuple(out.shape) != expected:
        return f"decode attention has shape {tuple(out.shape)}, expected {expected}"
    return "decode attention is not exactly 0" if bool(out.any()) else None


# ---- loaded weights ------------------------------------------------------------------------------


def _loaded_weights(make: Factory, request: LoadRequest) -> str | None:
    loader = processed(make, request)
    return parameters_differ(loader, request) or _other_weights(loader, request)


def _processed_again(make: Factory, request: LoadRequest) -> str | None:
    loader = processed(make, request)
    for _ in range(2):
        loader.process_weights_after_loading()
        reason = parameters_differ(loader, request) or _other_weights(loader, request)
        if reason is not None:
            return f"processed again, {reason}"
    return None


def _other_weights(loader: KVBLoader, request: LoadRequest) -> str | None:
    """None if both parameters are the checkpoint's, bit for bit."""
    inputs: Inputs = {
        "kv_b_proj_paddle": request.by_rank,
        "kv_b_proj_torch": request.by_rank.T,
        "num_attention_heads": request.heads,
        "qk_nope_head_dim": request.qk_nope_head_dim,
        "v_head_dim": request.v_head_dim,
        "tensor_parallel_size": request.tensor_parallel_size,
    }
    expected = oracle_for("kv_b_split", "definition").run(inputs, None)
    for name in ("k_b_proj_weight", "v_b_proj_weight"):
        right = expected[f"{name}_{request.layout}"]
        if not isinstance(right, Tensor):
            raise TypeError(f"the oracle of kv_b_split must return a tensor for {name}")
        differs = bits_differ(getattr(loader, name).cpu(), right[request.tensor_parallel_rank])
        if bool(differs.any()):
            first, wrong = tuple(differs.nonzero()[0].tolist()), int(differs.sum())
            return f"{wrong:,} of {differs.numel():,} elements of {name} differ, the first at {first}"
    return None


# ---- uses ----------------------------------------------------------------------------------------


def unsplit(request: LoadRequest) -> Tensor:
    """[R, H, N + V] float64 on the request's device: the rank's heads of the checkpoint's weight."""
    width = request.qk_nope_head_dim + (request.v_head_dim or 0)
    heads = request.by_rank.double().view(request.kv_lora_rank, request.num_attention_heads, width)
    first = request.tensor_parallel_rank * request.heads
    return heads[:, first : first + request.heads].to(request.device)


def over_budget(what: str, got: Tensor, exact: Tensor, dtype: str) -> str | None:
    """None if every (token, head) row [T, H, n] is within what one rounding of it allows."""
    if got.shape != exact.shape:
        return f"{what} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    rounded = row_errors(exact.to(DTYPES[dtype]), exact).relative_l2
    judged = judge_rows(dtype, row_errors(got, exact), rounded)
    if not bool(judged.over.any()):
        return None
    worst = float((judged.error / judged.budget).max())
    over, rows = int(judged.over.sum()), judged.over.numel()
    return f"{over} of {rows} (token, head) rows of {what} are over budget, the worst by {worst:.1f} x"


def _absorbed_use(make: Factory, request: LoadRequest) -> str | None:
    loader, weight, nope = processed(make, request), unsplit(request), request.qk_nope_head_dim
    q_nope = request.numbers("q_nope", TOKENS, request.heads, nope)
    latent_out = request.numbers("latent_out", TOKENS, request.heads, request.kv_lora_rank)
    # (q W_UK) c = q (W_UK c): what meets a latent in place of its key.
    query = torch.einsum("thk,rhk->thr", q_nope.double(), weight[..., :nope])
    value = torch.einsum("thr,rhv->thv", latent_out.double(), weight[..., nope:])
    got_query, got_value = (
        loader.forward(x.transpose(0, 1), kind).transpose(0, 1)
        for x, kind in ((q_nope, "k"), (latent_out, "v"))
    )
    return over_budget("forward k", got_query, query, request.dtype) or over_budget(
        "forward v", got_value, value, request.dtype
    )


def _unabsorbed_use(make: Factory, request: LoadRequest) -> str | None:
    loader, nope = processed(make, request), request.qk_nope_head_dim
    latents = request.numbers("latents", TOKENS, request.kv_lora_rank)
    both = torch.einsum("tr,rhj->thj", latents.double(), unsplit(request))
    return over_budget(
        "expand_keys", loader.expand_keys(latents), both[..., :nope], request.dtype
    ) or over_budget("expand_values", loader.expand_values(latents), both[..., nope:], request.dtype)


# ---- refusals ------------------------------------------------------------------------------------


def _unknown_proj_type(make: Factory, request: LoadRequest) -> str | None:
    loader = processed(make, request)
    x = torch.zeros(*request.shapes[0], dtype=DTYPES[request.dtype], device=request.device)
    for proj_type in ("q", "kv", "", "K"):
        reason = refuses(lambda proj_type=proj_type: loader.forward(x, proj_type))  # type: ignore[misc]
        if reason is not None:
            return f"proj_type {proj_type!r}: {reason}"
    return None


def _missing_v_head_dim(make: Factory, request: LoadRequest) -> str | None:
    return refuses(lambda: make(request), "v_head_dim")


def _indivisible_heads(make: Factory, request: LoadRequest) -> str | None:
    return refuses(lambda: make(request), str(request.num_attention_heads), str(request.tensor_parallel_size))


_WITHOUT_WIDTH = tuple(replace(request, v_head_dim=None) for request in (DUMMY[0], LOADED[0], LOADED[-1]))
_INDIVISIBLE = tuple(
    replace(request, num_attention_heads=20, tensor_parallel_size=8, tensor_parallel_rank=1)
    for request in (DUMMY[0], LOADED[0], LOADED[-1])
)

FACTS: tuple[Fact[Factory, LoadRequest], ...] = (
    Fact("dummy_parameters_exist_from_construction", "B40, L39", DUMMY, _dummy_parameters),
    Fact("dummy_parameters_are_zero", "O22, L39", DUMMY, _dummy_zeros),
    Fact("dummy_processing_twice_changes_nothing", "B41, L39", DUMMY, _dummy_processing),
    Fact("dummy_decode_is_exactly_zero", "O22", DUMMY, _dummy_decode),
    Fact("loaded_weights_are_the_checkpoints", "O22, L40", LOADED, _loaded_weights),
    Fact("processing_again_is_safe", "O22, L39", LOADED, _processed_again),
    Fact("absorbed_use_equals_the_unsplit_projection", "O22, L40, D7", USED, _absorbed_use),
    Fact("unabsorbed_use_equals_the_unsplit_projection", "O22, L40, D7", USED, _unabsorbed_use),
    Fact("unknown_proj_types_are_refused", "O22", (*DUMMY, *LOADED[:1]), _unknown_proj_type),
    Fact("a_missing_v_head_dim_is_refused", "O22", _WITHOUT_WIDTH, _missing_v_head_dim),
    Fact("heads_that_ranks_cannot_share_are_refused", "O22", _INDIVISIBLE, _indivisible_heads),
)


def facts(device: str) -> tuple[Fact[Factory, LoadRequest], ...]:
    """The facts of loaders that live on a device."""
    return tuple(
        replace(fact, circumstances=[replace(request, device=device) for request in fact.circumstances])
        for fact in FACTS
    )
