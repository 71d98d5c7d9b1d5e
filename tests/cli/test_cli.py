"""The command line: in this process for speed, in its own where signals and exit codes matter."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import recurx
from recurx import tasks
from recurx.cli import options, output
from recurx.commands import COMMANDS, main
from recurx.experiments import printed
from recurx.experiments.demo import engines, full_size, learn
from recurx.experiments.tasks.sudoku import files, solver
from recurx.experiments.tasks.sudoku.layout import Layout
from recurx.models import TRM, TRMConfig
from recurx.train import Report

TINY = ["--set", "hidden_size=16", "--set", "num_heads=2", "--batch-size", "8"]
PUZZLE = "1...4....1.....2"  # 4x4, not necessarily of one solution


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A short run on 4x4 Sudoku."""
    folder = tmp_path_factory.mktemp("run") / "first"
    arguments = ["train", "sudoku-4x4", "--steps", "6", "--eval-every", "3", "--eval-count", "16"]
    assert main([*arguments, *TINY, "--out", str(folder)]) == 0
    return folder


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def only_json(capsys) -> tuple[dict, str]:
    """What stdout has, which is nothing but JSON, and what was said on stderr."""
    printed, said = capsys.readouterr()
    return json.loads(printed), said


# ---- train, eval, solve ------------------------------------------------------------------------


