"""Every check catches the path that is broken in the way it is for, and passes the right one."""

from itertools import count

import pytest
import torch

from harness.checks import checks
from harness.kernel_path import KernelPath
from harness.verdict import Kind, Status

ALONE = "mla_decode/decode:70/model=minicpm3-4b,heads=2,block=16"
MIXED = (
    "mla_decode/decode:40,draft:30+3,idle,decode:5,hit:6+4,paused:9,pad:2/model=minicpm3-4b,heads=2,block=16"
)
PINNED = f"{MIXED},splits=1"
WRITE = "latent_cache_write/hit:30+3,decode:15,idle,prefill:5,paused:9,pad:6/model=minicpm3-4b,block=16"
OF_STEPS = ("history", "chunks", "recompute", "bytes")
"""Asked of whole steps: tests/test_schedules.py."""
EVERY = [name for name, check in checks().items() if "interpreted" in check.lanes and name not in OF_STEPS]
AGAIN = [name for name in EVERY if checks()[name].relaunches]


def supports_all(_):
    return None


def path_of(run, operator="mla_decode", **options):
    return KernelPath(f"test/{operator}", operator, ("interpreted",), supports_all, run, **options)


# ---- a path that is right, with places to break it -----------------------------------------------


def attend(inputs, outputs, *, visible_of=None, scale_of=None, rows_of=None):
    """Absorbed decode, one token at a time, in float64.

    Places to break it: `visible_of(visible, kv_len)` and `scale_of(scale)` change what they are named
    after, `rows_of(cache, table, count)` reads the first `count` cache rows of a table.
    """
    scale = inputs["softmax_scale"] if scale_of is None else scale_of(inputs["softmax_scale"])
    rows_of = rows_of or rows_by_table
    encoder, decoder, starts = (
        inputs[name].tolist() for name in ("seq_lens_encoder", "seq_lens_decoder", "cu_seqlens_q")
    )
    for token, slot in enumerate(inputs["batch_id_per_token"].tolist()):
        if slot < 0 or encoder[slot] > 0:
            outputs["out"][token] = 0.0
            outputs["lse"][token] = -torch.inf
            continue
        kv_len = decoder[slot] + starts[slot + 1] - starts[slot]
        visible = decoder[slot] + token - starts[slot] + 1
        if visible_of is not None:
            visible = visible_of(visible, kv_len)
        keys = rows_of(inputs["latent_cache"], inputs["block_tables"][slot], visible).double()
        logits = inputs["q"][token].double() @ keys.T * scale
        outputs["out"][token] = torch.softmax(logits, -1) @ keys[:, : inputs["kv_lora_rank"]]
        outputs["lse"][token] = torch.logsumexp(logits, -1)


