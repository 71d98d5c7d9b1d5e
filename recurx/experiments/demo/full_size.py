"""The demo's second half: engine by engine, the same answers, and the time side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from recurx.cli.output import table
from recurx.errors import InvalidArgument
from recurx.experiments.answering.checkpoints import open_checkpoint
from recurx.experiments.demo import engines
from recurx.experiments.demo.learn import Trained, heading
from recurx.experiments.demo.options import Options
from recurx.experiments.printed import side_by_side
from recurx.experiments.tasks import Sudoku
from recurx.experiments.tasks.sudoku import files
from recurx.experiments.tasks.sudoku.layout import to_boards, to_tokens
from recurx.models import TRM, RecursiveModel, TRMConfig

# Three puzzles that newspapers and encyclopedias print again and again, from easy to notorious.
PUZZLES = (
    "530070000600195000098000060800060003400803001700020006060000280000419005000080079",
    "800000000003600000070090200050007000000045700000100030001000068008500010090000400",
    "000000039000001005003050800008090006070002000100400000009080050020000600400700000",
)
MOST_PUZZLES = 4  # of a file: one supervision step of eager bf16 may take a second a puzzle
REPEATS = 5
SLOW_SECONDS = 2.0  # of eager PyTorch for one puzzle
RACE_SECONDS = 25.0  # of timed rounds: slow engines get fewer of them
LARGE_SECONDS = 60.0  # the same at full size, where torch.compile alone may take half of it


def read_puzzles(asked: Options) -> tuple[NDArray[np.int64], str]:
    """Boards [N, 81] from the command line, a file, or this file, and where they come from."""
    layout = Sudoku().layout
    if asked.puzzle and asked.puzzles:
        raise InvalidArgument("give puzzles as arguments or with --puzzles, not both.")
    if asked.puzzles:
        read = files.read(asked.puzzles, layout, MOST_PUZZLES)
        return read.puzzles, f"the first {len(read)} of {asked.puzzles}"
    lines = asked.puzzle or PUZZLES
    boards = files.parse_boards(lines, layout)
    return boards, "yours" if asked.puzzle else "well-known ones"


def race_trained(console: Console, trained: Trained) -> list[dict[str, Any]]:
    """The trained tiny model on every engine: the answers must be the same, cell by cell."""
    heading(console, 4, "The trained model, engine by engine")
    inputs = torch.from_numpy(trained.examples.inputs[:256]).to(trained.trainer.device)
    lanes = [engines.eager(trained.model, inputs), *engines.engines(trained.model, inputs)]
    engines.race(lanes, REPEATS, RACE_SECONDS)
    return _show(console, f"one supervision step of {len(inputs)} 6x6 puzzles", lanes, lanes[0])


def race(
    console: Console,
    puzzles: NDArray[np.int64],
    source: str,
    asked: Options,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Full-size TRM on 9x9 puzzles on every engine."""
    heading(console, 5, "Full-size TRM on 9x9 Sudoku, engine by engine")
    model = _full_size(console, asked, device)
    inputs = torch.from_numpy(to_tokens(puzzles)).to(device)
    config, task = model.config, Sudoku()
    console.print(
        f"T={config.tokens} tokens, D={config.hidden_size}, {len(model.inner.schedule)} net calls "
        f"a supervision step; puzzles: {source}"
    )
    console.print(side_by_side([task.text(row) for row in to_tokens(puzzles)[:3]]))
    lanes = _lanes(model, inputs, not asked.no_compile)
    engines.race(lanes, REPEATS, LARGE_SECONDS)
    count = len(lanes[0].logits) if lanes[0].logits is not None else len(puzzles)
    title = f"one supervision step of {count} 9x9 puzzle{'s' if count > 1 else ''}"
    rows = _show(console, title, lanes, next(lane for lane in lanes if lane.dtype == "float32"))
    if asked.checkpoint:
        _show_answers(console, model, task, inputs, puzzles)
    return rows


