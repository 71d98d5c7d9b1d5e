"""`python -m recurx experiment`: the framework and each experiment, at sizes of seconds."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from recurx import experiments, plotting, reference
from recurx.cli import main
from recurx.errors import InvalidArgument
from recurx.experiments import session as sessions
from recurx.experiments import sort, windows
from recurx.experiments.session import Plan, Session
from recurx.train import Trainer, preset

TINY = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 2}
TOY_SORT = [
    "experiment", "sort", "--length", "4", "--values", "3", "--supervision", "2",
    "--test-steps", "3", "--layers", "2", "--batch-size", "8", "--count", "20",
    "--time-budget", "0.3",
]  # fmt: skip
TOY_WINDOWS = [
    "experiment", "windows", "--task", "sort:length=4,values=3", "--steps", "6", "--l-cycles", "3",
    "--supervision", "2", "--batch-size", "8", "--count", "20", "--seeds", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads; later tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments_of(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def make_session(folder: Path) -> Session:
    return Session(folder, Console(file=open("/dev/null", "w")))


def tiny(seed: int = 0, **model):
    task = "sort:length=4,values=3"
    return preset("tiny-mlp", task, seed=seed, batch_size=8, model={**TINY, **model})


# ---- the framework -------------------------------------------------------------------------------


def test_every_experiment_has_what_the_command_needs():
    for name in experiments.EXPERIMENTS:
        module = experiments.load(name)
        assert module.CLAIM.endswith(".") and module.SEEDS >= 1 and module.SECONDS > 0
        assert all(map(callable, (module.measure, module.tables, module.draw)))
    with pytest.raises(InvalidArgument, match="sort, windows"):
        experiments.load("chess")


def test_a_finished_net_is_kept_and_a_changed_one_trained_again(tmp_path):
    measured = []

    def measure(trainer):
        measured.append(trainer.step)
        return {"answer": 42}

    plan = Plan(steps=3, eval_every=2, eval_count=8, max_steps=2)
    first = make_session(tmp_path).net("one", tiny(), plan, measure)
    assert first["steps"] == 3 and first["ended"] == "steps" and first["answer"] == 42
    assert [point["step"] for point in first["learning"]] == [2, 3]
    assert make_session(tmp_path).net("one", tiny(), plan, measure) == first
    assert measured == [3], "the second time it was read"

    longer = Plan(steps=4, eval_every=2, eval_count=8, max_steps=2)
    assert make_session(tmp_path).net("one", tiny(), longer, measure)["steps"] == 4
    make_session(tmp_path).net("one", tiny(), longer, measure, prepare=sort.look_once)
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
    plan = Plan(seconds=5, eval_every=1, eval_count=8, max_steps=2)
    record = session.net("one", tiny(), plan, lambda trainer: {})
    assert record["steps"] == 5 and record["seconds"] == 5


def test_until_ends_a_net(tmp_path):
    plan = Plan(steps=50, until=0.0, eval_every=4, eval_count=8, max_steps=2)
    record = make_session(tmp_path).net("one", tiny(), plan, lambda trainer: {})
    assert record["steps"] == 4 and record["ended"] == "stopped"


def test_interrupted_it_keeps_finished_nets_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", lambda *a, **k: "interrupted")
    with pytest.raises(KeyboardInterrupt):
        make_session(tmp_path).net("one", tiny(), Plan(steps=2), lambda trainer: {})
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
    for page in plotting.PAGES.values():
        assert min(plotting.contrast(colour, page) for colour in plotting.COLOURS) > 3


def test_without_matplotlib_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TOY_SORT, "--out", str(tmp_path)]) == 2
    assert "recurx[plot]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_redraw_needs_a_result(tmp_path, capsys):
    assert main(["experiment", "sort", "--redraw", "--no-plot", "--out", str(tmp_path)]) == 2
    assert "run the experiment first" in capsys.readouterr().err


# ---- sort ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sort_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*TOY_SORT, "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert result["settings"]["length"] == 4 and result["machine"]["torch"] == torch.__version__
    rows = {row["kind"]: row for row in result["rows"]}
    assert list(rows) == ["recursive", "one call", "deep"]
    recursive, one, deep = rows.values()
    assert (recursive["calls"], one["calls"], deep["calls"]) == (2, 1, 1)
    assert one["parameters"] == recursive["parameters"] >= deep["parameters"]
    assert deep["layers"] == 2 and deep["width"] < one["width"]
    assert [len(row["curve"]) for row in rows.values()] == [3, 1, 1]
    assert all(net["seconds"] >= 0.3 and net["ended"] == "stopped" for net in result["nets"])
    assert not result["holds"] and "did NOT show" in printed
    svg = (tmp_path / "plot.svg").read_text()
    assert "supervision steps" in svg and (tmp_path / "plot.png").stat().st_size > 1000

    again = tmp_path / "plot.svg"
    again.unlink()
    assert main(["experiment", "sort", "--redraw", "--out", str(tmp_path)]) == 0
    assert again.read_text() == svg


def test_one_look_is_one_call(monkeypatch):
    """Net calls as they run, the recursive net's beside them; and no second supervision step."""
    arguments = arguments_of(sort, "--length", "4", "--values", "3", "--batch-size", "4")
    original, ran = reference.run, []

    def counting(schedule, nets, x, states, cos_sin, start, stop):
        ran.append(stop - start)
        return original(schedule, nets, x, states, cos_sin, start, stop)

    monkeypatch.setattr(reference, "run", counting)
    for kind, calls in ((sort.RECURSIVE, 2), (sort.ONE_CALL, 1), (sort.DEEP, 1)):
        trainer = Trainer(sort.net_config(arguments, kind, 0), backend="eager")
        if kind != sort.RECURSIVE:
            sort.look_once(trainer)
        ran.clear()
        trainer.train_step()
        assert bool(trainer.carry.halted.all()) == (kind != sort.RECURSIVE)
        trainer.train_step()
        assert ran == [calls, calls]


