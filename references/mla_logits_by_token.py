"""Logits of a whole model again, in NumPy: token by token, with a cache of its own, absorbed.

Shares nothing with the definition. A token goes through all layers before the next one begins; of those
before it, it sees only what they left in the cache: a latent c and a rotated key part r, D / 2 complex
numbers. No key and no value is ever made:

    s_j  = softmax_scale * query_scale * (q_nope w_uk . c_j + Re sum(q_pe * conj(r_j)))
    out  = (sum_j softmax(s)_j c_j) w_uv

The rotation of position p multiplies each pair, as a complex number, by exp(i p w). The cache begins empty:
the `latent_cache` of the inputs is rounded to the model's dtype, and what it should hold is part of the
question. So cached tokens go through all layers too, however the row was cut into steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cases.models import Model, RopeScaling, load_model
from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, maybe_tensor, number, tensor, text

Float64 = npt.NDArray[np.float64]
Complex128 = npt.NDArray[np.complex128]

STAGES = ("q", "q_pe", "k_pe", "compressed_kv", "attention", "o_proj_out", "hidden")


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Logits [Tp, vocab], the stages [L, Tp, ...] and the cache rows written, float64, on the host.

    Raises:
        ValueError: an emulation is asked for, which the definition has; or the model has more in its layers.
    """
    if precision is not None:
        raise ValueError("logits token by token are float64 only")
    model = load_model(text(inputs, "model"))
    if model.model_type is None:
        raise ValueError(f"{model.name} has no model_type: nothing says that its layers are of this form")
    stack = _Stack.of(model, inputs)
    history = tensor(inputs, "history_ids").tolist()
    new_ids = tensor(inputs, "token_ids").tolist()
    begins = tensor(inputs, "cu_seqlens_k").tolist()
    owners = tensor(inputs, "batch_id_per_token").tolist()
    positions = tensor(inputs, "position_ids").tolist()
    tables, cache = tensor(inputs, "block_tables").tolist(), tensor(inputs, "latent_cache")
    blocks, block_size = cache.shape[1], cache.shape[3]

    memories: dict[int, list[_Memory]] = {}
    steps: dict[int, dict[str, Float64]] = {}
    targets: list[int] = []
    for token, slot in enumerate(owners):
        if slot < 0:
            continue
        memory = memories.setdefault(slot, [_Memory() for _ in stack.layers])
        # At a row's first new token its memory is empty: what came before is told first.
        while len(memory[0].latents) < positions[token]:
            stack.step(history[begins[slot] + len(memory[0].latents)], memory)
        steps[token] = stack.step(new_ids[token], memory)
        block, offset = divmod(positions[token], block_size)
        targets.append(tables[slot][block] * block_size + offset)

    shapes = {name: values.shape for name, values in stack.step(0, [_Memory() for _ in stack.layers]).items()}
    collected = {name: np.zeros((len(owners), *shape)) for name, shape in shapes.items()}
    for token, values in steps.items():
        for name, value in values.items():
            collected[name][token] = value
    outputs = {name: np.moveaxis(collected[name], 0, 1) for name in STAGES}
    rows = [layer * blocks * block_size + row for layer in range(len(stack.layers)) for row in targets]
    written = np.concatenate([outputs["compressed_kv"], outputs["k_pe"]], axis=-1)[:, sorted(steps)]
    return {
        "logits": torch.from_numpy(collected["logits"]),
        **{name: torch.from_numpy(values) for name, values in outputs.items()},
        "latent_cache": Writes(
            torch.tensor(rows, dtype=torch.int64),
            torch.from_numpy(written.reshape(len(rows), cache.shape[-1])),
        ),
    }


@dataclass
class _Memory:
    """What a layer keeps of a row's tokens."""

    latents: list[Float64] = field(default_factory=list)
    ropes: list[Complex128] = field(default_factory=list)


