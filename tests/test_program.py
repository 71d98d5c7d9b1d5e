"""The lowered program is the schedule, whatever it shares, keeps and leaves on chip."""

from __future__ import annotations

import inspect
import random
import sys
import types

import pytest
from recurx.kernels.arena import Row, rows_of, slots_of

from recurx import Schedule, Step, program
from recurx.operands import Span
from recurx.program import Program, lower
from recurx.schedule import INPUT

PUBLISHED = (Schedule.trm(3, 6), Schedule.hrm(2, 2), Schedule.single_z(2, 3), Schedule.hier(6, 2))


def any_schedule(seed: int) -> Schedule:
    """Few names and short sums, so that calls often inject the same and overwrite each other."""
    draw = random.Random(seed)
    readable = ("a", "b", INPUT)

    def names(least: int) -> tuple[str, ...]:
        return tuple(draw.choices(readable, k=draw.randint(least, 2)))

    sums = [names(0) for _ in range(2)]
    damping = (1.0, 1.0, 1.0, 0.5)
    steps = [
        Step(
            draw.choice("LH"), draw.choice("ab"), names(1), draw.choice(sums), draw.choice(damping)
        )
        for _ in range(draw.randint(2, 7))
    ]
    return Schedule(tuple(steps))


def added(values: list[object]) -> object:
    """The sum of some values as an expression; the order counts."""
    total = values[0]
    for value in values[1:]:
        total = ("+", total, value)
    return total


def by_the_schedule(schedule: Schedule, span: Span) -> list[object]:
    values = {name: name for name in (INPUT, *schedule.states)}
    for step in schedule.steps[span.start : span.stop]:
        h = added([values[name] for name in step.state])
        if step.inject:
            h = ("+", h, added([values[name] for name in step.inject]))
        value = (step.net, h)
        values[step.write] = value if step.damping == 1 else ("+", values[step.write], value)
    return list(values.values())


def by_the_calls(schedule: Schedule, lowered: Program) -> list[object]:
    """An engine that believes every word: a state that stays is never stored."""
    slots: list[object] = [INPUT, *schedule.states]
    on_chip: tuple[int, object] | None = None
    kept: object = "nothing"
    for call in lowered.calls:
        terms = [slots[slot] for slot in call.state]
        if on_chip is not None:
            assert on_chip[0] == call.state[0], "what stayed on chip is not what comes first"
            terms[0] = on_chip[1]
        h = added(terms)
        if call.inject:
            inject = kept
            if call.shared is None or call.forms:
                inject = added([slots[slot] for slot in call.inject])
            kept = inject if call.forms else kept
            h = ("+", h, inject)
        value = ("+", slots[call.write], (call.net, h)) if call.damped else (call.net, h)
        on_chip = (call.write, value) if call.stays else None
        if on_chip is None:
            slots[call.write] = value
    return slots


def by_the_rows(schedule: Schedule, lowered: Program) -> list[object]:
    slots: list[object] = [INPUT, *schedule.states, "nothing", "nothing"][: slots_of(lowered)]
    for row in rows_of(lowered):
        h = added([slots[slot] for slot in row.state])
        if row.inject:
            h = ("+", h, added([slots[slot] for slot in row.inject]))
        slots[row.place] = value = h if row.net is None else (row.net, h)
        slots[row.write] = value if row.place == row.write else ("+", slots[row.write], value)
    return slots[: lowered.states + 1]


def assert_the_same(schedule: Schedule, span: Span) -> Program:
    lowered = lower.__wrapped__(schedule, span)
    want = by_the_schedule(schedule, span)
    assert by_the_calls(schedule, lowered) == want, schedule
    assert by_the_rows(schedule, lowered) == want, schedule
    shared = [call.shared for call in lowered.calls if call.shared is not None]
    assert all(shared.count(number) > 1 for number in shared), "a sum that one call uses is kept"
    return lowered


@pytest.mark.parametrize("schedule", PUBLISHED, ids=lambda s: s.name)
def test_published_schedules(schedule: Schedule) -> None:
    for start in range(len(schedule)):
        for stop in range(start, len(schedule) + 1):
            assert_the_same(schedule, Span(start, stop))


def test_any_schedule() -> None:
    found = [assert_the_same(s, Span(0, len(s))) for s in map(any_schedule, range(3000))]
    calls = [call for lowered in found for call in lowered.calls]
    assert sum(call.forms for call in calls) > 300
    assert sum(call.stays for call in calls) > 300


def test_trm_forms_its_sum_once_a_cycle() -> None:
    lowered = lower(Schedule.trm(3, 6), Span(0, 21))
    assert [k for k, call in enumerate(lowered.calls) if call.forms] == [0, 7, 14]
    assert [call.shared for call in lowered.calls[:7]] == [1] * 6 + [None]
    assert slots_of(lowered) == 4
    assert rows_of(lowered)[:2] == (Row(None, 3, 3, (2, 0)), Row("L", 1, 1, (1,), (3,)))


PLANTED = {
    "what a damped call reads stays on chip": ("if after.damping != 1:", "if False:"),
    "a sum is kept though what it adds was written": (
        "            held = None\n",
        "            pass\n",
    ),
    "a sum is kept for nobody": (" and step.write not in step.inject", ""),
    "a state that is read again stays on chip": ("*after.state[1:], *after.inject", ""),
    "what is not the first operand stays on chip": (" or after.state[0] != step.write", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_rejected(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, (old, new) = inspect.getsource(program), PLANTED[bug]
    assert text.count(old) == 1
    mutant = types.ModuleType(program.__name__)
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)  # dataclasses look it up
    exec(text.replace(old, new), vars(mutant))
    monkeypatch.setitem(globals(), "lower", mutant.lower)
    with pytest.raises(AssertionError):
        test_any_schedule()
