"""Mazes: find the shortest path from S to G.

Tokens (the convention of the official Maze data): 0 padding, then `#` wall, space, S, G, and `o`
for a cell of the path. `Maze` is a tree of corridors, so there is one path; `MazeHard` has walls
in random places, and often several. The checker takes any shortest path.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.experiments.tasks.maze import hard, paths
from recurx.tasks.base import PAD, Examples, Flags, Grid, Task, Tokens, hashed_share

CHARACTERS = "?# SGo"  # by token id
WALL, OPEN, START, GOAL, PATH = range(1, 6)


@dataclass(frozen=True)
class Maze(Task):
    """A maze of `size` x `size` cells whose path is at least `shortest` steps (default: size)."""

    size: int = 10
    shortest: int | None = None
    name: str = "maze"

    pool = 1024  # some seconds of pure Python at 10x10
    held_out_rule = "no rotation or reflection of them is a training maze"

    def __post_init__(self) -> None:
        if self.size < 4:
            raise bad_argument("tasks.maze", "size", "at least 4", self.size)
        if self.shortest is not None and not 1 <= self.shortest <= 2 * self.size:
            raise bad_argument("tasks.maze", "shortest", f"1..{2 * self.size}", self.shortest)

    @property
    def seq_len(self) -> int:
        return self.size * self.size

    @property
    def vocab_size(self) -> int:
        return len(CHARACTERS)

    @property
    def _least(self) -> int:
        return self.size if self.shortest is None else self.shortest

    @property
    def grid(self) -> Grid:
        """Cells that touch are neighbours."""
        row, column = np.divmod(np.arange(self.seq_len), self.size)
        units = np.stack([row, self.size + column])
        apart = abs(units[:, :, None] - units[:, None, :]).sum(axis=0)
        return Grid(units, apart == 1)

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        mazes: list[NDArray[np.int64]] = []  # in a tree one way leads from S to G
        while len(mazes) < count:
            grid = self._corridors(rng)
            start = int(rng.choice(np.flatnonzero(grid == OPEN)))
            far = [n for n, steps in self._distances(grid, start).items() if steps >= self._least]
            if far:
                grid[start], grid[far[int(rng.integers(len(far)))]] = GOAL, START
                mazes.append(grid)
        inputs = np.array(mazes, dtype=np.int64).reshape(count, self.seq_len)
        return Examples(inputs, self.solve(inputs))

    def _corridors(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Carve a random tree: a wall falls where exactly one of its neighbours is open."""
        grid = np.full(self.seq_len, WALL, dtype=np.int64)
        frontier = [int(rng.integers(self.seq_len))]
        grid[frontier[0]] = OPEN
        frontier = self._neighbours(frontier[0])
        while frontier:
            # Mostly the newest wall (long corridors), now and then any (branches).
            at = len(frontier) - 1 if rng.random() < 0.7 else int(rng.integers(len(frontier)))
            cell = frontier.pop(at)
            around = self._neighbours(cell)
            if grid[cell] == WALL and sum(grid[n] == OPEN for n in around) == 1:
                grid[cell] = OPEN
                walls = [n for n in around if grid[n] == WALL]
                frontier += [walls[i] for i in rng.permutation(len(walls))]
        return grid

    def _neighbours(self, cell: int) -> list[int]:
        row, column = divmod(cell, self.size)
        return [
            r * self.size + c
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            if 0 <= r < self.size and 0 <= c < self.size
        ]

    def _distances(self, grid: NDArray[np.int64], start: int) -> dict[int, int]:
        """Steps from `start` to every cell that can be reached without crossing a wall."""
        distance = {start: 0}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for neighbour in self._neighbours(cell):
                if grid[neighbour] != WALL and neighbour not in distance:
                    distance[neighbour] = distance[cell] + 1
                    queue.append(neighbour)
        return distance

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """A random turn or reflection of every maze, with another S and G where a pair as far apart
        as the task asks is found: the walls alone decide on the side of the split."""
        inputs = self._turned(rng, examples).inputs
        count = len(inputs)
        rows, passable = np.arange(count), inputs != WALL
        start = np.where(passable, rng.random(inputs.shape), 0.0).argmax(axis=1)
        steps = paths.distances(passable.reshape(-1, self.size, self.size), start)
        far = steps >= self._least
        goal = np.where(far, rng.random(inputs.shape), -1.0).argmax(axis=1)
        others = np.where(passable, OPEN, WALL)
        others[rows, start], others[rows, goal] = START, GOAL
        questions = np.where(far[rows, goal, None], others, inputs)
        return Examples(questions, self.solve(questions, rng))

    def _turned(self, rng: np.random.Generator, examples: Examples) -> Examples:
        images = self._images[rng.integers(8, size=len(examples))]
        return Examples(
            np.take_along_axis(examples.inputs, images, axis=1),
            np.take_along_axis(examples.answers, images, axis=1),
        )

    @functools.cached_property
    def _images(self) -> NDArray[np.int64]:
        """[8, T]: the cells under each rotation and reflection of the square."""
        grid = np.arange(self.seq_len).reshape(self.size, self.size)
        turned = [np.rot90(side, k) for side in (grid, grid.T) for k in range(4)]
        return np.stack(turned).reshape(8, self.seq_len)

    def held_out(self, examples: Examples) -> Flags:
        walls = (examples.inputs == WALL).astype(np.int64)[:, self._images]  # [N, 8, T]
        first = np.lexsort(walls.transpose(2, 0, 1)[::-1], axis=-1)[:, :1, None]
        canonical = np.take_along_axis(walls, first, axis=1)[:, 0]
        return hashed_share(canonical)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """Any shortest path is right: the maze is as given, and the marked cells, as many as the
        shortest way needs, lead from S to G."""
        path, rows = answers == PATH, np.arange(len(inputs))
        unchanged = (np.where(path, OPEN, answers) == inputs).all(axis=1)
        whole, goal, from_start = self._search(inputs, inputs != WALL)
        marked = path | (inputs == START) | (inputs == GOAL)
        steps, along = from_start[rows, goal], self._search(inputs, marked)[2][rows, goal]
        right = unchanged & whole & (inputs != PAD).all(axis=1)
        return right & (along > 0) & (along == steps) & (path.sum(axis=1) + 1 == steps)

    def solve(self, inputs: Tokens, rng: np.random.Generator | None = None) -> Tokens:
        """Answers [N, T]: a random one of the shortest paths of each maze.

        Raises:
            InvalidArgument: a maze has not one S and one G, or no way between them (row named).
        """
        rng = np.random.default_rng(0) if rng is None else rng
        whole, goal, steps = self._search(inputs, inputs != WALL)
        wrong = np.flatnonzero(~whole | (steps[np.arange(len(inputs)), goal] < 1))
        if len(wrong):
            raise bad_argument(
                "tasks.maze", "inputs", "one S, one G and a way between them in each maze",
                f"maze {wrong[0] + 1} without ({len(wrong)} of {len(inputs)} are wrong)",
            )  # fmt: skip
        return np.where(paths.trace_back(steps, goal, rng) & (inputs == OPEN), PATH, inputs)

    def _search(
        self, inputs: Tokens, passable: NDArray[np.bool_]
    ) -> tuple[Flags, NDArray[np.int64], NDArray[np.int64]]:
        """Which mazes have one S and one G, where G is [N], and the steps from S to all [N, T]."""
        starts, goals = inputs == START, inputs == GOAL
        whole = (starts.sum(axis=1) == 1) & (goals.sum(axis=1) == 1)
        grids = passable.reshape(-1, self.size, self.size)
        return whole, goals.argmax(axis=1), paths.distances(grids, starts.argmax(axis=1))

    def text(self, tokens: NDArray[np.int64]) -> str:
        rows = tokens.reshape(self.size, self.size)
        return "\n".join("".join(CHARACTERS[token] for token in row) for row in rows)


@dataclass(frozen=True)
class MazeHard(Maze):
    """Walls in random places, and a shortest path of at least `shortest` steps: long for the size.

    The published Maze-Hard has 30x30 cells and paths of more than 110 (arXiv 2506.21734). One maze
    in a hundred is that hard, so most are thrown away.
    """

    size: int = 30
    shortest: int = 110
    name: str = "maze-hard"

    def __post_init__(self) -> None:
        if not 4 <= self.size <= hard.MOST_COLUMNS:
            raise bad_argument("tasks.maze", "size", f"4..{hard.MOST_COLUMNS}", self.size)
        if not 1 <= self.shortest <= self.seq_len // 2:
            raise bad_argument("tasks.maze", "shortest", f"1..{self.seq_len // 2}", self.shortest)

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        passable, start, goal = hard.mazes(rng, count, self.size, self.shortest)
        rows = np.arange(count)
        inputs = np.where(passable.reshape(count, self.seq_len), OPEN, WALL).astype(np.int64)
        inputs[rows, start], inputs[rows, goal] = START, GOAL
        return Examples(inputs, self.solve(inputs, rng))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        """A random turn or reflection alone: few pairs of cells of a maze are that far apart."""
        return self._turned(rng, examples)