def rows_by_table(cache, table, count):
    positions = torch.arange(count)
    return cache[table[positions // cache.shape[2]].long(), 0, positions % cache.shape[2]]


def write(inputs, outputs, *, shift=0, with_padding=False):
    """The cache write, token by token: `shift` rows too far, and where padding points too."""
    cache = outputs["latent_cache"].view(-1, outputs["latent_cache"].shape[-1])
    for token, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot >= 0 or (with_padding and slot >= -len(cache)):
            cache[slot + shift] = torch.cat([inputs["compressed_kv"][token], inputs["k_pe"][token]])


def broken(**places):
    return path_of(lambda inputs, outputs, _: attend(inputs, outputs, **places))


def afterwards(act):
    """The right path, then act(inputs, outputs)."""

    def run(inputs, outputs, workspace):
        attend(inputs, outputs)
        act(inputs, outputs)

    return path_of(run)


def broken_write(**places):
    return path_of(lambda inputs, outputs, _: write(inputs, outputs, **places), "latent_cache_write")


RIGHT = broken()
RIGHT_WRITE = broken_write()


def passing(launch, name):
    """Whether every result of a check is a pass."""
    results = list(checks()[name].run(launch))
    assert results
    return all(result.status is Status.PASSED for result in results)


def failure(launch, name):
    """The one failed result of a check."""
    failed = [result for result in checks()[name].run(launch) if result.status is Status.FAILED]
    assert len(failed) == 1, f"{name}: {[result.reason for result in failed]}"
    return failed[0]


# ---- the right paths -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("text", [MIXED, PINNED])
def test_the_right_decode_passes(name, text, launched):
    assert passing(launched(text, RIGHT), name)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("options", ["layers=2,block=16+3", "layers=2,heads=2+3,splits=2"])
def test_the_right_decode_passes_in_every_layer(name, options, launched):
    assert passing(launched(f"mla_decode/decode:40,idle,draft:30+3/model=minicpm3-4b,{options}", RIGHT), name)


@pytest.mark.parametrize("name", ["values", "guard", "inputs", "bounds", *AGAIN])
def test_the_right_cache_write_passes(name, launched):
    assert passing(launched(WRITE, RIGHT_WRITE), name)


@pytest.mark.parametrize(
    "text", ["mla_decode//heads=2", "mla_decode/idlex3/heads=2", "mla_decode/pad:2/heads=2"]
)
@pytest.mark.parametrize("name", EVERY)
def test_steps_without_a_row_fail_no_check(name, text, launched):
    statuses = {result.status for result in checks()[name].run(launched(text, RIGHT))}
    assert statuses <= {Status.PASSED, Status.SKIPPED}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("data", ["planted", "randn", "flat", "peaked", "huge", "deep", "tiny"])
def test_the_right_decode_is_within_budget_in_every_mode(data, dtype, launched):
    launch = launched(
        f"mla_decode/decode:40,draft:30+3/model=minicpm3-4b,heads=2,dtype={dtype},data={data}", RIGHT
    )
    assert passing(launch, "values")
    assert passing(launch, "lse")


# ---- values and lse ------------------------------------------------------------------------------


def no_rope_width(scale):
    """(N + D)^-0.5 * m^2 with the latent width in place of N + D, as a port from plain attention has it."""
    return scale * (96 / 288) ** 0.5


@pytest.mark.parametrize("length", [2, 40, 700])
def test_a_wrong_scale_is_caught_at_every_length(length, launched):
    launch = launched(f"mla_decode/decode:{length}/model=minicpm3-4b,heads=2", broken(scale_of=no_rope_width))
    for name in ("values", "lse"):
        assert failure(launch, name).kind is Kind.WRONG


def test_a_missing_log2_e_is_caught(launched):
    launch = launched(ALONE, broken(scale_of=lambda scale: scale * 1.4426950408889634))
    assert failure(launch, "values").kind is Kind.WRONG


@pytest.mark.parametrize("length", [1, 15, 16, 63, 700])
def test_a_dropped_last_key_is_caught(length, launched):
    path = broken(visible_of=lambda visible, _: visible - 1)
    launch = launched(f"mla_decode/decode:{length}/model=minicpm3-4b,heads=2,block=16", path)
    for name in ("values", "lse"):
        assert failure(launch, name).kind is Kind.WRONG


def test_a_forbidden_key_is_caught_and_located(launched):
    path = broken(visible_of=lambda visible, kv_len: min(visible + 1, kv_len))
    found = failure(launched(MIXED, path), "values")
    # Row 1 is draft:30+3 at tokens 1 to 3: the first two see a key too many, the last has none left.
    assert (found.where.rows, found.where.tokens, found.where.heads) == ("1", "1-2", "0-1")
    assert found.error > found.budget
    assert found.worst.index[0] in (1, 2)


def test_one_wrong_row_is_caught_and_located(launched):
    def spoil(inputs, outputs):
        outputs["out"][2, 1] *= 1.02

    found = failure(launched(MIXED, afterwards(spoil)), "values")
    assert (found.where.rows, found.where.tokens, found.where.heads) == ("1", "2", "1")
    assert found.reason.startswith("1 of ")


@pytest.mark.parametrize(("share", "is_within"), [(0.9, True), (1.1, False)])
def test_a_row_is_over_budget_from_its_budget_on(share, is_within, launched):
    one_row = f"{ALONE},dtype=fp32".replace("heads=2", "heads=1")
    (clean,) = checks()["values"].run(launched(one_row, afterwards(lambda *_: None)))

    def spoil(inputs, outputs):
        outputs["out"] *= 1 + share * clean.budget

    assert passing(launched(one_row, afterwards(spoil)), "values") == is_within


def test_one_wrong_element_is_caught_and_named(launched):
    def spoil(inputs, outputs):
        outputs["out"][0, 1, 200] += 1.0

    found = failure(launched(ALONE, afterwards(spoil)), "values")
    assert found.where.dims == "200"
    assert found.worst.index == (0, 1, 200)
    assert found.worst.got - found.worst.expected == pytest.approx(1.0, abs=0.01)


def test_a_base_2_lse_is_caught(launched):
    launch = launched(ALONE, afterwards(lambda _, outputs: outputs["lse"].div_(0.6931471805599453)))
    assert failure(launch, "lse").kind is Kind.WRONG
    assert passing(launch, "values")


def test_an_lse_without_the_scale_is_caught(launched):
    def unscaled(inputs, outputs):
        outputs["lse"] /= inputs["softmax_scale"]

    assert failure(launched(ALONE, afterwards(unscaled)), "lse").kind is Kind.WRONG


@pytest.mark.parametrize("empty", [-1e30, torch.inf, torch.nan, 0.0])
def test_an_lse_that_is_not_minus_infinity_for_empty_rows_is_caught(empty, launched):
    def fill(inputs, outputs):
        lse = outputs["lse"]
        lse[lse == -torch.inf] = empty

    found = failure(launched(MIXED, afterwards(fill)), "lse")
    # The four tokens of hit:6+4 in slot 4, and the two of padding, which belong to no row.
    assert (found.where.rows, found.where.tokens) == ("4", "5-10")
    assert found.error == torch.inf


def test_an_lse_of_minus_infinity_for_a_row_with_keys_is_caught(launched):
    launch = launched(ALONE, afterwards(lambda _, outputs: outputs["lse"].fill_(-torch.inf)))
    assert failure(launch, "lse").kind is Kind.WRONG


def test_padding_left_unwritten_is_caught(launched):
    def unwrite(inputs, outputs):
        padding = inputs["batch_id_per_token"] < 0
        outputs["out"][padding] = torch.nan
        outputs["lse"][padding] = torch.nan

    launch = launched(MIXED, afterwards(unwrite))
    for name in ("values", "lse"):
        found = failure(launch, name)
        assert (found.where.rows, found.where.tokens) == ("", "9-10")


def test_outputs_never_written_are_caught(launched):
    launch = launched(ALONE, path_of(lambda *_: None))
    for name in ("values", "lse"):
        assert failure(launch, name).kind is Kind.WRONG


def test_a_cache_write_one_row_off_is_caught_twice(launched):
    launch = launched(WRITE, broken_write(shift=1))
    assert failure(launch, "values").kind is Kind.WRONG
    found = failure(launch, "guard")
    assert found.kind is Kind.GUARD
    assert found.where.blocks


def test_one_wrong_bit_of_a_copy_is_caught(launched):
    def run(inputs, outputs, workspace):
        write(inputs, outputs)
        rows = outputs["latent_cache"].view(-1, 288)
        slot = inputs["slot_mapping"][1]
        rows.view(torch.int16)[slot, 7] ^= 1

    found = failure(launched(WRITE, path_of(run, "latent_cache_write")), "values")
    assert (found.where.rows, found.where.dims) == ("0", "7")
    assert found.reason.startswith("1 of ")


# ---- guard and inputs ----------------------------------------------------------------------------


def poke(tensor, offset, value=0.0):
    """Writes one element of a tensor's storage, `offset` elements from its first."""
    tensor.as_strided((1,), (1,), tensor.storage_offset() + offset).fill_(value)


@pytest.mark.parametrize("strided", [0, 1])
@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_write_just_outside_an_output_is_caught(name, place, strided, launched):
    def stray(inputs, outputs):
        tensor = outputs[name]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        poke(tensor, -1 if place == "before" else last + 1)

    launch = launched(f"{ALONE},strided={strided}", afterwards(stray))
    found = failure(launch, "guard")
    assert (found.kind, found.tensor) == (Kind.GUARD, name)
    assert passing(launch, "values")


def test_a_write_into_the_gap_between_heads_is_caught(launched):
    path = afterwards(lambda _, outputs: poke(outputs["out"], 256))
    launch = launched(ALONE, path)
    assert launch.layers[0].outputs["out"].view.stride(1) > 256
    assert failure(launch, "guard").tensor == "out"


def test_a_write_outside_the_workspace_is_caught(launched):
    def run(inputs, outputs, workspace):
        attend(inputs, outputs)
        poke(workspace["scratch"], workspace["scratch"].numel())

    path = path_of(run, workspace=lambda _: {"scratch": ((3, 5), "float32")})
    assert failure(launched(ALONE, path), "guard").tensor == "scratch"


def test_workspace_and_outputs_are_nan_before_the_launch(launched):
    seen = {}

    def run(inputs, outputs, workspace):
        seen.update({name: tensor.clone() for name, tensor in {**outputs, **workspace}.items()})
        attend(inputs, outputs)

    path = path_of(run, workspace=lambda _: {"scratch": ((3, 5), "float32")})
    launched(ALONE, path)
    assert sorted(seen) == ["lse", "out", "scratch"]
    assert all(bool(tensor.isnan().all()) for tensor in seen.values())


def test_guards_are_not_checked_where_the_library_allocates(launched):
    path = path_of(lambda inputs, outputs, _: attend(inputs, outputs), allocates=True)
    results = list(checks()["guard"].run(launched(ALONE, path)))
    assert {(result.status, bool(result.reason)) for result in results} == {(Status.SKIPPED, True)}


def test_a_write_of_padding_through_a_negative_index_is_caught(launched):
    launch = launched(WRITE, broken_write(with_padding=True))
    found = failure(launch, "guard")
    assert found.kind is Kind.GUARD
    # Slot -1 is the last row of the last block.
    blocks = launch.layers[0].batch.pages.num_blocks
    assert str(blocks - 1) in found.where.blocks
    assert passing(launch, "values")


def test_a_row_of_padding_written_before_the_cache_is_caught(launched):
    def run(inputs, outputs, workspace):
        write(inputs, outputs)
        cache, token = outputs["latent_cache"], inputs["slot_mapping"].tolist().index(-1)
        before = cache.as_strided((256,), (1,), cache.storage_offset() - 288)
        before.copy_(inputs["compressed_kv"][token])

    found = failure(launched(WRITE, path_of(run, "latent_cache_write")), "guard")
    assert (found.kind, found.where.blocks) == (Kind.GUARD, "")


@pytest.mark.parametrize(
    "name",
    [
        "q",
        "latent_cache",
        "block_tables",
        "seq_lens_encoder",
        "seq_lens_decoder",
        "seq_lens_this_time",
        "cu_seqlens_q",
        "batch_id_per_token",
    ],
)
@pytest.mark.parametrize("place", ["inside", "behind"])
def test_a_changed_input_is_caught(name, place, launched):
    def change(inputs, outputs):
        tensor = inputs[name]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        poke(tensor, last if place == "inside" else last + 1, 3)

    found = failure(launched(ALONE, afterwards(change)), "inputs")
    assert (found.kind, found.tensor) == (Kind.INPUT_CHANGED, name)


# ---- what must not matter ------------------------------------------------------------------------


def unread_as_zero(cache, table, count):
    """Whole blocks, NaN taken for "no key here": right as long as unread slots hold NaN."""
    blocks = table[: -(-count // cache.shape[2])].long()
    rows = cache[blocks, 0].flatten(0, 1)
    return rows[~rows.isnan().any(-1)]


def test_a_path_that_reads_poison_and_drops_nan_is_caught(launched):
    # A decode row's last block is read past its length; of a draft the mask would still be missing.
    launch = launched(ALONE, broken(rows_of=unread_as_zero))
    assert passing(launch, "values")
    assert failure_of_any(launch, "poison").kind is Kind.WRONG


def failure_of_any(launch, name):
    """The first failed result of a check that compares every output."""
    failed = [result for result in checks()[name].run(launch) if result.status is Status.FAILED]
    assert failed
    return failed[0]


def rows_in_order(cache, table, count):
    """The cache as if the blocks lay in order, from the row's first block on."""
    first = int(table[0]) * cache.shape[2]
    return cache.flatten(0, 2)[first : first + count]


def test_a_path_that_ignores_the_block_table_is_caught(launched):
    launch = launched(f"{ALONE},pages=sequential", broken(rows_of=rows_in_order))
    assert passing(launch, "values")
    assert failure_of_any(launch, "pages").kind is Kind.WRONG


def nudging(tokens_of):
    """The right path, then other last bits in one column of the tokens tokens_of(inputs): within budget."""

    def nudge(inputs, outputs):
        bits = outputs["out"].view(torch.int16)
        bits[tokens_of(inputs), :, 0] ^= 1

    return afterwards(nudge)


def spoiling(tokens_of):
    """The right path, then values 3 % off in the tokens tokens_of(inputs): beyond any budget."""

    def spoil(inputs, outputs):
        outputs["out"][tokens_of(inputs)] *= 1.03

    return afterwards(spoil)


def in_slot_0(inputs):
    return inputs["batch_id_per_token"] == 0


def in_a_larger_batch(inputs):
    """The first token, where there are more slots than MIXED has."""
    return [0] if len(inputs["seq_lens_decoder"]) > 6 else []


def test_a_nondeterministic_path_is_caught(launched):
    launches = count()
    launch = launched(ALONE, nudging(lambda _: [0] if next(launches) == 3 else []))
    assert passing(launch, "values")
    assert failure(launch, "repeat").kind is Kind.NONDETERMINISTIC


def test_a_path_that_leaves_out_what_an_earlier_launch_wrote_is_caught(launched):
    launches = count()

    def run(inputs, outputs, workspace):
        if next(launches) == 0:
            attend(inputs, outputs)

    assert failure(launched(ALONE, path_of(run)), "repeat").kind is Kind.NONDETERMINISTIC


@pytest.mark.parametrize("neighbour", [0, 1])
def test_a_result_that_depends_on_a_neighbour_is_caught(neighbour, launched):
    def where_the_neighbour_begins_oddly(inputs):
        # The lowest bit of the neighbour's query: other data change it in half of the seeds.
        is_odd = inputs["q"].view(torch.int16)[neighbour, 0, 0] & 1
        return [1 - neighbour] if is_odd else []

    text = "mla_decode/decode:40,decode:30/model=minicpm3-4b,heads=2,block=16,data=randn"
    caught = []
    for seed in range(8):
        launch = launched(f"{text},seed={seed}", nudging(where_the_neighbour_begins_oddly))
        assert passing(launch, "values")
        caught.append(not passing(launch, "neighbours"))
    assert any(caught)
    assert not all(caught)


def test_a_result_that_depends_on_its_slot_is_caught_where_the_plan_is_pinned(launched):
    launch = launched(PINNED, nudging(in_slot_0))
    assert passing(launch, "values")
    assert failure_of_any(launch, "permute").kind is Kind.WRONG
    # Without a pinned plan the bits may change with the batch.
    assert passing(launched(MIXED, nudging(in_slot_0)), "permute")


@pytest.mark.parametrize("text", [MIXED, PINNED])
def test_a_result_that_grossly_depends_on_its_slot_is_caught(text, launched):
    found = failure_of_any(launched(text, spoiling(in_slot_0)), "permute")
    assert (found.kind, found.tensor) == (Kind.WRONG, "out")


def test_a_result_that_depends_on_idle_slots_is_caught_where_the_plan_is_pinned(launched):
    launch = launched(PINNED, nudging(in_a_larger_batch))
    assert passing(launch, "values")
    assert failure_of_any(launch, "idle").kind is Kind.WRONG
    assert passing(launched(MIXED, nudging(in_a_larger_batch)), "idle")


@pytest.mark.parametrize("text", [MIXED, PINNED])
def test_a_result_that_grossly_depends_on_idle_slots_is_caught(text, launched):
    found = failure_of_any(launched(text, spoiling(in_a_larger_batch)), "idle")
    assert (found.kind, found.tensor) == (Kind.WRONG, "out")


def test_a_batch_invariant_path_is_held_to_its_bits(launched):
    def run(inputs, outputs, workspace):
        attend(inputs, outputs)
        if len(inputs["seq_lens_decoder"]) > 6:
            outputs["lse"] += 1e-6

    assert failure(launched(MIXED, path_of(run, batch_invariant=True)), "idle").tensor == "lse"


# ---- which checks run ----------------------------------------------------------------------------


def test_each_lane_has_its_checks():
    assert "graph" not in EVERY
    assert checks()["graph"].lanes == ("compiled",)
    assert checks()["bounds"].lanes == ("interpreted",)


def test_checks_that_launch_again_come_last():
    again = [check.relaunches for check in checks().values()]
    assert again == sorted(again)
    assert any(again)
