"""What a task is: examples, symmetries, an honest split, and a checker that needs no labels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.int64]  # [N, T] token ids; 0 is padding in every task
Flags = NDArray[np.bool_]  # [N]
OnProgress = Callable[[int, int], None]  # (examples that are ready, of how many)

PAD = 0


@dataclass(frozen=True)
class Examples:
    """N questions and their answers, both [N, T] int64 token ids.

    Padding in an answer marks tokens that nobody asks for: the loss skips them. `puzzles` [N] are
    the rows of the puzzle embedding, of tasks that have more than the one blank row 0.
    """

    inputs: Tokens
    answers: Tokens
    puzzles: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def identifiers(self) -> NDArray[np.int32]:
        """[N] puzzle identifiers for a model; 0, the blank one, in tasks without."""
        if self.puzzles is None:
            return np.zeros(len(self), dtype=np.int32)
        return self.puzzles.astype(np.int32)

    def take(self, rows: NDArray[np.int64] | Flags | slice) -> Examples:
        """The rows that an index array, a mask or a slice selects."""
        puzzles = None if self.puzzles is None else self.puzzles[rows]
        return Examples(self.inputs[rows], self.answers[rows], puzzles)

    @staticmethod
    def join(parts: list[Examples]) -> Examples:
        puzzles = [part.puzzles for part in parts if part.puzzles is not None]
        return Examples(
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.answers for part in parts]),
            np.concatenate(puzzles) if puzzles else None,
        )


@dataclass(frozen=True, eq=False)
class Grid:
    """Which cells of a board belong together.

    Args:
        units: [G, T] of each cell its row, its column and, where there are boxes, its box, numbered
            apart.
        neighbours: [T, T] whether two different cells touch, or share a unit: what the rules link.
    """

    units: NDArray[np.int64]
    neighbours: NDArray[np.bool_]


class Stream(ABC):
    """What draws examples from a generator of its own can be saved, and goes on elsewhere."""

    _rng: np.random.Generator

    @abstractmethod
    def draw(self, count: int) -> Examples:
        """The next `count` examples."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return copy.deepcopy(dict(self._rng.bit_generator.state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the stream that made `state` stopped (with the same arguments)."""
        self._rng.bit_generator.state = copy.deepcopy(state)


class Split(Protocol):
    """The examples of a file in two parts.

    Attributes:
        path, sha256: the file.
        held_out: which of its examples are never trained on.
        rule: one sentence saying what these have that the others have not.
    """

    path: str
    sha256: str
    held_out: NDArray[np.int64]

    @property
    def rule(self) -> str: ...

    def examples(self, rows: NDArray[np.int64]) -> Examples:
        """These examples as they stand in the file."""

    def sampler(self, seed: int, reveal: int) -> Stream:
        """An endless stream of the others; 0..reveal blanks of each are filled in."""

    def write_held_out(self, path: str | Path) -> None:
        """The questions that are held out, as a file of the same kind."""


class Task(ABC):
    """A family of puzzles with `seq_len` tokens out of `vocab_size`.

    Attributes:
        name: the name under which the registry made it, options included.
        seq_len, vocab_size: T, and the number of token ids.
        num_puzzle_identifiers: rows of the puzzle embedding; 1 where all puzzles follow the same
            rules.
        pool: how many fresh examples a sampler generates before it recombines them by symmetry;
            0 if generating is so cheap that every example can be fresh.
        blank: token id of a blank in a question whose answer fills the blanks; None in others.
        grid: how the tokens lie on a board; None in other tasks.
        has_rules: whether `check` can tell right answers from wrong without their labels.
        counts: whether `count` has an exact solver.
        held_out_rule: one sentence saying what the held-out examples have that training never has.
    """

    name: str
    held_out_rule: str
    num_puzzle_identifiers: int = 1
    pool: int = 0
    blank: int | None = None
    grid: Grid | None = None
    has_rules: bool = True
    counts: bool = False

    @property
    @abstractmethod
    def seq_len(self) -> int: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        """`count` fresh examples."""

    def candidates(self, rng: np.random.Generator, count: int, split: str) -> Examples:
        """Fresh examples from which a sampler keeps those of `split`; a task whose two sides come
        from two places draws from the right one."""
        return self.generate(rng, count)

    @abstractmethod
    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """Each example under a random symmetry of the task, or with another question asked of the
        same thing, on the same side of the split; the answer is right."""

    @abstractmethod
    def held_out(self, examples: Examples) -> Flags:
        """Which examples belong to the held-out side. A property of the example alone, so the
        two sides are disjoint whatever was drawn, augmented, or resumed."""

    @abstractmethod
    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """Whether each answer is right by the rules and the givens; needs no solution."""

    def accepts(self, inputs: Tensor, answers: Tensor) -> Tensor:
        """`check` for `recurx.solve(..., select=task.accepts)`: int [N, T] twice -> bool [N]."""
        import torch

        flags = self.check(inputs.cpu().numpy(), answers.cpu().numpy())
        return torch.from_numpy(flags).to(inputs.device)

    def possible(self, inputs: Tensor) -> Tensor | None:
        """bool [N, T, vocab], which tokens the rules leave in each cell of questions [N, T], for
        `recurx.Search`: those of every answer are among them, and a cell with none says that there
        is no answer. None, as here, in tasks that do not tell."""
        return None

    def count(self, inputs: Tensor, most: int) -> Tensor | None:
        """int64 [N], how many answers questions [N, T] have, by an exact solver: 0, 1, or 2 for
        more; -1 where that took more than `most` positions. None in tasks without one."""
        return None

    def right(self, examples: Examples, answers: Tokens) -> Flags:
        """Whether each answer to `examples` is right: by `check`, and by `examples.answers` only
        in tasks whose rules nobody knows."""
        return self.check(examples.inputs, answers)

    def split_file(
        self,
        path: str | Path,
        hold_out: int,
        *,
        sha256: str | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Split:
        """The examples of a file, `hold_out` of which are held out.

        Args:
            sha256: of the file that is meant; None takes what is there.
            on_progress: called while answers are searched that the file does not have.

        Raises:
            InvalidArgument: the task is not trained on files, or this one is refused.
        """
        known = "a task that is trained on files, as sudoku (9x9) is"
        raise bad_argument("train", "puzzles", known, self.name)

    @abstractmethod
    def text(self, tokens: NDArray[np.int64]) -> str:
        """One row of tokens [T] as readable text, one line a row of the board."""


def hashed_share(keys: NDArray[np.int64], share: int = 8) -> Flags:
    """A fixed pseudo-random 1/share of all keys [N, K]; rows that are equal answer alike."""
    mixed = np.full(len(keys), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in np.ascontiguousarray(keys).T.astype(np.uint64):
        mixed = (mixed ^ column) * np.uint64(0xBF58476D1CE4E5B9)  # multiply, shift, xor: splitmix64
        mixed ^= mixed >> np.uint64(29)
    return mixed % np.uint64(share) == 0
