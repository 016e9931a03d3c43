"""Step metadata that several operators take: one name, one meaning. Names and layouts are FastDeploy's."""

from cases.contract import Fill, TensorSpec

SEQ_LENS_ENCODER = TensorSpec(
    "seq_lens_encoder", ("slots",), "int32", "new prefill tokens", fill=Fill.METADATA
)
SEQ_LENS_DECODER = TensorSpec("seq_lens_decoder", ("slots",), "int32", "cached tokens", fill=Fill.METADATA)
SEQ_LENS_THIS_TIME = TensorSpec("seq_lens_this_time", ("slots",), "int32", "new tokens", fill=Fill.METADATA)
CU_SEQLENS_Q = TensorSpec(
    "cu_seqlens_q",
    ("slots_plus_one",),
    "int32",
    "exclusive prefix sum of seq_lens_this_time",
    fill=Fill.METADATA,
)
CU_SEQLENS_K_PREFILL = TensorSpec(
    "cu_seqlens_k_prefill",
    ("slots_plus_one",),
    "int32",
    "exclusive prefix sum of cached and new tokens over prefill rows",
    fill=Fill.METADATA,
)
BATCH_ID_PER_TOKEN = TensorSpec(
    "batch_id_per_token", ("tokens",), "int32", "slot of each token, -1 for padding", fill=Fill.METADATA
)
BLOCK_TABLES = TensorSpec(
    "block_tables",
    ("slots", "max_blocks"),
    "int32",
    "physical block of each block of a row; entries past its length are never followed",
    fill=Fill.METADATA,
    strided=True,
)
