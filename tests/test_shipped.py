"""The nets that come with recurx, and the commands that use them when no checkpoint is named."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import recurx
from recurx.commands import main
from recurx.experiments.tasks.sudoku.layout import Layout
from recurx.experiments.tasks.sudoku.solver import solve as search
from recurx.models import TRM, TRMConfig

EASY = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
HARD = "000000039000001005003050800008090006070002000100400000009080050020000600400700000"
MOST_BYTES = 6_000_000


def module():
    return importlib.import_module("recurx.shipped_nets")


@pytest.fixture
def net(tmp_path: Path, monkeypatch) -> Path:
    """A throw-away 9x9 net in place of the package's."""
    torch.manual_seed(0)
    model = TRM(TRMConfig.tiny(11, 81, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1))
    path = tmp_path / "package" / module().NETS["sudoku"]
    path.parent.mkdir(parents=True)
    recurx.save_checkpoint(
        path, model, {"task": "sudoku", "solve": {"max_steps": 3, "halt": "any", "patience": 1}}
    )
    monkeypatch.setattr(module(), "PACKAGE", tmp_path / "package")
    return path


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


# ---- the registry ------------------------------------------------------------------------------


def test_every_net_in_the_package_is_registered_loads_and_is_small() -> None:
    folder = module().PACKAGE
    present = {f"data/{p.name}" for p in (folder / "data").glob("*.safetensors")}
    assert present <= set(module().NETS.values())
    for task, file in module().NETS.items():
        if not module().available(task):
            continue
        assert (folder / file).stat().st_size < MOST_BYTES
        loaded = recurx.shipped(task)
        game = recurx.tasks.get(task)
        assert (loaded.config.seq_len, loaded.config.vocab_size) == (game.seq_len, game.vocab_size)
        batch = {"inputs": torch.ones(1, game.seq_len, dtype=torch.int64)}
        recurx.solve(loaded.build(), batch, **{**loaded.recommended, "max_steps": 1})
    assert recurx.shipped("sudoku-6x6:clues=12").path == folder / module().NETS["sudoku-6x6"]


def test_what_does_not_ship_is_said(net: Path) -> None:
    with pytest.raises(recurx.InvalidArgument, match="no net ships for maze; nets ship for sudoku"):
        recurx.shipped("maze:size=9")
    net.unlink()
    with pytest.raises(
        recurx.InvalidArgument, match=r"has no net for sudoku .*recurx train sudoku"
    ):
        recurx.shipped()
    assert not module().available("sudoku")


# ---- the commands ------------------------------------------------------------------------------


