"""Arguments that versions of FastDeploy's operators have had: a line for each version, the newest first.

In braces stands a group of `GROUPS`. The names are those that Paddle's Python functions have, in the order of
the C++ functions behind them.
"""

from __future__ import annotations

from collections.abc import Mapping

GROUPS = {
    "lengths": "seq_lens_encoder seq_lens_decoder seq_lens_this_time",
    "rows": "kv_nope kv_pe kv_cache seq_lens",
    "slots": "batch_id_per_token cu_seqlens_q block_tables",
    "offsets": "padding_offsets cum_offsets block_tables",
    "encoder_tiles": "encoder_batch_ids encoder_tile_ids_per_batch",
    "kv_tiles": "kv_batch_ids kv_tile_ids_per_batch",
    "decoder_tiles": "decoder_batch_ids decoder_tile_ids_per_batch",
    "shapes": "encoder_block_shape_q decoder_block_shape_q group_size block_size",
    "caches": "query key_cache value_cache",
    "by_slot": "cu_seqlens_q batch_id_per_token block_tables",
    # All optional.
    "quantisation": (
        "attn_mask query_bias query_out_scales cache_k_quant_scales cache_v_quant_scales "
        "cache_k_dequant_scales cache_v_dequant_scales cache_k_zp cache_v_zp out_linear_shifts "
        "out_linear_smooths"
    ),
    "attributes": (
        "compute_dtype cache_quant_type_str nope_size max_input_length softmax_scale quant_max_bound "
        "quant_min_bound out_linear_in_scale speculate_max_draft_token_num causal speculate_decoder"
    ),
    "planned": (
        "decoder_num_blocks_cpu decoder_num_blocks_device decoder_chunk_size_device max_len_tensor_cpu"
    ),
    "counted": "decoder_num_blocks decoder_num_blocks_cpu decoder_chunk_size_cpu",
    "maxima": "max_dec_len_this_time max_len_kv",
    "read": "latent_cache block_tables new_compressed_kv new_k_pe cu_seqlens_k cu_seqlens_q",
    "widths": "kv_lora_rank qk_rope_head_dim block_size",
    "backend": "fd_config kv_num_heads num_heads head_dim encoder_block_shape_q decoder_block_shape_q",
}

VERSIONS = {
    "get_position_ids_and_mask_encoder_batch": """
        {lengths} position_ids
        {lengths} position_ids mask_encoder_batch
    """,
    "get_padding_offset": """
        input_ids seq_len draft_tokens seq_lens_encoder seq_lens_decoder cpu_token_num
        input_ids seq_len draft_tokens seq_lens_encoder cpu_token_num
        input_ids token_num seq_len
        input_ids cum_offsets token_num seq_len
    """,
    "prefill_mla_write_cache": """
        {rows} seq_lens_decoder {slots} slot_mapping kv_signal_data cache_quant_type_str
        {rows} seq_lens_decoder {slots} kv_signal_data cache_quant_type_str max_seq_len
        {rows} seq_lens_decoder {slots} cache_quant_type_str max_seq_len
        {rows} seq_lens_decoder {offsets} cache_quant_type_str max_seq_len
    """,
    "decode_mla_write_cache": """
        {rows} seq_lens_encoder {slots} cache_quant_type_str speculate_decoder
        {rows} seq_lens_encoder {slots} cache_quant_type_str max_seq_len speculate_decoder
        {rows} seq_lens_encoder {offsets} cache_quant_type_str max_seq_len speculate_decoder
    """,
    "get_block_shape_and_split_kv_block": """
        {lengths} {decoder_tiles} {planned} {encoder_tiles} encoder_num_blocks_x_cpu {kv_tiles} \
kv_num_blocks_x_cpu {shapes}
        {lengths} {decoder_tiles} decoder_num_blocks_cpu max_len_tensor_cpu {shapes} decoder_step_token_num
        {lengths} {decoder_tiles} decoder_num_blocks_x_cpu max_len_tensor_cpu {shapes} decoder_step_token_num
    """,
    "multi_head_latent_attention": """
        {caches} seq_lens_decoder seq_lens_this_time {by_slot} {kv_tiles} kv_num_blocks {decoder_tiles} \
decoder_num_blocks_device decoder_chunk_size_device {maxima} {quantisation} {attributes}
        {caches} {lengths} {by_slot} {encoder_tiles} encoder_num_blocks {kv_tiles} kv_num_blocks \
{decoder_tiles} {counted} max_enc_len_this_time {maxima} {quantisation} {attributes}
    """,
    "merge_prefill_decode_output": """
        encoder_res decoder_res {lengths} cu_seq_q head_num head_dim max_token
    """,
    "dsk_attn_write_cache": """
        kv_nope kv_pe kv_cache slot_mapping scale cache_quant_type_str
        kv_nope kv_pe kv_cache slot_mapping seq_lens seq_lens_decoder {slots} kv_signal_data scale \
cache_quant_type_str max_seq_len is_prefill
    """,
    "fused_read_cache_and_interleave_triton": """
        {read} {widths}
    """,
    "fused_read_cache_and_interleave_naive": """
        {read} {widths}
    """,
    "extract_decoder_token_from_q": """
        q cu_seqlens_q seq_lens_encoder seq_lens_decoder
    """,
    "insert_decoder_result_back": """
        decoder_result cu_seqlens_q seq_lens_encoder seq_lens_decoder mixed_token_num
    """,
    "compute_slot_mapping": """
        block_tables positions batch_id_per_token block_size
    """,
    "KVBatchLinear": """
        fd_config kv_b_proj prefix kv_lora_rank num_attention_heads qk_nope_head_dim v_head_dim
        fd_config prefix kv_lora_rank num_attention_heads qk_nope_head_dim v_head_dim
    """,
    "MLAAttentionBackend": """
        {backend}
    """,
    "TritonMLAAttentionBackend": """
        {backend}
    """,
}

