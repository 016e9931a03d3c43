"""Facts about engines' objects: a right one contradicts none, faulty ones what they break."""

from types import SimpleNamespace

import pytest
import torch

from harness.conformance import kv_b_loading, launch_buffers, manager_caches, value_padding
from harness.conformance.facts import Fact, findings, refuses
from harness.tensors import DTYPES

FACTS = {
    fact.name: fact
    for module in (kv_b_loading, launch_buffers, manager_caches, value_padding)
    for fact in module.FACTS
}


def contradicted(subject, facts):
    """Names of the facts that do not hold."""
    return {finding.fact for finding in findings(subject, facts) if finding.reason is not None}


# ---- an engine's loader, and what can be wrong with one ------------------------------------------


class EngineLoader:
    """A loader as engines write it, in views and copies: nothing of ours in it."""

    def __init__(self, request):
        if request.v_head_dim is None:
            raise ValueError("v_head_dim must be given")
        if request.num_attention_heads % request.tensor_parallel_size:
            raise ValueError(f"{request.num_attention_heads} heads for {request.tensor_parallel_size} ranks")
        self.request = request
        self.kv_b_proj = self.local(request.kv_b_proj)
        if request.load_choice == "dummy":
            self.make_dummies()
        if request.load_choice == "default_v0":
            self.split()

    def local(self, weight):
        """This rank's columns of the checkpoint's weight, [R, H (N + V)]."""
        if weight is None:
            return None
        by_rank = self.by_rank(weight)
        width = by_rank.shape[1] // self.request.tensor_parallel_size
        first = self.first(width)
        return by_rank[:, first : first + width]

    def by_rank(self, weight):
        return weight.T if self.request.layout == "torch" else weight

    def first(self, width):
        return self.request.tensor_parallel_rank * width

    def make_dummies(self):
        keys, values = self.request.shapes
        self.k_b_proj_weight = torch.zeros(keys, dtype=DTYPES[self.request.dtype])
        self.v_b_proj_weight = torch.zeros(values, dtype=DTYPES[self.request.dtype])

    def process_weights_after_loading(self):
        if self.kv_b_proj is None:
            return
        self.split()

    def by_head(self):
        return self.kv_b_proj.reshape(self.request.kv_lora_rank, self.request.heads, -1)

    def split(self):
        nope = self.request.qk_nope_head_dim
        by_head = self.by_head()
        self.k_b_proj_weight = by_head[..., :nope].permute(1, 2, 0).contiguous()
        self.v_b_proj_weight = by_head[..., nope:].transpose(0, 1).contiguous()
        self.kv_b_proj = None

    def forward(self, x, proj_type):
        if proj_type == "k":
            return torch.bmm(x, self.k_b_proj_weight)
        if proj_type == "v":
            return torch.bmm(x, self.v_b_proj_weight)
        raise ValueError(f"unknown projection {proj_type!r}")

    def expand_keys(self, latents):
        return torch.einsum("tr,hkr->thk", latents, self.k_b_proj_weight)

    def expand_values(self, latents):
        return torch.einsum("tr,hrv->thv", latents, self.v_b_proj_weight)


DUMMY_FACTS = frozenset(
    {
        "dummy_parameters_exist_from_construction",
        "dummy_parameters_are_zero",
        "dummy_processing_twice_changes_nothing",
        "dummy_decode_is_exactly_zero",
    }
)
LOADED_FACTS = frozenset({"loaded_weights_are_the_checkpoints", "processing_again_is_safe"})
USES = frozenset(
    {"absorbed_use_equals_the_unsplit_projection", "unabsorbed_use_equals_the_unsplit_projection"}
)
PROJ_TYPES = "unknown_proj_types_are_refused"


class WithoutDummies(EngineLoader):
    """B40: a dummy load never makes the parameters."""

    breaks = DUMMY_FACTS

    def make_dummies(self):
        pass


class DummiesAtProcessing(EngineLoader):
    """B40, half cured: parameters come with processing, which a dummy load may leave out."""

    breaks = frozenset({"dummy_parameters_exist_from_construction", "dummy_parameters_are_zero"})

    def make_dummies(self):
        pass

    def process_weights_after_loading(self):
        if self.request.load_choice == "dummy":
            super().make_dummies()
        super().process_weights_after_loading()


