"""`experiment hybrid` with a fake encoder, at sizes of seconds."""

from __future__ import annotations

import argparse
import functools
import io
from pathlib import Path

import pytest
import torch
from fakes import FakeEncoder, FakeTokenizer
from rich.console import Console

from recurx import reference
from recurx.experiments import hybrid, looks
from recurx.experiments.session import Session
from recurx.hybrid import HybridTrainer, PassageBank, task_bank

TOY = ["--task", "order:people=3,names=8,wordings=2,fewest=2", "--supervision", "2",
       "--test-steps", "3", "--calls", "2", "--layers", "2", "--batch-size", "8",
       "--count", "30"]  # fmt: skip
KINDS = (looks.RECURSIVE, looks.ONE_LOOK, looks.DEEP)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    hybrid.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(TOY)), seeds=1, time_budget=0.3)


def toy_bank() -> PassageBank:
    torch.manual_seed(1)
    return task_bank(arguments().task, PassageBank(FakeEncoder(), FakeTokenizer(), 5))


def test_it_trains_measures_tells_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # in dev
    from matplotlib.figure import Figure

    asked = arguments()
    result = hybrid.measure(Session(tmp_path, Console(file=io.StringIO())), asked, toy_bank())
    recursive, once, deep = result["rows"]
    assert recursive["parameters"] == once["parameters"] >= deep["parameters"]
    assert [row["calls"] for row in result["rows"]] == [2, 1, 1]
    assert [row["trained_steps"] for row in result["rows"]] == [2, 1, 1]
    assert [len(row["curve"]) for row in result["rows"]] == [3, 1, 1]
    assert result["encoder"]["passages"] == 8 + 2 * 64 + 1
    for net in result["nets"]:
        assert set(net["by_length"]) == {"2", "3"}
        assert all(len(curve) == len(net["curve"]) for curve in net["by_length"].values())
    result["settings"] = vars(asked)
    for _, columns, rows in hybrid.tables(result):
        assert rows and all(len(row) == len(columns) for row in rows)
    figure = Figure(figsize=hybrid.SIZE)
    hybrid.draw(result, figure)
    assert [len(axes.lines) > 0 for axes in figure.axes] == [True, True]


def test_the_final_test_is_of_the_longest_chains() -> None:
    trainer = HybridTrainer(hybrid.net_config(HybridTrainer, arguments(), KINDS[0], 0),
                            bank=toy_bank())  # fmt: skip
    held = trainer.held_out(40)
    assert len(held) == 40 and (held.answers > 0).all()
    assert trainer.task.held_out(held).all()


def test_kinds_differ_in_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls counted as they run; the first two kinds start from the same bits."""
    make = functools.partial(HybridTrainer, bank=toy_bank(), backend="eager")
    original, ran = reference.run, []

    def counting(schedule, nets, x, states, cos_sin, start, stop):  # type: ignore[no-untyped-def]
        ran.append(stop - start)
        return original(schedule, nets, x, states, cos_sin, start, stop)

    monkeypatch.setattr(reference, "run", counting)
    models, layers = [], []
    for kind in KINDS:
        trainer = make(hybrid.net_config(make, arguments(), kind, 0))
        hybrid.plain_calls(trainer)
        models.append({name: t.clone() for name, t in trainer.model.state_dict().items()})
        layers.append(trainer.model.config.L_layers)
        trainer.train_step()
        assert bool(trainer.carry.halted.all()) == (kind != looks.RECURSIVE)
    assert ran == [2, 1, 1] and layers == [1, 1, 2]
    for (name, one), two in zip(models[0].items(), models[1].values(), strict=True):
        assert torch.equal(one, two), name
