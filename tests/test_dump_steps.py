"""Sessions as cases: which rows are one sequence, where it stands, what is shared, told and refused."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, Kind, Options, Row, parse
from cases.blocks import blocks_needed
from cases.schedule import sequences
from cases.strategies import schedules, steps
from harness.capture import Session
from harness.dump_case import import_case
from harness.dump_file import Dump, read_steps
from harness.judge import judge_case
from harness.metadata import slot_mapping, step_metadata
from harness.paging import lay_out
from harness.plan import UsageError
from harness.reduction import reduce_verdict
from harness.task import Task
from harness.verdict import Status

ROOT = Path(__file__).resolve().parent.parent


def dump(lengths, ids=None, table=None, names="fastdeploy", **more):
    """A step's values from (encoder, cached, new) of each slot; of vLLM without what tells drafts."""
    encoder, cached, new = np.array(lengths, np.int64).reshape(-1, 3).T
    if names == "fastdeploy":
        values = {"seq_lens_encoder": encoder, "seq_lens_decoder": cached, "seq_lens_this_time": new}
    else:
        values = {"query_start_loc": np.concatenate([[0], np.cumsum(new)]), "seq_lens": cached + new}
    if ids is not None:
        values["request_ids"] = np.array(ids, np.int64)
    if table is not None:
        values |= {"block_tables": np.array(table, np.int64), "block_size": 4}
    return values | more


def imported(*session, operator="mla_step"):
    return import_case((Dump(values, step) for step, values in enumerate(session)), operator)


def rows_of(*session):
    return str(imported(*session).case).split("/")[1]


def remarks(*session):
    """Without those that every import has."""
    everywhere = ("no block_size", "everything else", "physical block ids")
    return [text for text in imported(*session).remarks if not text.startswith(everywhere)]


def refusal(*session, operator="mla_step"):
    with pytest.raises(UsageError) as caught:
        imported(*session, operator=operator)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PREFILL, DECODE, GONE = (8, 0, 8), (0, 8, 1), (0, 0, 0)


# ---- rows are followed ---------------------------------------------------------------------------


def test_a_slot_goes_on_from_step_to_step():
    session = [dump([PREFILL]), dump([(5, 8, 5)]), dump([(0, 13, 1)]), dump([(0, 14, 3)]), dump([(0, 15, 1)])]
    assert rows_of(*session) == "prefill:8..hit:8+5..decode:13..draft:14+3..decode:15"
    assert remarks(*session) == []


def test_a_request_in_another_row_keeps_its_slot():
    # The first row ends and the last one moves into its place, as vLLM's rows do.
    session = [dump([PREFILL, (6, 0, 6)], [70, 71]), dump([(0, 6, 1)], [71]), dump([(0, 7, 1)], [71])]
    assert rows_of(*session) == "prefill:8,prefill:6..idle,decode:6..idle,decode:7"
    (told,) = remarks(*session)
    assert told.startswith("1 of 2 sequences stand in another slot than in the dump")


def test_without_ids_rows_that_move_are_known_by_their_blocks():
    session = [
        dump([PREFILL, (8, 0, 8)], table=[[5, 6, 0], [7, 8, 0]], names="vllm"),
        dump([DECODE], table=[[7, 8, 9]], names="vllm"),
    ]
    assert rows_of(*session) == "prefill:8x2..idle,decode:8"
    # Lengths alone say that row 0 goes on.
    bare = [{name: value for name, value in values.items() if name != "block_tables"} for values in session]
    assert rows_of(*bare) == "prefill:8x2..decode:8"


def test_rows_of_fastdeploy_do_not_move():
    session = [
        dump([GONE, PREFILL], table=[[0, 0, 0], [7, 8, 0]]),
        dump([DECODE, GONE], table=[[7, 8, 9], [0, 0, 0]]),
    ]
    # Another request, whose history was put into blocks that are free again.
    assert rows_of(*session) == "idle,prefill:8..decode:8,idle"


