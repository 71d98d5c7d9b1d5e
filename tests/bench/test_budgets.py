"""Accuracy for a budget: curves over steps, time and rollouts, and what early exit saves."""

from __future__ import annotations

import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import recurx
from recurx import tasks
from recurx.bench import budgets
from recurx.bench.budgets import Exit, Point, budget_curve, compare_exits, doubling
from recurx.bench.budgets import shown as pictures
from recurx.models import TRM, TRMConfig
from recurx.tasks import Examples, Task
from recurx.train import evaluate
from tests.scripted import Scripted

RIGHT_AT = [1, 1, 2, 4, 0]  # the step at which each puzzle comes right
SURE_AT = [1, 2, 1, 4, 9]  # the third is sure one step too early


@pytest.fixture(scope="module")
def task() -> Task:
    return tasks.get("sudoku-4x4")


@pytest.fixture(scope="module")
def examples(task: Task) -> Examples:
    return tasks.Sampler(task, 0).draw_distinct(5)


@pytest.fixture
def model(task: Task, examples: Examples) -> Scripted:
    return Scripted(examples, RIGHT_AT, SURE_AT, task.vocab_size)


def test_points_are_what_each_budget_buys(model, task, examples) -> None:
    points = budget_curve(model, task, examples, (1, 2, 4, 8), (1, 2), halt=None, batch_size=2,
                          init="random")  # fmt: skip
    assert [(p.rollouts, p.max_steps) for p in points] == [
        (r, s) for r in (1, 2) for s in (1, 2, 4, 8)
    ]
    assert [p.exact for p in points[:4]] == [0.4, 0.6, 0.8, 0.8]
    assert [p.steps_mean for p in points] == [1, 2, 4, 8, 2, 4, 8, 16]
    assert all(p.seconds > 0 for p in points)
    early = budget_curve(model, task, examples, (8,), halt="q")
    assert early[0].steps_mean == (1 + 2 + 1 + 4 + 8) / 5 and early[0].exact == 0.6
    settled = budget_curve(model, task, examples, (8,), halt="fixed-point", patience=1)
    assert settled[0].steps_mean == (2 + 2 + 3 + 5 + 8) / 5 and settled[0].exact == 0.8


def test_exits_are_compared_in_interleaved_rounds(model, task, examples, monkeypatch) -> None:
    asked: list[str | None] = []
    solve = budgets.solve
    monkeypatch.setattr(
        budgets, "solve", lambda *a, **k: (asked.append(k["halt"]), solve(*a, **k))[1]
    )
    exits = {"sure": {"halt": "q"}, "settled": {"halt": "fixed-point", "patience": 1}}
    rows = compare_exits(model, task, examples, max_steps=8, exits=exits, rounds=3)
    assert asked[1:] == [None, "q", "fixed-point"] * 3
    assert [row.name for row in rows] == ["always 8 steps", "sure", "settled"]
    assert [row.exact for row in rows] == [0.8, 0.6, 0.8]
    assert [row.steps_mean for row in rows] == [8, 3.2, 4]
    assert rows[0].speedup == 1.0
    assert budgets.fastest_at_equal_accuracy(rows).name != "sure"  # it is right less often


def test_the_fastest_exit_must_not_solve_fewer() -> None:
    rows = [
        Exit("always", {}, 0.9, 16, 8.0, 1.0), Exit("rash", {}, 0.89, 1, 1.0, 8.0),
        Exit("slow", {}, 0.95, 8, 4.0, 2.0), Exit("good", {}, 0.9, 4, 2.0, 4.0),
    ]  # fmt: skip
    assert budgets.fastest_at_equal_accuracy(rows).name == "good"
    assert budgets.fastest_at_equal_accuracy(rows[:2]).name == "always"


def test_doubling() -> None:
    assert doubling(1) == (1,) and doubling(16) == (1, 2, 4, 8, 16)
    assert doubling(20) == (1, 2, 4, 8, 16, 20)


# ---- evaluate ----------------------------------------------------------------------------------


