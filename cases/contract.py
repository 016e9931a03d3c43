"""`Operator`: the contract of an operator, as data.

One file of `cases/operators/` holds one contract. The harness makes inputs and outputs from it, the
oracle and the paths are called with exactly the tensors it names, and the checks read from it what an
output may differ by and what may be written.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

from cases.blocks import unknown_history
from cases.case import Case
from cases.discovery import Found, discover
from cases.errors import CaseError
from cases.layers import Layer
from cases.models import load_model
from cases.options import Options


@enum.unique
class Fill(enum.Enum):
    """Where the contents of an input come from."""

    METADATA = "step metadata of that name"
    QUERY = "absorbed queries [q_nope W_UK | q_pe], already rotated"
    LATENT = "normalised compressed latents of the new tokens"
    ROPE_KEY = "rotated k_pe of the new tokens"
    CACHE_BEFORE = "latent cache holding the tokens cached before the step"
    CACHE_AFTER = "latent cache holding these and the step's new tokens"
    HEAD_QUERY = "unabsorbed queries [q_nope | q_pe] of each head, already rotated"
    HEAD_KEY = "keys [k_nope | k_pe] of each head, of the prefill rows' histories and new tokens"
    HEAD_VALUE = "values of each head, of the prefill rows' histories and new tokens"
    PREFILL_OUTPUT = "outputs of each head at prefill rows' tokens, poison at all others"
    DECODE_OUTPUT = "outputs of each head at decode rows' tokens, packed; NaN behind the last"
    PREFIX_OUT = "outputs of each head over a token's cached keys, poison where it sees none of them"
    PREFIX_LSE = "log-sum-exps of each head over a token's cached keys, infinite where it sees none"
    SUFFIX_OUT = "outputs of each head over a token's keys of the step, poison where it sees none of them"
    SUFFIX_LSE = "log-sum-exps of each head over a token's keys of the step, infinite where it sees none"
    NOPE_QUERY = "unrotated parts of each head's queries, for keys that are made from the latents"
    ROPE_QUERY = "rotated parts of the same queries"
    KEY_WEIGHT = "W_UK, the half of kv_b_proj that makes keys from latents"
    VALUE_WEIGHT = "W_UV, the half of kv_b_proj that makes values from latents"
    KV_B_WEIGHT = "kv_b_proj of all ranks' heads as a checkpoint holds it, in the layout that the axes say"
    RAW_QUERY = "rope parts of each head's queries, not yet rotated"
    RAW_KEY = "rope parts of the new tokens' keys, not yet rotated"
    POSITIONS = "absolute position of each token; padding's are stale, past the table's end or negative"
    NEW_IDS = "ids of the new tokens"
    HISTORY_IDS = "ids of every token that a slot holds after the step, slot after slot"
    MODEL_WEIGHT = "a weight of a small whole model, of that name"
    TILED_LATENT = (
        "latents of the new tokens whose tiles are hard to quantise: zeros, outliers, NaN, infinities"
    )
    HARD_ROPE_KEY = "rotated k_pe of the new tokens, with some numbers that only a copy hands on"
    PACKED_BEFORE = "packed cache holding the tokens cached before the step"
    PACKED_LISTED = "packed cache holding the tokens, cached and new, that some list names; poison elsewhere"
    PACKED_LISTED_BEFORE = "the same of the tokens cached before the step alone"
    PACKABLE_LATENT = "latents of the new tokens; packing them changes no logit that a data mode makes equal"
    LISTED_ROWS = "physical rows of some of the positions that each token sees, among entries that name none"
    LISTED_TOKENS = "some of the step's tokens that each prefill token sees, among entries that name none"
    LISTED_BY_HISTORY = "tokens of the step for rows with nothing cached, physical rows for all others"
    STEP_LISTED_QUERY = "the same as LISTED_QUERY, where keys are tokens of the step"
    LISTED_QUERY = "absorbed queries, already rotated, to which the oldest and newest listed keys stand out"
    COMPUTED_CACHE = "latent caches of all layers holding what earlier steps have computed, poison elsewhere"
    QKV = "projected queries, keys and values of the new tokens side by side, not yet rotated"
    GROUP_QUERY = "rotated queries of heads that share keys in groups"
    KEYS_BEFORE = "cache of each KV head's rotated keys holding the tokens cached before the step"
    VALUES_BEFORE = "cache of each KV head's values holding the same tokens"
    KEYS_SEEN = "cache of each KV head's rotated keys holding what some new token sees, poison elsewhere"
    VALUES_SEEN = "cache of each KV head's values holding the same tokens, poison elsewhere"
    QKV_WEIGHT = (
        "projections of queries, keys, values and gates of all ranks, in the layout that the axes say"
    )
    SINK = "learned logit of each head that belongs to no key"
    ROPE_TABLE = "cosines and sines of the positions that the step's tokens have, poison at all others"


@enum.unique
class Judge(enum.Enum):
    """How an output is compared with the oracle's."""

    BITS = "the rows that the oracle declares, bit exact, and every other byte as it was"
    EXACT = "every element, bit exact"
    ATTENTION = "error of one (token, head) row against the budget of its dtype"
    LAYER = "error of one (token, head) row against the budget of a whole step of attention"
    LSE = "natural-log LSE against its own budget"
    STAGE = "error of one token's row against that of an emulation of the whole stack"
    ROTATION = "every element, within the roundings that a rotation in the path's arithmetic makes"
    MERGE = "every element, within the roundings that a merge of two attention states makes"


