"""The dimensions of one layer of a case, every default resolved."""

from __future__ import annotations

from dataclasses import dataclass

from cases.models import Model, load_model
from cases.options import Options


@dataclass(frozen=True)
class Layer:
    """One layer: the model's dimensions with what the case says of this layer.

    Attributes:
        index: position in the stack, from 0.
        model: the model whose dimensions hold where the case says nothing else.
        num_attention_heads: query heads of this rank.
        block_size: tokens a cache block.
        window: visible keys, self included; 0 is all.
        cache: storage of the cache, `same` (the model dtype), `fp8` or `packed`.
        dtype: model dtype, `bf16`, `fp16` or `fp32`.
        tensor_parallel_size: ranks that the model's heads are divided among.
        index_topk: entries of a token's list of keys.
    """

    index: int
    model: Model
    num_attention_heads: int
    block_size: int
    window: int
    cache: str
    dtype: str
    tensor_parallel_size: int = 1
    index_topk: int = 2048

    @property
    def kv_lora_rank(self) -> int:
        """R: width of the compressed latent; the values are the first R columns of a cache row."""
        return self.model.kv_lora_rank

    @property
    def qk_rope_head_dim(self) -> int:
        """D: width of the rotated key part that all heads share."""
        return self.model.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """R + D: width of one cache row and of an absorbed query."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_nope_head_dim(self) -> int:
        """N: width of a head's unrotated query and key part."""
        return self.model.qk_nope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """N + D: width of a head's unabsorbed query and key."""
        return self.model.qk_head_dim

    @property
    def v_head_dim(self) -> int:
        """V: width of a head's value."""
        return self.model.v_head_dim

    @property
    def kv_b_proj_width(self) -> int:
        """H_total (N + V): output features of kv_b_proj for the heads of all ranks."""
        heads = self.num_attention_heads * self.tensor_parallel_size
        return heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def softmax_scale(self) -> float:
        """What logits are multiplied by, natural log."""
        return self.model.softmax_scale


def resolve_layers(options: Options) -> tuple[Layer, ...]:
    """One `Layer` for each layer of a case."""
    model = load_model(options.model)
    heads = options.heads or (model.num_attention_heads // options.tp,)

    def of(values: tuple[int, ...], layer: int) -> int:
        return values[layer] if len(values) > 1 else values[0]

    return tuple(
        Layer(
            index=index,
            model=model,
            num_attention_heads=of(heads, index),
            block_size=of(options.block, index),
            window=of(options.window, index),
            cache=options.cache[index] if len(options.cache) > 1 else options.cache[0],
            dtype=options.dtype,
            tensor_parallel_size=options.tp,
            index_topk=options.topk,
        )
        for index in range(options.layers)
    )
