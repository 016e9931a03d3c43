"""Indices of a sliding window: worked by hand, at its edges, in any block size, against a plain count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of, operators
from harness.checks import checks
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
HUGE = 2**30


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


FAMILIES = ("triton", "cuda")


@pytest.fixture
def path_of(request):
    """(family) -> the path of that family, ready to run."""

    def path(family):
        if family == "triton":
            pytest.importorskip("triton")
            from harness.paths.triton.swa_indices import PATHS
        else:
            request.getfixturevalue("cuda_on_the_processor")
            from harness.paths.cuda.swa_indices import PATHS
        return PATHS[0]

    return path


@pytest.fixture(params=FAMILIES)
def list_keys(request, path_of):
    """(tables, cu_seqlens_q, decoder, batch ids, output, block_size, window) -> the output, written."""

    def run(tables, cu_seqlens_q, decoder, ids, got, block_size, window):
        inputs = {
            "block_tables": int32(tables),
            "cu_seqlens_q": int32(cu_seqlens_q),
            "seq_lens_decoder": int32(decoder),
            "batch_id_per_token": int32(ids),
            "block_size": block_size,
            "window": window,
        }
        path_of(request.param).run(inputs, {"swa_indices": got}, {})
        return got

    return run


@pytest.fixture(params=[*ROLES, *FAMILIES])
def indices(request, path_of):
    """(tables, encoder, decoder, this_time, block_size, window) -> each token's entries but -1."""

    def run(tables, encoder, decoder, this_time, block_size, window, *, padding=0):
        ids = [slot for slot, count in enumerate(this_time) for _ in range(count)] + [-1] * padding
        table = int32(tables).view(len(tables), len(tables[0]) if tables else 2)
        inputs = {
            "block_tables": table,
            "cu_seqlens_q": int32([sum(this_time[:row]) for row in range(len(this_time) + 1)]),
            "seq_lens_encoder": int32(encoder),
            "seq_lens_decoder": int32(decoder),
            "batch_id_per_token": int32(ids),
            "block_size": block_size,
            "window": window,
        }
        room = table.shape[1] * block_size
        width = -(-min(window or room, room) // 128) * 128
        if request.param in ROLES:
            got = oracle_for("swa_indices", request.param).run(inputs, None)["swa_indices"]
        else:
            got = torch.full((len(ids), 1, width), -7, dtype=torch.int32)
            path_of(request.param).run(inputs, {"swa_indices": got}, {})
        assert got.dtype is torch.int32
        assert got.shape == (len(ids), 1, width)
        return [visible(row) for row in got[:, 0].tolist()]

    return run


def visible(row):
    """The entries of a row, after asserting that nothing but -1 stands behind them."""
    count = sum(entry != -1 for entry in row)
    assert -1 not in row[:count]
    return row[:count]


# ---- by hand -------------------------------------------------------------------------------------


def test_a_window_of_three_over_history_and_new_tokens(indices):
    # bs = 2, table [5, 2, 7]: positions 0 to 4 lie in rows 10, 11, 4, 5, 14; three cached, two new.
    for encoder in (0, 2):
        got = indices([[5, 2, 7, HUGE]], [encoder], [3], [2], 2, 3)
        assert got == [[11, 4, 5], [4, 5, 14]]


def test_blocks_are_as_large_as_they_are(indices):
    # FastDeploy's B38: with blocks of 32, position 40 is block 1, offset 8; not block 0, offset 40.
    assert indices([[9, 4, HUGE]], [0], [40], [1], 32, 1) == [[4 * 32 + 8]]
    assert indices([[9, 4, HUGE]], [0], [40], [1], 48, 1) == [[9 * 48 + 40]]


def test_a_continued_chunk_sees_its_cached_history(indices):
    # FastDeploy's B39: 100 cached, four new, a window of 128: the first new token sees 101 keys, not one.
    got = indices([[3, 6, HUGE]], [4], [100], [4], 64, 128)
    rows = [*range(3 * 64, 4 * 64), *range(6 * 64, 7 * 64)]
    assert got == [rows[: 101 + token] for token in range(4)]


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65])
def test_the_first_key_leaves_with_the_token_behind_the_window(indices, window):
    # FastDeploy's B58: the window counts the token itself.
    got = indices([[0, 1, 2]], [0], [window - 1], [2], 64, window)
    assert got == [list(range(window)), list(range(1, window + 1))]


@pytest.mark.parametrize("window", [0, 6, 7, 1000])
def test_no_window_and_one_that_is_never_full_hide_nothing(indices, window):
    assert indices([[1, 0, HUGE]], [2], [4], [2], 4, window) == [[4, 5, 6, 7, 0], [4, 5, 6, 7, 0, 1]]


def test_drafts_move_their_window_with_every_token(indices):
    assert indices([[2, 1]], [0], [3], [3], 4, 2) == [[10, 11], [11, 4], [4, 5]]


def test_rows_without_a_token_and_padding_see_nothing_and_shift_nobody(indices):
    # Idle, decode on 1, paused, a first chunk of two, padding.
    tables = [[HUGE, HUGE], [3, HUGE], [4, HUGE], [0, HUGE]]
    got = indices(tables, [0, 0, 0, 2], [0, 1, 5, 0], [0, 1, 0, 2], 8, 4, padding=3)
    assert got == [[24, 25], [0], [0, 1], [], [], []]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("slots", [0, 1, 3])
