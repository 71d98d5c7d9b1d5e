"""Tasks: puzzles are right and unique, splits are disjoint, checkers refuse wrong answers."""

from __future__ import annotations

import numpy as np
import pytest

from recurx import InvalidArgument, tasks
from recurx.experiments.tasks import Maze
from recurx.experiments.tasks.sudoku import files, generate, symmetry
from recurx.experiments.tasks.sudoku.layout import Layout, board_text, is_solution, to_boards
from recurx.experiments.tasks.sudoku.solver import solve

SMALL = (
    "sudoku-4x4",
    "sudoku-6x6:clues=20",
    "sort:length=6,values=5",
    "sort:length=4,values=9,tags=3",
    "maze:size=6",
    "maze-hard:size=7,shortest=10",
    "chain:length=6",
    "compose:length=4,degree=3",
    "reach:nodes=5",
    "order:people=4,names=8",
    "trades:trades=4",
)

# A published 17-clue puzzle with one solution.
SEVENTEEN = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"


def backtrack_count(layout: Layout, board: list[int], limit: int = 2) -> int:
    """Plain backtracking, written apart from the solver under test."""
    if 0 not in board:
        return 1
    cell = board.index(0)
    units = [set(unit) for unit in layout.units.tolist() if cell in unit]
    used = {board[c] for unit in units for c in unit}
    total = 0
    for digit in range(1, layout.size + 1):
        if digit not in used and total < limit:
            board[cell] = digit
            total += backtrack_count(layout, board, limit - total)
            board[cell] = 0
    return total


@pytest.mark.parametrize("size", [4, 6])
def test_generated_sudokus_have_one_solution_by_plain_backtracking(size: int) -> None:
    layout = Layout.of(size)
    puzzles, answers = generate.puzzles(layout, np.random.default_rng(0), 6)
    assert is_solution(layout, puzzles, answers).all()
    assert [backtrack_count(layout, list(p)) for p in puzzles.tolist()] == [1] * 6
    for cell in np.flatnonzero(puzzles[0]):  # minimal: without any one clue there are several
        fewer = puzzles[0].copy()
        fewer[cell] = 0
        assert backtrack_count(layout, list(fewer)) == 2


def test_solver_counts_like_plain_backtracking() -> None:
    layout, rng = Layout.of(4), np.random.default_rng(1)
    boards = generate.full_boards(layout, rng, 40)
    boards[rng.random(boards.shape) < 0.7] = 0
    boards[::5, 0] = 1 + boards[::5, 1] % 4  # some contradict themselves
    expected = [backtrack_count(layout, list(b)) if _consistent(layout, b) else 0 for b in boards]
    assert len(set(expected)) == 3
    assert solve(layout, boards).count.tolist() == expected


def _consistent(layout: Layout, board: np.ndarray) -> bool:
    return all(len(set(d)) == len(d) for u in layout.units for d in [board[u][board[u] > 0]])


def test_4x4_has_288_boards() -> None:
    empty = np.zeros((1, 16), dtype=np.int64)
    assert solve(Layout.of(4), empty, limit=10_000).count[0] == 288


def test_nine_by_nine_difficulties() -> None:
    layout, rng = Layout.of(9), np.random.default_rng(2)
    easy, answers = generate.puzzles(layout, rng, 4, clues=36, max_guesses=0)
    solved = solve(layout, easy)
    assert (solved.count == 1).all() and (solved.boards == answers).all()
    assert (solved.guesses == 0).all() and ((easy > 0).sum(axis=1) == 36).all()
    minimal, _ = generate.puzzles(layout, rng, 12)
    assert (solve(layout, minimal).guesses > 0).any()


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_keep_solutions_clues_and_orbit(size: int) -> None:
    layout, rng = Layout.of(size), np.random.default_rng(3)
    answers = generate.full_boards(layout, rng, 30)
    puzzles = answers * (rng.random(answers.shape) < 0.5)
    images, image_answers = symmetry.random_images(layout, rng, puzzles, answers)
    assert is_solution(layout, images, image_answers).all()
    assert ((images > 0).sum(axis=1) == (puzzles > 0).sum(axis=1)).all()
    assert (images != puzzles).any(axis=1).all()
    keys = symmetry.orbit_key(layout, answers)
    assert (symmetry.orbit_key(layout, image_answers) == keys).all()
    if size > 4:
        assert len(np.unique(keys, axis=0)) > 5  # the key tells orbits apart


