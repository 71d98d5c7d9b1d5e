"""The shell game in plain English: cups change places in pairs, and a ball goes with them.

    The ball is left.  Swap left and right.  Switch middle with right.  Exchange left and middle.

The answer at a sentence is where the ball is after it: left, right, middle, left. Each needs the one
before it, and swaps do not commute, so that counting them is no way out: this is the word problem of
permutations (`recurx.tasks.compose`), read from sentences.

Tokens: 0 is padding, 1..3 a place, then where the ball starts, then every move in every wording.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Tokens, hashed_share
from recurx.tasks.english import EnglishTask

HELD_OUT_SHARE = 8
PLACES = ("left", "middle", "right")
START = "The ball is {}."
WORDINGS = ("Swap {} and {}.", "Exchange {} and {}.", "Switch {} with {}.")
PAIRS = np.array([(a, b) for a in range(3) for b in range(3) if a != b])  # [6, 2], as they are told


@dataclass(frozen=True)
class Cups(EnglishTask):
    """A start and `moves` moves, told in `wordings` ways."""

    moves: int = 8
    wordings: int = 3
    name: str = "cups"

    def __post_init__(self) -> None:
        if self.moves < 1:
            raise bad_argument("tasks.cups", "moves", "at least 1", self.moves)
        if not 1 <= self.wordings <= len(WORDINGS):
            raise bad_argument("tasks.cups", "wordings", f"1..{len(WORDINGS)}", self.wordings)

    @property
    def seq_len(self) -> int:
        return self.moves + 1

    @property
    def choices(self) -> int:
        return len(PLACES)

    @property
    def held_out_rule(self) -> str:
        return "no training example tells of the same start and swaps, in whatever words"

    @functools.cached_property
    def passages(self) -> tuple[str, ...]:
        moves = [
            text.format(PLACES[a], PLACES[b]) for text in WORDINGS[: self.wordings] for a, b in PAIRS
        ]
        return (*PLACES, *map(START.format, PLACES), *moves)

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        start = rng.integers(3, size=(count, 1))
        told = rng.integers(len(PAIRS) * self.wordings, size=(count, self.moves))
        return self._answered(np.concatenate([4 + start, 7 + told], axis=1))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """The same swaps in other words, the two places in whatever order."""
        swap = self._swaps(examples.inputs)
        twin = rng.integers(2, size=swap.shape)
        same = np.array([[i for i, pair in enumerate(PAIRS) if 3 - pair.sum() == k]
                         for k in range(3)])  # fmt: skip
        told = rng.integers(self.wordings, size=swap.shape) * len(PAIRS) + same[swap, twin]
        inputs = np.concatenate([examples.inputs[:, :1], 7 + told], axis=1)
        return Examples(inputs, examples.answers)

    @staticmethod
    def _swaps(inputs: Tokens) -> Tokens:
        """[N, moves]: the place 0..2 that each move leaves alone."""
        place: Tokens = 3 - PAIRS[(inputs[:, 1:] - 7) % len(PAIRS)].sum(axis=-1)
        return place

    def _answered(self, inputs: Tokens) -> Examples:
        ball = [inputs[:, 0] - 4]
        for alone in self._swaps(inputs).T:
            ball.append(np.where(ball[-1] == alone, alone, 3 - alone - ball[-1]))
        return Examples(inputs, np.stack(ball, axis=1) + 1)

    def held_out(self, examples: Examples) -> Flags:
        told = np.concatenate([examples.inputs[:, :1], self._swaps(examples.inputs)], axis=1)
        return hashed_share(told, HELD_OUT_SHARE)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """The first place is the start; a move that names the place before goes to its other one."""
        before, after = answers[:, :-1] - 1, answers[:, 1:] - 1
        pair = PAIRS[(inputs[:, 1:] - 7) % len(PAIRS)]
        named = pair == before[..., None]
        goal = np.where(named[..., 0], pair[..., 1], np.where(named[..., 1], pair[..., 0], before))
        starts = answers[:, 0] == inputs[:, 0] - 3
        return starts & (after == goal).all(axis=1)