def test_steps_without_a_token_give_empty_rows(indices, slots, padding):
    got = indices([[HUGE, HUGE]] * slots, [0] * slots, [5] * slots, [0] * slots, 8, 4, padding=padding)
    assert got == [[]] * padding


def test_what_the_table_does_not_have_is_nowhere(list_keys):
    # Too short a table and a negative entry are refused by the contract; still no address is made of them.
    got = torch.full((1, 1, 4), -7, dtype=torch.int32)
    assert list_keys([[2, 0]], [0, 1], [9], [0], got, 4, 4).tolist() == [[[0 + 2, 0 + 3, -1, -1]]]
    assert list_keys([[2, -1]], [0, 1], [4], [0], got, 4, 3).tolist() == [[[10, 11, -1, -1]]]


@pytest.mark.parametrize("width", [3, 130, 700])
def test_rows_of_any_width_and_stride_are_written_to_their_end(list_keys, width):
    whole = torch.full((2, 1, width + 5), -7, dtype=torch.int32)
    list_keys([[1, 0]], [0, 2], [0], [0, 0], whole[:, :, :width], 2, 3)
    rest = [-1] * (width - 2)
    assert whole[:, 0, :width].tolist() == [[2, -1, *rest], [2, 3, *rest]]
    assert bool((whole[:, :, width:] == -7).all())


def test_more_rows_than_an_int32_tells_apart_are_refused():
    pytest.importorskip("triton")
    from harness.paths.triton.swa_indices import supports

    assert supports(parse("swa_indices/decode:5/block=1024,pool=2097152")) is None
    assert "2,147,484,672" in supports(parse("swa_indices/decode:5/block=1024,pool=2097153"))


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5", "paused:16"]),
    st.integers(1, 30).map("prefill:{}".format),
    st.integers(1, 60).map("decode:{}".format),
    st.tuples(st.integers(1, 60), st.integers(1, 20)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 60), st.integers(1, 9)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=6).map(",".join), st.sampled_from(["", ",pad:3"])
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 70), st.integers(1, 20), st.sampled_from(["huge", "-1", "0"]))
def test_the_references_see_every_position_of_the_window_and_no_other(make_batch, rows, window, block, tail):
    batch = make_batch(f"swa_indices/{rows}/window={window},block={block},tail={tail}")
    layer = batch.layers[0]
    inputs = {**layer.tensors, **layer.attributes}
    one, other = (oracle_for("swa_indices", role).run(inputs, None)["swa_indices"] for role in ROLES)
    assert one.dtype is other.dtype
    assert torch.equal(one, other)
    assert one.shape[2] == layer.axes["window_indices"]
    tables, ids = layer.tensors["block_tables"].tolist(), batch.metadata.batch_id_per_token.tolist()
    for token, (slot, position) in enumerate(zip(ids, batch.metadata.position_ids.tolist(), strict=True)):
        expected = [
            tables[slot][key // block] * block + key % block
            for key in range(position + 1)
            if slot >= 0 and (window == 0 or position - key < window)
        ]
        assert visible(one[token, 0].tolist()) == expected


SMALL = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"


@pytest.mark.parametrize(
    "text",
    [
        f"swa_indices/{SMALL}/window=17,block=16",
        f"swa_indices/{SMALL}/window=0,block=3,strided=0",
        f"swa_indices/{SMALL}/window=200,layers=2,block=1+64",
        *(f"swa_indices/{rows}/window=9" for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
    ],
)
def test_the_kernel_passes_every_check_it_is_not_exempt_from(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton.swa_indices import PATHS

    results = every_result(launched(text, PATHS[0]))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


# ---- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "width"),
    [
        # The window in tiles of 128, where a table has room for so many keys.
        ("decode:5000", "window=1", 128),
        ("decode:5000", "window=128", 128),
        ("decode:5000", "window=129", 256),
        ("decode:5000", "window=513", 640),
        # Three blocks of 64 and one entry behind them; without a window, all of these.
        ("decode:130", "window=513", 256),
        ("decode:130", "window=0", 256),
        ("decode:5,decode:130", "window=0,block=16", 256),
    ],
)
def test_there_is_room_for_the_window_or_the_table(make_batch, rows, options, width):
    assert make_batch(f"swa_indices/{rows}/{options}").layers[0].axes["window_indices"] == width


def test_every_exemption_names_a_check_and_a_reason():
    exempt = operators()["swa_indices"].exempt
    assert set(exempt) <= set(checks())
    assert all(len(reason) > 20 for reason in exempt.values())


def test_work_counts_batch_ids_table_entries_and_indices():
    case = parse("swa_indices/decode:100,hit:63+2,idle,pad:3/window=65")
    # 65 keys in 2 blocks; 64 in one and 65 in two. An id of each token.
    assert contract_of(case).work(case, case.layers[0]).bytes == 4 * (65 + 2 + 64 + 1 + 65 + 2 + 3)
