"""Mazes: searches agree with a plain one, hard mazes are hard, files are read, answers are judged
by the rules alone."""

from __future__ import annotations

import numpy as np
import pytest

from recurx import InvalidArgument, RecurxError, tasks
from recurx.experiments.tasks.maze import GOAL, PATH, START, WALL, Maze, files, hard, paths

HARD = "maze-hard:size=12,shortest=24"
# Two shortest paths, of 4 steps.
SQUARE = "S  #   #  G#####"
ROUND_THE_CORNER, STRAIGHT_DOWN = "Soo#  o#  G#####", "S  #o  #ooG#####"


@pytest.fixture(scope="module")
def drawn() -> tasks.Examples:
    return tasks.get(HARD).generate(np.random.default_rng(0), 20)


def test_searches_agree_with_a_plain_one() -> None:
    rng, size = np.random.default_rng(1), 9
    passable = rng.random((30, size, size)) > 0.35
    start = np.array([rng.choice(np.flatnonzero(grid)) for grid in passable])
    steps = paths.distances(passable, start)
    far, longest = hard._farthest(hard._as_rows(passable), start)
    maze = Maze(size=size)
    for row, grid in enumerate(passable):
        plain = maze._distances(np.where(grid.reshape(-1), 0, WALL), int(start[row]))
        expected = np.full(size * size, paths.UNREACHED)
        expected[list(plain)] = list(plain.values())
        assert steps[row].tolist() == expected.tolist()
        assert longest[row] == expected.max() == steps[row, far[row]]


def test_hard_mazes_have_long_shortest_paths_and_often_several(drawn: tasks.Examples) -> None:
    task = tasks.get(HARD)
    assert task.check(drawn.inputs, drawn.answers).all()
    assert ((drawn.answers == PATH).sum(axis=1) + 1 >= 24).all()
    others = task.solve(drawn.inputs, np.random.default_rng(5))
    assert task.check(drawn.inputs, others).all()
    assert (others != drawn.answers).any(axis=1).sum() > 5


def test_images_of_a_maze_ask_for_other_ways_on_the_same_side() -> None:
    task = tasks.get("maze:size=8,shortest=9")
    drawn = task.generate(np.random.default_rng(0), 60)
    images = task.augment(np.random.default_rng(1), drawn)
    assert task.check(images.inputs, images.answers).all()
    assert (task.held_out(images) == task.held_out(drawn)).all()
    assert ((images.answers == PATH).sum(axis=1) + 1 >= 9).all()

    def least(inputs: np.ndarray) -> list[tuple[int, ...]]:
        """Each maze by one name for all its turns and reflections."""
        return [min(map(tuple, row[task._images])) for row in inputs]

    def walls(inputs: np.ndarray) -> np.ndarray:
        return (inputs == WALL).astype(int)

    assert least(walls(images.inputs)) == least(walls(drawn.inputs))
    pairs = zip(least(images.inputs), least(drawn.inputs), strict=True)
    assert sum(one != other for one, other in pairs) > 50, "another S and G"
    # From most starts of a maze nothing is that far: then the pair that it has stays.
    longest = tasks.get("maze:size=8,shortest=16")
    drawn = longest.generate(np.random.default_rng(0), 20)
    images = longest.augment(np.random.default_rng(1), drawn)
    assert ((images.answers == PATH).sum(axis=1) + 1 >= 16).all()
    assert longest.check(images.inputs, images.answers).all()


def test_images_of_hard_mazes_are_as_hard(drawn: tasks.Examples) -> None:
    task = tasks.get(HARD)
    images = task.augment(np.random.default_rng(1), drawn)
    assert task.check(images.inputs, images.answers).all()
    assert ((images.answers == PATH).sum(axis=1) == (drawn.answers == PATH).sum(axis=1)).all()


def test_checker_needs_no_label_and_refuses_near_misses(drawn: tasks.Examples) -> None:
    task = tasks.get(HARD)

    def refused(wrong: np.ndarray) -> bool:
        return not task.check(drawn.inputs, wrong).any()

    rows = np.arange(len(drawn))
    gap, extra = drawn.answers.copy(), drawn.answers.copy()
    gap[rows, (gap == PATH).argmax(axis=1)] = drawn.inputs[rows, (gap == PATH).argmax(axis=1)]
    extra[rows, (extra == 2).argmax(axis=1)] = PATH
    assert refused(gap) and refused(extra) and refused(drawn.inputs)
    swapped = np.select([drawn.answers == START, drawn.answers == GOAL], [GOAL, START], gap)
    assert refused(swapped)
    opened = np.where(drawn.answers == WALL, 2, drawn.answers)
    assert refused(opened)


def test_detour_of_a_right_length_walk_is_refused() -> None:
    """As many marked cells as the shortest path has, connected to S, but not to G."""
    task = Maze(size=4)
    ids = {c: i for i, c in enumerate("?# SGo")}
    question, dead_end = (np.array([[ids[c] for c in t]]) for t in (SQUARE, "So #oo #  G#####"))
    assert (dead_end == PATH).sum() == 3
    assert not task.check(question, dead_end)[0]


