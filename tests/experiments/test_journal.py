"""`--out FILE` of solve and eval: nothing is lost or doubled, whoever kills it, whenever."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import recurx
from recurx import tasks
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.experiments.answering import journal
from recurx.experiments.tasks.sudoku import files
from recurx.experiments.tasks.sudoku.layout import Layout
from recurx.models import TRM, TRMConfig
from recurx.train.ranks import Ranks

COUNT, SIZE = 50, 8


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    """An untrained net of 4x4 Sudoku, whose answers the rules hardly ever accept."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    config = TRMConfig.tiny(6, 16, hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1)
    recurx.save_checkpoint(path, TRM(config), {"task": "sudoku-4x4"})
    return str(path)


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory) -> str:
    boards = tasks.get("sudoku-4x4").generate(np.random.default_rng(0), COUNT).inputs - 1
    boards[3, :2] = 1  # clashes
    path = tmp_path_factory.mktemp("puzzles") / "puzzles.txt"
    path.write_text("".join("".join(map(str, board)) + "\n" for board in boards.tolist()))
    return str(path)


def solve(puzzles: str, net: str, out: Path, *more: str) -> list[str]:
    said = ["--search", "--forced", "--budget", "3", "--starts", "2", "--max-steps", "4"]
    said += ["--batch-size", str(SIZE)]
    return ["solve", puzzles, "--checkpoint", net, "--out", str(out), *said, *more]


# ---- the file itself -----------------------------------------------------------------------------


def work(number: int, part: range) -> tuple[list[str], dict[str, int]]:
    return [f"{number},{i}" for i in part], {"done": len(part)}


def cut(count: int = 30, size: int = 7):
    return iter([range(first, min(first + size, count)) for first in range(0, count, size)])


def run(path: Path, ranks: Ranks | None = None, work=work) -> journal.Done:
    ranks = ranks or Ranks()
    with journal.opened(str(path), ranks, 7, "part,number", {"kind": "test"}) as (file, resumed):
        return journal.run(cut(), len, work, file, ranks, resumed, lambda done: None)