class WithoutGuard(EngineLoader):
    """B41: processing reads kv_b_proj, which a dummy load has not."""

    breaks = frozenset(
        {
            "dummy_processing_twice_changes_nothing",
            "dummy_decode_is_exactly_zero",
            *LOADED_FACTS,
            PROJ_TYPES,
        }
    )

    def process_weights_after_loading(self):
        self.split()


class ProcessedOnce(EngineLoader):
    """O22: only the first processing is safe; kv_b_proj was dropped by then."""

    breaks = frozenset({"dummy_processing_twice_changes_nothing", "processing_again_is_safe"})
    processed = False

    def process_weights_after_loading(self):
        if self.processed:
            raise AttributeError("'NoneType' object has no attribute 'weight'")
        super().process_weights_after_loading()
        self.processed = True


class TransposedAgain(EngineLoader):
    """O22: every processing turns the kept parameters once more."""

    breaks = frozenset({"loaded_weights_are_the_checkpoints", "processing_again_is_safe"})

    def process_weights_after_loading(self):
        if self.kv_b_proj is None and self.request.load_choice != "dummy":
            heads, rank, width = self.v_b_proj_weight.shape
            turned = self.v_b_proj_weight.transpose(1, 2).contiguous()
            self.v_b_proj_weight = turned.view(heads, rank, width)
        super().process_weights_after_loading()


class RandomDummies(EngineLoader):
    """O22: dummy weights as an allocator left them, or drawn at random."""

    breaks = frozenset(
        {
            "dummy_parameters_are_zero",
            "dummy_processing_twice_changes_nothing",
            "dummy_decode_is_exactly_zero",
        }
    )

    def make_dummies(self):
        super().make_dummies()
        self.k_b_proj_weight.fill_(1e-3)
        self.v_b_proj_weight.fill_(1e-3)


class RandomValues(EngineLoader):
    """O22: only one of the dummy parameters is zero."""

    breaks = frozenset(
        {
            "dummy_parameters_are_zero",
            "dummy_processing_twice_changes_nothing",
            "dummy_decode_is_exactly_zero",
        }
    )

    def make_dummies(self):
        super().make_dummies()
        self.v_b_proj_weight.fill_(-1e-5)


class WholeModelDummies(EngineLoader):
    """O22: dummy parameters with the heads of all ranks."""

    breaks = frozenset(
        {
            "dummy_parameters_exist_from_construction",
            "dummy_processing_twice_changes_nothing",
            "dummy_decode_is_exactly_zero",
        }
    )

    def make_dummies(self):
        keys, values = self.request.shapes
        size, dtype = self.request.tensor_parallel_size, DTYPES[self.request.dtype]
        self.k_b_proj_weight = torch.zeros(size * keys[0], *keys[1:], dtype=dtype)
        self.v_b_proj_weight = torch.zeros(size * values[0], *values[1:], dtype=dtype)


class SinglePrecisionDummies(EngineLoader):
    """O22: dummy parameters in the default dtype."""

    breaks = frozenset(DUMMY_FACTS - {"dummy_parameters_are_zero"})

    def make_dummies(self):
        keys, values = self.request.shapes
        self.k_b_proj_weight, self.v_b_proj_weight = torch.zeros(keys), torch.zeros(values)


class DecodeNotZero(EngineLoader):
    """A projection that adds what no weight gave it."""

    breaks = frozenset({"dummy_decode_is_exactly_zero", "absorbed_use_equals_the_unsplit_projection"})

    def forward(self, x, proj_type):
        return super().forward(x, proj_type) + (0.125 if proj_type == "v" else 0.0)


class LayoutIgnored(EngineLoader):
    """L40: torch checkpoints are reshaped without being transposed."""

    breaks = LOADED_FACTS | USES

    def by_rank(self, weight):
        return weight.reshape(self.request.kv_lora_rank, -1)


class RankIgnored(EngineLoader):
    """O22: every rank takes the first slice."""

    breaks = LOADED_FACTS | USES

    def first(self, width):
        return 0


