"""Our loaded kv_b_proj: every fact holds of it, and what it does beyond them."""

import pytest
import torch

from cases import parse
from harness.conformance import kv_b_loading, value_padding
from harness.conformance.facts import findings
from harness.conformance.kv_b_loading import LoadRequest, numbers
from harness.data import ProjectedSource
from harness.kv_b_data import weight_rows
from harness.tensors import DTYPES


@pytest.fixture(scope="module")
def ours():
    """The module of the projection."""
    pytest.importorskip("triton")
    from harness.paths.triton import kv_b_proj

    return kv_b_proj


def dimensions_of(ours, request):
    return ours.KVBDimensions(
        num_attention_heads=request.num_attention_heads,
        qk_nope_head_dim=request.qk_nope_head_dim,
        v_head_dim=request.v_head_dim,
        kv_lora_rank=request.kv_lora_rank,
        tensor_parallel_size=request.tensor_parallel_size,
        tensor_parallel_rank=request.tensor_parallel_rank,
    )


def constructed(ours, request):
    return ours.KVBProjection(
        dimensions_of(ours, request),
        load_choice=request.load_choice,
        layout=request.layout,
        dtype=DTYPES[request.dtype],
        device=request.device,
    )


@pytest.fixture(scope="module")
def make(ours):
    """A factory of projections as the facts ask for them."""

    def of(request):
        projection = constructed(ours, request)
        if request.kv_b_proj is not None:
            projection.load_weight(request.kv_b_proj)
        return projection

    return of


@pytest.mark.parametrize("fact", kv_b_loading.FACTS, ids=lambda fact: fact.name)
def test_the_fact_holds_of_our_projection(fact, make):
    (finding,) = findings(make, [fact])
    assert finding.reason is None


@pytest.mark.parametrize("fact", value_padding.FACTS, ids=lambda fact: fact.name)
def test_the_fact_holds_of_our_padding(fact, ours):
    (finding,) = findings(ours, [fact])
    assert finding.reason is None


@pytest.mark.parametrize("choice", ["default_v0", "default_v1"])
@pytest.mark.parametrize("layout", ["paddle", "torch"])
def test_a_rank_s_own_shard_is_taken_like_the_whole(ours, make, choice, layout):
    request = LoadRequest(load_choice=choice, layout=layout, tensor_parallel_size=2, tensor_parallel_rank=1)
    whole = kv_b_loading.processed(make, request)
    alone = constructed(ours, request)
    shard = request.by_rank.chunk(2, dim=1)[1]
    # A view of the whole: its rows lie apart, or its columns.
    alone.load_weight(shard if layout == "paddle" else shard.T)
    alone.process_weights_after_loading()
    for name in ("k_b_proj_weight", "v_b_proj_weight"):
        one, other = getattr(whole, name), getattr(alone, name)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_weights_loaded_again_replace_the_old_ones_in_place(make):
    request = LoadRequest()
    projection = kv_b_loading.processed(make, request)
    places = projection.k_b_proj_weight.data_ptr(), projection.v_b_proj_weight.data_ptr()
    old = projection.k_b_proj_weight.clone()
    width = request.by_rank.shape[1]
    others = weight_rows(
        "kv_b_proj", torch.arange(request.kv_lora_rank), width, DTYPES[request.dtype], seed=9
    )
    projection.load_weight(others.T.contiguous())
    # Until they are processed the old ones are in use.
    assert torch.equal(projection.k_b_proj_weight, old)
    projection.process_weights_after_loading()
    assert torch.equal(projection.k_b_proj_weight[0], others[:, : request.qk_nope_head_dim].T)
    assert (projection.k_b_proj_weight.data_ptr(), projection.v_b_proj_weight.data_ptr()) == places


def test_the_checkpoint_s_tensor_is_let_go_after_processing(make):
    projection = make(LoadRequest(load_choice="default_v1"))
    assert projection.kv_b_proj is not None
    projection.process_weights_after_loading()
    assert projection.kv_b_proj is None
    assert make(LoadRequest(load_choice="default_v0")).kv_b_proj is None


@pytest.mark.parametrize("load", [False, True])
def test_a_use_before_the_weights_are_there_is_refused(ours, load):
    request = LoadRequest(load_choice="default_v1")
    projection = constructed(ours, request)
    if load:
        projection.load_weight(request.kv_b_proj)
    latents = torch.zeros(2, request.kv_lora_rank, dtype=torch.bfloat16)
    queries = torch.zeros(2, request.heads, request.qk_nope_head_dim, dtype=torch.bfloat16)
    for use, given in (
        (projection.expand_keys, latents),
        (projection.expand_values, latents),
        (projection.absorb_query, queries),
    ):
        with pytest.raises(RuntimeError, match="no weights yet"):
            use(given)
    projection.process_weights_after_loading()
    assert projection.is_loaded == load


