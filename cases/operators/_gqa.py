"""Tensors that the operators of grouped queries share: the paged caches of section 3.5."""

from cases.contract import Fill, Judge, TensorSpec


def key_cache(*, fill: Fill | None = None, judge: Judge | None = None) -> TensorSpec:
    """The cache of keys as an input with a fill, or as an output with a judge."""
    axes = ("num_blocks", "num_key_value_heads", "block_size", "qk_head_dim")
    return TensorSpec(
        "k_cache", axes, "cache", "paged cache of each KV head's rotated keys", fill=fill, judge=judge
    )


def value_cache(*, fill: Fill | None = None, judge: Judge | None = None) -> TensorSpec:
    """The cache of values, likewise. It has the blocks of the keys' cache, and a width of its own."""
    axes = ("num_blocks", "num_key_value_heads", "block_size", "v_head_dim")
    return TensorSpec(
        "v_cache", axes, "cache", "paged cache of each KV head's values", fill=fill, judge=judge
    )
