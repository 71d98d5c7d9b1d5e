"""ARC-AGI-1 and 2 as HRM and TRM learn them: a row of the puzzle embedding for every (task,
augmentation), which alone tells the model what to do with a grid.

Training examples are all demonstration pairs and the test pairs of the training set, under random
augmentations and translations. Held out are the test inputs of the evaluation set, which models
only ever see here. What the rule of a task is nobody says, so the labels decide what is right;
without them `well_formed` tells whether an answer is a grid at all, and voting which is likely.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from recurx.errors import InvalidArgument, bad_argument
from recurx.experiments.tasks.arc import canvas, data
from recurx.experiments.tasks.arc.augment import Augmentation, augmentations
from recurx.experiments.tasks.arc.canvas import (
    END,
    FIRST_COLOUR,
    SIDE,
    Grid,
    anywhere,
    decode,
    encode,
)
from recurx.tasks.base import PAD, Examples, Flags, Task, Tokens

Question = tuple[str, int]  # id of the task, number of its test input
Mark = tuple[Question, Augmentation]  # where a row of a batch of test inputs comes from
Row = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # puzzle identifier, input, output [900]
CORNER = (0.0, 0.0)


@dataclass(frozen=True)
class Ballot:
    """One prediction, back in the orientation and the colours of the task.

    Args:
        question: which test input it answers.
        grid: the predicted output.
        q: logit of being right.
    """

    question: Question
    grid: Grid
    q: float


@dataclass(frozen=True)
class Arc(Task):
    """The public tasks of ARC-AGI-`version`.

    Args:
        version: 1 or 2.
        augmentations: of each task, besides the task as it is (published: 1000). The puzzle
            embedding has 1 + tasks * (augmentations + 1) rows; row 0 is blank.
        limit: at most so many tasks of the training set and of the evaluation set, for trials.
    """

    version: int = 1
    augmentations: int = 31
    limit: int | None = None
    name: str = "arc"

    has_rules = False
    held_out_rule = (
        "they are test inputs of the evaluation set; training has its demonstrations alone"
    )

    def __post_init__(self) -> None:
        if self.version not in data.REVISIONS:
            raise bad_argument("tasks.arc", "version", "1 or 2", self.version)
        if self.augmentations < 0:
            raise bad_argument("tasks.arc", "augmentations", "at least 0", self.augmentations)
        if self.limit is not None and self.limit < 1:
            raise bad_argument("tasks.arc", "limit", "at least 1", self.limit)

    # ---- sizes ---------------------------------------------------------------------------------

    @property
    def seq_len(self) -> int:
        return SIDE * SIDE

    @property
    def vocab_size(self) -> int:
        return canvas.VOCAB_SIZE

    @property
    def num_puzzle_identifiers(self) -> int:
        return 1 + len(self.puzzles) * (self.augmentations + 1)

    # ---- data ----------------------------------------------------------------------------------

    @functools.cached_property
    def puzzles(self) -> tuple[data.Puzzle, ...]:
        """The tasks, those of the training set first."""
        every = data.load(self.version)
        return tuple(
            puzzle
            for evaluation in (False, True)
            for puzzle in islice((p for p in every if p.evaluation == evaluation), self.limit)
        )

    @functools.cached_property
    def _training(self) -> list[tuple[int, data.Pair]]:
        """(task, pair) of every pair that is trained on."""
        return [(task, p) for task, puzzle in enumerate(self.puzzles) for p in puzzle.for_training]

    @functools.cached_property
    def questions(self) -> list[tuple[int, int]]:
        """(task, number among its tests) of every test input of the evaluation set."""
        return [
            (task, number)
            for task, puzzle in enumerate(self.puzzles)
            if puzzle.evaluation
            for number in range(len(puzzle.tests))
        ]

    @property
    def solutions(self) -> dict[Question, Grid]:
        """The labels of the held-out test inputs."""
        return {
            (self.puzzles[task].id, number): self.puzzles[task].tests[number][1]
            for task, number in self.questions
        }

    def augmentations_of(self, task: int) -> list[Augmentation]:
        """The task as it is, and its augmentations; fewer than asked for with few colours."""
        return _augmentations(self.puzzles[task], self.augmentations)

    def identifier(self, task: int, augmentation: int) -> int:
        """The row of the puzzle embedding."""
        return 1 + task * (self.augmentations + 1) + augmentation

    def _task_of(self, identifier: int) -> tuple[int, Augmentation]:
        task, augmentation = divmod(identifier - 1, self.augmentations + 1)
        return task, self.augmentations_of(task)[augmentation]

    # ---- examples ------------------------------------------------------------------------------

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        """Training pairs, all equally often, each under one of its task's augmentations, and
        somewhere on the canvas. One pair a task, in the mean, stays at the corner, where all test
        inputs are."""
        pairs = rng.integers(len(self._training), size=count).tolist()
        chance = rng.random((count, 4))  # augmentation, corner, top, left
        rows = []
        for number, (which, corner, *place) in zip(pairs, chance.tolist(), strict=True):
            task, pair = self._training[number]
            moved = corner * len(self.puzzles[task].for_training) >= 1
            rows.append(self._row(task, which, pair, place if moved else CORNER))
        return _examples(rows)

    def candidates(self, rng: np.random.Generator, count: int, split: str) -> Examples:
        if split == "train":
            return self.generate(rng, count)
        rows = []
        for pick, which in rng.random((count, 2)).tolist():
            task, number = self.questions[int(pick * len(self.questions))]
            rows.append(self._row(task, which, self.puzzles[task].tests[number]))
        return _examples(rows)

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """Each example as another augmentation of its task, somewhere else on the canvas."""
        rows = []
        chance = rng.random((len(examples), 3)).tolist()
        for example, (which, *place) in zip(_pairs_of(examples), chance, strict=True):
            identifier, question, answer = example
            task, before = self._task_of(identifier)
            pair = before.undo(question), before.undo(answer)
            rows.append(self._row(task, which, pair, place))
        return _examples(rows)

    def _row(
        self, task: int, which: float, pair: data.Pair, place: Sequence[float] = CORNER
    ) -> Row:
        """A pair under one of the task's augmentations, `which` of them as a share of all."""
        known = self.augmentations_of(task)
        augmentation = int(which * len(known))
        return self.identifier(task, augmentation), *_placed(known[augmentation], pair, place)

    def held_out(self, examples: Examples) -> Flags:
        flags = np.zeros(len(examples), dtype=bool)
        for i, (identifier, question, _) in enumerate(_pairs_of(examples)):
            task, augmentation = self._task_of(identifier)
            puzzle = self.puzzles[task]
            if puzzle.evaluation:
                grid = augmentation.undo(question)
                flags[i] = any(np.array_equal(grid, test) for test, _ in puzzle.tests)
        return flags

    # ---- answers -------------------------------------------------------------------------------

    def right(self, examples: Examples, answers: Tokens) -> Flags:
        """By the labels: all tokens of the grid and its ends; what lies beyond is not asked for."""
        return ((answers == examples.answers) | (examples.answers == PAD)).all(axis=1)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """Nobody knows the rule of an ARC task, so this cannot be told without labels.

        Raises:
            InvalidArgument: always; it names what to use instead.
        """
        raise InvalidArgument(
            "recurx.tasks: whether an ARC answer is right only its label tells: use "
            "task.right(examples, answers), or task.well_formed(answers) for its form alone."
        )

    def well_formed(self, answers: Tokens) -> Flags:
        """Which answers are a whole grid at the corner of the canvas, without labels."""
        return canvas.well_formed(answers)

    def test_batches(
        self, size: int, votes: int | None = None, tasks: int | None = None
    ) -> Iterator[tuple[Examples, list[Mark]]]:
        """Every held-out test input under the first `votes` augmentations of its task (None: all),
        in batches of at most `size`, each row with where it comes from; of the first `tasks`."""
        asked = set(sorted({task for task, _ in self.questions})[:tasks])
        every = (
            (task, number, augmentation)
            for task, number in self.questions
            if task in asked
            for augmentation in range(len(self.augmentations_of(task)[:votes]))
        )
        while batch := list(islice(every, size)):
            rows: list[Row] = []
            marks: list[Mark] = []
            for task, number, augmentation in batch:
                puzzle, chosen = self.puzzles[task], self.augmentations_of(task)[augmentation]
                placed = _placed(chosen, puzzle.tests[number], CORNER)
                rows.append((self.identifier(task, augmentation), *placed))
                marks.append(((puzzle.id, number), chosen))
            yield _examples(rows), marks

    def ballots(
        self, marks: Sequence[Mark], answers: Tokens, q: NDArray[np.float64]
    ) -> list[Ballot]:
        """The votes of answers [N, 900] with logits q [N] to the rows `marks` of `test_batches`."""
        return [
            Ballot(question, augmentation.undo(grid), float(logit))
            for (question, augmentation), grid, logit in zip(marks, decode(answers), q, strict=True)
        ]

    def text(self, tokens: NDArray[np.int64]) -> str:
        shown = {PAD: " ", END: "|"}
        lines = [
            "".join(shown.get(token, str(token - FIRST_COLOUR)) for token in row).rstrip()
            for row in tokens.reshape(SIDE, SIDE).tolist()
        ]
        return "\n".join(lines).rstrip("\n")


