"""Dumps as cases: what engines' metadata means, what is told, what is refused; there and back again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, Kind, Options, Row, parse
from cases.blocks import blocks_needed, step_blocks
from cases.strategies import steps
from harness.capture import capture
from harness.dump_case import import_case
from harness.dump_file import Dump, Stub, read_dump
from harness.dump_step import MAX_TOKENS
from harness.metadata import slot_mapping, step_metadata
from harness.paging import lay_out
from harness.plan import UsageError

ROOT = Path(__file__).resolve().parent.parent

# The example of FastDeploy's contract with a decode row, a hit and a paused slot.
FASTDEPLOY = {
    "seq_lens_encoder": [4, 0, 5, 0, 0, 0],
    "seq_lens_decoder": [0, 9, 128, 64, 0, 70],
    "seq_lens_this_time": [4, 1, 5, 3, 0, 0],
}
VLLM = {"query_start_loc": [0, 4, 5, 10, 13, 13, 13], "seq_lens": [4, 10, 133, 67, 0, 70]}


def values(dump):
    return {
        name: np.array(value, np.int64) if isinstance(value, list) else value for name, value in dump.items()
    }


def imported(dump, operator="mla_step"):
    return import_case([Dump(values(dump))], operator)


def rows_of(dump):
    return str(imported(dump).case).split("/")[1]


def remark(dump, words, operator="mla_step"):
    """The one remark that has these words."""
    (found,) = [text for text in imported(dump, operator).remarks if words in text]
    return found


def refusal(dump, operator="mla_step"):
    with pytest.raises(UsageError) as caught:
        imported(dump, operator)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- rows ----------------------------------------------------------------------------------------


def test_fastdeploys_lengths_are_rows():
    assert rows_of(FASTDEPLOY) == "prefill:4,decode:9,hit:128+5,draft:64+3,idle,paused:70"


def test_vllms_lengths_are_rows_as_in_a_batch_spec():
    assert rows_of(VLLM) == "prefill:4,decode:9,hit:128+5,hit:64+3,idle,paused:70"
    spec = str(parse("mla_step/q4_q1s10_q5s133")).split("/")[1]
    assert spec == ",".join(rows_of(VLLM).split(",")[:3])


def test_vllms_prompt_lengths_tell_drafts_from_prefill():
    dump = {**VLLM, "num_prompt_tokens": [4, 9, 200, 60, 0, 70]}
    assert rows_of(dump) == "prefill:4,decode:9,hit:128+5,draft:64+3,idle,paused:70"
    # The last token of a prompt, alone.
    assert rows_of({"query_start_loc": [0, 1], "seq_lens": [65], "num_prompt_tokens": [65]}) == "hit:64+1"
    assert "slots 2, 3" in remark(VLLM, "are read as hit")
    assert not [text for text in imported(dump).remarks if "read as hit" in text]


def test_a_first_token_alone_is_a_prefill_of_one():
    dump = {"query_start_loc": [0, 1], "seq_lens": [1]}
    assert rows_of(dump) == "prefill:1"
    assert not [text for text in imported(dump).remarks if "rule V1" in text]


def test_vllms_computed_tokens_stand_in_for_totals():
    dump = {"query_start_loc": [0, 4, 5], "num_computed_tokens": [0, 9]}
    assert rows_of(dump) == "prefill:4,decode:9"


def test_buffers_of_vllm_that_are_longer_than_the_step_are_cut():
    dump = {"query_start_loc": [0, 1, 2, 2, 2], "seq_lens": [5, 6, 99, 0, 0, 0], "num_reqs": 2}
    assert rows_of(dump) == "decode:4,decode:5"


def test_shapes_with_an_axis_of_one_are_taken():
    dump = {name: [[length] for length in lengths] for name, lengths in FASTDEPLOY.items()}
    assert rows_of(dump) == rows_of(FASTDEPLOY)


def test_prefix_sums_stand_in_for_the_new_tokens():
    dump = {**FASTDEPLOY, "cu_seqlens_q": [0, 4, 5, 10, 13, 13, 13]}
    assert rows_of({name: value for name, value in dump.items() if name != "seq_lens_this_time"}) == rows_of(
        dump
    )


def test_a_row_that_the_language_refuses_is_told():
    dump = {"seq_lens_encoder": [0], "seq_lens_decoder": [0], "seq_lens_this_time": [2]}
    assert rows_of(dump) == "prefill:2"
    assert "slot 0: new tokens, seq_lens_encoder 0 and nothing cached" in remark(dump, "rule V1")


@pytest.mark.parametrize(
    ("tail", "rows", "told"),
    [
        ({"batch_id_per_token": [0, 0, -1, -1, -1]}, "prefill:2,pad:3", ""),
        ({"batch_id_per_token": [0, 0]}, "prefill:2", ""),
        ({"batch_id_per_token": [0, 0, -1, 7, -1]}, "prefill:2,pad:1", "goes on with 2 entries"),
        ({"slot_mapping": [64, 65, -1, -1]}, "prefill:2,pad:2", ""),
        # What is not negative may be a live slot, as of padding tokens in FastDeploy: ids say more.
        ({"slot_mapping": [64, 65, 9, 9], "batch_id_per_token": [0, 0, -1, -1]}, "prefill:2,pad:2", ""),
        ({"slot_mapping": [64, 65, 9, 9]}, "prefill:2", "goes on with 2 entries"),
    ],
)
def test_tokens_of_no_slot_are_padding_and_the_rest_of_a_buffer_is_told(tail, rows, told):
    dump = {"seq_lens_encoder": [2], "seq_lens_decoder": [0], "seq_lens_this_time": [2], **tail}
    assert rows_of(dump) == rows
    assert any(told in text for text in imported(dump).remarks)
    if not told:
        assert not [text for text in imported(dump).remarks if "goes on" in text]


def test_no_slot_at_all_is_a_case():
    assert rows_of({"seq_lens_encoder": [], "seq_lens_decoder": [], "seq_lens_this_time": []}) == ""
    assert rows_of({"query_start_loc": [0], "seq_lens": []}) == ""


# ---- blocks --------------------------------------------------------------------------------------


def decodes(cached, table, **more):
    return {
        "seq_lens_encoder": [0] * len(cached),
        "seq_lens_decoder": cached,
        "seq_lens_this_time": [1] * len(cached),
        "block_tables": table,
        "block_size": 4,
        **more,
    }


def test_shared_full_blocks_are_tags():
    table = [[7, 8, 1, -1], [7, 8, 9, 2], [3, 4, -1, -1], [7, 5, -1, -1]]
    dump = decodes([9, 12, 6, 5], table)
    assert rows_of(dump) == "decode:9@p0,decode:12@p0,decode:6,decode:5@p0"


def test_of_rows_that_begin_alike_and_go_apart_those_that_a_tag_can_name_share_one():
    # 0 and 1 share all that 0 has; 2 shares one full block of two and goes its own way.
    dump = decodes([4, 8, 8], [[7, 1, -1], [7, 8, 2], [7, 9, 3]])
    assert rows_of(dump) == "decode:4@p0,decode:8@p0,decode:8"
    assert "slots 0, 1, 2 share blocks otherwise" in remark(dump, "share blocks otherwise")


@pytest.mark.parametrize(
    "table",
    [
        # The same block twice in a row, in two places of two rows, and one that is not full.
        [[7, 7, -1], [8, 9, -1]],
        [[7, 1, -1], [8, 7, -1]],
        [[7, 1, -1], [8, 1, -1]],
    ],
)
def test_sharing_that_no_tag_says_is_told(table):
    dump = decodes([5, 5], table)
    assert rows_of(dump) == "decode:5x2"
    assert remark(dump, "share blocks otherwise")


def test_a_block_that_is_written_this_step_belongs_to_one_row():
    dump = decodes([7, 7], [[7, 1], [7, 1]])
    assert rows_of(dump) == "decode:7x2@p0"
    assert "slots 0, 1 share blocks otherwise" in remark(dump, "share blocks otherwise")


def test_entries_that_name_no_block_are_told():
    assert "slot 0: block_tables names no block" in remark(decodes([5, 5], [[7, -1], [8, 9]]), "rule V3")
    assert "slot 1" in remark(decodes([5, 5], [[7, 1], [8, 9]], num_blocks=9), "rule V3")
    assert not [text for text in imported(decodes([5, 5], [[7, 1], [8, 2]])).remarks if "V3" in text]


def test_a_slot_mapping_that_departs_from_the_table_is_told():
    dump = decodes([5, 6], [[7, 1], [8, 2]], slot_mapping=[1 * 4 + 1, 2 * 4 + 3])
    told = remark(dump, "slot_mapping departs")
    assert "at 1 tokens, first at token 1: 11 and not 10" in told
    right = decodes([5, 6], [[7, 1], [8, 2]], slot_mapping=[5, 10])
    assert not [text for text in imported(right).remarks if "slot_mapping" in text]


@pytest.mark.parametrize("table", [None, [[], []]])
def test_a_step_without_a_table_is_a_case(table):
    dump = decodes([5, 5], table)
    assert rows_of({name: value for name, value in dump.items() if value is not None}) == "decode:5x2"


# ---- options -------------------------------------------------------------------------------------


def test_scalars_are_options_where_the_operator_has_them():
    dump = {**FASTDEPLOY, "block_size": 16, "num_attention_heads": np.array([8]), "model": "deepseek-v2-lite"}
    case = imported(dump, "mla_decode").case
    assert case.options == Options(model="deepseek-v2-lite", heads=(8,), block=(16,))
    assert remark(dump, "num_attention_heads is not kept: position_ids", "position_ids")
    assert remark({**dump, "model": "mine"}, "there is no model 'mine'")
    assert remark(FASTDEPLOY, "no block_size: the case's is 64")
    assert remark({**FASTDEPLOY, "num_blocks": 9000}, "pool=9000")


def test_names_that_are_not_read_are_told():
    assert (
        "not read: a, b, q and 1 more"
        in imported({**FASTDEPLOY, "q": Stub("half", ()), "b": 1, "a": 1, "z": 1}).remarks
    )


# ---- what is refused -----------------------------------------------------------------------------


def without(name, dump=FASTDEPLOY):
    return {key: value for key, value in dump.items() if key != name}


@pytest.mark.parametrize(
    ("dump", "sentence"),
    [
        (
            {},
            "the dump must have seq_lens_encoder, seq_lens_decoder and seq_lens_this_time, or",
        ),
        ({"block_size": 64}, "got block_size"),
        (without("seq_lens_encoder"), "the dump has no seq_lens_encoder"),
        (without("seq_lens_this_time"), "the dump has no seq_lens_this_time"),
        (without("query_start_loc", VLLM), "the dump has no query_start_loc"),
        (without("seq_lens", VLLM), "the dump has no num_computed_tokens"),
        ({**FASTDEPLOY, **VLLM}, "both FastDeploy's seq_lens_decoder and vLLM's query_start_loc"),
        ({**FASTDEPLOY, "seq_lens_decoder": [0]}, "seq_lens_decoder must have 6 entries, one a slot, got 1"),
        (
            {**FASTDEPLOY, "seq_lens_decoder": [[0, 0, 0, 0, 0, 0]]},
            "seq_lens_decoder must have shape [B] or [B, 1]",
        ),
        ({**FASTDEPLOY, "seq_lens_decoder": 7}, "seq_lens_decoder must be an array, got 7"),
        ({**FASTDEPLOY, "seq_lens_decoder": Stub("int32", (6,))}, "has no contents in this dump"),
        (
            {**FASTDEPLOY, "seq_lens_decoder": [0, 9, -1, 64, 0, 70]},
            "seq_lens_decoder[2] must be at least 0, got -1",
        ),
        (
            {**FASTDEPLOY, "seq_lens_this_time": [4, 1, 6, 3, 0, 0]},
            "slot 2 contradicts itself: seq_lens_encoder 5 and",
        ),
        ({**FASTDEPLOY, "seq_lens_decoder": [0, 10**9, 0, 0, 0, 0]}, "1,000,000,000, more than"),
        ({**FASTDEPLOY, "seq_lens_decoder": [0, 2**62, 0, 0, 0, 0]}, "more than"),
        ({**FASTDEPLOY, "cu_seqlens_q": [0, 4, 5, 9, 13, 13, 13]}, "cu_seqlens_q[3] must be 10"),
        ({**FASTDEPLOY, "cu_seqlens_q": [0, 4, 5]}, "must have 7 entries, one more than slots, got 3"),
        (
            {**FASTDEPLOY, "batch_id_per_token": [0] * 12},
            "batch_id_per_token has 12 tokens and the lengths give 13",
        ),
        ({**FASTDEPLOY, "batch_id_per_token": [0] * 13}, "batch_id_per_token[4] must be 1"),
        ({**FASTDEPLOY, "block_size": 0}, "block_size must be an integer from 1"),
        ({**FASTDEPLOY, "block_size": "a"}, "block_size must be an integer from 1"),
        ({**FASTDEPLOY, "block_size": [1, 2]}, "block_size must be one whole number, got an array"),
        ({**VLLM, "query_start_loc": [0, 4, 3, 10, 13, 13, 13]}, "must not fall, and does from 4 to 3"),
        ({**VLLM, "query_start_loc": [1, 4, 5, 10, 13, 13, 13]}, "must begin with 0, got 1"),
        ({**VLLM, "query_start_loc": []}, "must have at least 1 entry"),
        ({**VLLM, "query_start_loc": [0, 10**9], "seq_lens": [10**7]}, "slot 0 contradicts itself"),
        ({**VLLM, "seq_lens": [3, 10, 133, 67, 0, 70]}, "slot 0 contradicts itself"),
        ({**VLLM, "num_computed_tokens": [0, 9, 128, 65, 0, 70]}, "num_computed_tokens[3] must be 64"),
        ({**VLLM, "num_reqs": 9}, "must have 10 entries"),
        (decodes([5, 5], [[1, 2]]), "block_tables has 1 rows and the lengths give 2 slots"),
        (
            decodes([5, 8], [[1, 2], [3, 4]]),
            "slot 1 holds 9 tokens: 3 blocks of 4 tokens, and block_tables has room for 2",
        ),
        (decodes([MAX_TOKENS], [[1]]), "slot 0 has 134,217,728 cached and 1 new tokens, more than"),
        (decodes([5], [1]), "block_tables must have shape [B, blocks], got [1]"),
    ],
)
def test_a_dump_that_contradicts_itself_is_refused_in_one_sentence(dump, sentence):
    assert sentence in refusal(dump)


def test_steps_beyond_any_engine_are_refused_before_they_are_built():
    many = {name: np.full(70_000, 0) for name in FASTDEPLOY}
    assert "at most 65,536 slots, got 70,000" in refusal(many)
    full = {name: np.full(3, MAX_TOKENS) for name in FASTDEPLOY}
    full["seq_lens_decoder"] = np.zeros(3, np.int64)
    assert "402,653,184 new tokens" in refusal(full)


# ---- there and back again ------------------------------------------------------------------------


def dump_of(case, names):
    """What an engine would have of a one-step case."""
    metadata, pages = step_metadata(case.steps[0]), lay_out(case, case.layers[0])[0]
    block_size = case.layers[0].block_size
    table = {"block_size": block_size, "num_attention_heads": case.layers[0].num_attention_heads}
    slots = slot_mapping(metadata, pages.block_tables, block_size)
    if names == "fastdeploy":
        return {**vars(metadata), **table, "block_tables": pages.block_tables, "slot_mapping": slots}
    length = metadata.seq_lens_decoder + metadata.seq_lens_this_time
    prompt = np.where(metadata.seq_lens_encoder > 0, length, metadata.seq_lens_decoder)
    return {
        "query_start_loc": metadata.cu_seqlens_q,
        "seq_lens": length,
        "num_prompt_tokens": prompt,
        "block_table": pages.block_tables,
        "slot_mapping": slots,
        **table,
    }


def represented(case):
    """The case without what metadata does not say: data keys, names of tags, drafts of one token."""
    groups = step_blocks(case.steps, case.layers[0].block_size)[0]
    slots = [row for row in case.steps[0] if row.is_slot]
    holders = {}
    for slot, blocks in enumerate(groups):
        for block in blocks:
            holders.setdefault(block, []).append(slot)
    shared = sorted(tuple(slots) for slots in holders.values() if len(slots) > 1)
    rows = []
    for row in [*slots, *case.steps[0][len(slots) :]]:
        if row.kind is Kind.DRAFT and row.new == 1:
            row = Row(Kind.DECODE, row.cached)
        rows.append(replace(row, tag=None, key=None))
    return rows, shared


@settings(deadline=None, max_examples=60)
@given(
    walked=steps(max_steps=1, max_slots=6, max_length=300),
    block=st.sampled_from([1, 3, 16, 64]),
    names=st.sampled_from(["fastdeploy", "vllm"]),
    suffix=st.sampled_from(["json", "safetensors"]),
)
def test_a_case_that_is_captured_and_imported_is_the_case(tmp_path_factory, walked, block, names, suffix):
    case = Case("mla_decode", walked, Options(block=(block,), heads=(4,)))
    file = tmp_path_factory.mktemp("dump") / f"step.{suffix}"
    assert capture(file, dump_of(case, names)) is None
    back = import_case([Dump(read_dump(file))], "mla_decode")
    assert represented(back.case) == represented(case)
    assert back.case.options == case.options
    assert not [
        text for text in back.remarks if "share blocks" in text or "slot_mapping" in text or "rule" in text
    ]
    assert blocks_needed(back.case.steps, block) == blocks_needed(case.steps, block)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_case_and_remarks_beside_it(main_here, tmp_path):
    file = tmp_path / "step.json"
    file.write_text(json.dumps({**FASTDEPLOY, "block_size": 64, "q": [1.5]}))
    result = main_here("import", str(file), "--operator", "mla_decode")
    assert result.returncode == 0
    assert result.stdout == "mla_decode/prefill:4,decode:9,hit:128+5,draft:64+3,idle,paused:70\n"
    assert "note: not read: q" in result.stderr.splitlines()
    assert main_here("show", result.stdout.strip()).returncode == 0


@pytest.mark.parametrize(
    ("content", "operator", "sentence"),
    [
        ('{"seq_lens_encoder": [NaN]}', "mla_step", "must be a whole number, got NaN"),
        ('{"seq_lens_enc', "mla_step", "was it cut off?"),
        (json.dumps({**FASTDEPLOY, "seq_lens_decoder": [0, 10**9, 0, 0, 0, 0]}), "mla_step", "1,000,000,000"),
        (json.dumps(FASTDEPLOY), "mla_nothing", "the operators are"),
    ],
)
def test_the_command_refuses_with_exit_code_2_and_prints_no_case(
    main_here, tmp_path, content, operator, sentence
):
    file = tmp_path / "step.json"
    file.write_text(content)
    result = main_here("import", str(file), "--operator", operator)
    assert (result.returncode, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_the_readme_shows_what_the_command_prints(command, tmp_path):
    metadata = {
        "seq_lens_encoder": [0, 0, 128, 0, 0],
        "seq_lens_decoder": [300, 140, 64, 0, 77],
        "seq_lens_this_time": [1, 1, 128, 0, 5],
        "block_tables": [[9, 4, 11, 2, 7], [9, 4, 30, 0, 0], [17, 21, 22, 0, 0], [0] * 5, [28, 3, 0, 0, 0]],
        "block_size": 64,
        "q": np.zeros((135, 16, 576), np.float16),
    }
    file = tmp_path / "step.json"
    assert capture(file, metadata) is None
    result = command("harness", "import", str(file), "--operator", "mla_decode")
    assert f"--operator mla_decode\n{result.stderr}{result.stdout}```" in (ROOT / "README.md").read_text()
