"""`experiment windows` at sizes of seconds: memory, gradients, and the verdict by hand."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest
import torch
from toy_nets import TASK, arguments_of, tiny

from recurx.commands import main
from recurx.experiments import session as sessions
from recurx.experiments import windows
from recurx.train import Trainer

TOY_WINDOWS = [
    "experiment", "windows", "--task", TASK, "--steps", "6", "--l-cycles", "3",
    "--supervision", "2", "--batch-size", "8", "--count", "20", "--seeds", "2",
]  # fmt: skip


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
    """Each low call keeps the same; what is left is that of embedding, heads and loss."""
    kept = [windows.kept_bytes(tiny(grad_window=w, L_cycles=4)) for w in (1, 2, 3, 4)]
    one, two, three, four = kept
    assert three - two == four - three > 0
    batch, tokens, width = 8, 4, 16
    assert three - two >= 4 * batch * tokens * width, "at least the input of a call, in fp32"
    # The high call also keeps a value a token once its input has a gradient.
    assert 0 <= (two - one) - (three - two) <= 4 * batch * tokens


def test_windows_differ_in_the_gradient_alone():
    """One forward, other gradients: the planted failure is a window that the trainer ignores."""
    arguments = arguments_of(windows, "--task", TASK, "--batch-size", "8")
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


@pytest.mark.parametrize(("window", "reached"), [(1, False), (2, True)])
def test_the_last_call_alone_does_not_reach_the_input(window, reached):
    trainer = Trainer(tiny(grad_window=window, L_cycles=3))
    trainer.train_step()
    gradient = trainer.model.inner.embed_tokens.embedding_weight.grad
    assert (gradient is not None and bool(gradient.any())) == reached