def test_a_slot_with_other_blocks_is_another_sequence_where_no_id_says_otherwise():
    session = [dump([PREFILL], table=[[5, 6, 0]]), dump([DECODE], table=[[7, 8, 9]])]
    # Its slot was not empty, so that a sequence with a history has the next one, with data of its own.
    assert rows_of(*session) == "prefill:8..idle,decode:8"
    same = [{**values, "request_ids": np.array([3])} for values in session]
    assert rows_of(*same) == "prefill:8..decode:8"
    assert "other blocks than its request had before: a sequence keeps its blocks" in remarks(*same)[0]


def test_a_request_that_is_away_for_some_steps_is_paused():
    session = [dump([PREFILL, PREFILL], [1, 2]), dump([DECODE], [1]), dump([], []), dump([DECODE], [2])]
    assert rows_of(*session) == "prefill:8x2..decode:8,paused:8..idle,paused:8..idle,decode:8"


def test_a_request_that_comes_back_with_other_blocks_was_not_paused():
    tables = [[[5, 6, 0], [7, 8, 0]], [[5, 6, 9]], [[5, 6, 9], [10, 11, 12]]]
    rows = [([PREFILL, PREFILL], [1, 2]), ([DECODE], [1]), ([(0, 9, 1), DECODE], [1, 2])]
    session = [dump(lengths, ids, table) for (lengths, ids), table in zip(rows, tables, strict=True)]
    assert rows_of(*session) == "prefill:8x2..decode:8..decode:9,decode:8"
    assert (
        "step 2: slot 1 has other blocks than its request had before: read as another" in remarks(*session)[0]
    )


def test_a_preempted_request_computes_its_own_tokens_again():
    session = [
        dump([PREFILL, (9, 0, 9)], [1, 2]),
        dump([DECODE], [1]),
        dump([(0, 9, 1), (6, 0, 6)], [1, 3]),
        dump([(0, 10, 1), (0, 6, 1), (10, 0, 10)], [1, 3, 2]),
    ]
    # Slot 1 has another request by then, whose data differ; those of request 2 are what they were.
    assert rows_of(*session) == (
        "prefill:8,prefill:9..decode:8..decode:9,prefill:6.k3..decode:10,decode:6,prefill:10.k1"
    )
    assert remarks(*session) == []


def test_a_request_preempted_and_found_in_the_cache_begins_in_a_slot_that_was_empty():
    session = [dump([PREFILL], [1]), dump([(9, 4, 9)], [1]), dump([(0, 13, 1)], [1])]
    assert rows_of(*session) == "prefill:8..idle,hit:4+9.k0..idle,decode:13"
    (told,) = remarks(*session)
    assert told.startswith("1 of 2 sequences stand in another slot")


def test_steps_that_are_missing_are_told():
    session = [Dump(dump([PREFILL], [1]), 3), Dump(dump([(0, 12, 1)], [1]), 7)]
    found = import_case(session, "mla_step")
    assert str(found.case) == "mla_step/prefill:8..idle,decode:12.k0"
    assert "step 7: 3 before it are missing: the case goes on from step 3" in found.remarks
    (later,) = [text for text in found.remarks if "are steps missing?" in text]
    assert later.startswith("step 7: slot 0 has 12 tokens cached and its request held 8 before")


def test_tokens_that_are_taken_back_were_drafts():
    lengths = [(8, 0, 8), (0, 8, 4), (0, 10, 4), (0, 14, 1), (0, 14, 1), (0, 15, 1)]
    session = [dump([row], names="vllm") for row in lengths]
    assert rows_of(*session) == "prefill:8..draft:8+4..draft:10+4..draft:14+1..decode:14..decode:15"
    assert not [text for text in remarks(*session) if "read as hit" in text]


def test_several_tokens_that_stay_may_be_a_chunk_and_that_is_told_once():
    session = [dump([row], names="vllm") for row in [(8, 0, 8), (0, 8, 4), (0, 12, 4)]]
    assert rows_of(*session) == "prefill:8..hit:8+4..hit:12+4"
    (told,) = remarks(*session)
    assert told.startswith("step 1: slot 0: several new tokens behind cached ones are read as hit")
    assert told.endswith("(1 more like it)")


