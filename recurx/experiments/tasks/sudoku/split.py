"""A file of Sudokus in two parts, and an endless stream of images of one of them.

    row = a puzzle of the training part -> a random symmetric image -> some blanks filled in

The held-out part is a fixed function of the file: puzzles `default_rng(0).permutation(N)[:K]`, so
that anyone can make the same list again, whatever else the run does. Training leaves out those K
puzzles and every puzzle whose solution could be a symmetric image of one of theirs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recurx.errors import InvalidArgument, bad_argument
from recurx.experiments.tasks.sudoku import files, solver, symmetry
from recurx.experiments.tasks.sudoku.layout import Layout, is_solution, to_tokens
from recurx.experiments.tasks.text_files import opened
from recurx.tasks.base import Examples, OnProgress, Stream

HOLD_OUT_SEED = 0


@dataclass(frozen=True, eq=False)
class PuzzleSplit:
    """The puzzles of a file in two parts.

    Args:
        path, sha256: the file.
        puzzles, answers: int8 [N, 81] digits, 0 for a blank.
        train, held_out: indices of puzzles, in the order of the permutation.
    """

    path: str
    sha256: str
    puzzles: NDArray[np.int8]
    answers: NDArray[np.int8]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]

    def examples(self, rows: NDArray[np.int64]) -> Examples:
        """These puzzles as they stand in the file."""
        return Examples(to_tokens(self.puzzles[rows]), to_tokens(self.answers[rows]))

    @property
    def rule(self) -> str:
        """One sentence saying what the held-out puzzles have that the others have not."""
        return (
            f"{len(self.held_out):,} puzzles of the file; the {len(self.train):,} that are trained "
            f"on have other solutions, up to symmetry"
        )

    def sampler(self, seed: int = 0, reveal: int = 0) -> PuzzleSampler:
        return PuzzleSampler(self, seed, reveal)

    def write_held_out(self, path: str | Path) -> None:
        """The held-out puzzles as lines of 81 digits, in the order of the permutation."""
        rows = self.puzzles[self.held_out]
        lines = "".join("".join(map(str, row)) + "\n" for row in rows.tolist())
        Path(path).write_text(lines, encoding="ascii")


def load(
    layout: Layout,
    path: str | Path,
    hold_out: int,
    *,
    sha256: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> PuzzleSplit:
    """A file of puzzles, its answers and its two parts.

    Answers come from the file where it has them (and are checked), else from the solver: 30 s for
    40,000 puzzles of 17 clues.

    Args:
        layout: 9x9; of 4x4 and 6x6 there are 2 and 49 boards up to symmetry, of which none could be
            held out honestly.
        hold_out: K, puzzles that are held out.
        sha256: of the file that is meant; None takes what is there.
        on_progress: called while the solver works.

    Raises:
        InvalidArgument: the layout is another; the file cannot be read or is not the one that
            `sha256` names; a puzzle has a wrong answer, or not exactly one solution; nothing is
            left to train on.
    """
    if layout.size != 9:
        got = f"{layout.size}x{layout.size}"
        raise bad_argument("train", "puzzles", "a file for the task sudoku (9x9)", got)
    with opened(path, "puzzles") as file:
        digest = hashlib.sha256(file.buffer.read()).hexdigest()
    if sha256 not in (None, digest):
        raise InvalidArgument(
            f"train: {path} is not the file that this run trains on: its SHA-256 begins with "
            f"{digest[:16]}, that of the run's file with {sha256[:16]}. Name the "
            f"right one (--puzzles FILE)."
        )
    puzzles, answers = _solved(Path(path), digest, layout, on_progress)
    if not hold_out < len(puzzles):
        most = f"fewer than the file's {len(puzzles)} puzzles"
        raise bad_argument("train", "hold_out", most, hold_out)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(puzzles))
    held_out, rest = order[:hold_out], order[hold_out:]
    train = rest[~_related(layout, answers, rest, held_out)]
    if len(train) == 0:
        raise InvalidArgument(
            f"train: {path} has {len(puzzles)} puzzles, and every one that is not held out has the "
            f"solution of a held-out one. Hold out fewer than {hold_out}."
        )
    return PuzzleSplit(str(path), digest, puzzles, answers, train, held_out)


_Both = tuple[NDArray[np.int8], NDArray[np.int8]]
_kept: dict[tuple[str, Layout], _Both] = {}  # the last file of this process, solved


def _solved(path: Path, digest: str, layout: Layout, on_progress: OnProgress) -> _Both:
    if (digest, layout) not in _kept:
        both = _read_and_solve(path, layout, on_progress)
        _kept.clear()
        _kept[digest, layout] = both
    return _kept[digest, layout]


def _read_and_solve(path: Path, layout: Layout, on_progress: OnProgress) -> _Both:
    read = files.read(path, layout)
    answers = read.answers.astype(np.int8)
    wrong = read.known & ~is_solution(layout, read.puzzles, read.answers)
    _refuse(path, np.flatnonzero(wrong), "the answer in the file breaks the rules or the givens")
    unknown = np.flatnonzero(~read.known)
    for first in range(0, len(unknown), solver.CHUNK):
        rows = unknown[first : first + solver.CHUNK]
        solved = solver.solve(layout, read.puzzles[rows])
        _refuse(path, rows[solved.count == 0], "it has no solution")
        _refuse(path, rows[solved.count > 1], "it has more than one solution")
        answers[rows] = solved.boards
        on_progress(min(first + solver.CHUNK, len(unknown)), len(unknown))
    return read.puzzles.astype(np.int8), answers


def _refuse(path: Path, wrong: NDArray[np.int64], why: str) -> None:
    if len(wrong):
        more = f" ({len(wrong)} like it near there)" if len(wrong) > 1 else ""
        raise InvalidArgument(f"puzzles: {path}, puzzle {wrong[0] + 1}: {why}{more}.")


def _related(
    layout: Layout, answers: NDArray[np.int8], rows: NDArray[np.int64], held_out: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which of `rows` have a solution that may be a symmetric image of a held-out one.

    By an invariant that a few other boards share: of 41,151 puzzles of 17 clues with 2,000 held
    out, 3.5 % of the rest go.
    """
    keys = symmetry.orbit_key(layout, answers.astype(np.int64))
    _, orbit = np.unique(keys, axis=0, return_inverse=True)
    orbit = orbit.reshape(-1)  # numpy 2.0 alone gives it another shape
    return np.isin(orbit[rows], orbit[held_out])


