"""`python -m recurx solve PUZZLE...`: boards in, boards out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.experiments import printed
from recurx.experiments.answering.refinement import Refining, arguments_of_solve
from recurx.options import file, option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recurx.experiments.tasks import Sudoku
    from recurx.solving.solve import Answers

UNSOLVED = 1  # exit code when an answer breaks a rule


@dataclass(frozen=True)
class Options(options.Json, options.Machine, Refining, options.Weights):
    puzzle: tuple[str, ...] = option(
        (), "a board row after row, 0 or . for a blank; or one FILE of them", flag="", nargs="*"
    )
    puzzles: str | None = file("a file of such lines, a CSV, or JSON lines")
    show: int = option(10, "print at most N boards", least=1)
    out: str | None = file("write an answer for each puzzle of the file (.txt, .csv, .jsonl), of "
                           "any number; a run that was killed goes on, and torchrun shares the "
                           "work")  # fmt: skip
    batch_size: int = option(256, "puzzles of --out that are solved at once", least=1)
    html: str | None = file("one page that shows the first --show boards being solved step by "
                            "step, without a network (.html)")  # fmt: skip


def run(asked: Options) -> int:
    import torch

    import recurx
    from recurx.cli import output
    from recurx.experiments.answering import boards_out, page
    from recurx.experiments.answering.checkpoints import open_checkpoint
    from recurx.experiments.tasks import Sudoku
    from recurx.experiments.tasks.sudoku.layout import to_boards
    from recurx.train.ranks import join_torchrun

    asked = _a_file(options.local_device(asked))
    device = asked.prepare()
    ranks = join_torchrun(device)
    if asked.out:
        boards_out.form_of(asked.out)
    if asked.out and (asked.html or not asked.puzzles):
        raise InvalidArgument("--out: for a file of puzzles, without --html.")
    name = None if asked.checkpoint else _task_of(asked)
    model, task, loaded = open_checkpoint(asked.checkpoint, name, device, asked.backend)
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"this checkpoint is for {task.name}: use eval for other tasks.")
    how = arguments_of_solve(asked.how, loaded.extra.get("solve"), task)
    console = output.make_console(quiet=not ranks.first)
    if asked.out:
        rest = (model, task, str(loaded.path), how, device, ranks, console)
        done = boards_out.solve_file(asked, *rest)
        if asked.json and ranks.first:
            output.json_line({"puzzles": done.before + done.now, "of_earlier_runs": done.before,
                              "verdicts": dict(done.counts), "seconds": done.seconds})  # fmt: skip
        return 0
    inputs = _inputs(asked, task)
    batch = {"inputs": torch.from_numpy(inputs).to(device)}
    answers = recurx.solve(model, batch, **how)
    predictions = answers.predictions.cpu().numpy()
    right = task.check(inputs, predictions)
    verdicts = answers.verdicts or tuple(
        "solved" if r else "not solved: the answer breaks a rule or a given" for r in right
    )
    for row in range(min(asked.show, len(inputs))):
        steps = int(answers.steps[row])
        console.print(f"puzzle {row + 1}: {verdicts[row]}, {steps} step{'s' * (steps != 1)}")
        console.print(printed.side_by_side([task.text(inputs[row]), task.text(predictions[row])]))
    console.print(f"{int(right.sum())} of {len(inputs)} solved")
    if asked.html:
        shown = [_watched(model, batch, row, how) for row in range(min(asked.show, len(inputs)))]
        found, q_steps = [one for one, _ in shown], [q for _, q in shown]
        page.write(asked.html, task, inputs[: asked.show], found, q_steps, verdicts[: len(shown)])
        console.print(f"page: {asked.html}", soft_wrap=True)
    if asked.json:
        lines = ["".join(map(str, board)) for board in to_boards(predictions).tolist()]
        result = {"solved": right.tolist(), "answers": lines, "steps": answers.steps.tolist()}
        output.json_line(result | ({"verdicts": answers.verdicts} if answers.verdicts else {}))
    return 0 if right.all() else UNSOLVED


def _watched(model: Any, batch: Any, row: int, how: dict[str, Any]) -> tuple[Answers, list[float]]:
    """One puzzle solved by itself, and q after each step of the picked try."""
    import recurx
    from recurx.experiments.answering import page

    one = {key: value[row : row + 1] for key, value in batch.items()}
    with page.watching(model) as seen:
        found = recurx.solve(model, one, **{**how, "trace": True, "first_sample": row})
    tries = found.rollout_steps.shape[1]
    search = how.get("search")
    if search is not None:
        at_once = [1] + [search.starts] * (search.budget - 1)
    else:
        at_once = [1] * tries if callable(how["select"]) else [tries]
    steps = found.rollout_steps[0].tolist()
    return found, page.q_of_steps(seen, steps, at_once, float(found.q[0]))


def _a_file(asked: Options) -> Options:
    """A single argument that is a file stands for --puzzles.

    Raises:
        InvalidArgument: there are no puzzles, or some of both kinds.
    """
    if len(asked.puzzle) == 1 and not asked.puzzles and Path(asked.puzzle[0]).is_file():
        return replace(asked, puzzle=(), puzzles=asked.puzzle[0])
    if bool(asked.puzzle) == bool(asked.puzzles):
        raise InvalidArgument("give puzzles as arguments, or a file with --puzzles (one of both).")
    return asked


def _task_of(asked: Options) -> str:
    """The Sudoku that the first puzzle has the length of; 9x9 if of none, which is then told."""
    from recurx.experiments.answering.checkpoints import SUDOKU_OF_LENGTH
    from recurx.experiments.tasks.sudoku import files

    first = files.first_puzzle(asked.puzzles) if asked.puzzles else asked.puzzle[0].strip()
    return SUDOKU_OF_LENGTH.get(len(first), "sudoku")


def _inputs(asked: Options, task: Sudoku) -> NDArray[np.int64]:
    """Token ids [N, T] of the puzzles given as arguments or in a file."""
    from recurx.experiments.tasks.sudoku import files
    from recurx.experiments.tasks.sudoku.layout import to_tokens

    if asked.puzzles:
        return to_tokens(files.read(asked.puzzles, task.layout).puzzles)
    return to_tokens(files.parse_boards(asked.puzzle, task.layout))