def test_a_step_captured_twice_is_told():
    session = [dump([PREFILL]), dump([DECODE]), dump([DECODE])]
    assert "step 2: it has the lengths of the step before: was one step captured twice?" in remarks(*session)


def test_padding_and_empty_slots_stay_where_they_are():
    padded = {"batch_id_per_token": np.array([1, -1, -1])}
    session = [dump([GONE, PREFILL, GONE]), dump([GONE, DECODE], **padded), dump([])]
    assert rows_of(*session) == "idle,prefill:8,idle..idle,decode:8,pad:2.."


# ---- blocks --------------------------------------------------------------------------------------


def test_a_prefix_found_in_anothers_blocks_is_a_tag_of_both():
    session = [
        dump([(9, 0, 9)], [1], [[5, 6, 7]]),
        dump([(0, 9, 1), (3, 8, 3)], [1, 2], [[5, 6, 7], [5, 6, 8]]),
        dump([(0, 10, 1), (0, 11, 1)], [1, 2], [[5, 6, 7], [5, 6, 8]]),
    ]
    assert rows_of(*session) == "prefill:9@p0..decode:9,hit:8+3@p0..decode:10,decode:11"
    assert remarks(*session) == []
    assert blocks_needed(imported(*session).case.steps, 4) == 4


def test_of_a_prompt_in_chunks_a_tag_names_the_first_and_the_rest_is_told():
    session = [
        dump([(4, 0, 4)], [1], [[5, 0, 0]]),
        dump([(5, 4, 5)], [1], [[5, 6, 7]]),
        dump([(0, 9, 1), (3, 8, 3)], [1, 2], [[5, 6, 7], [5, 6, 8]]),
    ]
    assert rows_of(*session) == "prefill:4@p0..hit:4+5..decode:9,hit:8+3@p0"
    (told,) = remarks(*session)
    assert told.startswith("step 2: slots 0, 1 share blocks otherwise than tags can say")


def test_a_block_that_another_request_gets_later_is_not_shared():
    session = [
        dump([PREFILL], [1], [[5, 6, 0]]),
        dump([GONE, PREFILL], [-1, 2], [[0, 0, 0], [5, 6, 0]]),
        dump([GONE, DECODE], [-1, 2], [[0, 0, 0], [5, 6, 7]]),
    ]
    assert rows_of(*session) == "prefill:8..idle,prefill:8..idle,decode:8"
    assert remarks(*session) == []


def test_rows_share_a_tag_with_one_that_both_share_with():
    # Requests 1 and 2 are never there together with a full block; 3 shares with one after the other.
    session = [
        dump([(0, 5, 1), (5, 0, 5), (0, 4, 1)], [1, 2, 3], [[5, 6], [7, 8], [5, 9]]),
        dump([GONE, (0, 5, 1), (0, 5, 1)], [-1, 2, 3], [[0, 0], [5, 8], [5, 9]]),
    ]
    assert rows_of(*session) == "decode:5@p0,prefill:5@p0,decode:4@p0..idle,decode:5x2"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "sentence"),
    [
        ([dump([PREFILL]), dump([(0, -1, 1)])], "step 1: seq_lens_decoder[0] must be at least 0, got -1"),
        ([dump([PREFILL]), dump([(0, 10**9, 1)])], "step 1: seq_lens_decoder[0] is 1,000,000,000, more than"),
        ([dump([PREFILL]), {}], "step 1: the dump must have seq_lens_encoder"),
        (
            [dump([PREFILL], block_size=16), dump([DECODE], block_size=32)],
            "step 1: block_size is 32, and the first step says 16: are these of one run?",
        ),
        (
            [dump([PREFILL]), dump([DECODE], block_size=32)],
            "step 1: block_size is 32, and the first step says nothing",
        ),
        ([dump([PREFILL], [1]), dump([DECODE])], "step 1: it has no ids of requests: give them in all steps"),
        ([dump([PREFILL]), dump([DECODE], [1])], "step 1: it has ids of requests, the first step none"),
        (
            [dump([PREFILL, PREFILL], [1, 1])],
            "step 0: request_ids must differ, and those of slots 0 and 1 do",
        ),
        ([dump([PREFILL], [-1])], "request_ids[0] names no request, and slot 0 holds 8 tokens"),
        ([dump([PREFILL], [1, 2])], "request_ids must have 1 entries, one a slot, got 2"),
        ([dump([PREFILL], [1], req_ids=np.array([1]))], "both req_ids and request_ids"),
    ],
)
def test_a_session_that_contradicts_itself_is_refused_with_its_step(session, sentence):
    assert sentence in refusal(*session)