class PuzzleSampler(Stream):
    """A seeded, endless stream of images of a file's training puzzles; saved like `tasks.Sampler`.

    Args:
        split: the file.
        seed: all randomness follows from it.
        reveal: each puzzle gets 0..reveal of its blanks filled from its solution, the number drawn
            uniformly (at most all of them): hard puzzles with easy ones among them.
    """

    def __init__(self, split: PuzzleSplit, seed: int = 0, reveal: int = 0) -> None:
        self.split, self.reveal = split, reveal
        self._rng = np.random.default_rng([seed, 2])  # 0 and 1 are the streams of tasks.Sampler

    def draw(self, count: int) -> Examples:
        """The next `count` examples."""
        split, rng = self.split, self._rng
        rows = split.train[rng.integers(len(split.train), size=count)]
        puzzles, answers = symmetry.random_images(
            Layout.of(9), rng, split.puzzles[rows].astype(np.int64),
            split.answers[rows].astype(np.int64),
        )  # fmt: skip
        if self.reveal:
            puzzles = revealed(rng, puzzles, answers, self.reveal)
        return Examples(to_tokens(puzzles), to_tokens(answers))


def revealed(
    rng: np.random.Generator,
    puzzles: NDArray[np.int64],
    answers: NDArray[np.int64],
    most: int,
) -> NDArray[np.int64]:
    """The puzzles [N, cells] with 0..most random blanks each filled from the answers."""
    how_many = rng.integers(0, most + 1, size=len(puzzles))
    lot = np.where(puzzles == 0, rng.random(puzzles.shape), 2.0)  # givens come last
    place = lot.argsort(axis=1).argsort(axis=1)
    return np.where(place < how_many[:, None], answers, puzzles)