def puzzle_file(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "puzzles.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_eval_needs_no_checkpoint_and_takes_untidy_files(net: Path, tmp_path, capsys) -> None:
    twice = EASY.replace("5", "0", 1).replace("3", "0", 1)
    untidy = (
        f"\ufeff# a title\r\n\r\n  {EASY}  \r\n{HARD.replace('0', '.')}\t# hard\r\n   \r\n"
        f"{'0' * 81}\r\n55{'0' * 79}\n{twice}"
    )
    assert main(["eval", "sudoku", "--puzzles", puzzle_file(tmp_path, untidy), "--json"]) == 0
    printed = "".join(capsys.readouterr()[::-1])  # JSON is all of stdout
    result = last_json(printed)
    assert result["count"] == 5 and result["exact"] == 0 and 0 <= result["cells"] <= 1
    assert result["steps_mean"] <= 3 and result["seconds"] > 0 and result["answers_seconds"] > 0
    assert result["checkpoint"] == str(net)
    assert "the net recommends" in printed and "without a unique solution" in printed

    unsolvable = puzzle_file(tmp_path, f"{'0' * 81}\n55{'0' * 79}\n")
    assert main(["eval", "--puzzles", unsolvable, "--max-steps", "2", "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert result["cells"] is None and result["count"] == 2 and len(result["curve"]) <= 2


def test_puzzles_of_several_solutions_are_judged_by_the_rules(net, tmp_path, capsys, monkeypatch):
    """A right answer that is not the solver's counts; the same with a wrong given does not."""
    layout = Layout.of(9)
    open_puzzle = [0] * 81  # every solved board answers it
    one = search(layout, [[int(c) for c in EASY]]).boards[0]
    swap = {1: 2, 2: 1}
    other = [swap.get(d, d) for d in one.tolist()]
    given = [other[0], *open_puzzle[1:]]
    wrong = [other[0] % 9 + 1, *open_puzzle[1:]]
    text = "\n".join("".join(map(str, p)) for p in (open_puzzle, given, wrong))
    tokens = torch.tensor([[d + 1 for d in other]]).expand(3, -1)
    flat = torch.ones(3, dtype=torch.int64)
    planted = recurx.Answers(tokens, flat, flat.float(), flat.bool(), flat[:, None],
                             trace=tokens[None])  # fmt: skip
    monkeypatch.setattr(
        importlib.import_module("recurx.train.evaluate"), "solve", lambda *a, **k: planted
    )
    assert main(["eval", "--puzzles", puzzle_file(tmp_path, text), "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert result["exact"] == pytest.approx(2 / 3) and result["cells"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{EASY}\n\n{EASY[:-1]}\n", "puzzles.txt:3: expected 81 characters"),
        (f"{EASY}\r\n{EASY[:-1]}x\r\n", "puzzles.txt:2, character 81: expected 1-9"),
        ("", "has no puzzle"),
        ("# nothing\r\n\r\n", "has no puzzle"),
        (f"question,answer\n{EASY},{'1' * 80}\n", "puzzles.txt:2, column answer: expected 81"),
        (b"\xff\xfe\x00\x01", "not a text file"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(text, says, net, tmp_path, capsys) -> None:
    for command in ("eval", "solve"):
        assert main([command, "--puzzles", puzzle_file(tmp_path, text)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_solve_chooses_the_net_by_the_length_of_the_puzzle(net, tmp_path, capsys) -> None:
    assert main(["solve", EASY, "--json"]) in (0, 1)
    assert len(last_json(capsys.readouterr().out)["answers"][0]) == 81
    assert main(["solve", "." * 16]) == 2
    assert "no net ships for sudoku-4x4" in capsys.readouterr().err
    assert main(["solve", EASY[:-2]]) == 2
    assert "puzzle 1: expected 81 characters" in capsys.readouterr().err
    assert main(["solve", "--puzzles", puzzle_file(tmp_path, f"#\n{'.' * 36}\n")]) == 2
    assert "this installation has no net for sudoku-6x6" in capsys.readouterr().err
    table = puzzle_file(tmp_path, f"source,question,answer\nbook, {EASY} ,\n")
    assert main(["solve", "--puzzles", table]) in (0, 1)


def test_what_the_user_says_goes_before_what_the_net_recommends(net, tmp_path, capsys) -> None:
    file = puzzle_file(tmp_path, f"{EASY}\n{HARD}\n")
    steps = {}
    for name, said in {
        "net": [], "halt": ["--halt", "none"], "both": ["--halt", "none", "--max-steps", "5"]
    }.items():  # fmt: skip
        assert main(["eval", "--puzzles", file, *said, "--json"]) == 0
        steps[name] = last_json(capsys.readouterr().out)["steps_mean"]
    assert steps["net"] <= 3 and steps["halt"] == 3 and steps["both"] == 5


def test_eval_draws_a_curve_and_compares_exits(net, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    file = puzzle_file(tmp_path, f"{EASY}\n{HARD}\n")
    picture = tmp_path / "curve.png"
    arguments = ["eval", "--puzzles", file, "--curve", str(picture), "--compare-exit"]
    more = ["--max-steps", "4", "--rollouts", "2", "--init", "random", "--json"]
    assert main([*arguments, *more]) == 0
    printed = "".join(capsys.readouterr()[::-1])  # JSON is all of stdout
    result = last_json(printed)
    assert picture.read_bytes()[:4] == b"\x89PNG" and "Early exit, 2 puzzles" in printed
    assert [(p["rollouts"], p["max_steps"]) for p in result["points"]] == [
        (r, s) for r in (1, 2) for s in (1, 2, 4)
    ]
    assert result["exits"][0]["name"] == "always 4 steps" and len(result["exits"]) > 5
    assert main(["eval", "--puzzles", file, "--curve", str(tmp_path / "c.pdf")]) == 2
    assert ".png or .svg" in capsys.readouterr().err
    assert main(["eval", "--puzzles", file, "--rollouts", "2"]) == 2
    assert "without --sigma or --init random" in capsys.readouterr().err


def test_demo_solves_a_typed_puzzle_and_says_how_it_went(net, capsys, monkeypatch) -> None:
    assert main(["demo", "--puzzle", EASY]) == 1
    printed = capsys.readouterr().out
    assert "a puzzle of one solution" in printed and "Not solved" in printed
    assert "51 blank" in printed and "wrong" in printed
    assert main(["demo", "--puzzle", EASY[:-1]]) == 2
    assert "puzzle 1: expected 81 characters" in capsys.readouterr().err
    assert main(["demo", "--puzzle", "55" + "0" * 79]) == 1
    assert "no solution" in capsys.readouterr().out

    answer = search(Layout.of(9), [[int(c) for c in EASY]]).boards
    tokens = torch.from_numpy(answer) + 1
    flat = torch.ones(1, dtype=torch.int64)
    start = torch.tensor([[int(c) + 1 for c in EASY]])
    planted = recurx.Answers(tokens, 2 * flat, flat.float(), flat.bool(), 2 * flat[:, None],
                             trace=torch.stack([start, tokens]))  # fmt: skip
    monkeypatch.setattr(recurx, "solve", lambda *a, **k: planted)
    assert main(["demo", "--puzzle", EASY]) == 0
    printed = capsys.readouterr().out
    assert "after steps 1, 2 of 2" in printed and "Solved." in printed
    assert printed.count("51 blank") == 2 and printed.count("solved") == 1
    assert "tries" not in printed
    planted = dataclasses.replace(planted, rollout_steps=torch.tensor([[3, 2, 0]]))
    assert main(["demo", "--puzzle", EASY]) == 0
    assert "of 2, the best of 2 tries; a puzzle of one" in capsys.readouterr().out


def test_demo_asks_only_where_somebody_can_answer(net, monkeypatch) -> None:
    from rich.console import Console

    from recurx.experiments.demo import shipped_net

    class Typist:
        def __init__(self, terminal: bool) -> None:
            self.terminal = terminal

        def isatty(self) -> bool:
            return self.terminal

    model, task = recurx.shipped().build(), recurx.tasks.get("sudoku")
    asked: list[str] = []
    typed = iter(["12", EASY, ""])
    console = Console(force_terminal=True, quiet=True)
    monkeypatch.setattr(console, "input", lambda text: (asked.append(text), next(typed))[1])
    filled = []
    monkeypatch.setattr(shipped_net, "fill", lambda *a: filled.append(a[3]))
    monkeypatch.setattr(sys, "stdin", Typist(False))
    shipped_net.ask(console, model, task, {})
    assert not asked
    monkeypatch.setattr(sys, "stdin", Typist(True))
    shipped_net.ask(console, model, task, {})
    assert len(asked) == 3 and len(filled) == 1