@dataclass(frozen=True)
class Work:
    """The least a layer's step must do: bytes moved once each, and floating-point operations."""

    bytes: int
    flops: int


ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor.

    Attributes:
        name: the field's standard term; the same name means the same thing in every operator.
        axes: axis names, outermost first. `tokens` counts padding; `slots_plus_one` is slots + 1;
            `prefill_keys` is the sum of cached and new tokens over prefill rows; `decode_tokens` is the sum
            of new tokens over decode rows, and counts padding as `tokens` does.
        dtype: `model` (the case's), `cache`, or a NumPy name such as `int32`.
        doc: what it is, with unit and layout.
        fill: where an input's contents come from; None for an output.
        judge: how an output is compared; None for an input that is not written.
        strided: whether the harness may pass a view with larger strides (the last axis stays dense).
        when_empty: what an output holds where it has no value.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    doc: str
    fill: Fill | None = None
    judge: Judge | None = None
    strided: bool = False
    when_empty: str = ""


@dataclass(frozen=True)
class Operator:
    """The contract of one operator.

    Attributes:
        name: as written in a case.
        summary: one sentence.
        source: the operators of FastDeploy that it stands for, and where its definition comes from.
        inputs, outputs: the tensors; one that is in both is written in place.
        attributes: names of the scalars that come with the tensors.
        options: option keys that a case of this operator may set.
        checks: names of the checks that apply to every case of it.
        work: the least that one layer of a one-step case must do; the roofline of `bench`.
        scratch: the most bytes of scratch memory that one layer of a one-step case needs, tensors in HBM
            that are neither inputs nor outputs.
        exempt: checks whose promise the operator does not make, each with the reason.
        plays_schedules: whether a case may have several steps: what one writes, the next one reads.
        is_stack: whether layers are run one after another as one model, which computes every history itself;
            tensors then have an axis of layers, and layers do not differ.
    """

    name: str
    summary: str
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    checks: tuple[str, ...]
    work: Callable[[Case, Layer], Work] | None = None
    scratch: Callable[[Case, Layer], int] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)
    plays_schedules: bool = False
    is_stack: bool = False

    def output(self, name: str) -> TensorSpec:
        """The output of that name."""
        return next(spec for spec in self.outputs if spec.name == name)

    @property
    def in_place(self) -> frozenset[str]:
        """Names of the tensors that are both read and written."""
        return frozenset(spec.name for spec in self.inputs) & {spec.name for spec in self.outputs}


@cache
def operators() -> dict[str, Operator]:
    """Every operator there is a contract for."""
    return {item.value.name: item.value for item in _found() if isinstance(item.value, Operator)}


@cache
def _found() -> tuple[Found, ...]:
    folder = Path(__file__).parent / "operators"
    return tuple(discover("cases.operators", folder, "OPERATOR"))