def test_an_operator_of_one_step_takes_one_file():
    sentence = refusal(dump([PREFILL]), dump([DECODE]), operator="mla_decode")
    assert sentence == "mla_decode is judged on one step, got 2: import one of its files"


def test_more_rows_than_a_case_can_have_are_refused_where_they_begin(monkeypatch):
    monkeypatch.setattr("harness.dump_case.MAX_ROWS", 3)
    assert refusal(*[dump([PREFILL])] * 9).startswith("step 3: until here there are more than 3 rows")


# ---- there and back again ------------------------------------------------------------------------


def dumps_of(case, names, ids, *, moving=False):
    """What an engine would have of every step of a case.

    ids: (slot, sequence) -> the number of its request; None for no ids.
    moving: whether rows stand in another order in every step, and nothing of a row without new tokens.
    """
    (layer,) = case.layers
    walked = zip(case.steps, sequences(case.steps), lay_out(case, layer), strict=True)
    for index, (step, held, pages) in enumerate(walked):
        slots = [row for row in step if row.is_slot]
        order = list(range(len(slots)))
        if moving:
            order = [slot for slot in order if slots[slot].new]
            order = order[index % 3 :] + order[: index % 3]
        rows = tuple(slots[slot] for slot in order) + step[len(slots) :]
        metadata, tables = step_metadata(rows), pages.block_tables[order]
        block = layer.block_size
        dumped = {
            "block_size": block,
            "block_tables": tables,
            "slot_mapping": slot_mapping(metadata, tables, block),
        }
        if ids is not None:
            dumped["request_ids"] = [-1 if (row := held[slot]) is None else ids(slot, row) for slot in order]
        if names == "fastdeploy":
            yield dumped | vars(metadata)
            continue
        length = metadata.seq_lens_decoder + metadata.seq_lens_this_time
        prompt = np.where(metadata.seq_lens_encoder > 0, length, metadata.seq_lens_decoder)
        yield dumped | {
            "query_start_loc": metadata.cu_seqlens_q,
            "seq_lens": length,
            "num_prompt_tokens": prompt,
        }


def by_begin(slot, sequence):
    return 1000 * sequence.began + slot


def lives(case):
    """What every sequence of a case does and when, wherever it stands; not how it waits at its ends."""
    found = {}
    for index, (step, held) in enumerate(zip(case.steps, sequences(case.steps), strict=True)):
        for slot, (row, sequence) in enumerate(zip(step, held, strict=True)):
            if sequence is not None:
                found.setdefault((sequence.began, slot), []).append((index, row))
    told = []
    for life in found.values():
        active = [index for index, row in life if row.new]
        rows = [(index, bare(row)) for index, row in life if active and active[0] <= index <= active[-1]]
        told.append([(index, str(row)) for index, row in rows])
    return sorted(life for life in told if life)


def bare(row):
    """A row without what metadata do not say."""
    if row.kind is Kind.DRAFT and row.new == 1:
        return Row(Kind.DECODE, row.cached)
    return Row(row.kind, row.cached, row.new)


SUFFIXES = st.sampled_from([".json", ".safetensors"])
NAMES = st.sampled_from(["fastdeploy", "vllm"])
BLOCKS = st.sampled_from([1, 3, 16, 64])


