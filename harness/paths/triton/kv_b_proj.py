"""`KVBProjection`: one rank's kv_b_proj, from loading to its two uses around MLA attention.

    parameter           shape        dtype
    k_b_proj_weight     [H, N, R]    model dtype, contiguous; W_UK
    v_b_proj_weight     [H, R, V]    model dtype, contiguous; W_UV

H = heads of the model / ranks. Both parameters exist from construction on and keep their memory: weights that
are loaded again, of a checkpoint updated while serving, replace their contents in place, and a captured graph
sees them.

    load_choice     load_weight                     process_weights_after_loading
    default_v0      splits                          nothing is left to do
    default_v1      keeps the checkpoint's tensor   splits it and lets it go
    dummy           refused                         nothing: both parameters are and stay 0

`process_weights_after_loading` may be called any number of times, loaded or not. A use before the weights are
loaded is refused.

Uses, T tokens: absorbed, for decode rows, q_nope [T, H, N] -> `absorb_query` [T, H, R] before attention over
latents and `project_output` [T, H, R] -> [T, H, V] behind it; unabsorbed, for prefill rows, latents [T, R] ->
`expand_keys` [T, H, N] and `expand_values` [T, H, V]. Each is one batched matrix product in the model dtype.
With dummy weights the absorbed form gives exactly 0, whatever attention does in between with finite numbers.

`pad_values` and `crop_output` stand around attention kernels that know one head width alone.

Not: quantised checkpoints, moving between devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.triton.kv_b_split import LAYOUTS, Layout, split_kv_b_proj

LoadChoice = Literal["default_v0", "default_v1", "dummy"]
LOAD_CHOICES: tuple[LoadChoice, ...] = ("default_v0", "default_v1", "dummy")


@dataclass(frozen=True)
class KVBDimensions:
    """What one rank's kv_b_proj is shaped by.

    Attributes:
        num_attention_heads: of the model, all ranks together.
        qk_nope_head_dim, v_head_dim, kv_lora_rank: N, V and R.
        tensor_parallel_size: ranks that the heads are divided among, in blocks.
        tensor_parallel_rank: this rank, from 0.

    Raises:
        ValueError: v_head_dim is missing, the heads cannot be divided, or there is no such rank.
    """

    num_attention_heads: int
    qk_nope_head_dim: int
    v_head_dim: int | None
    kv_lora_rank: int
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0

    def __post_init__(self) -> None:
        heads, size, rank = self.num_attention_heads, self.tensor_parallel_size, self.tensor_parallel_rank
        if self.v_head_dim is None:
            raise ValueError(
                "v_head_dim is None, expected the width of a head's values: the model's config has it"
            )
        if size < 1 or heads % size:
            raise ValueError(
                f"num_attention_heads={heads} cannot be divided among tensor_parallel_size={size} ranks: "
                "choose a size that divides it"
            )
        if not 0 <= rank < size:
            raise ValueError(f"tensor_parallel_rank is 0 to {size - 1}, got {rank}")

    @property
    def heads(self) -> int:
        """H: heads of this rank."""
        return self.num_attention_heads // self.tensor_parallel_size

    @property
    def value_width(self) -> int:
        """V, which is not None once constructed."""
        return self.v_head_dim or 0

    @property
    def head_features(self) -> int:
        """N + V: output features of kv_b_proj that one head has."""
        return self.qk_nope_head_dim + self.value_width


class KVBProjection:
    """One rank's kv_b_proj; see the module's docstring.

    Attributes:
        k_b_proj_weight, v_b_proj_weight: the parameters.
        kv_b_proj: the checkpoint's tensor between loading and processing, else None.

    Raises:
        ValueError: load choice or layout is none of those there are.
    """

    def __init__(
        self,
        dimensions: KVBDimensions,
        *,
        load_choice: LoadChoice = "default_v1",
        layout: Layout = "torch",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if load_choice not in LOAD_CHOICES:
            raise ValueError(f"load_choice is one of {', '.join(LOAD_CHOICES)}, got {load_choice!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.dimensions = dimensions
        self.load_choice = load_choice
        self.layout = layout
        self.kv_b_proj: Tensor | None = None
        self.is_loaded = load_choice == "dummy"
        heads, rank = dimensions.heads, dimensions.kv_lora_rank
        self.k_b_proj_weight = torch.zeros(
            heads, dimensions.qk_nope_head_dim, rank, dtype=dtype, device=device
        )
        self.v_b_proj_weight = torch.zeros(heads, rank, dimensions.value_width, dtype=dtype, device=device)

    def load_weight(self, weight: Tensor) -> None:
        """Takes the checkpoint's kv_b_proj.weight: of all ranks' heads, or of this rank's alone.

        Raises:
            ValueError: the weight has another shape, dtype or device, or the load choice is dummy.
        """
        if self.load_choice == "dummy":
            raise ValueError(
                "load_choice is dummy: its weights are 0 and no checkpoint is read; choose default_v1"
            )
        self._check_weight(weight)
        if self.load_choice == "default_v0":
            self._split(weight)
        else:
            self.kv_b_proj = weight

    def process_weights_after_loading(self) -> None:
        """Splits what was loaded and not yet split; safe to call again, and where nothing was loaded."""
        if self.kv_b_proj is None:
            return
        self._split(self.kv_b_proj)
        self.kv_b_proj = None

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """[T, H, N] -> [T, H, R]: queries that meet latents instead of keys."""
        return self.forward(q_nope.transpose(0, 1), "k").transpose(0, 1)

    def project_output(self, latent_out: Tensor) -> Tensor:
        """[T, H, R] -> [T, H, V]: attention over latents made attention over values."""
        return self.forward(latent_out.transpose(0, 1), "v").transpose(0, 1)

    def forward(self, x: Tensor, proj_type: str) -> Tensor:
        """The absorbed use, head by head: `k` [H, T, N] -> [H, T, R], `v` [H, T, R] -> [H, T, V].

        Raises:
            ValueError: proj_type is neither.
            RuntimeError: the weights were not loaded.
        """
        weights = {"k": self.k_b_proj_weight, "v": self.v_b_proj_weight}
        if proj_type not in weights:
            raise ValueError(f"proj_type is one of {', '.join(weights)}, got {proj_type!r}")
        self._require_weights()
        return torch.bmm(x, weights[proj_type])

    def expand_keys(self, latents: Tensor) -> Tensor:
        """[T, R] -> [T, H, N]: what each head's keys have that is not rotated."""
        self._require_weights()
        # One latent for all heads: nothing is copied.
        by_head = latents.expand(self.dimensions.heads, -1, -1)
        return torch.bmm(by_head, self.k_b_proj_weight.transpose(1, 2)).transpose(0, 1)

    def expand_values(self, latents: Tensor) -> Tensor:
        """[T, R] -> [T, H, V]: each head's values."""
        self._require_weights()
        by_head = latents.expand(self.dimensions.heads, -1, -1)
        return torch.bmm(by_head, self.v_b_proj_weight).transpose(0, 1)

    def _require_weights(self) -> None:
        if self.is_loaded:
            return
        raise RuntimeError(
            f"kv_b_proj has no weights yet (load_choice {self.load_choice}): call load_weight, "
            "then process_weights_after_loading"
        )

    def _check_weight(self, weight: Tensor) -> None:
        held, of = self.dimensions, self.k_b_proj_weight
        widths = [heads * held.head_features for heads in (held.num_attention_heads, held.heads)]
        shapes = [(held.kv_lora_rank, width) for width in widths]
        if self.layout == "torch":
            shapes = [(width, rank) for rank, width in shapes]
        if tuple(weight.shape) not in shapes:
            raise ValueError(
                f"kv_b_proj.weight in layout {self.layout} has shape {shapes[0]}, or {shapes[1]} for this "
                f"rank alone, got {tuple(weight.shape)}"
            )
        if (weight.dtype, weight.device) != (of.dtype, of.device):
            raise ValueError(
                f"kv_b_proj.weight is {of.dtype} on {of.device}, got {weight.dtype} on {weight.device}: "
                "convert it before it is loaded"
            )

    def _split(self, weight: Tensor) -> None:
        held = self.dimensions
        features = weight.shape[0 if self.layout == "torch" else 1]
        is_whole = features == held.num_attention_heads * held.head_features
        # A transposed view of another layout's tensor is dense along the other axis.
        dense = weight if weight.stride(1) == 1 else weight.contiguous()
        split_kv_b_proj(
            dense,
            self.k_b_proj_weight,
            self.v_b_proj_weight,
            first_head=held.tensor_parallel_rank * held.heads if is_whole else 0,
            layout=self.layout,
        )
        self.is_loaded = True


