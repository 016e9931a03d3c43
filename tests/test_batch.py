"""Batches: what the contract says of every tensor, and poison wherever nothing may be read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cases import Options, parse
from cases.contract import Fill, contract_of, operators
from cases.suite import load_suite
from harness.buffers import NAN_BYTE, bytes_of
from harness.fill import FINITE_POISON, GROUP_CACHES
from harness.footprint import required_bytes
from harness.model_data import HIDDEN_SIZE, INTERMEDIATE_SIZE, Q_LORA_RANK, VOCAB_SIZE
from harness.tensors import DTYPES

DIGESTS = json.loads((Path(__file__).parent / "data" / "digests.json").read_text(encoding="utf-8"))
HUGE_POOL = 10_000
SMOKE = [str(item.case) for item in load_suite("smoke").cases if (item.case.options.pool or 0) < HUGE_POOL]
ZOO = "draft:30+3,hit:64+17,prefill:5,decode:100,idle,paused:7,pad:2"


def expected_shape(spec, layer, case):
    """The shape a contract asks for, from the case's rows alone."""
    rows = case.steps[0]
    slots = [row for row in rows if row.is_slot]
    value = layer.model.v_head_dim if layer.v_dim is None else layer.v_dim
    kv_heads = -(-layer.total_num_key_value_heads // case.options.tp)
    sizes = {
        "one": 1,
        "tokens": sum(row.new for row in rows),
        "slots": len(slots),
        "slots_plus_one": len(slots) + 1,
        "num_attention_heads": layer.num_attention_heads,
        "kv_lora_rank": layer.model.kv_lora_rank,
        "qk_rope_head_dim": layer.model.qk_rope_head_dim,
        "latent_width": layer.model.kv_lora_rank + layer.model.qk_rope_head_dim,
        "cache_width": (
            layer.model.kv_lora_rank * 33 // 32 + 2 * layer.model.qk_rope_head_dim
            if layer.cache == "packed"
            else layer.model.kv_lora_rank + layer.model.qk_rope_head_dim
        ),
        "packed_width": layer.model.kv_lora_rank * 33 // 32 + 2 * layer.model.qk_rope_head_dim,
        "v_head_dim": value,
        "num_key_value_heads": kv_heads,
        "qkv_width": (layer.num_attention_heads + kv_heads) * layer.model.qk_head_dim + kv_heads * value,
        "qkvg_checkpoint_width": (
            (case.options.tp * layer.num_attention_heads + layer.total_num_key_value_heads)
            * (layer.model.qk_head_dim + value)
        ),
        "qk_nope_head_dim": layer.model.qk_nope_head_dim,
        "qk_head_dim": layer.model.qk_nope_head_dim + layer.model.qk_rope_head_dim,
        "prefill_keys": sum(row.length for row in slots if row.seq_lens_encoder),
        "decode_tokens": sum(row.new for row in rows if row.is_decode or not row.is_slot),
        "block_size": layer.block_size,
        "num_blocks": None,
        "window_indices": None,
        "index_topk": case.options.topk,
        "tensor_parallel_size": case.options.tp,
        "kv_b_proj_width": (
            case.options.tp
            * layer.num_attention_heads
            * (layer.model.qk_nope_head_dim + layer.model.v_head_dim)
        ),
        "table_positions": max((row.length for row in slots if row.seq_lens_this_time), default=1),
        "num_layers": case.options.layers,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "vocab_size": VOCAB_SIZE,
        "q_lora_rank": Q_LORA_RANK,
        "history_tokens": sum(row.length for row in slots),
        "q_width": layer.num_attention_heads * layer.model.qk_head_dim,
        "attention_width": layer.num_attention_heads * layer.model.v_head_dim,
        "max_blocks": max((-(-row.length // layer.block_size) for row in slots), default=0) + 1,
    }
    return [sizes[axis] for axis in spec.axes]


@pytest.mark.parametrize("text", SMOKE)
def test_inputs_have_the_contracts_axes_and_dtypes(text, make_batch):
    case = parse(text)
    batch = make_batch(text)
    is_stack = batch.operator.is_stack
    assert len(batch.layers) == (1 if is_stack else case.options.layers)
    for layer_batch, layer in zip(batch.layers, case.layers, strict=not is_stack):
        present = [spec for spec in batch.operator.inputs if layer_batch.attributes.get(spec.name, 0) == 0]
        withheld = [spec.name for spec in batch.operator.inputs if spec not in present]
        # Queries are compressed or they are not, and layers have sinks or none.
        has_sinks = "sinks" in {spec.name for spec in present}
        attends_in_groups = batch.operator.name == "gqa_step" and not has_sinks
        assert withheld == (["q_proj"] if is_stack else ["sinks"] if attends_in_groups else [])
        assert list(layer_batch.inputs) == [spec.name for spec in present]
        assert list(layer_batch.attributes) == [*batch.operator.attributes, *withheld]
        for spec in present:
            view = layer_batch.inputs[spec.name].view
            expected = expected_shape(spec, layer, case)
            assert [None if e is None else g for g, e in zip(view.shape, expected, strict=True)] == expected
            of_layer = {
                "model": DTYPES[layer.dtype],
                "cache": torch.uint8 if layer.cache == "packed" else DTYPES[layer.dtype],
            }
            named = of_layer[spec.dtype] if spec.dtype in of_layer else getattr(torch, spec.dtype)
            assert view.dtype is named
            assert view.stride(-1) == 1
            assert layer_batch.inputs[spec.name].untouched_outside()
            if not spec.strided or case.options.strided == "0":
                assert view.is_contiguous()


@pytest.mark.parametrize("name", operators())
def test_contracts_name_known_options_and_describe_every_tensor(name):
    operator = operators()[name]
    assert set(operator.options) <= {item.name for item in fields(Options)}
    for spec in operator.inputs:
        assert spec.fill is not None
        assert spec.doc
    for spec in operator.outputs:
        assert spec.judge is not None
        assert spec.doc


def test_strided_inputs_are_really_strided(make_batch):
    tensors = make_batch("mla_decode/decode:9x3/heads=4").layers[0].tensors
    assert not tensors["q"].is_contiguous()
    assert not tensors["block_tables"].is_contiguous()
    assert tensors["latent_cache"].is_contiguous()


def held_rows(batch, layer, *, with_new):
    """[nb, bs] bool: physical rows that hold a token, from the block table and the lengths alone."""
    tensors = layer.tensors
    cache, tables = tensors["latent_cache"], tensors["block_tables"]
    held = torch.zeros(cache.shape[0], cache.shape[2], dtype=torch.bool)
    for slot in range(batch.metadata.slots):
        count = int(tensors["seq_lens_decoder"][slot])
        if with_new:
            count += int(tensors["seq_lens_this_time"][slot])
        for position in range(count):
            held[int(tables[slot, position // cache.shape[2]]), position % cache.shape[2]] = True
    return held


@pytest.mark.parametrize("block", [1, 3, 16, 64])
@pytest.mark.parametrize("operator", ["mla_decode", "latent_cache_write"])
def test_cache_rows_that_hold_no_token_are_nan_and_the_others_are_not(operator, block, make_batch):
    batch = make_batch(f"{operator}/{ZOO},hit:5+3@sys,decode:8@sys/block={block}".replace("pad:2,", ""))
    layer = batch.layers[0]
    cache = layer.tensors["latent_cache"][:, 0]
    held = held_rows(batch, layer, with_new=operator == "mla_decode")
    assert bool(held.any())
    assert bool((~held).any())
    assert bool(cache[~held].isnan().all())
    assert bool(cache[held].isfinite().all())


@pytest.mark.parametrize(("poison", "value"), [("finite", FINITE_POISON), ("zero", 0.0)])
def test_cache_rows_that_hold_no_token_are_what_poison_says(poison, value, make_batch):
    batch = make_batch(f"mla_decode/{ZOO}/heads=2,poison={poison}")
    layer = batch.layers[0]
    cache = layer.tensors["latent_cache"][:, 0]
    assert bool((cache[~held_rows(batch, layer, with_new=True)] == value).all())


@pytest.mark.parametrize(
    ("operator", "names"), [("mla_decode", ["q"]), ("latent_cache_write", ["compressed_kv", "k_pe"])]
)
def test_token_rows_are_numbers_and_those_of_padding_nan(operator, names, make_batch):
    tensors = make_batch(f"{operator}/{ZOO}").layers[0].tensors
    real = 3 + 17 + 5 + 1
    for name in names:
        assert bool(tensors[name][:real].isfinite().all())
        assert bool(tensors[name][real:].isnan().all())
        assert len(tensors[name]) == real + 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_rows_are_told_from_poison_by_their_bytes(dtype, make_batch):
    # Both are NaN, but a padding row that is copied onto poison must show.
    tensors = make_batch(f"latent_cache_write/decode:3,pad:2/dtype={dtype}").layers[0].tensors
    for name in ("compressed_kv", "k_pe"):
        padding = bytes_of(tensors[name][1:].contiguous())
        assert bool(tensors[name][1:].isnan().all())
        assert not bool((padding.view(2, -1, DTYPES[dtype].itemsize) == NAN_BYTE).all(-1).any())


def test_the_cache_after_a_step_holds_what_the_step_writes(make_batch):
    before = make_batch(f"latent_cache_write/{ZOO}").layers[0].tensors
    after = make_batch(f"mla_decode/{ZOO}/heads=1").layers[0].tensors["latent_cache"]
    rows = torch.cat([before["compressed_kv"], before["k_pe"]], -1)
    slots = before["slot_mapping"]
    assert torch.equal(after.view(-1, after.shape[-1])[slots[slots >= 0]], rows[slots >= 0])


def test_a_shared_block_holds_what_it_holds_of_one_row_alone(make_batch):
    blocks = []
    for rows in ("decode:130@sys,decode:200@sys", "decode:130@sys", "idle,decode:200@sys"):
        tensors = make_batch(f"mla_decode/{rows}/heads=1").layers[0].tensors
        first = int(tensors["block_tables"][-1, 0])
        blocks.append(tensors["latent_cache"][first])
    assert bool(blocks[0].isfinite().all())
    assert torch.equal(blocks[0], blocks[1])
    assert torch.equal(blocks[0], blocks[2])


def test_attributes_are_the_models_and_the_cases(make_batch):
    layer = make_batch("mla_decode/decode:9/model=glm-5,heads=2,splits=3").layers[0]
    # N + D = 192 + 64: scale 256^-0.5.
    assert layer.attributes == {"softmax_scale": 0.0625, "kv_lora_rank": 512, "splits": 3}


# ---- digests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [f"mla_decode/{ZOO}/heads=2", f"latent_cache_write/{ZOO}/layers=2", f"mla_step/{ZOO}/heads=2"],
)
def test_the_digest_depends_on_every_tensor(text, make_batch):
    batch = make_batch(text)
    before = batch.digest()
    assert make_batch(text).digest() == before
    for layer in batch.layers:
        for name, buffer in layer.inputs.items():
            last = tuple(size - 1 for size in buffer.view.shape)
            kept = buffer.snapshot()
            buffer.view[last] = 2
            assert batch.digest() != before, name
            buffer.restore(kept)
            assert batch.digest() == before, name


def test_the_digest_depends_on_attributes(make_batch):
    texts = ("mla_decode/decode:9/heads=2", "mla_decode/decode:9/heads=2,splits=2")
    assert len({make_batch(text).digest() for text in texts}) == 2


@pytest.mark.parametrize("text", DIGESTS)
def test_digests_equal_those_of_other_machines(text, make_batch):
    assert make_batch(text).digest() == DIGESTS[text]


# ---- memory --------------------------------------------------------------------------------------


def test_required_bytes_covers_the_tensors(make_batch):
    text = f"mla_decode/{ZOO}/heads=8"
    case = parse(text)
    held = sum(len(buffer.raw) for layer in make_batch(text).layers for buffer in layer.inputs.values())
    assert required_bytes(case, contract_of(case), "cpu") > held


def test_a_huge_cache_takes_memory_on_a_gpu_and_little_on_the_host():
    case = parse("mla_decode/decode:63,decode:64/heads=4,pool=117000")
    operator = contract_of(case)
    cache_bytes = 117_000 * 64 * 576 * 2
    assert required_bytes(case, operator, "cuda") > cache_bytes
    assert required_bytes(case, operator, "cpu") < cache_bytes // 4


def test_a_huge_cache_is_made_without_touching_all_of_it(make_batch):
    batch = make_batch("mla_decode/decode:63,decode:64/heads=1,pool=60000,pages=reversed")
    layer = batch.layers[0]
    buffer = layer.inputs["latent_cache"]
    assert buffer.sparse
    assert len(buffer.snapshot()) < 20 << 20
    used = sorted(layer.pages.used.tolist())
    assert used == [59997, 59998, 59999]
    # 63 cached and one new fill the first block; 64 and one new begin a second, holding one row.
    full, other, started = (int(block) for row in layer.pages.blocks for block in row)
    assert bool(buffer.view[[full, other]].isfinite().all())
    assert bool(buffer.view[started, 0, 0].isfinite().all())
    assert bool(buffer.view[started, 0, 1:].isnan().all())
    assert bool(buffer.view[59996].isnan().all())


def test_every_cache_input_is_declared_as_one():
    for operator in operators().values():
        for spec in operator.inputs:
            caches = (Fill.CACHE_BEFORE, Fill.CACHE_AFTER, Fill.COMPUTED_CACHE, *GROUP_CACHES)
            assert (spec.dtype == "cache") == (spec.fill in caches)