@pytest.mark.parametrize("name", SMALL)
def test_examples_are_right_by_the_checker(name: str) -> None:
    task = tasks.get(name)
    drawn = tasks.Sampler(task, seed=5).draw(40)
    assert drawn.inputs.shape == drawn.answers.shape == (40, task.seq_len)
    assert drawn.inputs.min() >= 1 and drawn.answers.max() < task.vocab_size
    assert task.check(drawn.inputs, drawn.answers).all()
    fresh = task.generate(np.random.default_rng(0), 3)
    assert task.check(fresh.inputs, fresh.answers).all()
    assert len(task.text(drawn.inputs[0]).splitlines()) >= 1


@pytest.mark.parametrize("name", SMALL)
def test_checker_refuses_every_single_wrong_token(name: str) -> None:
    task = tasks.get(name)
    drawn = tasks.Sampler(task, seed=5).draw(1)
    for cell in range(task.seq_len):
        for token in range(task.vocab_size):
            wrong = drawn.answers.copy()
            wrong[0, cell] = token
            same = bool((wrong == drawn.answers).all())
            assert bool(task.check(drawn.inputs, wrong)[0]) == same, (cell, token)


def test_checker_refuses_a_valid_board_that_drops_a_given() -> None:
    task = tasks.get("sudoku-4x4")
    drawn = tasks.Sampler(task, seed=5).draw(1)
    other = generate.full_boards(Layout.of(4), np.random.default_rng(0), 50) + 1
    right = task.check(np.repeat(drawn.inputs, 50, axis=0), other)
    keeps = ((drawn.inputs == 1) | (drawn.inputs == other)).all(axis=1)
    assert (right == keeps).all() and not right.all()


def test_records_have_different_keys_and_the_keys_alone_decide_on_their_side() -> None:
    task = tasks.get("sort:length=4,values=9,tags=3")
    drawn = task.generate(np.random.default_rng(0), 200)
    keys, tags = np.divmod(drawn.inputs - 1, 3)
    assert (np.diff(np.sort(keys, axis=1)) > 0).all() and set(np.unique(tags)) == {0, 1, 2}
    others = (tags + np.random.default_rng(1).integers(3, size=tags.shape)) % 3
    retagged = tasks.Examples(keys * 3 + others + 1, drawn.answers)
    held = task.held_out(drawn)
    assert (task.held_out(retagged) == held).all() and 0 < held.sum() < len(held)
    assert task.text(np.array([0, 1, 18])) == ". 0:0 5:2"
    bare = tasks.get("sort:length=4,values=6")
    assert bare.text(np.array([0, 1, 6])) == ". 0 5"


def test_maze_checker_takes_any_shortest_path_and_refuses_detours() -> None:
    task = Maze(size=4)
    ids = {c: i for i, c in enumerate("?# SGo")}

    def tokens(text: str) -> np.ndarray:
        return np.array([[ids[c] for c in text]])

    question = tokens("S  #   #  G#####")
    assert task.check(question, tokens("Soo#  o#  G#####"))[0]
    assert task.check(question, tokens("S  #o  #ooG#####"))[0]
    assert not task.check(question, tokens("S  #o  #o G#####"))[0]  # broken
    assert not task.check(question, tokens("Soo#ooo#ooG#####"))[0]  # too much
    assert not task.check(question, tokens("So## o## oG#####"))[0]  # walls moved


@pytest.mark.parametrize("name", SMALL)
def test_splits_are_disjoint(name: str) -> None:
    task = tasks.get(name)
    train = tasks.Sampler(task, seed=5).draw(400)
    test = tasks.Sampler(task, seed=5, split="held-out").draw_distinct(60)
    assert task.held_out(test).all() and not task.held_out(train).any()
    if not name.startswith(("sudoku-4x4", "chain")):  # the side survives every symmetry
        assert task.held_out(task.augment(np.random.default_rng(1), test)).all()
    seen = {row.tobytes() for row in train.inputs}
    assert seen.isdisjoint(row.tobytes() for row in test.inputs)
    assert len({row.tobytes() for row in test.inputs}) == len(test)


