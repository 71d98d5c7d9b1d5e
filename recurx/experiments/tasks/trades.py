"""Who has the ball, in plain English: two people at a time trade what they hold.

    Tom has the ball.  Tom and Mia swap.  Sam trades with Tom.  Eva and Mia trade.

The answer at a sentence is who has the ball after it: Tom, Mia, Mia, Eva. Each needs the one before
it, and trades do not commute, so that counting them is no way out: this is the word problem of
permutations (the task `compose`), read from sentences. Most trades leave the ball where it is.

Tokens: 0 is padding, 1..people a person, then who starts, then every trade in every wording.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.experiments.tasks.english import NAMES, EnglishTask
from recurx.tasks.base import Examples, Flags, Tokens, hashed_share

START = "{} has the ball."
WORDINGS = ("{} and {} swap.", "{} and {} trade.", "{} trades with {}.")


@dataclass(frozen=True)
class Trades(EnglishTask):
    """Who starts, and `trades` trades among `people`, told in `wordings` ways."""

    trades: int = 6
    people: int = 5
    wordings: int = 3
    name: str = "trades"

    held_out_rule = "no training example tells of the same start and trades, in whatever words"

    answer_per_passage = True

    def __post_init__(self) -> None:
        if self.trades < 1:
            raise bad_argument("tasks.trades", "trades", "at least 1", self.trades)
        if not 3 <= self.people <= len(NAMES):
            raise bad_argument("tasks.trades", "people", f"3..{len(NAMES)}", self.people)
        if not 1 <= self.wordings <= len(WORDINGS):
            raise bad_argument("tasks.trades", "wordings", f"1..{len(WORDINGS)}", self.wordings)

    @property
    def seq_len(self) -> int:
        return self.trades + 1

    @property
    def choices(self) -> int:
        return self.people

    @functools.cached_property
    def passages(self) -> tuple[str, ...]:
        people = NAMES[: self.people]
        told = [
            text.format(people[a], people[b])
            for text in WORDINGS[: self.wordings]
            for a, b in self._pairs
        ]
        return (*people, *map(START.format, people), *told)

    @functools.cached_property
    def _pairs(self) -> NDArray[np.int64]:
        """[people * (people - 1), 2] persons 0.. of a trade, as they are named."""
        return np.argwhere(~np.eye(self.people, dtype=bool))

    def _told(self, wording: Tokens, pair: Tokens) -> Tokens:
        return 2 * self.people + 1 + wording * len(self._pairs) + pair

    def _traders(self, inputs: Tokens) -> Tokens:
        """[N, trades, 2]: persons 0.. of each trade."""
        return self._pairs[(inputs[:, 1:] - 2 * self.people - 1) % len(self._pairs)]

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        start = rng.integers(self.people, size=(count, 1))
        pair = rng.integers(len(self._pairs), size=(count, self.trades))
        told = self._told(rng.integers(self.wordings, size=pair.shape), pair)
        holder = [start[:, 0]]
        for a, b in self._pairs[pair].transpose(1, 2, 0):
            swapped = np.where(holder[-1] == b, a, holder[-1])
            holder.append(np.where(holder[-1] == a, b, swapped))
        inputs = np.concatenate([self.people + 1 + start, told], axis=1)
        return Examples(inputs, np.stack(holder, axis=1) + 1)

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """The same trades in other words, the two people in whatever order."""
        traders = rng.permuted(self._traders(examples.inputs), axis=2)
        a, b = traders[..., 0], traders[..., 1]
        pair = a * (self.people - 1) + b - (b > a)
        told = self._told(rng.integers(self.wordings, size=pair.shape), pair)
        return Examples(np.concatenate([examples.inputs[:, :1], told], axis=1), examples.answers)

    def held_out(self, examples: Examples) -> Flags:
        traders = np.sort(self._traders(examples.inputs), axis=2).reshape(len(examples), -1)
        return hashed_share(np.concatenate([examples.inputs[:, :1], traders], axis=1))

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """The first answer is who starts; who traded hands the ball on, all others keep it."""
        before, after = answers[:, :-1, None] - 1, answers[:, 1:] - 1
        traders = self._traders(inputs)
        gives = traders == before  # [N, trades, 2]
        partner = np.where(gives, traders[..., ::-1], -1).max(axis=2)
        right = np.where(gives.any(axis=2), after == partner, after == before[..., 0])
        return (answers[:, 0] == inputs[:, 0] - self.people) & right.all(axis=1)