@functools.lru_cache(maxsize=4096)
def _augmentations(puzzle: data.Puzzle, count: int) -> list[Augmentation]:
    used = np.zeros(canvas.COLOURS, dtype=bool)  # in what a solver sees: no labels
    for question, answer in puzzle.for_training:
        used[question] = used[answer] = True
    for question, _ in puzzle.tests:
        used[question] = True
    return augmentations(puzzle.id, used, count)


def _placed(
    augmentation: Augmentation, pair: data.Pair, place: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both canvases of an augmented pair, moved by the same share of the room there is."""
    grids = [augmentation.apply(grid) for grid in pair]
    room = [SIDE + 1 - max(grid.shape[axis] for grid in grids) for axis in (0, 1)]
    top, left = (int(share * free) for share, free in zip(place, room, strict=True))
    return encode(grids[0], top, left), encode(grids[1], top, left)


def _examples(rows: list[Row]) -> Examples:
    puzzles, *grids = zip(*rows, strict=True) if rows else ((), (), ())
    inputs, answers = np.array(grids, dtype=np.int64).reshape(2, len(rows), SIDE * SIDE)
    return Examples(inputs, answers, np.array(puzzles, dtype=np.int64))


def _pairs_of(examples: Examples) -> Iterator[tuple[int, Grid, Grid]]:
    """(puzzle identifier, input, output) as grids, as they lie on the canvas."""
    for identifier, question, answer in zip(
        examples.identifiers.tolist(), examples.inputs, examples.answers, strict=True
    ):
        yield identifier, anywhere(question), anywhere(answer)