def test_train_writes_a_checkpoint_and_metrics_and_resumes(run_folder: Path, capsys) -> None:
    assert {p.name for p in run_folder.iterdir()} == {
        "model.safetensors", "state.safetensors", "metrics.jsonl"
    }  # fmt: skip
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert {"exact", "curve"} <= lines[0]["held_out"].keys()
    assert main(["train", "--resume", str(run_folder), "--steps", "8", "--json"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["step"] == 8 and json.loads(printed)["ended"] == "steps"
    assert "go on with: python -m recurx train --resume" in said  # stdout has JSON alone


def test_train_help_lists_every_task(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = capsys.readouterr().out.replace(";", ",").replace("\n", " ").replace(",", " ").split()
    assert set(tasks.NAMES) <= set(words) and "arc-2" in words


def test_train_refuses_to_overwrite_and_to_change_a_run(run_folder: Path, capsys) -> None:
    assert main(["train", "sudoku-4x4", "--out", str(run_folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", str(run_folder), "--lr", "1"]) == 2
    assert "leave out --lr" in capsys.readouterr().err
    assert main(["train", "--resume", str(run_folder), "--lr-decay", "none", "--set", "a=1"]) == 2
    assert "leave out --lr-decay, --set" in capsys.readouterr().err
    assert main(["train", "--resume", str(run_folder), "--seed", "0"]) == 2
    assert "leave out --seed" in capsys.readouterr().err
    assert main(["train", "sort", "--resume", str(run_folder)]) == 2
    assert "is a run of sudoku-4x4" in capsys.readouterr().err
    weights = str(run_folder / "model.safetensors")
    assert main(["train", "--resume", str(run_folder), "--start-from", weights]) == 2
    assert "leave out --start-from" in capsys.readouterr().err


def test_eval_on_held_out_puzzles_and_on_a_file(run_folder: Path, tmp_path, capsys) -> None:
    checkpoint = ["--checkpoint", str(run_folder / "model.safetensors")]
    assert main(["eval", *checkpoint, "--count", "20", "--max-steps", "3", "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert (result["count"], result["task"]) == (20, "sudoku-4x4")
    assert {"exact", "cells", "steps_mean", "seconds"} <= result.keys()
    assert len(result["curve"]) <= 3 and result["steps_mean"] <= 3

    file = tmp_path / "puzzles.txt"
    file.write_text(f"# two, the second without a unique solution\n1234341221434321\n{'.' * 16}\n")
    arguments = ["eval", "sudoku-4x4", *checkpoint, "--puzzles", str(file), "--halt", "none"]
    assert main([*arguments, "--json"]) == 0
    result, printed = only_json(capsys)
    assert result["count"] == 2 and result["steps_mean"] == 16 and 0 <= result["cells"] <= 1
    assert "16 steps" in printed


def test_eval_says_which_rule_halts_and_offers_that_of_training(run_folder: Path, capsys) -> None:
    checkpoint = ["--checkpoint", str(run_folder / "model.safetensors"), "--count", "16", "--json"]
    assert main(["eval", *checkpoint]) == 0
    result, printed = only_json(capsys)
    assert "halts  at q > 0, after 16 steps at most (--halt q, the default;" in printed
    assert "as `train` evaluates, all 8 steps: " in printed
    asked = printed.split("as `train` evaluates: ")[1].split(")")[0].split()
    assert main(["eval", *checkpoint, *asked]) == 0
    as_asked, printed = only_json(capsys)
    assert as_asked["halt"] is None and as_asked["histogram"] == {"8": 16}
    trained = {"max_steps": 8, "count": 16, "exact": as_asked["exact"]}
    assert result["halt"] == "q" and result["as_trained"] == trained
    assert "halts  never, after 8 steps at most (--halt none)" in printed
    assert "as_trained" not in as_asked and "as `train`" not in printed  # somebody chose


def test_eval_says_so_when_halting_costs_accuracy(run_folder: Path, monkeypatch, capsys) -> None:
    """Planted figures: 65 % where q halts, 88 % in all steps, and the other way round."""
    exact = {"q": 0.65, None: 0.88}

    def planted(*_: object, halt: str | None, **__: object) -> Report:
        return Report(512, exact[halt], None, 1.0, 0.1, (exact[halt],), {1: 512})

    monkeypatch.setattr(recurx.train, "evaluate", planted)
    command = ["eval", "--checkpoint", str(run_folder / "model.safetensors")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "exact  65.00%" in printed and "all 8 steps: 88.00% exact (--halt none" in printed
    assert "q ends puzzles too early" in printed
    exact["q"] = 0.88
    assert main(command) == 0
    assert "too early" not in capsys.readouterr().out


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path, capsys) -> None:
    folder = tmp_path / "a[red] [" / "b]"
    arguments = ["train", "sudoku-4x4", "--steps", "1", "--eval-count", "4", "--eval-every", "1"]
    assert main([*arguments, *TINY, "--out", str(folder)]) == 0
    assert f"weights: {folder}/model.safetensors" in capsys.readouterr().out
    checkpoint = ["--checkpoint", str(folder / "model.safetensors")]
    puzzles = folder.parent / "b].txt"
    puzzles.write_text("1234341221434321\n")
    assert main(["eval", *checkpoint, "--puzzles", str(puzzles)]) == 0
    assert f"1 puzzles from {puzzles}" in capsys.readouterr().out
    console = output.make_console()
    console.print(output.table("[/b] a", ["[/b] b"], [["[/b] c"]]))
    printed = capsys.readouterr().out
    assert all(f"[/b] {name}" in printed for name in "abc")


def test_solve_prints_boards_and_tells_by_the_exit_code(run_folder: Path, tmp_path, capsys) -> None:
    checkpoint = ["--checkpoint", str(run_folder / "model.safetensors")]
    code = main(["solve", PUZZLE, "." * 16, *checkpoint, "--json"])
    result, printed = only_json(capsys)
    assert code == (0 if all(result["solved"]) else 1) and len(result["answers"]) == 2
    assert f"{sum(result['solved'])} of 2 solved" in printed
    assert "1 . | . .     " in printed
    file = tmp_path / "p.txt"
    file.write_text(PUZZLE)
    assert main(["solve", "--puzzles", str(file), *checkpoint]) == code


def test_solve_judges_by_the_rules(run_folder: Path, capsys, monkeypatch) -> None:
    """A solver that answers right, planted in place of the model, is believed; a wrong one not."""
    checkpoint = ["--checkpoint", str(run_folder / "model.safetensors")]
    for answer, code in (("1234341221434321", 0), ("1234341221434312", 1)):
        tokens = torch.tensor([[int(c) + 1 for c in answer]])
        planted = recurx.Answers(
            tokens, torch.ones(1, dtype=torch.int64), torch.zeros(1),
            torch.ones(1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.int64),
        )  # fmt: skip
        monkeypatch.setattr(recurx, "solve", lambda *a, planted=planted, **k: planted)
        assert main(["solve", "12343412214343.1", *checkpoint]) == code
        assert f"{1 - code} of 1 solved" in capsys.readouterr().out


# ---- mistakes of the user ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "name a task"),
        (["train", "chess"], "expected one of sudoku"),
        (["train", "sort", "--preset", "huge"], "preset of trm-att"),
        (["train", "sort", "--set", "depth=3"], "depth"),
        (["train", "--resume", "nowhere"], "nothing to resume"),
        (["train", "sort", "--backend", "abacus"], "--backend: expected one of auto"),
        (["train", "sort", "--device", "abacus"], "--device abacus: not usable here"),
        (["eval", "--checkpoint", "nowhere"], "nowhere"),
        (["eval", "sudoku", "--checkpoint", "RUN"], "16 tokens out of 6, task sudoku has 81"),
        (["eval", "--checkpoint", "RUN", "--puzzles", "nowhere"], "cannot read nowhere"),
        (["eval", "--checkpoint", "RUN", "--sigma", "-1"], "sigma"),
        (["solve", "--checkpoint", "RUN"], "give puzzles"),
        (["solve", "12", "--checkpoint", "RUN"], "puzzle 1: expected 16 characters"),
        (["solve", "5" * 16, "--checkpoint", "RUN"], "character 1: expected 1-4"),
        (["demo", "12"], "puzzle 1: expected 81 characters"),
        (["demo", "--puzzles", "nowhere"], "cannot read nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: list[str], says: str, run_folder: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(run_folder / "model.safetensors")
    assert main([model if a == "RUN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_damaged_checkpoint_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "bad").write_bytes(b"not a checkpoint at all")
    assert main(["eval", "--checkpoint", str(tmp_path / "bad")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["x", "-3s", "nan", "s", ""])
def test_bad_times_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a time like"):
        options.seconds(text)


def test_times_and_settings() -> None:
    assert [options.seconds(t) for t in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
    assert options.setting("a=3") == ("a", 3) and options.setting("a=rope") == ("a", "rope")
    assert options.setting("a=true") == ("a", True)


# ---- processes ---------------------------------------------------------------------------------


def spawn(*arguments: str, **kwargs) -> subprocess.Popen:
    root = Path(recurx.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "recurx", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def test_help_lists_every_command_and_env_reports() -> None:
    process = spawn("--help")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and all(name in printed for name in COMMANDS)
    process = spawn("env", "--json")
    printed, _ = process.communicate(timeout=120)
    facts = {fact["name"] for fact in last_json(printed)["facts"]}
    assert process.returncode == 0 and {"torch", "python", "eager"} <= facts


def test_ctrl_c_leaves_a_usable_checkpoint_and_resume_goes_on(tmp_path) -> None:
    folder = tmp_path / "run"
    process = spawn("train", "sudoku-4x4", "--out", str(folder), "--eval-every", "2",
                    "--eval-count", "8", *TINY)  # fmt: skip
    assert process.stdout is not None
    while "step      2" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Interrupted" in printed and "Traceback" not in errors
    resumed = recurx.train.Trainer.resume(folder)
    assert resumed.step >= 2
    resumed.train_step()


def test_sigkill_at_any_moment_keeps_the_last_checkpoint(tmp_path) -> None:
    folder = tmp_path / "run"
    process = spawn("train", "sudoku-4x4", "--out", str(folder), "--eval-every", "1",
                    "--save-every", "1", "--eval-count", "4", *TINY)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "model.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    trainer = recurx.train.Trainer.resume(folder)
    assert trainer.step >= 1
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= trainer.step for line in lines)


# ---- the demo ----------------------------------------------------------------------------------


def test_demo_in_small(tmp_path, monkeypatch, capsys) -> None:
    """All six parts, with a full-size model that is not, and next to no training."""
    monkeypatch.setattr(learn, "TASK", "sudoku-4x4")
    monkeypatch.setattr(learn, "MODEL", {"hidden_size": 32, "num_heads": 2})
    monkeypatch.setattr(learn, "FINAL_COUNT", 40)
    small = TRMConfig.sudoku_att(hidden_size=64, num_heads=2, puzzle_emb_ndim=64, inner_multiple=32)
    monkeypatch.setattr(TRMConfig, "sudoku_att", lambda: small)
    shipped = importlib.import_module("recurx.shipped_nets")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    net = tmp_path / shipped.NETS["sudoku"]
    net.parent.mkdir()
    tiny = TRMConfig.tiny(11, 81, hidden_size=16, num_heads=2)
    recurx.save_checkpoint(net, TRM(tiny), {"task": "sudoku"})
    arguments = ["demo", "--time-budget", "2", "--out", str(tmp_path / "run"), "--no-compile"]
    assert main([*arguments, "--json"]) == 0
    printed = "".join(capsys.readouterr()[::-1])  # JSON is all of stdout
    for heading in ("1. A tiny", "2. One board", "3. Accuracy", "4. The trained", "5. Full-size"):
        assert heading in printed
    assert "6. A trained 9x9 net" in printed and "a puzzle of one solution" in printed
    assert "UNTRAINED" in printed
    result = last_json(printed)
    trained = {row["engine"]: row for row in result["trained"]}
    assert trained["recurx cpu"].get("same_cells", 1.0) == 1.0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_puzzles_of_the_demo_have_one_solution() -> None:
    layout = Layout.of(9)
    boards = files.parse_boards(full_size.PUZZLES, layout)
    assert (solver.solve(layout, boards).count == 1).all()


def test_race_interleaves_refuses_and_keeps_to_its_time() -> None:
    calls: list[str] = []

    def step(name: str, wait: float = 0.0):
        def run() -> torch.Tensor:
            calls.append(name)
            time.sleep(wait)
            return torch.zeros(1)

        return run

    def fail() -> torch.Tensor:
        raise RuntimeError("no compiler\nand more")

    runners = [
        engines.Lane("a", "float32", step("a")), engines.Lane("b", "float32", step("b")),
        engines.Lane("broken", "float32", fail), engines.Lane("absent", "float32", None, "why"),
    ]  # fmt: skip
    engines.race(runners, repeats=3, seconds=10)
    assert calls == ["a", "b"] + ["a", "b"] * 3 and len(runners[0].seconds) == 3
    assert runners[2].refused == "RuntimeError: no compiler" and runners[3].refused == "why"

    calls.clear()
    slow = engines.Lane("slow", "float32", step("slow", 0.2))
    late = engines.Lane(engines.COMPILED, "float32", step("late"))
    own = engines.Lane("own", "float32", step("own"))
    engines.race([slow, own, late], repeats=3, seconds=0.1)
    assert calls == ["slow", "own"] and slow.median >= 0.2  # their first calls are their results
    assert len(own.seconds) == 1 and late.refused == engines.TIME_IS_UP


def test_lanes_of_the_race_agree_on_a_small_model() -> None:
    torch.manual_seed(0)
    config = TRMConfig.tiny(11, 81, H_cycles=2, L_cycles=2)
    model, inputs = TRM(config).eval(), torch.randint(1, 11, (2, 81))
    lanes = [engines.eager(model, inputs), *engines.engines(model, inputs)]
    engines.race(lanes, repeats=1, seconds=60)
    assert model.backend == "auto"  # as before
    for lane in lanes:
        if lane.refused:
            continue
        same, error = full_size._compare(lane, lanes[0])
        assert same == 1.0 and error < 1e-5
    other = engines.eager(TRM(config).eval(), inputs)
    engines.race([other], repeats=1, seconds=60)
    same, error = full_size._compare(other, lanes[0])
    assert error > 0.1  # other weights would show


@pytest.mark.slow
def test_the_compiled_lane_gives_the_answers_of_eager() -> None:
    torch.manual_seed(0)
    model = TRM(TRMConfig.tiny(11, 81, H_cycles=1, L_cycles=2, puzzle_emb_ndim=64)).eval()
    inputs = torch.randint(1, 11, (2, 81))
    lanes = [engines.eager(model, inputs), engines.compiled(model, inputs)]
    engines.race(lanes, repeats=1, seconds=300)
    assert lanes[1].refused == ""
    same, error = full_size._compare(lanes[1], lanes[0])
    assert same == 1.0 and error < 1e-5


def test_output_helpers() -> None:
    assert printed.side_by_side(["a\nbb", "c"], gap="|") == "a |c\nbb|"
    assert printed.curve([0.5]).split() == ["1", "step", "50.0%", "#" * 20]
