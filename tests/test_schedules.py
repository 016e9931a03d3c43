"""Cases of several steps, played: what goes on from step to step, what is noticed, and where it is said."""

import pytest
import torch

from cases import parse
from cases.contract import contract_of
from harness.batch import materialise
from harness.checks import checks
from harness.footprint import required_bytes
from harness.judge import judge_case
from harness.kernel_path import KernelPath
from harness.launch import Launch, PathFailure
from harness.task import Task
from harness.verdict import Kind, Status
from references.oracle import oracle_for

SMALL = "model=minicpm3-4b,heads=2,block=16"
SCHEDULE = (
    "mla_step/prefill:40@sys,decode:9,draft:20+4..decode:40,idle,draft:22+3,hit:32+5@sys"
    "..decode:41,prefill:30,decode:23,hit:37+9,pad:2/" + SMALL
)


def attend(inputs, outputs, workspace=None):
    """A right step, by the reference."""
    expected = oracle_for("mla_step", "definition").run(inputs, None)
    outputs["out"].copy_(expected["out"])
    cache = outputs["latent_cache"]
    cache.view(-1, cache.shape[-1])[expected["latent_cache"].rows] = expected["latent_cache"].values


def path_of(run, **options):
    return KernelPath("test/mla_step", "mla_step", ("interpreted",), lambda _: None, run, **options)


RIGHT = path_of(attend)


@pytest.fixture
def judge(lane, tmp_path):
    """(text, path) -> the verdict."""

    def verdict_of(text, path):
        task = Task(str(parse(text)), "mla_step", path.name, lane.name)
        return judge_case(task, path, lane, tmp_path / "lock")

    return verdict_of


def from_step(number, act):
    """The right path; from some launch on act(inputs, outputs) comes after it."""
    launches = iter(range(100))

    def run(inputs, outputs, _):
        attend(inputs, outputs)
        if next(launches) >= number:
            act(inputs, outputs)

    return path_of(run)


def written_rows(inputs, outputs):
    """Rows of the cache that the step has written."""
    rows = oracle_for("mla_step", "definition").run(inputs, None)["latent_cache"].rows
    return outputs["latent_cache"].view(-1, outputs["latent_cache"].shape[-1]), rows


# ---- what goes on --------------------------------------------------------------------------------


def test_a_right_path_passes_and_every_check_of_it_names_a_step(judge):
    verdict = judge(SCHEDULE, RIGHT)
    assert verdict.status is Status.PASSED
    assert {check.name for check in verdict.checks} >= {"values", "guard", "inputs", "history"}
    assert {check.where.steps for check in verdict.checks} <= {"0", "1", "2"}
    # One result of each check and tensor.
    assert len({(check.name, check.tensor) for check in verdict.checks}) == len(verdict.checks)