def test_uses_by_token_are_those_by_head(make):
    request = LoadRequest(kv_lora_rank=64)
    projection = kv_b_loading.processed(make, request)
    queries = numbers("q", 3, request.heads, request.qk_nope_head_dim, dtype=torch.bfloat16)
    latent_out = numbers("o", 3, request.heads, request.kv_lora_rank, dtype=torch.bfloat16)
    by_head = projection.forward(queries.transpose(0, 1), "k")
    assert torch.equal(projection.absorb_query(queries), by_head.transpose(0, 1))
    by_head = projection.forward(latent_out.transpose(0, 1), "v")
    assert torch.equal(projection.project_output(latent_out), by_head.transpose(0, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"load_choice": "default_v2"},
            "load_choice is one of default_v0, default_v1, dummy, got 'default_v2'",
        ),
        ({"layout": "jax"}, "layout is one of paddle, torch, got 'jax'"),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(ours, changes, said):
    with pytest.raises(ValueError, match=said):
        constructed(ours, LoadRequest(**changes))


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_there_is_not_is_refused(ours, rank):
    with pytest.raises(ValueError, match=f"tensor_parallel_rank is 0 to 1, got {rank}"):
        dimensions_of(ours, LoadRequest(tensor_parallel_size=2, tensor_parallel_rank=rank))


def test_weights_of_another_shape_or_dtype_are_refused(ours):
    request = LoadRequest(layout="paddle", tensor_parallel_size=2)
    projection = constructed(ours, request)
    # The other layout's shape, and one head too few.
    for wrong in (request.by_rank.T, request.by_rank[:, :-64], request.by_rank[1:]):
        with pytest.raises(ValueError, match=r"shape \(32, 256\), or \(32, 128\) for this rank alone, got"):
            projection.load_weight(wrong)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 on cpu, got torch\.float32 on cpu"):
        projection.load_weight(request.by_rank.float())
    assert not projection.is_loaded


def test_a_dummy_load_takes_no_checkpoint(ours):
    projection = constructed(ours, LoadRequest(load_choice="dummy"))
    with pytest.raises(ValueError, match="load_choice is dummy"):
        projection.load_weight(LoadRequest().kv_b_proj)


def test_the_projections_of_a_step_are_loaded_from_their_checkpoint(ours):
    # mla_step's W_UK and W_UV, put together to a checkpoint and loaded, are those of mla_step.
    layer = parse("mla_step/decode:1/model=mistral-small-4,heads=2").layers[0]
    source = ProjectedSource(layer, "planted", 0)
    w_uk, w_uv = (make(torch.device("cpu")) for make in (source.w_uk, source.w_uv))
    checkpoint = torch.cat([w_uk, w_uv.transpose(1, 2)], dim=1).flatten(0, 1)
    dimensions = ours.KVBDimensions(2, layer.qk_nope_head_dim, layer.v_head_dim, layer.kv_lora_rank)
    projection = ours.KVBProjection(dimensions, dtype=torch.float32)
    projection.load_weight(checkpoint)
    projection.process_weights_after_loading()
    assert torch.equal(projection.k_b_proj_weight, w_uk)
    assert torch.equal(projection.v_b_proj_weight, w_uv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_dummy_weights_is_exactly_zero(ours, make_batch, dtype):
    from harness.paths.triton import mla_step

    text = f"mla_step/draft:30+3,decode:5,prefill:4/model=minicpm3-4b,heads=2,dtype={dtype}"
    case, batch = parse(text), make_batch(text)
    (layer,) = case.layers
    dimensions = ours.KVBDimensions(2, layer.qk_nope_head_dim, layer.v_head_dim, layer.kv_lora_rank)
    projection = ours.KVBProjection(dimensions, load_choice="dummy", dtype=DTYPES[dtype])
    projection.process_weights_after_loading()
    inputs = {
        **batch.layers[0].tensors,
        **batch.layers[0].attributes,
        "w_uk": projection.k_b_proj_weight,
        "w_uv": projection.v_b_proj_weight,
    }
    out = torch.full((8, 2, layer.v_head_dim), torch.nan, dtype=DTYPES[dtype])
    scratch = {
        name: torch.full(shape, torch.nan, dtype=getattr(torch, kind))
        if "float" in kind
        else torch.zeros(shape, dtype=getattr(torch, kind))
        for name, (shape, kind) in mla_step.workspace(case).items()
    }
    mla_step.run(inputs, {"out": out}, scratch)
    assert bool((out == 0).all())