@settings(deadline=None, max_examples=60)
@given(walked=st.one_of(schedules(), steps(max_length=200)), block=BLOCKS, names=NAMES, suffix=SUFFIXES)
def test_a_schedule_that_is_captured_and_imported_is_the_schedule(
    tmp_path_factory, walked, block, names, suffix
):
    case = Case("mla_step", walked, Options(block=(block,)))
    folder = tmp_path_factory.mktemp("session") / "steps"
    session = Session(folder, suffix=suffix)
    for values in dumps_of(case, names, by_begin):
        assert session.capture(values) is None
    back = import_case(read_steps(folder), "mla_step")
    shown = [[bare(row) for row in step] for step in back.case.steps]
    assert shown == [[bare(row) for row in step] for step in case.steps]
    assert not [text for text in back.remarks if "share blocks" in text or "slot_mapping" in text]
    assert blocks_needed(back.case.steps, block) == blocks_needed(case.steps, block)


@settings(deadline=None, max_examples=60)
@given(walked=schedules(), block=BLOCKS, names=NAMES)
def test_a_schedule_whose_rows_move_has_the_same_sequences_with_the_same_data(walked, block, names):
    # What waits while its blocks get shared comes back with others, as if it had been preempted.
    untagged = tuple(tuple(replace(row, tag=None) for row in step) for step in walked)
    case = Case("mla_step", untagged, Options(block=(block,)))
    dumps = dumps_of(case, names, lambda _, sequence: sequence.key, moving=True)
    values = (
        {name: np.array(value) if isinstance(value, list) else value for name, value in dump.items()}
        for dump in dumps
    )
    back = import_case((Dump(item, step) for step, item in enumerate(values)), "mla_step").case
    assert lives(back) == lives(case)
    assert [step[-1:] for step in back.steps if step and not step[-1].is_slot] == [
        step[-1:] for step in case.steps if step and not step[-1].is_slot
    ]


@settings(deadline=None, max_examples=40)
@given(walked=schedules(), block=BLOCKS)
def test_without_ids_slots_that_stay_are_followed_by_lengths_and_blocks(walked, block):
    untagged = tuple(tuple(Row(row.kind, row.cached, row.new) for row in step) for step in walked)
    case = Case("mla_step", untagged, Options(block=(block,)))
    dumps = dumps_of(case, "fastdeploy", None)
    back = import_case((Dump(item, step) for step, item in enumerate(dumps)), "mla_step").case
    assert [[bare(row) for row in step] for step in back.steps] == [
        [bare(row) for row in step] for step in case.steps
    ]


# ---- the command, and what becomes of the case ---------------------------------------------------

SCHEDULE = parse(
    "mla_step/prefill:20@sys,decode:9,prefill:5..decode:20,draft:10+3,hit:5+4"
    "..decode:21,decode:12,idle,hit:16+4@sys/model=minicpm3-4b,heads=1,block=16"
)


@pytest.fixture
def session(tmp_path):
    """A folder with the steps of `SCHEDULE`, as an engine captures them."""
    folder = tmp_path / "session"
    steps = Session(folder)
    more = {"model": "minicpm3-4b", "num_attention_heads": 1}
    for values in dumps_of(SCHEDULE, "fastdeploy", by_begin):
        assert steps.capture({**values, **more}) is None
    return folder


def test_a_session_is_imported_and_the_case_runs_and_is_reported(command, session, tmp_path):
    result = command("harness", "import", str(session))
    assert (result.returncode, result.stdout) == (0, f"{SCHEDULE}\n".replace("@sys", "@p0"))
    report = tmp_path / "report.html"
    asked = (result.stdout.strip(), "--path", "triton/mla_step", "--lane", "interpreted")
    result = command("harness", "run", *asked, "--report", f"html:{report}", timeout=240)
    assert result.returncode == 0, result.stderr
    assert "prefill:20@p0,decode:9,prefill:5..decode:20" in report.read_text()