def test_impossible_length_ends_in_an_error(monkeypatch) -> None:
    monkeypatch.setattr(hard, "MOST_ROUNDS", 2)
    with pytest.raises(RecurxError, match="ask for fewer"):
        tasks.get("maze-hard:size=10,shortest=50").generate(np.random.default_rng(0), 1)
    with pytest.raises(InvalidArgument, match="shortest"):
        tasks.get("maze-hard:size=6,shortest=19")


def test_csv_with_and_without_answers(tmp_path) -> None:
    task, path = Maze(size=4), tmp_path / "mazes.csv"
    path.write_text(
        "source,question,answer,rating\n"
        f"a,{SQUARE},{ROUND_THE_CORNER},4\nb,{SQUARE},{STRAIGHT_DOWN},4\nc,{SQUARE},,4\n"
    )
    examples, known = files.read(path, task)
    assert known.tolist() == [True, True, False]
    assert task.check(examples.inputs, examples.answers).all()
    assert (examples.answers[0] != examples.answers[1]).any()
    assert task.text(examples.answers[0]).replace("\n", "") == ROUND_THE_CORNER
    assert len(files.read(path, task, limit=2)[0]) == 2
    path.write_text(f"question\n{SQUARE}\n")
    assert not files.read(path, task)[1].any()


ROWS = [SQUARE[i : i + 4] for i in range(0, 16, 4)]


@pytest.mark.parametrize(
    "text",
    [
        f"\ufeffsource;Rating;ANSWER ; Question\r\na;4;{STRAIGHT_DOWN};{SQUARE}\r\n",
        f'id\tmaze\tsolution\n1\t"{SQUARE}"\t"{STRAIGHT_DOWN}"\n\n',
        "question,answer\n" + ",".join(f'"{chr(10).join(rows)}"' for rows in (
            ROWS, [STRAIGHT_DOWN[i : i + 4] for i in range(0, 16, 4)])) + "\n",
        f"{SQUARE},{STRAIGHT_DOWN}\n",
    ],
)  # fmt: skip
def test_mazes_as_people_have_them(tmp_path, text: str) -> None:
    task, path = Maze(size=4), tmp_path / "mazes.csv"
    path.write_bytes(text.encode())
    examples, known = files.read(path, task)
    assert known.tolist() == [True]
    assert task.text(examples.inputs[0]).replace("\n", "") == SQUARE
    assert task.text(examples.answers[0]).replace("\n", "") == STRAIGHT_DOWN
    path.write_text("\n\n".join("\n".join(ROWS) for _ in range(3)))
    examples, known = files.read(path, task)
    assert task.text(examples.inputs[2]).replace("\n", "") == SQUARE and not known.any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("labyrinth\nx\n", "header that has the column question.*'labyrinth'"),
        ("question\n", "no maze"),
        (
            f"question\n{SQUARE}\n{SQUARE[:-1]}\n",
            ":3, column question: expected 16 characters.*15 characters",
        ),
        (f"question\n{SQUARE[:9]}\n", "got 3x3"),
        (f"question\n{SQUARE[:-1]}x\n", "character 16: expected one of"),
        (f"question\n{ROUND_THE_CORNER}\n", "o is for answers"),
        (f"question\n{SQUARE}\n{SQUARE.replace('G', ' ')}\n", "maze 2"),
        ("question\nS###########   G\n", "a way between them"),
        (f'question,answer\n{SQUARE},"{STRAIGHT_DOWN}\n{SQUARE},\n', ":3: not a row of a CSV"),
        (f'question\n"{SQUARE}"x\n', ":2: not a row of a CSV.*stray"),
        (f"question\n{SQUARE},,x\n", ":2: expected 1 cells, as in the header, got 3"),
    ],
)
def test_bad_files_say_where(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "mazes.csv"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=says):
        files.read(path, Maze(size=4))


def test_eval_reads_mazes(tmp_path, capsys) -> None:
    """Through the command: any shortest path counts as exact, whatever the file's answer is."""
    import json

    from recurx import commands
    from recurx.checkpoint import save_checkpoint
    from recurx.models import TRM, TRMConfig

    checkpoint = str(tmp_path / "model.safetensors")
    model = TRM(TRMConfig.tiny(vocab_size=6, seq_len=16, hidden_size=16))
    save_checkpoint(checkpoint, model, {"task": "maze:size=4"})
    path = tmp_path / "mazes.csv"
    path.write_text(f"source,question,answer,rating\na,{SQUARE},{STRAIGHT_DOWN},4\n")
    code = commands.main(["eval", "--checkpoint", checkpoint, "--puzzles", str(path), "--json"])
    assert code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["count"] == 1 and 0 <= report["cells"] <= 1
