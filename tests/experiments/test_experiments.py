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
from recurx.experiments import compose, looks, sort, windows
from recurx.experiments import session as sessions
from recurx.experiments.session import Plan, Session
from recurx.train import Trainer, preset

TINY = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 2}
TOY_SORT = [
    "experiment", "sort", "--task", "sort:length=4,values=3", "--supervision", "2",
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
    with pytest.raises(InvalidArgument, match="compose, exit, sort, windows"):
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


# ---- one look against many: sort, compose --------------------------------------------------------


@pytest.mark.slow
def test_sort_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([*TOY_SORT, "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert (
        result["settings"]["supervision"] == 2 and result["machine"]["torch"] == torch.__version__
    )
    rows = {row["kind"]: row for row in result["rows"]}
    assert list(rows) == ["recursive", "one look", "deep"]
    recursive, one, deep = rows.values()
    assert all(row["calls"] == 1 for row in rows.values())
    assert one["parameters"] == recursive["parameters"] >= deep["parameters"]
    assert deep["layers"] == 2 and deep["width"] < one["width"]
    assert [len(row["curve"]) for row in rows.values()] == [3, 1, 1]
    assert [row["trained_steps"] for row in rows.values()] == [2, 1, 1]
    assert all(net["seconds"] >= 0.3 and net["ended"] == "stopped" for net in result["nets"])
    assert not result["holds"] and "did NOT show" in printed
    svg = (tmp_path / "plot.svg").read_text()
    assert "supervision steps" in svg and (tmp_path / "plot.png").stat().st_size > 1000

    again = tmp_path / "plot.svg"
    again.unlink()
    assert main(["experiment", "sort", "--redraw", "--out", str(tmp_path)]) == 0
    assert again.read_text() == svg


def test_one_look_is_one_call(monkeypatch):
    """Calls counted as they run. Left as published (the planted failure), a step has two."""
    arguments = arguments_of(sort, "--task", "sort:length=4,values=3", "--batch-size", "4")
    original, ran = reference.run, []

    def counting(schedule, nets, x, states, cos_sin, start, stop):
        ran.append(stop - start)
        return original(schedule, nets, x, states, cos_sin, start, stop)

    monkeypatch.setattr(reference, "run", counting)
    for kind in (looks.RECURSIVE, looks.ONE_LOOK, looks.DEEP):
        trainer = Trainer(looks.net_config(arguments, kind, 0), backend="eager")
        looks.one_call_a_step(trainer)
        ran.clear()
        trainer.train_step()
        assert bool(trainer.carry.halted.all()) == (kind != looks.RECURSIVE)
        trainer.train_step()
        assert ran == [1, 1]
        assert trainer.averaged().inner.schedule.name == "one call", "tested as it was trained"
    ran.clear()
    Trainer(looks.net_config(arguments, looks.ONE_LOOK, 0), backend="eager").train_step()
    assert ran == [2]


@pytest.mark.parametrize("module", [sort, compose])
def test_nets_have_equal_parameters(module):
    arguments = arguments_of(module)
    kinds = (looks.RECURSIVE, looks.ONE_LOOK, looks.DEEP)
    configs = [looks.net_config(arguments, kind, 0) for kind in kinds]
    recursive, one, deep = map(looks.parameters, configs)
    assert recursive == one and 0.8 * one < deep <= one
    assert configs[2].model_config().L_layers == 4


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgument, match="--layers"):
        looks.net_config(arguments_of(sort, "--layers", "4000"), looks.DEEP, 0)


def test_looks_hold_by_their_rule():
    def holds(*exact):
        kinds = (looks.RECURSIVE, looks.ONE_LOOK, looks.DEEP)
        rows = [
            {"kind": kind, "exact": {"mean": e}, "curve": [e / 2, e], "layers": 4,
             "trained_steps": 2}
            for kind, e in zip(kinds, exact, strict=True)
        ]  # fmt: skip
        return looks._verdict(rows)["holds"]

    assert holds(0.96, 0.1, 0.5)
    assert not holds(0.94, 0.1, 0.1)
    assert not holds(0.96, 0.3, 0.1)


@pytest.mark.slow
def test_many_looks_learn_what_one_look_does_not(tmp_path):
    """The claim itself, on words so short that it takes seconds."""
    arguments = arguments_of(
        compose, "--task", "compose:degree=3,length=4", "--supervision", "4", "--batch-size", "32"
    )
    exact = {}
    for kind in (looks.RECURSIVE, looks.ONE_LOOK):
        plan = Plan(steps=400, eval_every=400, eval_count=200,
                    max_steps=4 if kind == looks.RECURSIVE else 1)  # fmt: skip
        record = make_session(tmp_path).net(
            kind, looks.net_config(arguments, kind, 0), plan, lambda trainer: {},
            prepare=looks.one_call_a_step,
        )  # fmt: skip
        exact[kind] = record["learning"][-1]["exact"]
    assert exact[looks.RECURSIVE] > 0.6 and exact[looks.ONE_LOOK] < 0.3


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
