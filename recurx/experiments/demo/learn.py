"""The demo's first half: a tiny model learns 6x6 Sudoku, and refines its answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

import recurx
from recurx.cli.output import table
from recurx.experiments.answering.progress import TrainingDisplay
from recurx.experiments.demo.options import Options
from recurx.experiments.printed import curve
from recurx.experiments.tasks.sudoku import Sudoku
from recurx.experiments.tasks.sudoku.layout import to_boards
from recurx.models import RecursiveModel
from recurx.tasks import Examples
from recurx.tasks.base import Tokens
from recurx.train import Report, Trainer, evaluate, preset

# 12 clues of 36; boards with every clue needed have 10, and take this net twice as long to learn.
TASK = "sudoku-6x6:clues=12"
# Two low calls, one high: what one supervision step leaves open, the next ones have to settle.
MODEL = {
    "H_cycles": 1, "L_cycles": 2, "halt_max_steps": 8,
    "halt_exploration_prob": 0.3,  # at 0.1 few samples go deep, and late steps unlearn (97 -> 91 %)
}  # fmt: skip
TARGET = 0.97  # of EVAL_COUNT puzzles; at 90 %, steps earlier, q is not sure enough to halt early
EVAL_EVERY, EVAL_COUNT, FINAL_COUNT = 100, 256, 1024
HALT_ABOVE = 2.0  # logit of being right, 7 to 1; training halts at even odds
MOST_BOARDS = 6  # beside each other in 100 columns


@dataclass(frozen=True)
class Trained:
    """The trained model and puzzles that it never saw."""

    trainer: Trainer
    model: RecursiveModel
    examples: Examples


def train(console: Console, asked: Options, device: torch.device) -> Trained | None:
    """Train until TARGET or the time budget; None if interrupted (the checkpoint is written)."""
    heading(console, 1, "A tiny recursive model learns 6x6 Sudoku")
    config = preset("tiny-mlp", TASK, seed=asked.seed, model=MODEL)
    trainer = Trainer(config, asked.out, device=device, backend=asked.backend)
    examples = trainer.held_out(EVAL_COUNT + FINAL_COUNT)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"{parameters:,} parameters, {len(trainer.model.inner.schedule)} net calls a supervision "
        f"step. It is tested on puzzles\nit never saw: {trainer.task.held_out_rule}."
    )
    display = TrainingDisplay(
        console, trainer, EVAL_EVERY, EVAL_COUNT, TARGET, halt="q", halt_above=HALT_ABOVE
    )
    with display.bar:
        reason = trainer.run(time_budget=asked.time_budget, on_step=display.on_step)
    if reason == "interrupted":
        console.print(
            f"Interrupted at step {trainer.step}. The weights are in {asked.out}; go on with\n"
            f"  python -m recurx train --resume {asked.out}",
            soft_wrap=True,
        )
        return None
    report = display.evaluate()
    console.print(
        f"{report.exact:.1%} of {report.count} held-out puzzles exact after "
        f"{trainer.seconds:.0f} s and {trainer.step} steps."
    )
    rest = examples.take(~_contained(examples, display.examples))
    return Trained(trainer, trainer.averaged(), rest)


def _contained(examples: Examples, other: Examples) -> NDArray[np.bool_]:
    """Which inputs occur in `other`: the test puzzles are not those that ended the training."""
    known = {row.tobytes() for row in other.inputs}
    return np.array([row.tobytes() in known for row in examples.inputs])


def show_filling(console: Console, trained: Trained) -> None:
    """One held-out board after each supervision step."""
    heading(console, 2, "One board, refined step by step")
    task = trained.trainer.task
    assert isinstance(task, Sudoku)
    batch = {"inputs": torch.from_numpy(trained.examples.inputs).to(trained.trainer.device)}
    answers = recurx.solve(trained.model, batch, halt_above=HALT_ABOVE, trace=True)
    assert answers.trace is not None
    trace = answers.trace.cpu().numpy()
    right = np.stack([task.check(trained.examples.inputs, step) for step in trace])
    solved_at = np.where(right[-1], right.argmax(axis=0) + 1, 0)
    # Of the boards that fit on the screen, the one that took the most steps to come right.
    row = int(np.where(solved_at < MOST_BOARDS, solved_at, 0).argmax())
    last = int(solved_at[row]) or MOST_BOARDS - 1
    puzzle, answer = trained.examples.inputs[row], trained.examples.answers[row]
    show_boards(console, task, [puzzle, *trace[:last, row]], answer)


def show_boards(
    console: Console, task: Sudoku, states: list[Tokens], answer: Tokens | None
) -> None:
    """Boards [T] side by side, the puzzle first; wrong cells are red on a terminal.

    Args:
        answer: [T] the known answer, by which cells are wrong; None: the cells whose digit stands
            twice in a row, column or box are.
    """
    boards = [_board(task, state, states[0], answer) for state in states]
    for line in range(len(boards[0])):
        console.print(Text("   ").join(board[line] for board in boards))


def _board(task: Sudoku, tokens: Tokens, puzzle: Tokens, answer: Tokens | None) -> list[Text]:
    """A board of the series, its wrong cells counted below."""
    given, board = to_boards(puzzle) > 0, to_boards(tokens)
    wrong = task.layout.twice(board) if answer is None else tokens != answer
    lines, cell = [], 0
    for line in task.text(tokens).splitlines():
        text = Text()
        for character in line:
            style = ""
            if character.isdigit() or character == ".":
                style = "bold" if given[cell] else "red" if wrong[cell] else "green"
                cell += 1
            text.append(character, style)
        lines.append(text)
    blanks = int((board == 0).sum())
    solved = bool(task.check(puzzle[None], tokens[None])[0])
    text = "solved" if solved else f"{blanks} blank" if blanks else f"{int(wrong.sum())} wrong"
    return [*lines, Text(text.center(len(lines[0])))]


def show_accuracy(console: Console, trained: Trained) -> Report:
    """The curve over steps, and what early exit saves."""
    heading(console, 3, "Accuracy against refinement")
    trainer, examples = trained.trainer, trained.examples
    full = evaluate(trained.model, trainer.task, examples, halt=None, device=trainer.device)
    console.print(f"{len(examples)} other held-out puzzles, exact if refinement stopped after")
    console.print(curve(full.curve))
    rows = [_row("always 16 steps", full)]
    for bar, text in ((HALT_ABOVE, "q of 7 to 1"), (0.0, "q of even odds, as in training")):
        report = evaluate(
            trained.model, trainer.task, examples, halt_above=bar, device=trainer.device
        )
        rows.append(_row(f"until {text}", report))
    columns = ["a puzzle is refined", "exact", "steps each", "time"]
    console.print(table("Early exit: finished puzzles leave the batch", columns, rows))
    return full


def _row(name: str, report: Report) -> list[str]:
    return [name, f"{report.exact:.1%}", f"{report.steps_mean:.1f}", f"{report.seconds:.2f} s"]


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n{number}. {text}", style="bold")
