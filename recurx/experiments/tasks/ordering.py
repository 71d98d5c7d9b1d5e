"""Ordering in plain English: who is older than whom, two people at a time, in shuffled sentences.

    Tom was born after Mia.  Eva is older than Sam.  Mia is younger than Sam.  Order them by age.

Each sentence links two neighbours of one chain, so the place of a person in the middle follows
from all the sentences on one side of it: the answer takes as many links as the chain is long, or
log2 of that if partial chains are joined.

Tokens: 0 is padding, 1..names a person, then every sentence ("statement") of every pair of people
in every wording, and last the question. `passages` holds the English of each.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from recurx.errors import bad_argument
from recurx.experiments.tasks.english import NAMES, EnglishTask
from recurx.tasks.base import PAD, Examples, Flags, Tokens, hashed_share

QUESTION = "Order them by age."
# (sentence, whether the first of the two people named is the older one)
WORDINGS = (
    ("{} is older than {}.", True),
    ("{} was born before {}.", True),
    ("{} is younger than {}.", False),
    ("{} was born after {}.", False),
)


@dataclass(frozen=True)
class Ordering(EnglishTask):
    """Chains of `people` out of `names`; with `fewest`, of fewest..people, as a curriculum.

    With `wordings` 1 or 2 the older person is always named first; 3 and 4 turn sentences round.

    A question is the sentences, padding, and the question; an answer the people and padding.
    """

    people: int = 8
    names: int = 16
    fewest: int = 0
    wordings: int = 4
    name: str = "order"

    held_out_rule = "no training example is about the same people, in whatever order"

    def __post_init__(self) -> None:
        if not 2 <= self.names <= len(NAMES):
            raise bad_argument("tasks.order", "names", f"2..{len(NAMES)}", self.names)
        if not 2 <= self.people < self.names:
            raise bad_argument(
                "tasks.order", "people", f"2..{self.names - 1}, fewer than names={self.names}",
                self.people, "The held-out examples are about other sets of people.",
            )  # fmt: skip
        if not 1 <= self.wordings <= len(WORDINGS):
            raise bad_argument("tasks.order", "wordings", f"1..{len(WORDINGS)}", self.wordings)
        if self.fewest and not 2 <= self.fewest <= self.people:
            raise bad_argument(
                "tasks.order", "fewest", f"2..people={self.people}, or 0 for people", self.fewest
            )

    @property
    def seq_len(self) -> int:
        return self.people

    @property
    def choices(self) -> int:
        return self.names

    def hardest(self) -> Ordering:
        return dataclasses.replace(self, fewest=0)

    @functools.cached_property
    def passages(self) -> tuple[str, ...]:
        """The English of the tokens 1, 2, ...: people, sentences, the question."""
        people = NAMES[: self.names]
        sentences = [
            text.format(a, b)
            for text, _ in WORDINGS[: self.wordings]
            for a in people
            for b in people
        ]
        return (*people, *sentences, QUESTION)

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        everybody = np.broadcast_to(np.arange(1, self.names + 1), (count, self.names))
        chain = rng.permuted(everybody, axis=1)[:, : self.people]
        many = rng.integers(self.fewest or self.people, self.people + 1, size=(count, 1))
        chain = np.where(np.arange(self.people) < many, chain, PAD)
        return Examples(self._asked(rng, chain), chain)

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """Sentences in another order and in other words."""
        return Examples(self._asked(rng, examples.answers), examples.answers)

    def _asked(self, rng: np.random.Generator, chain: Tokens) -> Tokens:
        """The sentences of each chain in random words and order, and the question."""
        older, younger = chain[:, :-1], chain[:, 1:]
        wording = rng.integers(self.wordings, size=older.shape)
        statements = np.where(younger == PAD, PAD, self._statements(wording, older, younger))
        statements = rng.permuted(statements, axis=1)
        last = np.argsort(statements == PAD, axis=1, kind="stable")  # padding after sentences
        statements = np.take_along_axis(statements, last, axis=1)
        question = np.full((len(chain), 1), self.vocab_size - 1)
        return np.concatenate([statements, question], axis=1)

    def _statements(self, wording: Tokens, older: Tokens, younger: Tokens) -> Tokens:
        forward = np.array([forward for _, forward in WORDINGS])[wording]
        first = np.where(forward, older, younger) - 1
        second = np.where(forward, younger, older) - 1
        return self.names + 1 + (wording * self.names + first) * self.names + second

    def _pairs(self, statements: Tokens) -> tuple[Tokens, Tokens]:
        """(older, younger) of each statement, as people 1..names."""
        rest, second = np.divmod(statements - self.names - 1, self.names)
        wording, first = np.divmod(rest, self.names)
        forward = np.array([forward for _, forward in WORDINGS])[wording]
        return np.where(forward, first, second) + 1, np.where(forward, second, first) + 1

    def held_out(self, examples: Examples) -> Flags:
        return hashed_share(np.sort(examples.answers, axis=1))

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """Everybody named is placed, nobody twice, and every sentence holds."""
        statements = inputs[:, :-1]
        said = statements != PAD
        older, younger = self._pairs(statements)
        used = np.arange(self.people) <= said.sum(axis=1, keepdims=True)
        place = np.full((len(answers), self.vocab_size), -1)
        places = np.where(used, np.arange(self.people), -1)
        np.put_along_axis(place, np.where(used, answers, PAD), places, axis=1)
        before = np.take_along_axis(place, np.where(said, older, PAD), axis=1)
        after = np.take_along_axis(place, np.where(said, younger, PAD), axis=1)
        # n people in a chain fill n places: somebody placed twice leaves another one out.
        return (~said | ((before >= 0) & (before < after))).all(axis=1)