@dataclass(frozen=True)
class _Stack:
    """A model with its weights, the attention's kv_b_proj taken apart."""

    model: Model
    softmax_scale: float
    embed_tokens: Float64
    layers: list[dict[str, Float64]]
    norm: Float64
    lm_head: Float64
    steps_per_position: Float64
    rope_scale: float

    @classmethod
    def of(cls, model: Model, inputs: Inputs) -> _Stack:
        """The inputs' weights, widened."""
        arrays = {
            name: held.to(torch.float64).cpu().numpy()
            for name in (
                *("embed_tokens", "input_layernorm", "q_a_proj", "q_a_layernorm", "q_b_proj", "q_proj"),
                *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "post_attention_layernorm"),
                *("gate_proj", "up_proj", "down_proj", "norm", "lm_head"),
            )
            if (held := maybe_tensor(inputs, name)) is not None
        }
        outer = {name: arrays.pop(name) for name in ("embed_tokens", "norm", "lm_head")}
        nope, rank = model.qk_nope_head_dim, model.kv_lora_rank
        layers = []
        for index in range(len(arrays["input_layernorm"])):
            layer = {name: values[index] for name, values in arrays.items()}
            halves = layer.pop("kv_b_proj").reshape(-1, nope + model.v_head_dim, rank)
            layer["w_uk"] = np.ascontiguousarray(halves[:, :nope])
            layer["w_uv"] = np.ascontiguousarray(halves[:, nope:])
            layers.append(layer)
        speeds, scale = _rotation(model)
        return cls(
            model=model,
            softmax_scale=number(inputs, "softmax_scale"),
            layers=layers,
            steps_per_position=speeds,
            rope_scale=scale,
            **outer,
        )

    def step(self, token_id: int, memory: list[_Memory]) -> dict[str, Float64]:
        """One more token of a row: its logits [vocab] and its stages [L, ...]; memory grows by it."""
        model = self.model
        position = len(memory[0].latents)
        branch = 1.0
        if model.scale_depth is not None:
            branch = model.scale_depth * model.num_hidden_layers**-0.5
        stream = model.scale_emb * self.embed_tokens[token_id]
        kept: dict[str, list[Float64]] = {name: [] for name in STAGES}
        for layer, past in zip(self.layers, memory, strict=True):
            normed = _normalised(stream, model.rms_norm_eps) * layer["input_layernorm"]
            stages = self._attend(layer, past, normed, position)
            stream = stream + branch * stages["o_proj_out"]
            normed = _normalised(stream, model.rms_norm_eps) * layer["post_attention_layernorm"]
            gate = layer["gate_proj"] @ normed
            active = gate / (1 + np.exp(-gate)) * (layer["up_proj"] @ normed)
            stream = stream + branch * (layer["down_proj"] @ active)
            for name, value in {**stages, "hidden": stream}.items():
                kept[name].append(value)
        last = _normalised(stream, model.rms_norm_eps) * self.norm
        if model.dim_model_base is not None:
            last = last * model.dim_model_base / model.hidden_size
        return {"logits": self.lm_head @ last, **{name: np.stack(values) for name, values in kept.items()}}

    def _attend(
        self, layer: dict[str, Float64], past: _Memory, normed: Float64, position: int
    ) -> dict[str, Float64]:
        """A token's stages in one layer's attention, from its normalised input [hidden]."""
        model = self.model
        nope, rank = model.qk_nope_head_dim, model.kv_lora_rank
        if "q_proj" in layer:
            q = layer["q_proj"] @ normed
        else:
            # 1e-6 whatever rms_norm_eps is: the default of DeepSeek's norm, which the latents' norms keep.
            q = layer["q_b_proj"] @ (_normalised(layer["q_a_proj"] @ normed, 1e-6) * layer["q_a_layernorm"])
        heads = q.reshape(-1, model.qk_head_dim)
        down = layer["kv_a_proj_with_mqa"] @ normed
        latent = _normalised(down[:rank], 1e-6) * layer["kv_a_layernorm"]
        turn = self.rope_scale * np.exp(1j * position * self.steps_per_position)
        q_pe, k_pe = self._paired(heads[:, nope:]) * turn, self._paired(down[rank:]) * turn
        past.latents.append(latent)
        past.ropes.append(k_pe)

        latents, ropes = np.array(past.latents), np.array(past.ropes)
        absorbed = np.einsum("hn,hnr->hr", heads[:, :nope], layer["w_uk"])
        logits = absorbed @ latents.T + (q_pe @ ropes.conj().T).real
        logits = logits * (self.softmax_scale * self._sharpening(position))
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        mean = (shares / shares.sum(axis=1, keepdims=True)) @ latents
        attention = np.einsum("hr,hvr->hv", mean, layer["w_uv"]).reshape(-1)
        return {
            "q": q,
            "q_pe": self._unpaired(q_pe),
            "k_pe": self._unpaired(k_pe),
            "compressed_kv": latent,
            "attention": attention,
            "o_proj_out": layer["o_proj"] @ attention,
        }

    def _sharpening(self, position: int) -> float:
        """What Mistral-4 multiplies a query by, which grows with how many original lengths lie behind it."""
        scaling = self.model.rope_scaling
        if scaling is None or scaling.llama_4_scaling_beta == 0:
            return 1.0
        behind = position // scaling.original_max_position_embeddings
        return 1 + scaling.llama_4_scaling_beta * math.log(1 + behind)

    def _paired(self, part: Float64) -> Complex128:
        """[..., D] as D / 2 complex numbers."""
        if self.model.rope == "interleaved":
            return part[..., 0::2] + 1j * part[..., 1::2]
        middle = part.shape[-1] // 2
        return part[..., :middle] + 1j * part[..., middle:]

    def _unpaired(self, pairs: Complex128) -> Float64:
        """[..., D], columns as the model has them."""
        if self.model.rope == "interleaved":
            return np.stack([pairs.real, pairs.imag], axis=-1).reshape(*pairs.shape[:-1], -1)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _normalised(values: Float64, eps: float) -> Float64:
    """Values over their root mean square."""
    return values / math.sqrt(float(values @ values) / len(values) + eps)


