"""Schedules: the published systems, their windows, validation, printing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurx import InvalidArgument, Schedule, Step


def test_trm_is_the_published_recursion() -> None:
    schedule = Schedule.trm(3, 6)
    low = Step("L", "z_L", ("z_L",), ("z_H", "x"))
    high = Step("L", "z_H", ("z_H",), ("z_L",))
    assert schedule.steps == ((low,) * 6 + (high,)) * 3
    assert (schedule.grad_from, schedule.window) == (14, 7)
    assert schedule.nets == ("L",) and set(schedule.states) == {"z_H", "z_L"}


def test_hrm_has_two_nets_and_a_window_of_two_calls() -> None:
    schedule = Schedule.hrm(2, 2)
    assert [step.net for step in schedule.steps] == ["L", "L", "H", "L", "L", "H"]
    assert schedule.window == 2


def test_single_z_reads_the_input_in_the_inner_calls_only() -> None:
    schedule = Schedule.single_z(2, 3)
    assert [step.inject for step in schedule.steps[:4]] == [("x",)] * 3 + [()]
    assert schedule.states == ("z",) and schedule.window == 4


def test_hier_sums_all_low_states_whatever_it_writes() -> None:
    schedule = Schedule.hier(6)
    lows = tuple(f"z_L{k}" for k in range(1, 7))
    assert [step.write for step in schedule.steps[:7]] == [*lows, "z_H"]
    assert all(step.state == lows for step in schedule.steps[:6])
    assert schedule.steps[6].inject == lows and len(schedule) == 21


@pytest.mark.parametrize(("window", "grad_from"), [(1, 20), ("cycle", 14), ("full", 0), (21, 0)])
def test_windows(window: int | str, grad_from: int) -> None:
    assert Schedule.trm(3, 6, window=window).grad_from == grad_from


def test_repr_says_calls_window_and_repetition() -> None:
    text = repr(Schedule.trm(3, 6))
    assert "21 net calls" in text and "gradient from call 14" in text
    assert "3 x [ 6 x z_L <- L(z_L + (z_H + x))" in text and "z_H <- L(z_H + (z_L)) ]" in text


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: Step("L", "x", ("z",)), ["write", "read-only"]),
        (lambda: Step("L", "z", ()), ["state", "at least one"]),
        (lambda: Step("L", "z", ("a-b",)), ["state", "a-b"]),
        (lambda: Schedule(()), ["steps"]),
        (lambda: Schedule((Step("L", "z", ("z",)),), grad_from=1), ["grad_from", "1"]),
        (lambda: Schedule((Step("L", "z", ("z",)),), grad_from=-1), ["grad_from", "-1"]),
        (lambda: Schedule.trm(0, 6), ["trm", "h_cycles", "0"]),
        (lambda: Schedule.trm(3, True), ["trm", "l_cycles", "True"]),
        (lambda: Schedule.hier(2, 3, 3), ["hier", "l_cycles", "3"]),
        (lambda: Schedule.trm(3, 6, window=22), ["window", "22"]),
        (lambda: Schedule(Schedule.trm(2, 2).steps, 3, detach_carry=False), ["detach_carry"]),
    ],
)
def test_impossible_schedules_are_refused_with_what_was_wrong(build, names) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidArgument) as error:
        build()
    assert all(name in str(error.value) for name in names), str(error.value)


names = st.sampled_from(["z_H", "z_L", "a", "b2"])
reads = st.lists(st.sampled_from(["x", "z_H", "z_L", "a", "b2"]), max_size=4).map(tuple)
steps = st.builds(
    Step, net=st.sampled_from(["L", "H"]), write=names, state=reads.filter(bool), inject=reads
)


@given(st.lists(steps, min_size=1, max_size=9), st.data())
def test_key_round_trip(calls: list[Step], data: st.DataObject) -> None:
    grad_from = data.draw(st.integers(0, len(calls) - 1))
    schedule = Schedule(tuple(calls), grad_from, detach_carry=True, name="free form")
    assert Schedule.from_key(schedule.key) == schedule
    assert str(len(calls)) in repr(schedule)