def test_caches_go_on_with_what_the_path_left(lane):
    case = parse(SCHEDULE)
    first = Launch.prepare(case, RIGHT, lane)
    first.run()
    (layer,) = first.layers
    cache, rows = written_rows(layer.inputs, {"latent_cache": layer.outputs["latent_cache"].view})
    marked = rows[0]
    cache[marked] = 7.0
    second = Launch.prepare(case, RIGHT, lane, 1, first)
    after = second.layers[0].batch.tensors["latent_cache"]
    assert bool((after.view(-1, after.shape[-1])[marked] == 7.0).all())
    (result,) = checks()["history"].run(second)
    assert (result.status, result.kind, result.tensor) == (Status.FAILED, Kind.WRONG, "latent_cache")
    assert result.worst.index == (int(marked), 0)
    assert result.worst.got == 7.0
    assert result.where.blocks == str(int(marked) // 16)


def test_freed_blocks_and_rejected_drafts_are_poison_again(lane):
    case = parse(SCHEDULE)
    first = Launch.prepare(case, RIGHT, lane)
    first.run()
    second = Launch.prepare(case, RIGHT, lane, 1, first)
    old, new = (launch.layers[0].batch for launch in (first, second))
    cache = new.tensors["latent_cache"].view(-1, 288)
    # Slot 2 had 24 tokens and keeps 22; slot 1 was freed.
    kept = old.pages.blocks[2][22 // 16] * 16
    assert bool(cache[kept + 5].isfinite().all())
    assert bool(cache[kept + 6 : kept + 8].isnan().all())
    freed = set(old.pages.blocks[1].tolist()) - set(new.pages.used.tolist())
    for block in freed:
        assert bool(cache[block * 16 : block * 16 + 16].isnan().all())


def test_steps_carry_exactly_the_rows_that_were_filled_before():
    case = parse(SCHEDULE)
    operator = contract_of(case)
    device = torch.device("cpu")
    assert materialise(case, operator, device).layers[0].carried.tolist() == []
    # 40 and 22 tokens; the shared prefix is among them.
    assert len(materialise(case, operator, device, 1).layers[0].carried) == 40 + 22
    # 41, 23 and 5 of the third row's own.
    assert len(materialise(case, operator, device, 2).layers[0].carried) == 41 + 23 + 5


def test_digests_of_a_schedule_depend_on_every_step(judge):
    whole = judge(SCHEDULE, RIGHT)
    other = judge(SCHEDULE.replace("hit:37+9", "hit:37+8"), RIGHT)
    assert whole.inputs_digest != other.inputs_digest
    assert whole.inputs_digest == judge(SCHEDULE, RIGHT).inputs_digest


def test_memory_of_two_steps_is_foreseen():
    one, both = (
        required_bytes(parse(f"mla_step/{rows}/{SMALL}"), contract_of(parse(f"mla_step/{rows}")), "cpu")
        for rows in ("prefill:40", "prefill:40..decode:40")
    )
    assert both == 2 * one


# ---- what is noticed -----------------------------------------------------------------------------


def test_a_failing_step_is_named_and_is_the_last(judge):
    played = []

    def spoil(_, outputs):
        played.append(1)
        outputs["out"][0] *= 1.1

    verdict = judge(SCHEDULE, from_step(1, spoil))
    assert (verdict.status, verdict.kind) == (Status.FAILED, Kind.WRONG)
    assert verdict.reason.startswith("step 1: ")
    (failed,) = [check for check in verdict.checks if check.status is Status.FAILED]
    assert (failed.name, failed.where.steps, failed.where.tokens) == ("values", "1", "0")
    assert played == [1]


def test_a_stale_write_into_a_block_of_a_stranger_is_noticed(judge):
    held = []

    def keep_writing(inputs, outputs):
        cache, rows = written_rows(inputs, outputs)
        held.append(rows)
        cache[held[0][-1]] = 1.0

    verdict = judge(SCHEDULE, from_step(0, keep_writing))
    assert verdict.status is Status.FAILED


def test_what_a_path_raises_names_its_step(judge):
    def fail(*_):
        raise ValueError("no room")

    verdict = judge(SCHEDULE, from_step(2, fail))
    assert (verdict.status, verdict.kind) == (Status.ERROR, Kind.CRASH)
    assert verdict.reason == "step 2: the path raised ValueError: no room"


def test_a_path_is_asked_about_every_step(judge):
    def refuses_drafts(case):
        (rows,) = case.steps
        return "no drafts" if any(row.kind.word == "draft" for row in rows) else None

    path = KernelPath("test/mla_step", "mla_step", ("interpreted",), refuses_drafts, attend)
    text = f"mla_step/prefill:9..decode:9..draft:10+2/{SMALL}"
    verdict = judge(text, path)
    assert (verdict.status, verdict.reason) == (Status.SKIPPED, "step 2: no drafts")


def test_workspaces_are_of_each_step_alone(lane):
    asked = []

    def workspace(case):
        asked.append(str(case))
        return {}

    case = parse(f"mla_step/prefill:9@sys.k7..decode:9/{SMALL},layers=2,pool=9")
    path = path_of(attend, workspace=workspace)
    Launch.prepare(case, path, lane, 1, None)
    assert asked == ["mla_step/decode:9.k7/model=minicpm3-4b,heads=2,block=16"] * 2


@pytest.mark.parametrize("name", [name for name, check in checks().items() if check.relaunches])
def test_checks_that_launch_again_are_asked_of_one_step(name, lane):
    launch = Launch.prepare(parse(SCHEDULE), RIGHT, lane)
    assert checks()[name].exemption(launch) is not None


@pytest.mark.parametrize("name", ["chunks", "recompute"])
def test_checks_that_play_are_not_asked_of_an_operator_of_one_step(name, lane, launched):
    path = KernelPath("test/write", "latent_cache_write", ("interpreted",), lambda _: None, lambda *_: None)
    launch = Launch.prepare(parse("latent_cache_write/prefill:5"), path, lane)
    assert "judged on one step" in checks()[name].exemption(launch)


# ---- chunks and recompute ------------------------------------------------------------------------

ONE_STEP = f"mla_step/prefill:30,hit:17+8,decode:40,draft:20+3,idle,paused:9,pad:2/{SMALL}"


def failed(name, launch):
    results = list(checks()[name].run(launch))
    assert results
    return [result for result in results if result.status is Status.FAILED]


@pytest.mark.parametrize("name", ["chunks", "recompute"])
@pytest.mark.parametrize(
    "rows",
    [
        "prefill:30",
        "hit:20+3@sys,hit:20+9@sys,decode:33@sys",
        "prefill:2,prefill:1",
        "prefill:40@sys,hit:9+2",
    ],
)
def test_a_right_path_gives_the_same_in_pieces(name, rows, launched):
    assert failed(name, launched(ONE_STEP, RIGHT)) == []
    assert failed(name, launched(f"mla_step/{rows}/{SMALL}", RIGHT)) == []


def test_chunks_notices_a_path_whose_chunks_lose_weight_by_their_history(launched):
    def run(inputs, outputs, _):
        attend(inputs, outputs)
        prefills = inputs["seq_lens_encoder"] > 0
        if bool((prefills & (inputs["seq_lens_decoder"] > 9)).any()):
            outputs["out"] *= 1.05

    (result, *_) = failed("chunks", launched(f"mla_step/prefill:30/{SMALL}", path_of(run)))
    assert result.tensor == "out"
    assert "chunks" in result.reason


def test_recompute_notices_a_path_that_writes_other_bytes_than_it_finds(launched):
    def run(inputs, outputs, _):
        attend(inputs, outputs)
        cache, rows = written_rows(inputs, outputs)
        cache[rows] *= 1.0 + 2.0**-7

    results = failed("recompute", launched(ONE_STEP, path_of(run)))
    assert {result.tensor for result in results} == {"out"}


@pytest.mark.parametrize(
    ("name", "rows"), [("chunks", "decode:9,prefill:1"), ("recompute", "prefill:9"), ("chunks", "")]
)
def test_what_has_no_pieces_is_skipped_with_a_reason(name, rows, launched):
    (result,) = checks()[name].run(launched(f"mla_step/{rows}/{SMALL}", RIGHT))
    assert result.status is Status.SKIPPED
    assert result.reason


# ---- bytes ---------------------------------------------------------------------------------------

BEFORE_A_CHUNK = f"mla_step/decode:900,hit:6+4/{SMALL}"


def test_bytes_passes_a_path_that_takes_none(launched):
    def run(inputs, outputs, _):
        outputs["out"].zero_()

    results = list(checks()["bytes"].run(launched(BEFORE_A_CHUNK, path_of(run))))
    assert [(result.tensor, result.status) for result in results] == [
        ("taken", Status.PASSED),
        ("moved", Status.PASSED),
        ("allocated", Status.PASSED),
    ]
    assert results[0].error == 0.0


def gathered(case):
    """Keys and values of every row's history, decode rows' too (B19)."""
    (layer,) = case.layers
    keys = sum(row.length for row in case.steps[0])
    width = layer.qk_head_dim + layer.v_head_dim
    return {"keys": ((keys, layer.num_attention_heads, width), "bfloat16")}


def test_bytes_notices_a_workspace_that_grows_with_histories_of_decode_rows(launched):
    def run(inputs, outputs, workspace):
        workspace["keys"].zero_()

    path = path_of(run, workspace=gathered)
    for rows in ("decode:900,hit:6+4", "decode:900"):
        results = failed("bytes", launched(f"mla_step/{rows}/{SMALL}", path))
        assert [result.tensor for result in results] == ["taken", "moved"]


def test_bytes_counts_what_is_taken_apart_from_what_is_written(launched):
    path = path_of(lambda *_: None, workspace=gathered)
    results = failed("bytes", launched(BEFORE_A_CHUNK, path))
    assert [result.tensor for result in results] == ["taken"]


def test_bytes_notices_what_a_path_allocates_itself(launched):
    def run(inputs, outputs, _):
        torch.zeros(9)

    (result,) = failed("bytes", launched(BEFORE_A_CHUNK, path_of(run)))
    assert (result.tensor, result.error, result.budget) == ("allocated", 36.0, 0.0)
    library = path_of(run, allocates=True)
    assert failed("bytes", launched(BEFORE_A_CHUNK, library)) == []


def test_bytes_does_not_count_views_or_copies_in_place(launched):
    def run(inputs, outputs, _):
        out = outputs["out"]
        out.transpose(0, 1)[:1].zero_()
        out[1:].copy_(out[:1].expand(len(out) - 1, -1, -1))

    launch = launched(BEFORE_A_CHUNK, path_of(run))
    assert [result.error for result in checks()["bytes"].run(launch) if result.tensor != "moved"] == [0, 0]


def test_bytes_says_nothing_of_an_operator_that_grants_nothing(launched):
    path = KernelPath("test/write", "latent_cache_write", ("interpreted",), lambda _: None, lambda *_: None)
    (result,) = checks()["bytes"].run(launched("latent_cache_write/prefill:5", path))
    assert result.status is Status.SKIPPED


@pytest.mark.parametrize("width", ["glm-4.7-flash", "mistral-small-4"])
def test_values_as_wide_as_keys_grant_no_padding(width):
    case = parse(f"prefill_attention/prefill:65/model={width}")
    assert contract_of(case).scratch(case, case.layers[0]) == 0


def test_a_layer_of_a_step_is_granted_what_its_rows_need():
    # One prefill row of 10 keys and 4 tokens, one decode token: N = V = 64, D = 32, R = 256, one head.
    case = parse("mla_step/hit:6+4,decode:9/model=minicpm3-4b,heads=1")
    elements = 10 * 288 + (10 + 5) * (96 + 96) + (64 + 288 + 256 + 64)
    assert contract_of(case).scratch(case, case.layers[0]) == 2 * elements + 4 * 258
    case = parse("mla_step/idle,paused:9/model=minicpm3-4b,heads=1")
    assert contract_of(case).scratch(case, case.layers[0]) == 0


def test_launching_raises_what_a_path_raises(lane):
    def fail(*_):
        raise ValueError("no room")

    launch = Launch.prepare(parse(SCHEDULE), path_of(fail), lane)
    with pytest.raises(PathFailure, match="no room"):
        launch.run()