_ATTENTION = "fastdeploy.model_executor.layers.attention"

MODULES = {
    "fastdeploy.model_executor.ops.gpu": (
        "get_position_ids_and_mask_encoder_batch",
        "get_padding_offset",
        "prefill_mla_write_cache",
        "decode_mla_write_cache",
        "dsk_attn_write_cache",
        "get_block_shape_and_split_kv_block",
        "multi_head_latent_attention",
        "merge_prefill_decode_output",
    ),
    f"{_ATTENTION}.mla_attention_backend": (
        "fused_read_cache_and_interleave_triton",
        "fused_read_cache_and_interleave_naive",
        "extract_decoder_token_from_q",
        "insert_decoder_result_back",
        "MLAAttentionBackend",
    ),
    f"{_ATTENTION}.triton_mla_attention_backend": ("TritonMLAAttentionBackend",),
    f"{_ATTENTION}.dsa_attention_backend": ("compute_slot_mapping",),
    "fastdeploy.model_executor.layers.linear": ("KVBatchLinear",),
}
"""Where the operators are, a layer and two backends."""


def _signatures(lines: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split()) for line in lines.format_map(GROUPS).strip().splitlines())


SIGNATURES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    name: _signatures(lines) for name, lines in VERSIONS.items()
}
"""Arguments of every version of an operator, in order."""

ALIASES = {
    "compute_type": "compute_dtype",
    "cache_quant_type": "cache_quant_type_str",
    "decoder_num_blocks": "decoder_num_blocks_device",
}
"""Other names that a version gives an argument."""

MISNAMED = {("input_ids", "token_num", "cum_offsets", "seq_len"): (0, 2, 1, 3)}
"""Registered with two names in another order than the C++ function has: places of the function's."""

_KINDS = {
    "str": "compute_dtype cache_quant_type_str",
    "int": (
        "{shapes} {widths} cpu_token_num max_seq_len nope_size max_input_length head_num head_dim max_token "
        "speculate_max_draft_token_num decoder_step_token_num mixed_token_num"
    ),
    "float": "softmax_scale quant_max_bound quant_min_bound out_linear_in_scale",
    "bool": "causal speculate_decoder is_prefill",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.format_map(GROUPS).split()}


def kind_of(argument: str) -> str:
    """What pybind11 says of an argument: `Tensor`, `int`, `float`, `bool` or `str`."""
    return _KIND_OF.get(argument, "Tensor")
