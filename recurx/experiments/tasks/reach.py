"""All shortest distances of a small directed graph, from its adjacency matrix.

A question is the matrix row after row: 1 no edge, 2 an edge from the row's node to the column's.
The answer at the same place: 1 if there is no way, else 2 + the number of edges of the shortest.
0 is padding. Distances grow by one edge in a round of relaxation, and double in a matrix square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Task, Tokens, hashed_share

NO_EDGE, EDGE = 1, 2
NO_WAY, HERE = 1, 2  # in answers; HERE + d is distance d


@dataclass(frozen=True)
class Reach(Task):
    """Graphs of `nodes` nodes: one random edge out of each, and a quarter as many more."""

    nodes: int = 8
    name: str = "reach"

    held_out_rule = "no training graph becomes one of theirs when nodes are renamed"

    def __post_init__(self) -> None:
        if self.nodes < 4:
            raise bad_argument("tasks.reach", "nodes", "at least 4", self.nodes)

    @property
    def seq_len(self) -> int:
        return self.nodes * self.nodes

    @property
    def vocab_size(self) -> int:
        return HERE + self.nodes  # distances end at nodes - 1

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        nodes = self.nodes
        sources = np.concatenate(
            [np.tile(np.arange(nodes), (count, 1)), rng.integers(nodes, size=(count, nodes // 4))],
            axis=1,
        )
        targets = (sources + rng.integers(1, nodes, size=sources.shape)) % nodes  # never itself
        edges = np.zeros((count, nodes, nodes), dtype=bool)
        edges[np.arange(count)[:, None], sources, targets] = True
        return self._example(edges)

    def _example(self, edges: NDArray[np.bool_]) -> Examples:
        """From edges [N, nodes, nodes]: a breadth-first search from all nodes at once."""
        reached = np.broadcast_to(np.eye(self.nodes, dtype=np.float32), edges.shape)
        answers = np.where(reached > 0, HERE, NO_WAY)
        for distance in range(1, self.nodes):
            reached = np.minimum(reached + reached @ edges.astype(np.float32), 1)
            answers[(reached > 0) & (answers == NO_WAY)] = HERE + distance
        shape = (len(edges), self.seq_len)
        inputs = np.where(edges, EDGE, NO_EDGE)
        return Examples(inputs.reshape(shape), answers.reshape(shape))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        names = rng.permuted(np.tile(np.arange(self.nodes), (len(examples), 1)), axis=1)
        cells = names[:, :, None] * self.nodes + names[:, None, :]
        cells = cells.reshape(len(examples), self.seq_len)
        return Examples(
            np.take_along_axis(examples.inputs, cells, axis=1),
            np.take_along_axis(examples.answers, cells, axis=1),
        )

    def held_out(self, examples: Examples) -> Flags:
        """By how many nodes are how far from and to each node: renaming permutes these counts."""
        distances = examples.answers.reshape(-1, self.nodes, self.nodes)
        weights = np.random.SeedSequence(0).generate_state(2 * self.vocab_size, np.uint64)
        out, into = weights[: self.vocab_size], weights[self.vocab_size :]
        each = out[distances].sum(axis=2, dtype=np.uint64)
        each ^= into[distances].sum(axis=1, dtype=np.uint64)
        return hashed_share(np.sort(each, axis=1).view(np.int64))

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """One relaxation: 0 to itself, else one more than the best node after one edge. Only the
        true distances stay as they are (a finite one walks down to 0 along real edges)."""
        shape = (-1, self.nodes, self.nodes)
        given = ((inputs == EDGE) | (inputs == NO_EDGE)).all(axis=1) & (answers >= NO_WAY).all(1)
        far = 2 * self.vocab_size
        distance = np.where(answers == NO_WAY, far, answers - HERE).reshape(shape)
        edges = (inputs == EDGE).reshape(shape)
        after_one = np.where(edges[..., None], distance[:, None], far).min(axis=2)
        relaxed = np.minimum(after_one + 1, far)
        relaxed[:, np.arange(self.nodes), np.arange(self.nodes)] = 0
        return given & (distance == relaxed).all(axis=(1, 2))

    def text(self, tokens: NDArray[np.int64]) -> str:
        rows = tokens.reshape(self.nodes, self.nodes)
        return "\n".join(" ".join(f"{token:2d}" for token in row) for row in rows)