def contract_of(case: Case, text: str | None = None) -> Operator:
    """The contract a case is judged by.

    `text` is what the user wrote, for the underlining; default the canonical text.

    Raises:
        CaseError: there is no such operator, or the case asks of it what its contract does not have.
    """
    text = str(case) if text is None else text
    operator = operators().get(case.operator)
    if operator is None:
        known = ", ".join(sorted(operators()))
        raise CaseError(f"the operators are {known}", text, 0, len(case.operator))
    if len(case.steps) > 1 and not operator.plays_schedules:
        start = text.index("..")
        message = f"{operator.name} is judged on one step, got {len(case.steps)}"
        raise CaseError(message, text, start, start + 2)
    for item in fields(Options):
        if item.name not in operator.options and getattr(case.options, item.name) != item.default:
            message = f"{operator.name} has no option {item.name}: it takes {', '.join(operator.options)}"
            start = 1 + max(text.rfind(f"{before}{item.name}=") for before in "/,")
            raise CaseError(message, text, start, start + len(item.name))
    if operator.is_stack:
        _check_stack(case, operator, text)
    _check_caches(case, operator, text)
    if "kv_heads" in operator.options:
        _check_groups(case, text)
    elif "model" in operator.options and not load_model(case.options.model).has_latents:
        start = text.rfind("model=")
        message = f"{case.options.model} keeps keys and values and no latents, which {operator.name} is about"
        raise CaseError(message, text, start, start + len("model"))
    if case.options.table == "none" and any(row.cached for step in case.steps for row in step):
        message = "cached tokens are found through the block table: table=none takes rows without any"
        start = text.rfind("table=")
        raise CaseError(message, text, start, start + len("table=none"))
    return operator


def _check_caches(case: Case, operator: Operator, text: str) -> None:
    """Raises CaseError where a cache is of a kind that no operator reads or writes."""
    start = text.rfind("cache=")
    if "fp8" in case.options.cache:
        message = f"{operator.name} takes cache=same or cache=packed: fp8 without scales is counted alone"
        raise CaseError(message, text, start, start + len("cache="))
    if "packed" in case.options.cache and case.options.dtype != "bf16":
        message = f"a packed cache holds k_pe in bf16: it takes dtype=bf16, got {case.options.dtype}"
        raise CaseError(message, text, start, start + len("cache="))


def _check_groups(case: Case, text: str) -> None:
    """Raises CaseError where query heads are no whole groups, or KV heads no whole share of the ranks."""
    key = next((key for key in ("kv_heads", "heads", "model") if f"{key}=" in text), None)
    start = text.rfind(f"{key}=") if key else 0
    end = start + len(key) if key else len(case.operator)
    for layer in case.layers:
        ranks, kv_heads = layer.tensor_parallel_size, layer.total_num_key_value_heads
        heads = layer.num_attention_heads * ranks
        if heads % kv_heads:
            message = (
                f"KV heads divide the {heads} query heads of all ranks into equal groups, got {kv_heads}"
            )
            raise CaseError(f"{message} in layer {layer.index}", text, start, end)
        if kv_heads % ranks and ranks % kv_heads:
            message = (
                f"each of {ranks} ranks has equally many KV heads, or shares one with equally many others"
            )
            raise CaseError(f"{message}: got {kv_heads} in layer {layer.index}", text, start, end)


def _check_stack(case: Case, operator: Operator, text: str) -> None:
    """Raises CaseError where layers differ, or where a row begins with tokens that no row has computed."""
    for key in ("heads", "block"):
        if len(getattr(case.options, key)) > 1:
            start = text.rfind(f"{key}=")
            message = f"the layers of {operator.name} are one stack: {key} takes one value"
            raise CaseError(message, text, start, start + len(key))
    if load_model(case.options.model).model_type is None:
        start = text.rfind("model=")
        message = f"{case.options.model} is more than latent attention and an MLP a layer: no logits of it"
        raise CaseError(message, text, max(start, 0), max(start, 0) + len("model"))
    found = unknown_history(case.steps, case.options.block[0])
    if found is not None:
        step, slot = found
        message = (
            f"step {step}, slot {slot} begins with cached tokens that no row of its tag has computed: "
            f"{operator.name} lays no history, begin with prefill:N"
        )
        raise CaseError(message, text, 0, len(operator.name))