def test_a_path_that_remembers_the_first_step_is_reduced_to_two_steps_of_one_row(session, lane, tmp_path):
    case = str(import_case(read_steps(session), "mla_step").case)
    (right,) = import_module("harness.paths.triton.mla_step").PATHS

    def judge(tasks):
        for task in tasks:
            first = {}

            def run(inputs, outputs, workspace, first=first):
                # A plan that is made once, and not again when lengths change.
                length = first.setdefault("seq_lens_decoder", inputs["seq_lens_decoder"].clone())
                if length.shape == inputs["seq_lens_decoder"].shape:
                    inputs = {**inputs, "seq_lens_decoder": length}
                right.run(inputs, outputs, workspace)

            yield judge_case(task, replace(right, run=run), lane, tmp_path / "lock")

    task = Task(case, "mla_step", right.name, lane.name)
    (verdict,) = judge([task])
    assert verdict.status is Status.FAILED
    found = reduce_verdict(verdict, judge, task, seconds=600.0)
    assert found.is_complete
    assert [len(step) for step in found.case.steps] == [1, 1]


def test_some_steps_of_a_session_are_imported(command, session):
    result = command("harness", "import", str(session), "--steps", "1-2")
    assert result.stdout.startswith(
        "mla_step/decode:20@p0,draft:10+3,hit:5+4..decode:21,decode:12,idle,hit:16+4"
    )
    assert command("harness", "import", str(session / "step-000001.json")).stdout.startswith(
        "mla_step/decode:20,draft:10+3,hit:5+4/"
    )


def cut_off(session):
    file = session / "step-000001.json"
    file.write_bytes(file.read_bytes()[:100])


def without_a_number(session):
    file = session / "step-000002.json"
    file.write_text(file.read_text().replace("21", "NaN"))


def ragged(session):
    file = session / "step-000002.json"
    values = json.loads(file.read_text())
    values["block_tables"][1].pop()
    file.write_text(json.dumps(values))


def empty(session):
    for file in session.iterdir():
        file.rename(session / f"{file.name}.old")


def twice(session):
    (session / "step-1.npz").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (cut_off, (), "step 1: "),
        (without_a_number, (), "step 2: seq_lens_decoder[0] must be a whole number, got NaN"),
        (ragged, (), "step 2: block_tables must be a table with rows of one length, but row 1 has"),
        (empty, (), "none found"),
        (twice, (), "has step 1 twice: step-000001.json and step-1.npz"),
        (None, ("--steps", "7-9"), "none found"),
        (None, ("--steps", "2-1"), "--steps takes FIRST-LAST, as 3-17, got 2-1"),
        (None, ("--operator", "mla_decode"), "is judged on one step, got 3: import one of its files"),
    ],
)
def test_the_command_refuses_a_broken_session_with_exit_code_2(command, session, spoil, options, sentence):
    if spoil is not None:
        spoil(session)
    result = command("harness", "import", str(session), *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_steps_of_a_file_cannot_be_chosen(command, session):
    result = command("harness", "import", str(session / "step-000001.json"), "--steps", "0-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--steps chooses from a folder of them" in result.stderr


def test_the_readme_shows_what_the_command_prints_of_a_session(command, tmp_path):
    lengths = [
        ([(130, 0, 130), (70, 0, 70)], ["0", "1"], [[9, 4, 11], [5, 6, 0]]),
        ([(0, 130, 1), (2, 128, 2)], ["0", "2"], [[9, 4, 11], [9, 4, 12]]),
        ([(0, 131, 1), (7, 64, 7), (0, 130, 1)], ["0", "1", "2"], [[9, 4, 11], [5, 8, 0], [9, 4, 12]]),
    ]
    session = Session(tmp_path / "session")
    for rows, ids, table in lengths:
        values = {**dump(rows, table=table), "request_ids": ids, "block_size": 64}
        assert session.capture(values) is None
    result = command("harness", "import", str(tmp_path / "session"))
    assert f"import /tmp/session\n{result.stderr}{result.stdout}```" in (ROOT / "README.md").read_text()
