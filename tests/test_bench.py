"""What bench computes from its figures, and that its cases are those of the contract."""

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest

from cases import parse
from cases.contract import contract_of
from cases.suite import load_suite
from harness.pool import Pool
from harness.task import Measured, Rates, Task
from reports.bench import ratios, table, write_jsonl, write_svg

RATES = Rates("a device", copy_bytes=1e12, read_bytes=1.2e12, matrix_flops=1e14)
FAST = Measured("mla_decode/decode:5", "p/fast", seconds=1e-3, bytes=2 * 10**9, flops=10**10)
FAIR = Measured("mla_decode/decode:5", "p/fair", seconds=1e-3, bytes=5 * 10**8, flops=2 * 10**10)
NONE = Measured("mla_decode/decode:5", "p/none", reason="not supported")


def test_a_time_that_beats_the_device_is_impossible_and_others_are_not():
    assert [ratio.is_impossible for ratio in ratios([FAST, FAIR, NONE], RATES)] == [True, False]


def test_an_adapter_is_told_as_a_multiple_of_our_fastest_path_on_the_case():
    theirs = [replace(FAIR, path="adapters/lib/op", seconds=3e-3), replace(FAIR, seconds=2e-3), FAIR]
    alone = replace(theirs[0], case="mla_decode/decode:6")
    found = ratios([*theirs, alone, NONE], RATES)
    assert [ratio.of_ours for ratio in found] == [pytest.approx(3.0), None, None, None]
    assert " 3.00  adapters/lib/op mla_decode/decode:5" in table(theirs, RATES)


def test_paths_of_a_case_are_timed_together_and_one_that_fails_costs_only_itself(monkeypatch):
    asked = []

    def schedule(function, args=(), timeout=0):
        future = Future()
        asked.append([task.path for task in args[0]] if args else "ceilings")
        if any(task.path == "bad" for task in (args[0] if args else ())):
            future.set_exception(RuntimeError("no kernel"))
        else:
            future.set_result([Measured(t.case, t.path, 1.0) for t in args[0]] if args else RATES)
        return future

    with Pool("interpreted", 1) as pool:
        monkeypatch.setattr(pool._pool, "schedule", schedule)
        cases = [("a", "ours"), ("a", "bad"), ("b", "ours"), ("b", "theirs")]
        rates, measured = pool.bench([Task(case, "op", path, "compiled") for case, path in cases])
    assert rates is RATES
    assert asked == ["ceilings", ["ours", "bad"], ["ours"], ["bad"], ["ours", "theirs"]]
    assert [(item.case, item.path) for item in measured] == cases
    assert [item.reason for item in measured] == ["", "RuntimeError: no kernel", "", ""]


def test_a_path_that_raises_or_refuses_is_left_out_and_the_others_are_timed(lane, monkeypatch):
    pytest.importorskip("triton")
    from harness import bench
    from harness.paths.triton.position_ids import PATHS

    def fails(*tensors):
        raise RuntimeError("no kernel image")

    ours = PATHS[0]
    paths = {
        "ours": ours,
        "fails": replace(ours, run=fails),
        "refuses": replace(ours, supports=lambda _: "not for this"),
    }
    launched = []

    def medians_of(launches):
        launched.extend(launch() for launch in launches)
        return [2.0 for _ in launches]

    monkeypatch.setattr(bench, "medians_of", medians_of)
    tasks = [Task("position_ids/decode:5", "position_ids", path, lane.name) for path in paths]
    measured = bench.measure(tasks, paths, lane)
    assert [item.path for item in measured] == list(paths)
    assert [item.seconds for item in measured] == [2.0, 0.0, 0.0]
    assert measured[0].bytes > 0
    assert "no kernel image" in measured[1].reason
    assert measured[2].reason == "not for this"
    assert len(launched) == 1


def test_shares_are_of_copy_bandwidth_and_matrix_rate():
    (ratio,) = ratios([FAIR], RATES)
    assert ratio.of_copy == pytest.approx(0.5)
    assert ratio.of_matrix == pytest.approx(0.2)


def test_the_table_has_a_line_a_measurement_and_says_what_was_skipped():
    text = table([FAST, FAIR, NONE], RATES)
    assert "IMPOSSIBLE" in text
    assert "skipped p/none mla_decode/decode:5: not supported" in text
    assert len(text.splitlines()) == 5


def test_the_files_hold_every_measurement(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [FAIR, NONE], RATES)
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert lines[0]["ceilings"]["device"] == "a device"
    assert lines[1]["of_copy"] == pytest.approx(0.5)
    assert lines[2]["reason"] == "not supported"
    write_svg(tmp_path / "b.svg", [FAIR, NONE], RATES)
    assert (tmp_path / "b.svg").read_text().count("<rect") == 3


def test_every_case_of_the_suite_states_its_work():
    for item in load_suite("bench").cases:
        work = contract_of(item.case).work
        assert work is not None
        assert work(item.case, item.case.layers[0]).bytes > 0


def test_the_work_of_a_decode_row_counts_each_visible_pair_once():
    case = parse("mla_decode/draft:3+2,prefill:4,paused:9/heads=2,dtype=fp32")
    work = contract_of(case).work(case, case.layers[0])
    # Queries at positions 3 and 4 see 4 and 5 keys; 2 heads; q K^T 576 wide, P V 512.
    assert work.flops == 2 * (4 + 5) * 2 * (576 + 512)
    # Five cache rows; six tokens of two heads, 576 in and 512 out; LSE.
    assert work.bytes == (5 * 576 + 6 * 2 * (576 + 512)) * 4 + 6 * 2 * 4


def test_the_work_of_a_cache_write_is_each_row_in_and_out_and_its_slot():
    case = parse("latent_cache_write/decode:3,pad:2")
    assert contract_of(case).work(case, case.layers[0]).bytes == 2 * 576 * 2 + 8
