"""`experiment hybrid` with a fake encoder, at sizes of seconds."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
from pathlib import Path

import pytest
import torch
from fakes import FakeEncoder, FakeTokenizer
from rich.console import Console

from recurx.cli import options
from recurx.experiments import behind_text as hybrid
from recurx.experiments import one_look
from recurx.experiments.hybrid import HybridTrainer, PassageBank, task_bank
from recurx.experiments.session import Session

ORDER = ["--task", "order:people=3,names=8,wordings=2,fewest=2", "--calls", "2"]
TRADES = ["--task", "trades:trades=2,people=3"]
TOY = ["--supervision", "2", "--test-steps", "3", "--layers", "2", "--batch-size", "8",
       "--count", "30"]  # fmt: skip
KINDS = (one_look.RECURSIVE, one_look.ONE_LOOK, one_look.DEEP)


def arguments(task: list[str]) -> hybrid.Options:
    parser = argparse.ArgumentParser()
    options.add(parser, hybrid.Options)
    words = [*task, *TOY, "--seeds", "1", "--time-budget", "0.3"]
    return options.read(parser.parse_args(words), hybrid.Options)


def toy_bank(asked: hybrid.Options) -> PassageBank:
    torch.manual_seed(1)
    return task_bank(asked.task, PassageBank(FakeEncoder(), FakeTokenizer(), 5))


@pytest.mark.parametrize(
    ("task", "passages", "lengths", "calls"),
    [(ORDER, 8 + 2 * 64 + 1, {"2", "3"}, 2), (TRADES, 3 + 3 + 3 * 6, {"3"}, 1)],
)
def test_it_trains_measures_tells_and_draws(
    tmp_path: Path, task: list[str], passages: int, lengths: set[str], calls: int
) -> None:
    pytest.importorskip("matplotlib")  # in dev
    from matplotlib.figure import Figure

    asked = arguments(task)
    session = Session(tmp_path, Console(file=io.StringIO()))
    result = hybrid.measure(session, asked, toy_bank(asked))
    recursive, once, deep = result["rows"]
    assert recursive["parameters"] == once["parameters"] >= deep["parameters"]
    assert [row["calls"] for row in result["rows"]] == [calls, 1, 1]
    assert [row["trained_steps"] for row in result["rows"]] == [2, 1, 1]
    assert [len(row["curve"]) for row in result["rows"]] == [3, 1, 1]
    assert result["encoder"]["passages"] == passages
    for net in result["nets"]:
        assert set(net["by_length"]) == lengths
        assert all(len(curve) == len(net["curve"]) for curve in net["by_length"].values())
    result["settings"] = dataclasses.asdict(asked)
    for _, columns, rows in hybrid.tables(result):
        assert rows and all(len(row) == len(columns) for row in rows)
    figure = Figure(figsize=hybrid.SIZE)
    hybrid.draw(result, figure)
    assert [len(axes.lines) > 0 for axes in figure.axes] == [True, True]


def test_the_final_test_is_of_the_longest_chains() -> None:
    asked = arguments(ORDER)
    make = functools.partial(HybridTrainer, bank=toy_bank(asked))
    trainer = make(one_look.net_config(asked, one_look.RECURSIVE, 0, make))
    held = trainer.held_out(40)
    assert len(held) == 40 and (held.answers > 0).all()
    assert trainer.task.held_out(held).all()


def test_all_kinds_read_the_same_and_the_first_two_start_from_the_same_bits() -> None:
    asked = arguments(TRADES)
    make = functools.partial(HybridTrainer, bank=toy_bank(asked))
    recursive, once, deep = (
        make(one_look.net_config(asked, kind, 0, make)).model for kind in KINDS
    )  # fmt: skip
    for (name, one), two in zip(
        recursive.state_dict().items(), once.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    assert deep.config.L_layers == 2 and deep.config.hidden_size < once.config.hidden_size
    assert recursive.bank is once.bank is deep.bank