def test_a_file_cut_off_anywhere_is_completed(tmp_path) -> None:
    whole = tmp_path / "whole.csv"
    assert run(whole).now == 30
    expected = whole.read_bytes()
    assert expected.decode().splitlines() == ["part,number", *(f"{i // 7},{i}" for i in range(30))]
    path = tmp_path / "part.csv"
    for size in range(len(expected) + 1):
        path.write_bytes(expected[:size])
        path.with_name("part.csv.job").write_text('{"kind": "test"}')
        done = run(path)
        assert path.read_bytes() == expected and done.before + done.now == 30
        # What is whole is not done again: parts of 7, and at the end the last one of 2.
        lines = max(expected[:size].count(b"\n") - 1, 0)
        assert done.before == (30 if lines == 30 else lines // 7 * 7)


@pytest.mark.parametrize("planted", ["the torn line stays", "parts are not counted"])
def test_planted_bugs_are_seen(planted: str, tmp_path, monkeypatch) -> None:
    read = journal.Journal._read
    if planted == "the torn line stays":
        bad = lambda self: (*read(self)[:2], self.path.stat().st_size)  # noqa: E731
    else:
        bad = lambda self: (0, 0, read(self)[2])  # noqa: E731
    monkeypatch.setattr(journal.Journal, "_read", bad)
    with pytest.raises(AssertionError):
        test_a_file_cut_off_anywhere_is_completed(tmp_path)


class Together:
    """What ranks in threads share."""

    def __init__(self, world: int) -> None:
        self.barrier, self.said = threading.Barrier(world), {}


class ThreadRanks(Ranks):
    def __init__(self, world: int, rank: int, together: Together) -> None:
        super().__init__(world, rank)
        self.together = together

    def first_says(self, value):
        return self.all(value)[0]

    def all(self, value):
        self.together.said[self.rank] = value
        self.together.barrier.wait()
        found = [self.together.said[rank] for rank in range(self.world)]
        self.together.barrier.wait()
        return found


def test_ranks_share_the_parts_and_change_nothing(tmp_path, monkeypatch) -> None:
    run(tmp_path / "one.csv")
    expected = (tmp_path / "one.csv").read_bytes()
    first = b"".join(expected.splitlines(keepends=True)[:10])  # a killed run of one rank
    workers: dict[int, int] = {}

    def gathered(own, ranks):
        workers.update({number: ranks.rank for number, *_ in own})
        found = ranks.all(own)
        return [one for some in found for one in some] if ranks.first else []

    monkeypatch.setattr(journal, "_gathered", gathered)
    for world in (2, 3):
        for begun in (b"", first):
            path = tmp_path / f"{world}-{len(begun)}.csv"
            path.write_bytes(begun)
            path.with_name(path.name + ".job").write_text('{"kind": "test"}')
            workers.clear()
            together = Together(world)
            threads = [
                threading.Thread(target=run, args=(path, ThreadRanks(world, rank, together)))
                for rank in range(world)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert path.read_bytes() == expected
            assert len(set(workers.values())) == world  # nobody was idle


def test_another_way_or_another_owner_is_refused(tmp_path) -> None:
    path = tmp_path / "answers.csv"
    run(path)
    with pytest.raises(InvalidArgument, match=r"begun in another way .kind: 'test' then"):
        journal.Journal(path, 7, "part,number", {"kind": "other"})
    path.with_name("answers.csv.job").unlink()
    with pytest.raises(InvalidArgument, match=r"no answers\.csv\.job says how"):
        journal.Journal(path, 7, "part,number", {"kind": "test"})


# ---- the commands --------------------------------------------------------------------------------


def test_killed_at_random_moments_it_ends_as_one_run(net, puzzles, tmp_path) -> None:
    """In forks of this process, so that a start costs no seconds."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert main(solve(puzzles, net, whole)) == 0
    moments, kills, ended = random.Random(1), 0, False
    while not ended:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = main(solve(puzzles, net, path))
            finally:
                os._exit(code)
        if kills < 8:
            before = path.stat().st_size if path.exists() else 0
            until = time.monotonic() + 10
            while time.monotonic() < until and (
                not path.exists() or path.stat().st_size <= before
            ) and not ended:  # fmt: skip
                ended = os.waitpid(pid, os.WNOHANG)[0] == pid
                time.sleep(0.001)
            if not ended:  # after the wait above its number may be another process's
                time.sleep(moments.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)[1] == 0
                kills += 1
        else:
            ended = os.waitpid(pid, 0)[1] == 0
            assert ended
    assert path.read_bytes() == whole.read_bytes() and kills > 2
    told = [json.loads(line)["puzzle"] for line in path.read_text().splitlines()]
    assert told == Path(puzzles).read_text().split()


@pytest.mark.parametrize("form", [".txt", ".csv", ".jsonl"])
def test_answers_are_a_file_of_puzzles_too(form: str, net, puzzles, tmp_path, capsys) -> None:
    out = tmp_path / f"answers{form}"
    assert main(solve(puzzles, net, out, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["puzzles"] == COUNT == sum(result["verdicts"].values())
    assert result["verdicts"]["contradictory"] == 1
    layout = Layout.of(4)
    asked, read = files.read(puzzles, layout), files.read(out, layout)
    task = tasks.get("sudoku-4x4")
    answers = read.puzzles if form == ".txt" else read.answers
    right = task.check(asked.puzzles + 1, answers + 1)
    assert int(right.sum()) == result["verdicts"].get("solved", 0) > 0
    if form == ".txt":
        assert (answers[~right] == asked.puzzles[~right]).all()
        assert "# contradictory" in out.read_text()
    else:
        assert (read.puzzles == asked.puzzles).all() and not read.known[~right].any()
    assert main(solve(puzzles, net, out, "--seed", "5")) == 2
    assert "begun in another way" in capsys.readouterr().err


def test_eval_in_parts_is_eval(net, puzzles, tmp_path, capsys) -> None:
    asked = ["eval", "--checkpoint", net, "--puzzles", puzzles, "--batch-size", "8", "--json"]
    assert main(asked) == 0
    whole = json.loads(capsys.readouterr().out)
    out = tmp_path / "parts.jsonl"
    for _ in range(2):
        assert main([*asked, "--out", str(out)]) == 0
        parts = json.loads(capsys.readouterr().out)
        for name in ("count", "exact", "cells", "steps_mean", "curve", "histogram"):
            assert parts[name] == whole[name], name
        lines = out.read_text().splitlines(keepends=True)
        assert len(lines) == -(-COUNT // SIZE)
        out.write_text("".join(lines[:3]) + lines[3][:20])  # as a kill leaves it


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["solve", "PUZZLES", "--out", "a.xml"], "ends in .txt, .csv, .jsonl"),
        (["solve", "1" * 16, "--out", "a.csv"], "for a file of puzzles"),
        (["eval", "--out", "a.jsonl"], "with --puzzles"),
        (["solve", "PUZZLES", "--budget", "3"], "only with --search"),
        (["solve", "PUZZLES", "--search", "--rollouts", "3"], "not with --search"),
    ],
)
def test_mistakes_are_told(arguments, says, net, puzzles, capsys) -> None:
    words = [puzzles if word == "PUZZLES" else word for word in arguments]
    assert main([*words, "--checkpoint", net]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(net, puzzles, tmp_path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert main(solve(puzzles, net, one)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", "recurx", *solve(puzzles, net, two)]  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert two.read_bytes() == one.read_bytes()