class SliceShifted(EngineLoader):
    """O22: slices of ranks but the first begin one head early."""

    breaks = LOADED_FACTS | USES

    def first(self, width):
        one = self.request.qk_nope_head_dim + self.request.v_head_dim
        return max(0, super().first(width) - one)


class ValuesFirst(EngineLoader):
    """L40: values taken for keys; of equal widths both shapes are right."""

    breaks = LOADED_FACTS | USES

    def by_head(self):
        width = self.request.v_head_dim
        by_head = super().by_head()
        return torch.cat([by_head[..., -width:], by_head[..., :-width]], -1)


class HeadsInterleaved(EngineLoader):
    """L40: viewed as [R, N + V, H]."""

    breaks = LOADED_FACTS | USES

    def by_head(self):
        return self.kv_b_proj.reshape(self.request.kv_lora_rank, -1, self.request.heads).transpose(1, 2)


class EqualWidthsOnly(EngineLoader):
    """L38: N and V confused, right only where they agree."""

    breaks = LOADED_FACTS | USES

    def split(self):
        value = self.request.v_head_dim
        by_head = self.by_head()
        self.k_b_proj_weight = by_head[..., :-value].permute(1, 2, 0).contiguous()
        self.v_b_proj_weight = by_head[..., value:].transpose(0, 1).contiguous()
        self.kv_b_proj = None


class OnlyVersionOneSplits(EngineLoader):
    """L39: one of two load choices never splits what it loaded."""

    breaks = LOADED_FACTS

    def process_weights_after_loading(self):
        if self.request.load_choice == "default_v1":
            super().process_weights_after_loading()

    def split(self):
        if self.request.load_choice == "default_v1":
            super().split()


class LatentsReversed(EngineLoader):
    """D7: the absorbed output's latent columns meet the weights in another order."""

    breaks = frozenset({"absorbed_use_equals_the_unsplit_projection"})

    def forward(self, x, proj_type):
        if proj_type == "v" and self.request.load_choice != "dummy":
            return torch.bmm(x, self.v_b_proj_weight.flip(1))
        return super().forward(x, proj_type)


class CoarseExpansion(EngineLoader):
    """Keys and values of prefill rows are made from weights rounded to eight bits on the way."""

    breaks = frozenset({"unabsorbed_use_equals_the_unsplit_projection"})

    def expand_values(self, latents):
        coarse = (self.v_b_proj_weight * 256).round() / 256
        return torch.einsum("tr,hrv->thv", latents, coarse)


class AnythingIsV(EngineLoader):
    """O22: whatever is not k is taken for v."""

    breaks = frozenset({PROJ_TYPES})

    def forward(self, x, proj_type):
        weight = self.k_b_proj_weight if proj_type == "k" else self.v_b_proj_weight
        return x.new_zeros(1) if x.shape[2] != weight.shape[1] else torch.bmm(x, weight)


class WidthAssumed(EngineLoader):
    """O22: without v_head_dim values are as wide as keys."""

    breaks = frozenset({"a_missing_v_head_dim_is_refused"})

    def __init__(self, request):
        if request.v_head_dim is not None:
            super().__init__(request)


class HeadsRoundedDown(EngineLoader):
    """O22: heads that are left over are dropped without a word."""

    breaks = frozenset({"heads_that_ranks_cannot_share_are_refused"})

    def __init__(self, request):
        if request.num_attention_heads % request.tensor_parallel_size == 0:
            super().__init__(request)


class HeadsAsserted(EngineLoader):
    """A bare assertion instead of a sentence."""

    breaks = frozenset({"heads_that_ranks_cannot_share_are_refused"})

    def __init__(self, request):
        assert request.num_attention_heads % request.tensor_parallel_size == 0
        super().__init__(request)


class HeadsRefusedWithoutNumbers(EngineLoader):
    """A refusal that does not say what cannot be divided by what."""

    breaks = frozenset({"heads_that_ranks_cannot_share_are_refused"})

    def __init__(self, request):
        if request.num_attention_heads % request.tensor_parallel_size:
            raise ValueError("bad tensor parallel size")
        super().__init__(request)


FAULTY = EngineLoader.__subclasses__()


