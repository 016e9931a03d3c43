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
        total_num_key_value_heads: heads of keys and values of all ranks.
        v_dim: width of a head's value where it is not the model's.
        has_sinks: whether every head has a learned logit of no key.
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
    total_num_key_value_heads: int = 0
    v_dim: int | None = None
    has_sinks: bool = False

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
        return self.model.v_head_dim if self.v_dim is None else self.v_dim

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values of this rank: at least one, which is then a copy of other ranks' too."""
        return max(1, self.total_num_key_value_heads // self.tensor_parallel_size)

    @property
    def group_size(self) -> int:
        """Query heads of this rank that share a head of keys and values."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def qkv_width(self) -> int:
        """Output features of this rank's projection of queries, keys and values."""
        keys = self.num_attention_heads + self.num_key_value_heads
        return keys * self.qk_head_dim + self.num_key_value_heads * self.v_head_dim

    @property
    def qkvg_width(self) -> int:
        """The same with a gate for every column of every query head's output."""
        return self.qkv_width + self.num_attention_heads * self.v_head_dim

    @property
    def qkvg_checkpoint_width(self) -> int:
        """Output features of q_proj, k_proj, v_proj and the gate for the heads of all ranks."""
        heads = self.num_attention_heads * self.tensor_parallel_size + self.total_num_key_value_heads
        return heads * (self.qk_head_dim + self.v_head_dim)

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

    def kv_heads(layer: int) -> int:
        if options.kv_heads:
            return of(options.kv_heads, layer)
        return model.num_key_value_heads or of(heads, layer) * options.tp

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
            total_num_key_value_heads=kv_heads(index),
            v_dim=of(options.v_dim, index) if options.v_dim else None,
            has_sinks=(options.sink[index] if len(options.sink) > 1 else options.sink[0]) == "learned",
        )
        for index in range(options.layers)
    )
