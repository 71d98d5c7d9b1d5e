"""`solve FILE --out FILE`: any number of Sudokus, in bounded memory, gone on with after a kill.

    .txt      the answer's digits; a puzzle without one stays as it is, with the verdict behind #
    .csv      puzzle,answer,verdict,steps,q; the answer is empty where there is none
    .jsonl    objects with these names; the answer is null where there is none

Whatever breaks a rule or a given is no answer.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.errors import InvalidArgument
from recurx.experiments.answering import journal
from recurx.experiments.tasks import text_files
from recurx.experiments.tasks.sudoku import Sudoku, files
from recurx.experiments.tasks.sudoku.layout import Boards, to_boards, to_tokens
from recurx.solving.options import Search

if TYPE_CHECKING:
    from rich.console import Console

    from recurx.solving.solve import Answers
    from recurx.train.ranks import Ranks

# Of a state in fp32, of the puzzles that a CPU refines together: what is allocated on the way is
# some ten times as much, and so does not grow with --batch-size.
STATE_BYTES = 1 << 20
FORMS = (".txt", ".csv", ".jsonl")
COLUMNS = ("puzzle", "answer", "verdict", "steps", "q")
UNSOLVED = "unsolved"


def form_of(path: str) -> str:
    """The ending of FILE.

    Raises:
        InvalidArgument: it is none of those that are known.
    """
    form = Path(path).suffix.lower()
    if form not in FORMS:
        raise InvalidArgument(
            f"--out: expected a name that ends in {', '.join(FORMS)}, got {path}."
        )
    return form


def together(model: Any, batch_size: int) -> int:
    """How many puzzles of a batch are refined at once: on a CPU a power of two, which all parts but
    the last have, so that few sizes are measured."""
    import torch

    from recurx.solving.on_cpu import LEAST_ROWS

    state = next(iter(model.inner.empty_carry(1).values()))
    if state.device.type != "cpu":
        return batch_size
    rows = max(STATE_BYTES // (4 * state.numel()), LEAST_ROWS * torch.get_num_threads())
    return min(batch_size, 1 << (rows.bit_length() - 1))


def job(asked: Any, task: Any, checkpoint: str, how: dict[str, Any]) -> dict[str, Any]:
    """What FILE.job says: all that the answers follow from."""
    said = {key: value for key, value in how.items() if key not in ("progress", "first_sample")}
    search = said.pop("search", None)
    if isinstance(search, Search):
        said["search"] = {k: v for k, v in vars(search).items() if k != "rules"}
    if callable(said.get("select")):
        said["select"] = "rules"
    return {
        "puzzles": journal.sha256(asked.puzzles), "checkpoint": journal.sha256(checkpoint),
        "task": task.name, "batch_size": asked.batch_size, "backend": asked.backend, "how": said,
    }  # fmt: skip


def solve_file(
    asked: Any, model: Any, task: Sudoku, checkpoint: str, how: dict[str, Any], device: Any,
    ranks: Ranks, console: Console,
) -> journal.Done:  # fmt: skip
    """Answer all puzzles of the file `asked.puzzles` into `asked.out`."""
    import torch

    import recurx

    form = form_of(asked.out)

    def parts() -> Iterator[Boards]:
        rows = text_files.stream(asked.puzzles, "puzzles", (task.size,))
        while part := list(itertools.islice(rows, asked.batch_size)):
            yield files.of_rows(part, task.layout).puzzles

    rows = together(model, asked.batch_size)

    def work(number: int, puzzles: Boards) -> tuple[list[str], Counter[str]]:
        lines, counts = [], Counter()
        for at in range(0, len(puzzles), rows):
            some, first = puzzles[at : at + rows], number * asked.batch_size + at
            batch = {"inputs": torch.from_numpy(to_tokens(some)).to(device)}
            more = {} if how.get("backend") == "cuda" else {"first_sample": first}
            told, had = lines_of(task, some, recurx.solve(model, batch, **{**how, **more}), form)
            lines += told
            counts += had
        return lines, counts

    heading = ",".join(COLUMNS) if form == ".csv" else ""
    wanted = job(asked, task, checkpoint, how)
    with journal.opened(asked.out, ranks, asked.batch_size, heading, wanted) as (file, resumed):
        return journal.run(parts(), len, work, file, ranks, resumed, saying(console))


def saying(console: Console) -> Callable[[journal.Done], None]:
    """What tells now and then how far a run is."""

    def say(done: journal.Done) -> None:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(done.counts.items()))
        before = f" after {done.before:,} of an earlier run" if done.before else ""
        rate = done.now / done.seconds if done.seconds else 0.0
        console.print(f"{done.now:,} puzzles{before}: {counts or 'none'}; {rate:,.1f} a second")

    return say


def lines_of(
    task: Sudoku, puzzles: Boards, found: Answers, form: str
) -> tuple[list[str], Counter[str]]:
    """A line for each puzzle, and how many have which verdict."""
    answers = found.predictions.cpu().numpy()
    right = task.check(to_tokens(puzzles), answers)
    told = found.verdicts or tuple("solved" if r else UNSOLVED for r in right)
    verdicts = [v if r or v != "solved" else UNSOLVED for v, r in zip(told, right, strict=True)]
    steps, q = found.rollout_steps.sum(1).tolist(), found.q.tolist()
    lines = []
    for row, verdict in enumerate(verdicts):
        puzzle = "".join(map(str, puzzles[row]))
        answer = "".join(map(str, to_boards(answers[row]))) if verdict == "solved" else None
        values = (puzzle, answer, verdict, steps[row], round(q[row], 4))
        if form == ".txt":
            lines.append(answer or f"{puzzle.replace('0', '.')} # {verdict}")
        elif form == ".csv":
            lines.append(",".join("" if value is None else str(value) for value in values))
        else:
            lines.append(json.dumps(dict(zip(COLUMNS, values, strict=True))))
    return lines, Counter(verdicts)