def test_a_report_is_what_the_script_says(model, task, examples) -> None:
    done: list[int] = []
    report = evaluate(model, task, examples, halt=None, max_steps=5, batch_size=2,
                      on_batch=done.append)  # fmt: skip
    assert done == [2, 4, 5]
    assert report.curve == (0.4, 0.6, 0.6, 0.8, 0.8) and report.exact == 0.8
    assert report.histogram == {5: 5} and report.steps_mean == 5
    unknown = evaluate(model, task, examples, known=np.zeros(5, dtype=bool), max_steps=2, halt=None)
    assert unknown.cells is None and unknown.exact == 0.6
    known = np.array([True, True, False, False, False])
    assert evaluate(model, task, examples, known=known, max_steps=2, halt=None).cells == 1.0
    with pytest.raises(recurx.InvalidArgument, match="one example or more"):
        evaluate(model, task, examples.take(slice(0)))


@pytest.mark.parametrize("change", [{"init": "random"}, {"sigma": 0.5}])
def test_noise_does_not_depend_on_the_batch_size(change, task, examples, monkeypatch) -> None:
    """What enters the first step is the same to the bit; forgetting first_sample would show."""
    torch.manual_seed(1)
    model = TRM(TRMConfig.tiny(task.vocab_size, task.seq_len, H_cycles=1, L_cycles=1)).eval()
    seen: list[torch.Tensor] = []
    model.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]["z_H"].clone()))

    def states(batch_size: int) -> torch.Tensor:
        seen.clear()
        evaluate(model, task, examples, batch_size=batch_size, max_steps=1, halt=None, rollouts=3,
                 **change)  # fmt: skip
        return torch.cat(seen)

    assert torch.equal(states(5), states(2))
    module = sys.modules[evaluate.__module__]
    solve = module.solve
    forgetful = lambda *a, first_sample, **k: solve(*a, **k)  # noqa: E731
    monkeypatch.setattr(module, "solve", forgetful)
    assert not torch.equal(states(5), states(2))


# ---- pictures ----------------------------------------------------------------------------------

POINTS = [Point(r, s, 0.5 + 0.1 * r, s, 0.001 * r * s) for r in (1, 2) for s in (1, 2, 4)]
ROWS = [
    Exit("always 16 steps", {}, 0.9, 16, 8.0, 1.0), Exit("q > 0", {}, 0.95, 1, 1.0, 8.0)
]  # fmt: skip


def test_pictures_are_drawn_and_say_what_they_show(tmp_path) -> None:
    pytest.importorskip("matplotlib")

    def curve(name: str, points: list[Point], trained: int) -> str:
        path = tmp_path / name
        pictures.write(path, "a title", lambda f: pictures.draw_budgets(points, f, trained))
        return path.read_text() if path.suffix == ".svg" else ""

    drawn = curve("curve.svg", POINTS, 2)
    for text in (
        "a title",
        "1 rollout",
        "2 rollouts",
        "milliseconds a puzzle",
        "steps in training",
    ):
        assert text in drawn
    assert curve("again.svg", POINTS, 2) == drawn
    one = curve("one.svg", POINTS[:3], 8)
    assert "1 rollout" not in one and "steps in training" not in one
    rows = [asdict(row) for row in ROWS]
    pictures.write(
        tmp_path / "exits.svg", "another", lambda f: pictures.draw_exits(rows, f.add_subplot())
    )
    exits = (tmp_path / "exits.svg").read_text()
    assert "q &gt; 0: 95.0%, 8.0x" in exits and "share of always 16 steps" in exits


def test_a_bad_picture_is_refused_before_anything_is_measured(tmp_path) -> None:
    with pytest.raises(recurx.InvalidArgument, match=r"\.png or \.svg"):
        pictures.check_path(tmp_path / "curve.pdf")
    with pytest.raises(recurx.InvalidArgument, match="no folder"):
        pictures.check_path(tmp_path / "nowhere" / "curve.png")