def test_every_fact_holds_of_an_engine_s_right_loader():
    assert contradicted(EngineLoader, kv_b_loading.FACTS) == set()


@pytest.mark.parametrize("loader", FAULTY, ids=lambda loader: loader.__name__)
def test_a_faulty_loader_contradicts_what_it_breaks_and_nothing_else(loader):
    assert contradicted(loader, kv_b_loading.FACTS) == loader.breaks


def test_every_fact_about_loading_is_broken_by_a_faulty_loader():
    broken = set().union(*(loader.breaks for loader in FAULTY))
    assert broken == {fact.name for fact in kv_b_loading.FACTS}


@pytest.mark.parametrize(("loader", "bug"), [(WithoutDummies, "B40"), (WithoutGuard, "B41")])
def test_a_finding_names_the_bug_the_circumstance_and_what_was_raised(loader, bug):
    found = [item for item in findings(loader, kv_b_loading.FACTS) if bug in item.source]
    (finding,) = found
    assert "AttributeError" in finding.reason
    assert "load_choice dummy" in finding.reason
    assert str(finding).startswith(finding.fact)


# ---- padding that is wrong -----------------------------------------------------------------------


def pad(values, width):
    """As engines write it."""
    if values.shape[-1] > width:
        raise ValueError(f"values of {values.shape[-1]} columns, keys of {width}")
    missing = width - values.shape[-1]
    return torch.nn.functional.pad(values, [0, missing]) if missing else values


def crop(out, width):
    return out[..., :width]


def left(values, width):
    """Zeros before the values."""
    missing = width - values.shape[-1]
    return torch.nn.functional.pad(values, [missing, 0]) if missing > 0 else pad(values, width)


def copied(values, width):
    """FastDeploy's O07 before it was changed: a padding of width 0 is a copy."""
    return pad(values, width).clone()


def repeated(values, width):
    """The last column repeated, as an edge padding does."""
    missing = width - values.shape[-1]
    if missing <= 0:
        return pad(values, width)
    return torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)


def negative(values, width):
    """A negative padding cuts wider values."""
    missing = width - values.shape[-1]
    return torch.nn.functional.pad(values, [0, missing]) if missing else values


def never(values, width):
    if values.shape[-1] > width:
        return pad(values, width)
    return values


def widened(values, width):
    padded = pad(values, width)
    return padded if padded is values else padded.float()


def uncropped(out, width):
    return out


ZEROS, EQUAL, WIDER, ATTENTION = (fact.name for fact in value_padding.FACTS)
PADDINGS = [
    pytest.param(pad, crop, set(), id="right"),
    pytest.param(left, crop, {ZEROS, ATTENTION}, id="left"),
    pytest.param(copied, crop, {EQUAL}, id="copied"),
    pytest.param(repeated, crop, {ZEROS, ATTENTION}, id="repeated"),
    pytest.param(negative, crop, {WIDER}, id="negative"),
    pytest.param(never, crop, {ZEROS}, id="never"),
    pytest.param(widened, crop, {ZEROS}, id="widened"),
    pytest.param(pad, uncropped, {ATTENTION}, id="uncropped"),
    pytest.param(pad, lambda out, width: out[..., -width:], {ATTENTION}, id="cropped-left"),
]


@pytest.mark.parametrize(("pad_values", "crop_output", "breaks"), PADDINGS)
def test_wrong_padding_contradicts_what_it_breaks_and_nothing_else(pad_values, crop_output, breaks):
    subject = SimpleNamespace(pad_values=pad_values, crop_output=crop_output)
    assert contradicted(subject, value_padding.FACTS) == breaks


def test_every_fact_about_padding_is_broken_by_a_wrong_one():
    assert set().union(*(param.values[2] for param in PADDINGS)) == {ZEROS, EQUAL, WIDER, ATTENTION}


# ---- room for tile lists that is wrong -----------------------------------------------------------