def pad_values(values: Tensor, qk_head_dim: int) -> Tensor:
    """[T, H, V] -> [T, H, N + D]: values with zeros behind them, for kernels whose heads have one width.

    Values that have the width of keys are returned as they are. Of attention's output the columns from V on
    are 0; `crop_output` leaves them out.

    Raises:
        ValueError: values are wider than keys.
    """
    width = values.shape[-1]
    if width > qk_head_dim:
        raise ValueError(
            f"values of width {width} cannot be padded to keys of width {qk_head_dim}: they are wider"
        )
    if width == qk_head_dim:
        return values
    padded = values.new_zeros(*values.shape[:-1], qk_head_dim)
    padded[..., :width] = values
    return padded


def crop_output(out: Tensor, v_head_dim: int) -> Tensor:
    """[T, H, N + D] -> [T, H, V]: attention's output over padded values without the padding."""
    return out[..., :v_head_dim]


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: every rank's projection loaded from both layouts, its parameters copied to the outputs.

    Unlike a step's kernels, loading allocates: the parameters are the projection's own.
    """
    for layout in LAYOUTS:
        weight = inputs[f"kv_b_proj_{layout}"]
        ranks = inputs["tensor_parallel_size"]
        for rank in range(ranks):
            dimensions = KVBDimensions(
                num_attention_heads=ranks * inputs["num_attention_heads"],
                qk_nope_head_dim=inputs["qk_nope_head_dim"],
                v_head_dim=inputs["v_head_dim"],
                kv_lora_rank=weight.shape[layout == "torch"],
                tensor_parallel_size=ranks,
                tensor_parallel_rank=rank,
            )
            projection = KVBProjection(dimensions, layout=layout, dtype=weight.dtype, device=weight.device)
            projection.load_weight(weight)
            projection.process_weights_after_loading()
            outputs[f"k_b_proj_weight_{layout}"][rank].copy_(projection.k_b_proj_weight)
            outputs[f"v_b_proj_weight_{layout}"][rank].copy_(projection.v_b_proj_weight)


PATHS = (
    KernelPath(
        name="triton/kv_b_proj",
        operator="kv_b_split",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
