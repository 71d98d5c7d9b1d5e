"""`python -m recurx experiment`: what all experiments share."""

from __future__ import annotations

import itertools
import sys

import pytest
from toy_nets import make_session, tiny

from recurx import experiments
from recurx.bench import drawing
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.experiments import session as sessions
from recurx.experiments.session import Course
from recurx.train import Trainer


def test_every_experiment_has_what_the_command_needs():
    for name in experiments.EXPERIMENTS:
        module = experiments.load(name)
        assert (
            module.CLAIM.endswith(".")
            and module.Options.seeds >= 1
            and module.Options.time_budget > 0
        )
        assert all(map(callable, (module.measure, module.tables, module.draw)))
    with pytest.raises(InvalidArgument, match="compose, exit, hybrid, sort, variants, windows"):
        experiments.load("chess")


def test_a_finished_net_is_kept_and_a_changed_one_trained_again(tmp_path):
    measured = []

    def measure(trainer):
        measured.append(trainer.step)
        return {"answer": 42}

    course = Course(steps=3, eval_every=2, eval_count=8, max_steps=2)
    first = make_session(tmp_path).net("one", tiny(), course, measure)
    assert first["steps"] == 3 and first["ended"] == "steps" and first["answer"] == 42
    assert [point["step"] for point in first["learning"]] == [2, 3]
    assert make_session(tmp_path).net("one", tiny(), course, measure) == first
    assert measured == [3], "the second time it was read"

    longer = Course(steps=4, eval_every=2, eval_count=8, max_steps=2)
    assert make_session(tmp_path).net("one", tiny(), longer, measure)["steps"] == 4
    make_session(tmp_path).net("one", tiny(), longer, measure, prepare=lambda trainer: None)
    assert measured == [3, 4, 4], "other settings, other net"


def test_budget_counts_training_alone(tmp_path, monkeypatch):
    """A clock that jumps while the session looks at the net must not end its training."""
    ticks = itertools.count()
    session = make_session(tmp_path)
    monkeypatch.setattr(session, "clock", lambda: float(next(ticks)))
    report = sessions.look

    def slow_look(*arguments):
        for _ in range(1000):
            next(ticks)
        return report(*arguments)

    monkeypatch.setattr(sessions, "look", slow_look)
    course = Course(seconds=5, eval_every=1, eval_count=8, max_steps=2)
    record = session.net("one", tiny(), course, lambda trainer: {})
    assert record["steps"] == 5 and record["seconds"] == 5


def test_until_ends_a_net(tmp_path):
    course = Course(steps=50, until=0.0, eval_every=4, eval_count=8, max_steps=2)
    record = make_session(tmp_path).net("one", tiny(), course, lambda trainer: {})
    assert record["steps"] == 4 and record["ended"] == "stopped"


def test_interrupted_it_keeps_finished_nets_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda *a, **k: "interrupted")
    with pytest.raises(KeyboardInterrupt):
        make_session(tmp_path).net("one", tiny(), Course(steps=2), lambda trainer: {})
    assert not list(tmp_path.glob("nets/*"))


def test_json_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    sessions.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        sessions.write_json(path, {"a": {1, 2}})
    assert sessions.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_spread_is_that_of_a_sample():
    found = sessions.spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["deviation"], found["low"], found["high"]) == (2.0, 1.0, 1.0, 3.0)
    assert sessions.spread([1.0])["deviation"] is None


def test_lines_are_readable_on_both_pages():
    for page in drawing.PAGES.values():
        assert min(drawing.contrast(colour, page) for colour in drawing.COLOURS) > 3


def test_without_matplotlib_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["experiment", "sort", "--out", str(tmp_path)]) == 2
    assert "recurx[plot]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_redraw_needs_a_result(tmp_path, capsys):
    assert main(["experiment", "sort", "--redraw", "--no-plot", "--out", str(tmp_path)]) == 2
    assert "run the experiment first" in capsys.readouterr().err