def rooms(stack, groups, block_size, *, tokens=None, slots=None):
    """As engines allocate it, for the largest of some group sizes."""
    tokens = stack.max_row_tokens if tokens is None else tokens
    slots = stack.slots if slots is None else slots
    rows = tokens * max(groups)
    return {
        "encoder": slots * -(-rows // 64),
        "decoder": slots * -(-rows // 16),
        "kv": slots * -(-tokens // block_size),
    }


def groups_of(stack):
    return [heads // kv_heads for heads, kv_heads in zip(stack.heads, stack.kv_heads, strict=True)]


def covering(stack):
    return rooms(stack, groups_of(stack), min(stack.block_sizes))


def by_most_kv_heads(stack):
    """B64: the largest number of KV heads, where the smallest has the largest groups."""
    return rooms(stack, [max(stack.heads) // max(stack.kv_heads)], min(stack.block_sizes))


def by_the_first_layer(stack):
    """B63: layer 0's counts for all."""
    return rooms(stack, groups_of(stack)[:1], stack.block_sizes[0])


def by_the_largest_block(stack):
    return rooms(stack, groups_of(stack), max(stack.block_sizes))


def rounded_down(stack):
    room = covering(stack)
    rows, longest = stack.max_row_tokens * max(groups_of(stack)), stack.max_row_tokens
    return {
        **room,
        "encoder": stack.slots * (rows // 64),
        "kv": stack.slots * (longest // min(stack.block_sizes)),
    }


def for_one_slot(stack):
    return rooms(stack, groups_of(stack), min(stack.block_sizes), slots=1)


def for_this_step(stack):
    """Room for the rows at hand, which a graph is then replayed beyond."""
    tiles = [stack.tiles(layer) for layer in range(len(stack.heads))]
    return {name: max(layer[name] for layer in tiles) for name in tiles[0]}


COVERED, FULL, LENGTHS_APART, ORDER = (fact.name for fact in launch_buffers.FACTS)
ROOMS = [
    pytest.param(covering, set(), id="covering"),
    pytest.param(by_most_kv_heads, {COVERED, FULL}, id="most-kv-heads"),
    pytest.param(by_the_first_layer, {COVERED, FULL, ORDER}, id="first-layer"),
    pytest.param(by_the_largest_block, {COVERED, FULL}, id="largest-block"),
    pytest.param(rounded_down, {COVERED, FULL}, id="rounded-down"),
    pytest.param(for_one_slot, {COVERED, FULL}, id="one-slot"),
    pytest.param(for_this_step, {LENGTHS_APART}, id="this-step"),
]


@pytest.mark.parametrize(("plan", "breaks"), ROOMS)
def test_too_little_room_contradicts_what_it_breaks_and_nothing_else(plan, breaks):
    assert contradicted(plan, launch_buffers.FACTS) == breaks


def test_every_fact_about_room_is_broken_by_a_wrong_plan():
    assert set().union(*(param.values[1] for param in ROOMS)) == {COVERED, FULL, LENGTHS_APART, ORDER}


def test_the_overflow_of_two_layers_is_told_in_numbers():
    # 24 heads, 8 and 4 KV heads, one prompt of 2,100 tokens in a model of 4,096.
    stack = launch_buffers.OVERFLOWING
    assert [stack.tiles(layer)["encoder"] for layer in (0, 1)] == [99, 197]
    assert (by_most_kv_heads(stack)["encoder"], covering(stack)["encoder"]) == (192, 384)
    (finding, *_) = findings(by_most_kv_heads, launch_buffers.FACTS)
    assert "layer 1 writes 197 tiles into the encoder list: room for 192" in finding.reason
    assert "B64" in finding.source


def test_our_own_plan_covers_every_stack():
    pytest.importorskip("triton")
    from harness.paths.triton.launch_buffers import capacity

    def plan(stack):
        return capacity(stack.slots, stack.max_row_tokens, groups_of(stack), stack.block_sizes)

    assert contradicted(plan, launch_buffers.FACTS) == set()


# ---- facts ---------------------------------------------------------------------------------------


def test_a_fact_ends_at_the_first_circumstance_that_contradicts():
    asked = []

    def contradiction(subject, circumstance):
        asked.append(circumstance)
        return "too large" if circumstance > subject else None

    fact = Fact("small", "source", (1, 2, 3, 4), contradiction)
    (finding,) = findings(2, [fact])
    assert asked == [1, 2, 3]
    assert finding.reason == "3: too large"
    assert str(finding) == "small: 3: too large (source)"
    (finding,) = findings(9, [fact])
    assert str(finding) == "small: holds (source)"


def test_what_a_subject_raises_contradicts():
    def contradiction(subject, circumstance):
        raise KeyError(circumstance)

    (finding,) = findings(None, [Fact("f", "s", ("here",), contradiction)])
    assert finding.reason == "here: KeyError: 'here'"


def raising(error):
    def action():
        raise error

    return action


def test_a_refusal_is_a_value_error_with_the_words():
    assert refuses(raising(ValueError("20 heads, 8 ranks")), "20", "8") is None
    assert "does not say 8" in refuses(raising(ValueError("20 heads")), "20", "8")
    assert "got AssertionError" in refuses(raising(AssertionError()), "20")
    assert refuses(lambda: None) == "expected a ValueError, got none"


def test_facts_of_a_device_are_the_same_facts_there():
    there = kv_b_loading.facts("cuda")
    assert [fact.name for fact in there] == [fact.name for fact in kv_b_loading.FACTS]
    assert {request.device for fact in there for request in fact.circumstances} == {"cuda"}
    assert all(str(request).endswith("on cuda") for fact in there for request in fact.circumstances)
    assert contradicted(EngineLoader, kv_b_loading.facts("cpu")) == set()


def test_names_of_facts_are_distinct_and_say_where_they_come_from():
    modules = (kv_b_loading, launch_buffers, value_padding, manager_caches)
    assert len(FACTS) == sum(len(module.FACTS) for module in modules)
    assert all(fact.source and fact.circumstances for fact in FACTS.values())


# ---- an engine's cache manager, and what can be wrong with one -----------------------------------


class EngineManager:
    """A manager as engines write it: shapes from each layer's numbers, tensors on no device."""

    item = None

    def __init__(self, request):
        self.request = request
        self.layers = request.layers

    def create_kv_cache(self):
        return self.allocated(self.request.num_blocks)

    def create_host_kv_cache(self):
        return self.allocated(self.request.num_host_blocks)

    def allocated(self, num_blocks):
        caches = {}
        for index, layer in enumerate(self.layers):
            number = index + self.first()
            caches["key", number] = self.key(index, num_blocks)
            if layer.model.index_head_dim:
                shape = (num_blocks, layer.block_size, layer.model.index_head_dim + 4)
                caches["indexer", number] = torch.empty(shape, dtype=torch.uint8, device="meta")
        return caches

    def first(self):
        return self.request.layer_offset

    def key(self, index, num_blocks):
        shape = (num_blocks, 1, self.layers[index].block_size, self.width(index))
        return torch.empty(shape, dtype=self.dtype(index), device="meta")

    def is_packed(self, index):
        return self.layers[index].cache == "packed"

    def width(self, index):
        rank, rope = self.layers[index].kv_lora_rank, self.layers[index].qk_rope_head_dim
        return rank + rank // 128 * 4 + 2 * rope if self.is_packed(index) else rank + rope

    def dtype(self, index):
        return torch.uint8 if self.is_packed(index) else torch.bfloat16


CACHES, NO_VALUES, SHAPES, BYTES_ARE_BYTES, SIZES, SWAPS, TOTAL = (fact.name for fact in manager_caches.FACTS)


class FirstLayersWidth(EngineManager):
    """B61: the shape of layer 0 is every layer's."""

    breaks = frozenset({SHAPES, SIZES, TOTAL})

    def width(self, index):
        return super().width(0)


class FirstLayersBlocks(EngineManager):
    """#8060: blocks of every layer are as large as layer 0's."""

    breaks = frozenset({SHAPES, SIZES, TOTAL})

    def key(self, index, num_blocks):
        shape = (num_blocks, 1, self.layers[0].block_size, self.width(index))
        return torch.empty(shape, dtype=self.dtype(index), device="meta")


class SlidingAsFull(EngineManager):
    """B61: the layer's number is not handed on, and sliding layers get the cache of full ones."""

    breaks = frozenset({SHAPES, BYTES_ARE_BYTES, SIZES, TOTAL})

    def is_packed(self, index):
        return False


class PackedInBfloat16(EngineManager):
    """B60: 656 columns, and the model dtype in place of bytes."""

    breaks = frozenset({BYTES_ARE_BYTES, SIZES, TOTAL})

    def dtype(self, index):
        return torch.bfloat16


class WordsOnTheHost(EngineManager):
    """B59: host buffers of 4-byte items, whatever the device has."""

    breaks = frozenset({BYTES_ARE_BYTES, SIZES, SWAPS})

    def create_host_kv_cache(self):
        caches = super().create_host_kv_cache()
        return {key: torch.empty(cache.shape, device="meta") for key, cache in caches.items()}


class DeviceBlocksOnTheHost(EngineManager):
    """P6: as many blocks on the host as on the device."""

    breaks = frozenset({SHAPES, SIZES, SWAPS})

    def create_host_kv_cache(self):
        return self.create_kv_cache()


class WithValues(EngineManager):
    """B62: a value cache beside the key of every layer."""

    breaks = frozenset({NO_VALUES, TOTAL})

    def allocated(self, num_blocks):
        caches = super().allocated(num_blocks)
        values = {("value", layer): cache for (name, layer), cache in caches.items() if name == "key"}
        return {**caches, **values}


class LayersOfTheStage(EngineManager):
    """P6: the second stage of a pipeline counts its layers from 0 again."""

    breaks = frozenset({CACHES, NO_VALUES})

    def first(self):
        return 0


class WithoutHost(EngineManager):
    """P6: a failed host allocation leaves out what it was for."""

    breaks = frozenset({CACHES})

    def create_host_kv_cache(self):
        return {}


class ItemsOfTheHost(EngineManager):
    """B59, with the right number of bytes: half the tokens, in items twice as large."""

    breaks = frozenset({SHAPES, BYTES_ARE_BYTES, SWAPS})

    def create_host_kv_cache(self):
        caches = super().create_host_kv_cache()
        wider = {torch.uint8: torch.bfloat16, torch.bfloat16: torch.float32}
        return {
            key: torch.empty(cache.shape, dtype=wider[cache.dtype], device="meta")[..., ::2].contiguous()
            for key, cache in caches.items()
        }


FAULTY_MANAGERS = EngineManager.__subclasses__()


def test_every_fact_holds_of_an_engine_s_right_manager():
    assert contradicted(EngineManager, manager_caches.FACTS) == set()


@pytest.mark.parametrize("manager", FAULTY_MANAGERS, ids=lambda manager: manager.__name__)
def test_a_faulty_manager_contradicts_what_it_breaks_and_nothing_else(manager):
    assert contradicted(manager, manager_caches.FACTS) == manager.breaks


def test_every_fact_about_caches_is_broken_by_a_faulty_manager():
    broken = set().union(*(manager.breaks for manager in FAULTY_MANAGERS))
    assert broken == {fact.name for fact in manager_caches.FACTS}


def test_a_finding_names_the_tensor_that_is_wrong():
    reasons = {finding.fact: finding.reason for finding in findings(SlidingAsFull, manager_caches.FACTS)}
    assert "('key', 0) on the device must be [5, 1, 64, 656], got [5, 1, 64, 576]" in reasons[SHAPES]
    assert "cache=packed" in reasons[SHAPES]
    assert "must be uint8, got bfloat16" in reasons[BYTES_ARE_BYTES]
    reasons = {finding.fact: finding.reason for finding in findings(WordsOnTheHost, manager_caches.FACTS)}
    assert "on the device and" in reasons[SWAPS]
    assert "layers from 4 on" in next(
        finding.reason for finding in findings(LayersOfTheStage, manager_caches.FACTS) if finding.reason
    )


def test_buffers_that_are_an_address_and_a_size_are_counted_all_the_same():
    class Buffers(EngineManager):
        def create_host_kv_cache(self):
            return {
                key: SimpleNamespace(shape=None, dtype=str(cache.dtype), nbytes=cache.nbytes)
                for key, cache in super().create_host_kv_cache().items()
            }

    assert contradicted(Buffers, manager_caches.FACTS) == set()