def _rotation(model: Model) -> tuple[Float64, float]:
    """Radians a position of each of the D / 2 pairs, and what a rotated pair is multiplied by."""
    pairs, scaling = model.qk_rope_head_dim // 2, model.rope_scaling
    if model.rope == "none":
        return np.zeros(pairs), 1.0
    plain = np.exp(-np.log(model.rope_theta) * np.arange(pairs) / pairs)
    if scaling is None:
        return plain, 1.0
    beyond = scaling.factor > 1
    if scaling.type == "longrope":
        stretched = plain / np.asarray(scaling.long_factor if beyond else scaling.short_factor)
        original = math.log(scaling.original_max_position_embeddings)
        return stretched, (1 + math.log(scaling.factor) / original) ** 0.5 if beyond else 1.0
    if scaling.type != "yarn":
        raise ValueError(f"rope_scaling of {model.name} is yarn or longrope, got {scaling.type!r}")
    first, last = _transition(model, scaling)
    # From the first pair to the last one, the frequency goes over to 1 / factor of it in equal steps.
    kept = np.interp(np.arange(pairs), [first, max(last, first + 0.001)], [1.0, 0.0])
    numerator, denominator = (
        0.1 * mscale * math.log(scaling.factor) + 1 if beyond else 1.0
        for mscale in (scaling.mscale, scaling.mscale_all_dim)
    )
    return plain * (kept + (1 - kept) / scaling.factor), numerator / denominator


def _transition(model: Model, scaling: RopeScaling) -> tuple[int, int]:
    """The last pair that turns often enough to be kept, and the first that is stretched by all of the factor.

    These turn beta_fast times or more, beta_slow times or fewer within the original length. Counted over as
    many pairs as the head has columns: a bound may lie beyond its own.
    """
    width = model.qk_rope_head_dim
    turns = [
        scaling.original_max_position_embeddings / (2 * math.pi) * model.rope_theta ** (-2 * pair / width)
        for pair in range(width)
    ]
    fast = [pair for pair, count in enumerate(turns) if count >= scaling.beta_fast]
    slow = [pair for pair, count in enumerate(turns) if count <= scaling.beta_slow]
    return (fast[-1] if fast else 0), (slow[0] if slow else width - 1)


ORACLE = Oracle(
    name="mla_logits_by_token",
    operator="mla_logits",
    role="derivation",
    source="arXiv:2405.04434, the absorption of W_UK and W_UV in section 2.1.2; rope: arXiv:2104.09864",
    run=run,
)
