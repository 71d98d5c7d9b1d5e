"""Sudoku files as people have them are read the same; what is none is refused with its place."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from recurx import InvalidArgument, tasks
from recurx.experiments.tasks import questions
from recurx.experiments.tasks.sudoku import files
from recurx.experiments.tasks.sudoku.layout import Layout

PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
LAYOUT = Layout.of(9)


def lines_of(board: str, between: str = "", end: str = "\n") -> str:
    return end.join(between.join(board[i : i + 9]) for i in range(0, 81, 9))


def drawn(board: str) -> str:
    rows = [board[i : i + 9].replace("0", ".") for i in range(0, 81, 9)]
    text = [" | ".join(" ".join(row[c : c + 3]) for c in (0, 3, 6)) for row in rows]
    rule = "------+-------+------"
    return "\n".join([*text[:3], rule, *text[3:6], rule, *text[6:]])


BOTH = {
    "quizzes": f"quizzes,solutions\n{PUZZLE},{ANSWER}\n",
    "puzzle": f"puzzle,solution\n{PUZZLE},{ANSWER}\n",
    "question": f"question,answer\n{PUZZLE},{ANSWER}\n",
    "extreme": f"source,question,answer,rating\nbook #3,{PUZZLE},{ANSWER},42\n",
    "kaggle": f"id,puzzle,solution,clues,difficulty\n1,{PUZZLE},{ANSWER},30,2.2\n",
    "other order": f"solution,id,puzzle\n{ANSWER},1,{PUZZLE}\n",
    "capitals": f" Solution , QUIZ \n {ANSWER} , {PUZZLE} \n",
    "quoted": f'"question","answer"\n"{PUZZLE}","{ANSWER}"\n',
    "quoted after a space": f'question, answer\n"{PUZZLE}", "{ANSWER}"\n',
    "semicolons": f"question;answer\n{PUZZLE};{ANSWER}\n",
    "tabs": f"question\tanswer\n{PUZZLE}\t{ANSWER}\n",
    "bom": f"\ufeffquestion,answer\n{PUZZLE},{ANSWER}\n",
    "crlf": f"question,answer\r\n{PUZZLE},{ANSWER}\r\n",
    "old mac": f"question,answer\r{PUZZLE},{ANSWER}\r",
    "blank lines": f"\n\nquestion,answer\n\n{PUZZLE},{ANSWER}\n\n",
    "grid in a cell": f'question,answer\n"{lines_of(PUZZLE)}","{lines_of(ANSWER, " ")}"\n',
    "list in a cell": f'puzzle,solution\n"[{", ".join(PUZZLE)}]","[{", ".join(ANSWER)}]"\n',
    "no header": f"{PUZZLE},{ANSWER}\n",
    "no header, numbered": f'7;"{PUZZLE}";{ANSWER};3\n',
}
ALONE = {
    "line": PUZZLE,
    "dots": PUZZLE.replace("0", "."),
    "underscores": PUZZLE.replace("0", "_"),
    "stars": PUZZLE.replace("0", "*"),
    "spaced": " ".join(PUZZLE),
    "nine lines": lines_of(PUZZLE),
    "nine lines, spaced": lines_of(PUZZLE, " ", "\r\n"),
    "nine lines, commas": lines_of(PUZZLE, ","),
    "nine lines, commas, empty blanks": lines_of(PUZZLE, ",").replace("0", ""),
    "nine lines, tabs": lines_of(PUZZLE, "\t"),
    "drawn": drawn(PUZZLE),
    "titled": f"Grid 01\n{lines_of(PUZZLE)}",
    "empty answer": f"question,answer\n{PUZZLE},\n",
    "no cell of an answer": f"question,answer\n{PUZZLE}\n",
    "answer nan": f"question,answer\n{PUZZLE},NaN\n",
    "answer of blanks": f"question,answer\n{PUZZLE},{'.' * 81}\n",
    "81 cells": ",".join(PUZZLE),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*BOTH, *ALONE])
def test_files_as_people_have_them(tmp_path: Path, name: str, packed: bool) -> None:
    data = (BOTH | ALONE)[name].encode()
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data) if packed else data)
    read = files.read(path, LAYOUT)
    assert ["".join(map(str, row)) for row in read.puzzles.tolist()] == [PUZZLE]
    assert files.first_puzzle(path).translate({46: 48, 95: 48, 42: 48}) == PUZZLE
    assert read.known.tolist() == [name in BOTH]
    if name in BOTH:
        assert ["".join(map(str, row)) for row in read.answers.tolist()] == [ANSWER]
    assert read.ratings == ({"extreme": "42", "kaggle": "2.2"}.get(name, ""),)


@pytest.mark.parametrize("form", [lines_of, drawn, lambda board: f"Grid 5\n{lines_of(board, ' ')}"])
def test_grids_one_after_the_other(tmp_path: Path, form) -> None:
    path = tmp_path / "grids.txt"
    for between in ("\n", "\n\n", "\n# a comment\n"):
        path.write_text(between.join(map(form, [PUZZLE, ANSWER, PUZZLE])))
        read = files.read(path, LAYOUT)
        assert ["".join(map(str, row)) for row in read.puzzles] == [PUZZLE, ANSWER, PUZZLE]
        assert len(files.read(path, LAYOUT, limit=2)) == 2


@pytest.mark.parametrize("side", [4, 6])
def test_small_boards_are_told_by_their_lines(tmp_path: Path, side: int) -> None:
    task = tasks.get(f"sudoku-{side}x{side}")
    boards = tasks.Sampler(task, seed=1).draw(3).inputs - 1
    text = ["".join(map(str, row)) for row in boards.tolist()]
    path = tmp_path / "small.txt"
    path.write_text("\n".join(t[i : i + side] for t in text for i in range(0, side * side, side)))
    assert files.first_puzzle(path) == text[0]
    assert (files.read(path, task.layout).puzzles == boards).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"id,grid9\n1,{PUZZLE[:-1]}\n", r"bad:1: .*header.*question.*puzzle.*got 'id,grid9'"),
        (lines_of(PUZZLE)[:-10], r"bad:1: expected 81 characters.*got 72"),
        (f"{lines_of(PUZZLE)}\n123456789\n", r"bad:10: expected 81 characters.*got 3x3"),
        (f"question,answer\n{PUZZLE},{ANSWER[:-1]}\n", "bad:2, column answer: expected 81.*got 80"),
        (f"quizzes,Solutions\n{PUZZLE},{PUZZLE}\n", "column Solutions, character 3: expected 1-9,"),
        (f"question\n{PUZZLE}\n\n{PUZZLE[:-1]}x\n", "bad:4, column question, character 81: exp"),
        (f'question,answer\n"{PUZZLE},{ANSWER}\n{PUZZLE},{ANSWER}\n', "bad:3: not a row of a CSV"),
        (f'question,answer\n"{PUZZLE}"0,{ANSWER}\n', "bad:2: not a row of a CSV.*stray"),
        (f"question,answer\n{PUZZLE},{ANSWER},{ANSWER}\n", "bad:2: expected 2 cells.*got 3"),
        ("question,answer\n\n", "has no puzzle"),
        ("", "has no puzzle"),
        (PUZZLE * 20000, "has a line of"),
        (b"\x1f\x8b" + b"x" * 40, "cannot read"),
        (gzip.compress(f"{PUZZLE}\n".encode() * 999)[:-30], "cannot read"),
        (b"\x80\x81", "not a text file.*UTF-8"),
    ],
)
def test_what_is_none_is_refused_with_its_place(tmp_path: Path, text: str | bytes, says) -> None:
    path = tmp_path / "bad"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidArgument, match=says):
        files.read(path, LAYOUT)


def test_answers_that_a_file_leaves_out_are_searched(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    wrong = "1" * 81  # eval takes the file's word; training checks it
    path.write_text(
        f"question,answer\n{PUZZLE},\n{PUZZLE},{wrong}\n{PUZZLE},{ANSWER}\n{'0' * 81},\n"
    )
    found = questions.read(str(path), tasks.get("sudoku"), None, print)
    assert found.known is not None and found.known.tolist() == [True, True, True, False]
    answers = ["".join(map(str, row)) for row in (found.examples.answers[:3] - 1).tolist()]
    assert answers == [ANSWER, wrong, ANSWER]
    from recurx.experiments.tasks.sudoku import split

    with pytest.raises(InvalidArgument, match="puzzle 2: the answer in the file breaks"):
        split.load(Layout.of(9), path, 1)
    path.write_text(f"question,answer\n{PUZZLE},{ANSWER}\n{'0' * 81},\n")
    with pytest.raises(InvalidArgument, match="puzzle 2: it has more than one"):
        split.load(Layout.of(9), path, 1)
    assert np.isin(found.examples.inputs, np.arange(11)).all()
