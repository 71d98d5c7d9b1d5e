"""ARC tasks from files, and which rows of a puzzle embedding are theirs.

    task = files.task("arc-agi_evaluation_challenges.json", names="identifiers.json")
    for examples, marks in task.test_batches(64):
        ...              # `recurx.experiments.answering.arc.evaluate` is an example

Tasks are a folder of files {"train": [pair, ...], "test": [pair, ...]}, one such file, or one of
the competition, {id: task}, whose answers may lie beside it (`..._solutions.json`); so is the
`test_puzzles.json` of official data sets. A pair is {"input": grid, "output": grid}, and the output
of a test pair may be missing. A net knows a task by its rows of the puzzle embedding, which it
learned with the demonstrations: `identifiers.json` of official data sets has a name a row,
`id|||t3|||0317...` for the task under symmetry 3 with colours renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recurx.errors import InvalidArgument
from recurx.experiments.tasks.arc import Arc
from recurx.experiments.tasks.arc.augment import IDENTITY, Augmentation
from recurx.experiments.tasks.arc.canvas import COLOURS, SIDE, Grid
from recurx.experiments.tasks.arc.data import Puzzle

IDENTIFIERS, TEST_PUZZLES = "identifiers.json", "test_puzzles.json"  # of official data sets
SEPARATOR, BLANK = "|||", "<blank>"
# Ours for each of theirs: turns 0..3, left-right, up-down, along one diagonal and the other.
SYMMETRY = (0, 1, 2, 3, 5, 7, 4, 6)
LARGEST = 1 << 26  # bytes of a file; the largest published one, of names, has 26 MB
UNKNOWN: Grid = np.zeros((0, 0), dtype=np.uint8)  # the answer to a test input without one

Rows = dict[str, list[tuple[int, Augmentation]]]  # id of a task -> its rows and what they mean


@dataclass(frozen=True, eq=False)
class ArcFiles(Arc):
    """Tasks of a file; all are held out but for their demonstrations.

    Args:
        loaded: the tasks.
        rows: of the puzzle embedding; None numbers them as `Arc` does, for a net of their own.
        table: how many rows there are.
    """

    loaded: tuple[Puzzle, ...] = ()
    rows: Rows | None = None
    table: int = 0

    @property
    def puzzles(self) -> tuple[Puzzle, ...]:  # type: ignore[override]
        return self.loaded[: self.limit]

    @property
    def num_puzzle_identifiers(self) -> int:
        return super().num_puzzle_identifiers if self.rows is None else self.table

    @property
    def solutions(self) -> dict[tuple[str, int], Grid]:
        return {key: grid for key, grid in super().solutions.items() if grid.size}

    def augmentations_of(self, task: int) -> list[Augmentation]:
        if self.rows is None:
            return super().augmentations_of(task)
        return [augmentation for _, augmentation in self.rows[self.puzzles[task].id]]

    def identifier(self, task: int, augmentation: int) -> int:
        if self.rows is None:
            return super().identifier(task, augmentation)
        return self.rows[self.puzzles[task].id][augmentation][0]

    def _task_of(self, identifier: int) -> tuple[int, Augmentation]:
        if self.rows is None:
            return super()._task_of(identifier)
        for task, puzzle in enumerate(self.puzzles):
            for row, augmentation in self.rows[puzzle.id]:
                if row == identifier:
                    return task, augmentation
        raise InvalidArgument(f"arc: row {identifier} of the puzzle embedding is of no task here.")


def task(
    challenges: str | Path,
    names: str | Path | None = None,
    trained: Arc | None = None,
    solutions: str | Path | None = None,
) -> ArcFiles:
    """The tasks of a file, for a net that was trained on their demonstrations.

    Args:
        challenges: file or folder of tasks.
        names: an official `identifiers.json`, for a net that was trained on that data set.
        trained: the task of a net of recurx, which knows public tasks by their ids.
            Without both the rows are those of a net that will be trained on these tasks.
        solutions: of the competition's file; default: the one beside it, if there is one.

    Raises:
        InvalidArgument: a file is damaged or of another kind (file, task and place are named), or
            the net has no row for a task.
    """
    loaded = read(challenges, solutions)
    if names is None and trained is None:
        return ArcFiles(loaded=loaded)
    asked = {puzzle.id for puzzle in loaded}
    rows, table = _rows_of(trained, asked) if names is None else _named_rows(names, asked)
    missing = [puzzle.id for puzzle in loaded if puzzle.id not in rows]
    if missing:
        raise InvalidArgument(
            f"arc: {challenges}: the net has no row of its puzzle embedding for {len(missing)} of "
            f"{len(loaded)} tasks ({', '.join(missing[:5])}): it was not trained on their "
            f"demonstrations. Train it on them, or name the {IDENTIFIERS} of its data set."
        )
    return ArcFiles(loaded=loaded, rows=rows, table=table)


def _rows_of(trained: Arc, asked: set[str]) -> tuple[Rows, int]:
    rows = {
        puzzle.id: [
            (trained.identifier(number, k), augmentation)
            for k, augmentation in enumerate(trained.augmentations_of(number))
        ]
        for number, puzzle in enumerate(trained.puzzles)
        if puzzle.id in asked
    }
    return rows, trained.num_puzzle_identifiers


# ---- names of rows -----------------------------------------------------------------------------


def read_names(path: str | Path) -> list[str]:
    """The name of each row, from an official `identifiers.json`."""
    names = _json(Path(path))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(f"arc: {path}: expected a list of names, got {_shown(names)}.")
    return names


def _named_rows(path: str | Path, asked: set[str]) -> tuple[Rows, int]:
    rows: Rows = {}
    names = read_names(path)
    for row, name in enumerate(names):
        known = name.partition(SEPARATOR)[0]
        if known in asked and name != BLANK:
            rows.setdefault(known, []).append((row, _meaning(name, path, row)))
    return rows, len(names)


def _meaning(name: str, path: str | Path, row: int) -> Augmentation:
    _, *parts = name.split(SEPARATOR)
    if not parts:
        return IDENTITY
    turn, colours = parts[-2:] if len(parts) > 1 else ("", "")
    known = len(turn) == 2 and turn[0] == "t" and turn[1] in "01234567"
    if not known or sorted(colours) != [*"0123456789"]:
        raise InvalidArgument(
            f"arc: {path}: row {row}: expected id{SEPARATOR}t0..t7{SEPARATOR}ten colours, got "
            f"{_shown(name)}."
        )
    return Augmentation(SYMMETRY[int(turn[1])], tuple(int(colour) for colour in colours))


# ---- tasks -------------------------------------------------------------------------------------


def read(path: str | Path, solutions: str | Path | None = None) -> tuple[Puzzle, ...]:
    """The tasks of a file or folder, in its order (a folder's by name)."""
    path = Path(path)
    if path.is_dir() and (path / TEST_PUZZLES).is_file():
        path = path / TEST_PUZZLES
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[str, tuple[Any, Path]] = {}
    for file in files:
        document = _json(file)
        if not isinstance(document, Mapping):
            raise InvalidArgument(f"arc: {file}: expected tasks, got {_shown(document)}.")
        alone = {"train", "test"} <= document.keys()
        found |= {k: (v, file) for k, v in ({file.stem: document} if alone else document).items()}
    if not found:
        raise InvalidArgument(f"arc: {path} has no task: expected JSON files of tasks.")
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    given = (
        Path(solutions) if solutions else beside if beside != path and beside.is_file() else None
    )
    answers = _json(given) if given else {}
    if not isinstance(answers, Mapping):
        raise InvalidArgument(f"arc: {given}: expected {{id: [grid, ...]}}, got {_shown(answers)}.")
    loaded = [
        _puzzle(name, value, answers.get(name), f"arc: {file}: task {name}")
        for name, (value, file) in found.items()
    ]
    labels = [answer for puzzle in loaded for _, answer in puzzle.tests]
    if path.name == TEST_PUZZLES and all(x.size <= 1 and not x.any() for x in labels):
        return tuple(_unanswered(puzzle) for puzzle in loaded)  # official stand-ins for no answer
    return tuple(loaded)


def _puzzle(name: str, value: Any, answers: Any, where: str) -> Puzzle:
    if not isinstance(value, Mapping) or not {"train", "test"} <= value.keys():
        raise InvalidArgument(
            f'{where}: expected {{"train": .., "test": ..}}, got {_shown(value)}.'
        )
    pairs: dict[str, list[tuple[Grid, Grid]]] = {}
    for part in ("train", "test"):
        if not isinstance(value[part], list) or not value[part]:
            raise InvalidArgument(f"{where}, {part}: expected pairs, got {_shown(value[part])}.")
        pairs[part] = []
        for number, pair in enumerate(value[part]):
            at = f"{where}, {part} {number}"
            if not isinstance(pair, Mapping):
                raise InvalidArgument(f'{at}: expected {{"input": grid, ..}}, got {_shown(pair)}.')
            output = pair.get("output")
            if part == "test" and output is None and answers is not None:
                if not isinstance(answers, list) or number >= len(answers):
                    raise InvalidArgument(
                        f"{at}: expected {len(value[part])} solutions, got {_shown(answers)}."
                    )
                output = answers[number]
            question = _grid(pair.get("input"), f"{at}, input")
            absent = part == "test" and output is None
            pairs[part].append((question, UNKNOWN if absent else _grid(output, f"{at}, output")))
    return Puzzle(name, tuple(pairs["train"]), tuple(pairs["test"]), True)


def _unanswered(puzzle: Puzzle) -> Puzzle:
    tests = tuple((question, UNKNOWN) for question, _ in puzzle.tests)
    return Puzzle(puzzle.id, puzzle.demonstrations, tests, True)


def _grid(value: Any, where: str) -> Grid:
    rows = value if isinstance(value, list) else []
    width = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    fits = 0 < len(rows) <= SIDE and 0 < width <= SIDE
    if not fits or not all(isinstance(row, list) and len(row) == width for row in rows):
        raise InvalidArgument(
            f"{where}: expected a grid of 1..{SIDE} rows and columns, got {_shown(value)}."
        )
    for row in rows:
        for cell in row:
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise InvalidArgument(f"{where}: expected colours 0..9, got {_shown(cell)}.")
    return np.array(rows, dtype=np.uint8)


def _json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InvalidArgument(f"arc: {path}: {size:,} bytes: expected at most {LARGEST:,}.")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidArgument(f"arc: cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"arc: {path}: expected JSON: {error}.") from error


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {str(value)[:60]!r}" if not isinstance(value, (list, Mapping)) else (
        f"a {kind} of {len(value)}"
    )  # fmt: skip
