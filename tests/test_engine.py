"""Random schedules: they do what an engine does, and are the same for one seed."""

from collections import Counter

from hypothesis import given, settings

from cases import Case, Kind, parse
from cases.engine import seeded_schedules
from cases.schedule import sequences
from cases.strategies import schedules
from harness.paging import lay_out

SIZES = {"steps": 30, "slots": 5, "tokens": 100}


@settings(max_examples=50, deadline=None)
@given(schedules(max_steps=8, max_slots=4, max_tokens=40))
def test_a_drawn_schedule_is_a_case(steps):
    case = Case("mla_step", steps)
    assert parse(str(case)) == case


def test_schedules_of_one_seed_are_equal_and_of_two_differ():
    assert seeded_schedules(1, 2, **SIZES) == seeded_schedules(1, 2, **SIZES)
    assert seeded_schedules(1, 2, **SIZES) != seeded_schedules(2, 2, **SIZES)


def test_a_schedule_is_the_same_on_every_machine():
    (steps,) = seeded_schedules(1, 1, steps=3, slots=3, tokens=60)
    # Looked up once; a change would silently change what the suites run.
    assert str(Case("mla_step", steps)).split("..") == [
        "mla_step/idle,prefill:56@a,idle",
        "hit:14+5@sys.k2,decode:56,hit:19+7.k3",
        "paused:19,idle,hit:26+20",
    ]


def test_schedules_have_every_event_of_an_engine():
    seen = Counter()
    for steps in seeded_schedules(3, 20, **SIZES):
        case = Case(
            "mla_step",
            steps,
        )
        pages = lay_out(case, case.layers[0])
        walked = sequences(case.steps)
        keys_before = set()
        for index, (step, held) in enumerate(zip(case.steps, walked, strict=True)):
            before = walked[index - 1] if index else ()
            for slot, (row, sequence) in enumerate(zip(step, held, strict=True)):
                seen[row.kind] += 1
                earlier = before[slot] if slot < len(before) else None
                if sequence is None:
                    seen["freed"] += earlier is not None
                    continue
                begins = sequence.began == index
                seen["recomputed"] += begins and sequence.key in keys_before
                seen["admitted with a history"] += begins and row.cached > 0
                seen["chunk of a prompt"] += not begins and row.kind is Kind.HIT
                seen["draft rejected"] += not begins and earlier is not None and row.cached < earlier.held
                seen["draft accepted whole"] += (
                    not begins and earlier is not None and row.cached == earlier.held > earlier.floor
                )
            keys_before |= {sequence.key for sequence in held if sequence}
            blocks = [set(row.tolist()) for row in pages[index].blocks]
            seen["prefix shared"] += sum(map(len, blocks)) > len(set().union(*blocks))
            if index:
                given = set(pages[index].used.tolist()) - set(pages[index].kept.tolist())
                seen["block reused"] += bool(given & set(pages[index - 1].used.tolist()))
    assert set(Kind) <= set(seen)
    assert min(seen.values()) >= 5, seen
