"""Two attention states over disjoint keys made into the state over both: SGLang's and vLLM's merge.

A state is what attention over some keys leaves of a (token, head): its output and its LSE, natural log. The
keys may be a token's cached ones and those of its step, or the two parts of any other division. With p and s
for prefix and suffix:

    lse = ln(exp(lse_p) + exp(lse_s))
    out = exp(lse_p - lse) out_p + exp(lse_s - lse) out_s

An LSE that is infinite, of either sign, says that no key was seen: the state is empty, what its output holds
is nothing, NaN even, and the merged state is the other one. Where both are empty, padding among them: out 0,
lse -inf. FlashAttention says +inf of what our operators say -inf of.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer


def work(case: Case, layer: Layer) -> Work:
    """Outputs of states that their rows do not leave empty read once, all LSEs read, everything written."""
    rows = case.steps[0]
    tokens = sum(row.new for row in rows)
    states = sum(row.seq_lens_this_time * (2 if row.cached else 1) for row in rows)
    heads = layer.num_attention_heads
    elements = (states + tokens) * heads * layer.v_head_dim
    return Work(
        bytes=elements * ITEM_BYTES[layer.dtype] + 3 * tokens * heads * 4,
        flops=3 * tokens * heads * layer.v_head_dim,
    )


_OUTPUT_AXES = ("tokens", "num_attention_heads", "v_head_dim")
_LSE_AXES = ("tokens", "num_attention_heads")


OPERATOR = Operator(
    name="merge_states",
    summary="two attention outputs with LSE over disjoint keys, empty ones too, merged into one of each",
    source="arXiv:2501.01005 section 2.2; SGLang merge_state_triton, vLLM merge_attn_states",
    inputs=(
        TensorSpec(
            "prefix_out",
            _OUTPUT_AXES,
            "model",
            "attention over the first part of the keys; poison where it is empty, NaN of padding tokens",
            fill=Fill.PREFIX_OUT,
            strided=True,
        ),
        TensorSpec(
            "prefix_lse",
            _LSE_AXES,
            "float32",
            "its log-sum-exp, natural log; infinite where it is empty",
            fill=Fill.PREFIX_LSE,
            strided=True,
        ),
        TensorSpec(
            "suffix_out",
            _OUTPUT_AXES,
            "model",
            "attention over the second part of the keys, like the first",
            fill=Fill.SUFFIX_OUT,
            strided=True,
        ),
        TensorSpec(
            "suffix_lse",
            _LSE_AXES,
            "float32",
            "its log-sum-exp, natural log; infinite where it is empty",
            fill=Fill.SUFFIX_LSE,
            strided=True,
        ),
    ),
    outputs=(
        TensorSpec(
            "out",
            _OUTPUT_AXES,
            "model",
            "attention over all of the keys",
            judge=Judge.MERGE,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "lse",
            _LSE_AXES,
            "float32",
            "its log-sum-exp, natural log",
            judge=Judge.MERGE,
            when_empty="-inf",
        ),
    ),
    attributes=(),
    options=("model", "heads", "v_dim", "layers", "dtype", "data", "seed", "poison", "strided", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
)
