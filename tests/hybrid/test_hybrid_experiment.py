"""`experiment hybrid` with a fake encoder, at sizes of seconds."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
import torch
from fakes import FakeEncoder, FakeTokenizer
from rich.console import Console

from recurx.experiments import hybrid
from recurx.experiments.session import Session
from recurx.hybrid import HybridTrainer, PassageBank, task_bank

TOY = ["--people", "3", "--names", "8", "--width", "16", "--supervision", "2", "--test-steps", "3",
       "--batch-size", "8", "--count", "30"]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    hybrid.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(TOY)), seeds=1, time_budget=0.3)


def toy_bank() -> PassageBank:
    torch.manual_seed(1)
    bank = PassageBank(FakeEncoder(), FakeTokenizer(), 5)
    return task_bank(hybrid.task_name(arguments()), bank)


def test_it_trains_measures_tells_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # in dev
    from matplotlib.figure import Figure

    asked = arguments()
    session = Session(tmp_path, Console(file=io.StringIO()))
    result = hybrid.measure(session, asked, toy_bank())
    recursive, once = result["rows"]
    assert recursive["parameters"] == once["parameters"]
    assert (recursive["trained_steps"], recursive["calls"]) == (2, 3)
    assert (once["trained_steps"], once["calls"]) == (1, 1)
    assert len(recursive["curve"]) == 3 and len(once["curve"]) == 1
    assert set(recursive["by_people"]) == {"2", "3"} and result["encoder"]["passages"] == 137
    result["settings"] = vars(asked)
    for _, columns, rows in hybrid.tables(result):
        assert rows and all(len(row) == len(columns) for row in rows)
    figure = Figure(figsize=hybrid.SIZE)
    hybrid.draw(result, figure)
    assert [len(axes.lines) > 0 for axes in figure.axes] == [True, True]


def test_nothing_but_the_steps_differs_between_the_two_kinds() -> None:
    bank = toy_bank()
    configs = [hybrid.net_config(arguments(), k, 0) for k in (hybrid.RECURSIVE, hybrid.ONE_LOOK)]
    models = [HybridTrainer(config, bank=bank).model for config in configs]
    for (name, one), two in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    differ = {
        key for key, value in vars(models[0].config).items() if vars(models[1].config)[key] != value
    }
    assert differ == {"halt_max_steps"}


@pytest.mark.parametrize(
    ("most", "least", "holds"), [(0.95, 0.1, True), (0.85, 0.1, False), (0.95, 0.3, False)]
)
def test_the_claim_holds_by_its_rule_alone(most: float, least: float, holds: bool) -> None:
    def row(exact: float) -> dict:
        return {"curve": [exact], "trained_steps": 1, "exact": {"mean": exact},
                "by_people": {"2": exact}}  # fmt: skip

    assert hybrid._verdict([row(most), row(least)])["holds"] is holds
