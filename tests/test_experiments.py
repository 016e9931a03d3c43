"""A path that leaves its tensors or whose threads race is told by what it does right otherwise."""

from dataclasses import replace

import pytest
import torch

from cases import parse
from harness import experiments
from harness.bounds import OutOfBounds
from harness.checks.races import FORWARD, RANDOM
from harness.diagnosis import diagnose
from harness.experiments import orders, remedies, remedies_by_verdict
from harness.kernel_path import KernelPath
from harness.lanes import lanes
from harness.launch import Launch, PathFailure

CASE = "position_ids/draft:30+3,idle,decode:5,pad:2"


def path_of(leaves, spoil=lambda _, right: right):
    """A right position_ids, but where leaves(inputs) it ends outside of its tensors."""

    def run(inputs, outputs, _):
        if leaves(inputs):
            raise OutOfBounds("a pointer outside every tensor")
        ids = inputs["batch_id_per_token"].long()
        tokens = torch.arange(len(ids))
        at = inputs["seq_lens_decoder"][ids] + tokens - inputs["cu_seqlens_q"][ids]
        outputs["position_ids"].copy_(spoil(inputs, torch.where(ids < 0, -1, at)))

    return KernelPath("test/position_ids", "position_ids", ("interpreted",), lambda _: None, run)


def has_padding(inputs):
    return bool((inputs["batch_id_per_token"] < 0).any())


def is_right(launch):
    return torch.equal(launch.layers[0].outputs["position_ids"].view, launch.expected(0)["position_ids"])


@pytest.fixture
def attempted(lane):
    """(text, path) -> a launch that was tried, and may have left its tensors."""

    def attempt(text, path):
        launch = Launch.prepare(parse(text), path, lane)
        try:
            launch.run()
        except PathFailure:
            assert not launch.has_ended
        return launch

    return attempt


def names(launch):
    return [found.name for found in remedies(launch, is_right)]


def test_what_is_right_without_padding_follows_padding(attempted):
    assert names(attempted(CASE, path_of(has_padding))) == ["padding-followed"]


def test_what_is_right_at_early_positions_has_offsets_that_wrap(attempted):
    def is_far(inputs):
        return int(inputs["seq_lens_decoder"].max()) > 2**24

    assert names(attempted("position_ids/decode:20000000", path_of(is_far))) == ["offsets-32-bit"]


def test_what_is_right_with_whole_tiles_has_an_unguarded_tail(attempted):
    def has_ragged_tokens(inputs):
        return len(inputs["batch_id_per_token"]) % 128 > 0

    def has_ragged_slots(inputs):
        return len(inputs["seq_lens_decoder"]) % 128 > 0

    assert names(attempted("position_ids/decode:9,decode:3", path_of(has_ragged_tokens))) == [
        "tail-unguarded"
    ]
    assert names(attempted("position_ids/decode:9,pad:3", path_of(has_ragged_slots))) == ["tail-unguarded"]


def test_wrong_outputs_are_no_matter_of_padding(attempted):
    path = path_of(lambda _: False, lambda inputs, right: right + has_padding(inputs))
    assert names(attempted(CASE, path)) == []


def test_what_always_leaves_its_tensors_is_not_explained(attempted):
    launch = attempted(CASE, path_of(lambda _: True))
    assert names(launch) == []
    assert diagnose(launch).sentence.startswith("unknown: ")


def test_what_is_right_when_it_is_launched_again_is_not_explained(attempted):
    launches = []
    launch = attempted(CASE, path_of(lambda _: launches.append(1) or len(launches) == 1))
    assert names(launch) == []


def test_a_diagnosis_by_experiment_is_likely(attempted):
    found = diagnose(attempted(CASE, path_of(has_padding)))
    assert found.names == ("padding-followed",)
    assert not found.sure
    assert found.sentence.startswith("likely padding-followed: ")


@pytest.mark.parametrize(
    ("text", "is_right", "found"),
    [
        (CASE, lambda case: all(row.is_slot for row in case.steps[0]), ["padding-followed"]),
        ("mla_decode/decode:9/heads=3", lambda case: case.options.heads == (16,), ["heads-unmasked"]),
        (CASE, lambda _: True, []),
        (CASE, lambda _: False, []),
        ("mla_step/prefill:9..decode:9", lambda case: len(case.steps) == 1, []),
    ],
)
def test_what_ends_its_process_is_explained_by_cases_that_do_not(text, is_right, found):
    assert [item.name for item in remedies_by_verdict(parse(text), is_right)] == found


# ---- orders of threads ---------------------------------------------------------------------------


@pytest.fixture
def scheduled(attempted, monkeypatch):
    """(what a schedule adds to the outputs) -> a CUDA path's launch in lane host, and its schedule."""
    at = [(FORWARD, 0)]

    def set_schedule(kind, seed=0):
        at[0] = (kind, seed)

    monkeypatch.setattr(experiments.build, "set_schedule", set_schedule)

    def launch_of(added):
        path = path_of(lambda _: False, lambda _, right: right + added(at[0]))
        launch = attempted(CASE, replace(path, name="cuda/position_ids"))
        return replace(launch, lane=lanes()["host"]), at

    return launch_of


def test_outputs_that_are_right_in_one_order_alone_are_a_race(scheduled):
    launch, at = scheduled(lambda order: int(order[0] == RANDOM))
    found = orders(launch, is_right)
    assert (found.name, found.is_sure) == ("race", True)
    assert at == [(FORWARD, 0)]


def test_outputs_that_are_right_in_no_order_are_likely_more_than_a_race(scheduled):
    found = orders(scheduled(lambda order: 1 + order[1])[0], is_right)
    assert (found.name, found.is_sure) == ("race", False)


def test_outputs_that_no_order_changes_are_no_race(scheduled):
    assert orders(scheduled(lambda _: 1)[0], is_right) is None


def test_paths_without_an_order_of_threads_have_no_race(attempted):
    assert orders(attempted(CASE, path_of(lambda _: False)), is_right) is None