def _lanes(model: RecursiveModel, inputs: torch.Tensor, compiled: bool) -> list[engines.Lane]:
    """Eager PyTorch in the model's dtype and in fp32, torch.compile of the faster of the two, and
    recurx's engines. One puzzle only where eager PyTorch is slow."""
    models = [model]
    if model.config.forward_dtype != "float32":
        models.append(_in_fp32(model))
    probes = [engines.eager(each, inputs[:1]) for each in models]
    for lane in probes:
        lane.first = lane.sample()
    if len(inputs) > 1 and max(lane.first for lane in probes) < SLOW_SECONDS:
        lanes = [engines.eager(each, inputs) for each in models]
    else:
        lanes, inputs = probes, inputs[:1]
    lanes += [lane for each in models for lane in engines.engines(each, inputs)]
    if compiled:  # last: on a slow machine it may be left out
        faster = min(range(len(models)), key=lambda index: probes[index].first)
        lanes.append(engines.compiled(models[faster], inputs))
    return lanes


def _full_size(console: Console, asked: Options, device: torch.device) -> RecursiveModel:
    if asked.checkpoint:
        model, _, loaded = open_checkpoint(asked.checkpoint, "sudoku", device, asked.backend)
        console.print(f"Weights: {loaded.path}", soft_wrap=True)
        return model
    console.print(
        "These weights are UNTRAINED (random): the answers mean nothing, only that the engines "
        "agree on\nthem and how long they take. Trained weights: --checkpoint FILE."
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        return TRM(TRMConfig.sudoku_att()).eval().to(device)


def _in_fp32(model: RecursiveModel) -> RecursiveModel:
    """The same weights with fp32 activations."""
    with torch.random.fork_rng(devices=[]):
        exact = type(model)(model.config.replace(forward_dtype="float32"))
    exact.load_state_dict(model.state_dict())
    return exact.eval().to(next(model.parameters()).device)


def _show(
    console: Console, title: str, lanes: list[engines.Lane], exact: engines.Lane
) -> list[dict[str, Any]]:
    """The table: speed against the fastest PyTorch, answers against `exact` (eager in fp32)."""
    rows, values = [], []
    best = min(x.median for x in lanes if x.seconds and not x.name.startswith("recurx"))
    for lane in lanes:
        value: dict[str, Any] = {"engine": lane.name, "dtype": lane.dtype}
        shown = ["-", "-", "-", "-"]
        if lane.seconds:
            same, error = _compare(lane, exact)
            value |= {"seconds": lane.median, "same_cells": same, "error": error}
            shown[:2] = f"{1000 * lane.median:.1f} ms", f"{best / lane.median:.2f}x"
            if same is not None:
                shown[2:] = f"{same:.1%}", f"{error:.0e}"
        else:
            value["refused"] = lane.refused
        rows.append([lane.name, lane.dtype, *shown])
        values.append(value)
    columns = ["engine", "dtype", "median time", "speed", "same cells", "error of logits"]
    console.print(table(title, columns, rows))
    console.print(
        "Same cells and error (root mean square, relative): against eager PyTorch in fp32."
    )
    for lane in lanes:
        if lane.refused:
            console.print(f"{lane.name}: {lane.refused}", soft_wrap=True)
    return values


def _compare(lane: engines.Lane, exact: engines.Lane) -> tuple[float, float] | tuple[None, None]:
    """Share of equal answers, and the relative error of the logits; None if `exact` did not run."""
    if lane.logits is None or exact.logits is None:
        return None, None
    same = (lane.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean()
    error = (lane.logits.float() - exact.logits).norm() / exact.logits.norm()
    return float(same), float(error)


def _show_answers(
    console: Console,
    model: RecursiveModel,
    task: Sudoku,
    inputs: torch.Tensor,
    puzzles: NDArray[np.int64],
) -> None:
    import recurx

    answers = recurx.solve(model, {"inputs": inputs})
    predictions = answers.predictions.cpu().numpy()
    right = task.check(to_tokens(puzzles), predictions)
    shown = side_by_side([task.text(row) for row in to_tokens(to_boards(predictions))[:3]])
    console.print(shown)
    console.print(f"{int(right.sum())} of {len(right)} solved in {answers.steps.tolist()} steps.")