def test_4x4_holds_out_whole_kinds_of_boards() -> None:
    task = tasks.get("sudoku-4x4")
    every = np.unique(generate.full_boards(Layout.of(4), np.random.default_rng(0), 6000), axis=0)
    assert len(every) == 288
    held = task.held_out(tasks.Examples(every + 1, every + 1))
    assert held.sum() == 48  # 2 of the 12 kinds of 24 boards


@pytest.mark.parametrize("name", SMALL)
def test_sampler_resumes_exactly(name: str) -> None:
    task = tasks.get(name)
    whole, first = tasks.Sampler(task, seed=5), tasks.Sampler(task, seed=5)
    first.draw(8)
    state = first.state_dict()
    resumed = tasks.Sampler(task, seed=5)
    resumed.load_state_dict(state)
    whole.draw(8)
    assert (whole.draw(8).inputs == resumed.draw(8).inputs).all()
    assert (tasks.Sampler(task, seed=6).draw(8).inputs != whole.draw(8).inputs).any()


def test_reads_lines_comments_and_csv(tmp_path) -> None:
    layout = Layout.of(9)
    text = tmp_path / "puzzles.txt"
    text.write_text(f"# a comment\n\n{SEVENTEEN.replace('0', '.')}  # hard\n{SEVENTEEN}\n")
    read = files.read(text, layout)
    assert len(read) == 2 and (read.puzzles[0] == read.puzzles[1]).all()
    assert len(files.read(text, layout, limit=1)) == 1
    answer = "".join(map(str, solve(layout, read.puzzles[:1]).boards[0]))
    table = tmp_path / "extreme.csv"
    table.write_text(f"source,question,answer,rating\nbook,{SEVENTEEN},{answer},42\n")
    read = files.read(table, layout)
    assert read.ratings == ("42",) and read.known.all()
    assert is_solution(layout, read.puzzles, read.answers).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SEVENTEEN[:-1], "bad.txt:1: expected 81 characters.*got 80 characters"),
        (f"{SEVENTEEN}\n{SEVENTEEN[:-1]}x", "bad.txt:2, character 81: expected 1-9"),
        ("# nothing\n", "no puzzle"),
        (f"source,question,answer,rating\nbook,{SEVENTEEN},12,3\n", "bad.txt:2, column answer"),
        ("source,question,answer,rating\n", "no puzzle"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=says):
        files.read(path, Layout.of(9))


def test_missing_and_binary_files(tmp_path) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        files.read(tmp_path / "none.txt", Layout.of(9))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InvalidArgument, match="not a text file"):
        files.read(tmp_path / "binary", Layout.of(9))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("chess", "expected one of sudoku"),
        ("maze:width=3", "options size, shortest"),
        ("sort:length=x", "length"),
        ("sort:tags=0", "tags.*at least 1"),
        ("sort:length=9,values=8,tags=2", "at least length=9"),
        ("sudoku:size=5", "4, 6, 9"),
        ("sudoku-4x4:size=9", "options clues"),
        ("sudoku-4x4:clues=3", "4..16"),
    ],
)
def test_unknown_names_list_the_known(name: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        tasks.Sampler(tasks.get(name))


def test_puzzles_without_one_solution_are_refused() -> None:
    task = tasks.get("sudoku-4x4")
    drawn = tasks.Sampler(task, seed=5).draw(5)
    assert (task.examples(to_boards(drawn.inputs)).answers == drawn.answers).all()
    with pytest.raises(InvalidArgument, match="more than one"):
        task.examples(np.zeros((1, 16), dtype=np.int64))
    with pytest.raises(InvalidArgument, match="none"):
        task.examples(np.array([[1, 1] + [0] * 14]))


def test_board_text_draws_boxes() -> None:
    board = np.arange(16) % 5
    assert board_text(Layout.of(4), board).splitlines()[2] == "----+----"
    assert to_boards(np.array([[0, 1, 2]])).tolist() == [[0, 0, 1]]