def test_sort_holds_by_its_rule():
    arguments = arguments_of(sort)

    def row(kind, exact):
        return {
            "kind": kind, "exact": {"mean": exact}, "curve": [exact / 2, exact], "layers": 4,
            "trained_steps": 2,
        }  # fmt: skip

    def holds(*exact):
        kinds = (sort.RECURSIVE, sort.ONE_CALL, sort.DEEP)
        rows = [row(kind, e) for kind, e in zip(kinds, exact, strict=True)]
        return sort._verdict(rows, arguments)["holds"]

    assert holds(0.96, 0.1, 0.1)
    assert not holds(0.94, 0.1, 0.1)
    assert not holds(0.96, 0.3, 0.1)


# ---- windows -------------------------------------------------------------------------------------


def test_windows_command(tmp_path, capsys):
    assert main([*TOY_WINDOWS, "--out", str(tmp_path), "--no-plot"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert [(row["window"], row["calls"]) for row in rows] == [
        ("1", 1), ("1-step", 2), ("cycle", 4), ("full", 8),
    ]  # fmt: skip
    kept = [row["kept_bytes"] for row in rows]
    assert all(one < other for one, other in itertools.pairwise(kept)), "memory grows with windows"
    assert len({net["parameters"] for net in result["nets"]}) == 1
    assert all(net["steps"] == 6 for net in result["nets"]) and len(result["nets"]) == 8
    assert all(len(row["exact"]["values"]) == 2 for row in rows)
    assert "kept MiB" in capsys.readouterr().out


def test_kept_bytes_are_those_of_the_window():
    """Each call keeps the same; what is left is that of embedding, heads and loss."""
    one, two, three = (windows.kept_bytes(tiny(grad_window=w, L_cycles=3)) for w in (1, 2, 3))
    assert two - one == three - two > 0
    batch, tokens, width = 8, 4, 16
    assert two - one >= 4 * batch * tokens * width, "at least the input of a call, in fp32"


def test_windows_differ_in_the_gradient_alone():
    """One forward, other gradients: the planted failure is a window that the trainer ignores."""
    arguments = arguments_of(windows, "--task", "sort:length=4,values=3", "--batch-size", "8")
    losses, moments = [], []
    for name in (windows.ONE_STEP, windows.CYCLE):
        trainer = Trainer(windows.net_config(arguments, name, 0))
        losses.append(trainer.train_step().loss)
        weight = trainer.model.inner.L_level.layers[0].mlp.gate_up_proj.weight
        moments.append(trainer.optimizer.state[weight]["exp_avg"].clone())
    assert losses[0] == losses[1]
    assert not torch.allclose(moments[0], moments[1], rtol=0.01)


def test_windows_hold_by_their_rule():
    arguments = argparse.Namespace(steps=6)

    def holds(one, cycle, steps=6):
        rows = [
            {"window": name, "exact": sessions.spread(exact), "kept_bytes": 1, "steps": steps,
             "step_ms": {"mean": 1.0}}
            for name, exact in ((windows.ONE_STEP, one), (windows.CYCLE, cycle))
        ]  # fmt: skip
        return windows._verdict(rows, arguments)["holds"]

    assert holds([0.1, 0.2], [0.5, 0.6])
    assert not holds([0.1, 0.7], [0.5, 0.6]), "one seed says the opposite"
    assert not holds([0.1, 0.4], [0.2, 0.45]), "less than the spread"
    assert not holds([0.1, 0.2], [0.5, 0.6], steps=5), "not all were trained alike"


@pytest.mark.parametrize("word", ["0", "all", "-1"])
def test_a_bad_window_is_named(word, capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "windows", "--windows", word])
    assert "1-step, cycle, full or a number of calls" in capsys.readouterr().err


def test_windows_need_the_two_of_the_claim(tmp_path, capsys):
    words = ["experiment", "windows", "--no-plot", "--out", str(tmp_path), "--windows", "cycle"]
    assert main(words) == 2
    assert "1-step is missing" in capsys.readouterr().err
