"""Every option of every subcommand with nonsense: an error in words and an exit code, no traceback.

What runs for long is cut off where its arguments are read and checked. CI runs a sample, the whole
is `RECURX_NONSENSE=all pytest tests/cli/test_nonsense.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recurx
from recurx import RecurxError
from recurx.commands import COMMANDS, build_parser, main

ALL = os.environ.get("RECURX_NONSENSE") == "all"
ROOT = Path(recurx.__file__).parents[1]
NONSENSE = ["", "x", "-1", "0", "nan", "inf", "-inf", "1e999", "9" * 18, "9" * 30, "1e-9", "none",
            "/proc/nope/x", ".", "é\udce9", "[b]x[/b]", "=", "a=b", "--", "\x01", "a:b=c", "../..",
            "FILE", "BINARY", "LOCKED"]  # fmt: skip
# A command line that would run, to which an option is added or whose arguments are replaced.
BASES = {
    "env": [],
    "demo": ["--no-compile"],
    "train": ["sudoku-4x4", "--set", "hidden_size=16", "--set", "num_heads=2"],
    "eval": ["--checkpoint", "NET", "--count", "2"],
    "solve": ["--checkpoint", "NET", "1...4....1.....2"],
    "profile": ["--seconds", "0.01"],
    "bench run": ["--case", "trm-att", "--out", "r.json"],
    "bench report": ["--no-plots"],
    "bench compare": [],
    "bench host": [],
    "export": ["NET", "net.onnx"],
} | {
    f"experiment {name}": ["--no-plot"]
    for name in ("compose", "exit", "hybrid", "sort", "variants", "windows")
}


def leaves(parser: argparse.ArgumentParser, path: str = "") -> dict[str, argparse.ArgumentParser]:
    """{words of a command: its parser} of every command that can run."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = {} if action.required else {path: parser}
            for name, inner in action.choices.items():
                found |= leaves(inner, f"{path} {name}".strip())
            return found
    return {path: parser}


def cases() -> list[tuple[str, tuple[str, ...]]]:
    every = []
    for path, parser in leaves(build_parser([*COMMANDS])).items():
        if path == "bench":
            continue  # is `bench run`
        for action in parser._actions:
            for value in NONSENSE:
                if not action.option_strings:
                    every.append((path, ("REPLACE", value)))
                elif action.nargs == 0:
                    if value == "x" and action.dest != "help":
                        every.append((path, (action.option_strings[-1],)))
                else:
                    every.append((path, (f"{action.option_strings[-1]}={value}",)))
    every += [(path, ("--no-such-option",)) for path in BASES] + [(path, ()) for path in BASES]
    if ALL:
        return every
    picked = np.random.default_rng(0).permutation(len(every))[:150]
    return [every[k] for k in sorted(picked)]


def test_the_bases_are_the_commands() -> None:
    assert set(BASES) == set(leaves(build_parser([*COMMANDS]))) - {"bench"}


class Ran(RecurxError):
    """Where the long part of a command begins."""


@pytest.fixture
def cut(monkeypatch, tmp_path):
    """The commands up to the long part, in an empty folder."""
    from recurx import experiments, train
    from recurx.bench import budgets, host, runner
    from recurx.experiments.demo import learn, shipped_net

    def stop(*_: object, **__: object) -> None:
        raise Ran("ran")

    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    for owner, name in ((train, "evaluate"), (train.Trainer, "run"), (recurx, "solve"),
                        (host, "run"), (recurx, "profile"), (runner.Measurement, "run"),
                        (learn, "train"),
                        (shipped_net, "solve_typed"), (budgets, "compare_exits")):  # fmt: skip
        monkeypatch.setattr(owner, name, stop)
    for name in experiments.EXPERIMENTS:
        monkeypatch.setattr(experiments.load(name), "measure", stop)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    from recurx.models import TRM, TRMConfig

    path = tmp_path_factory.mktemp("net") / "model.safetensors"
    config = TRMConfig.tiny(6, 16, hidden_size=16, num_heads=2)
    recurx.save_checkpoint(path, TRM(config), {"task": "sudoku-4x4"})
    return str(path)


@pytest.mark.filterwarnings("ignore")
def test_nonsense_ends_in_words(cut: Path, net: str, capsys, monkeypatch) -> None:
    real = {"NET": net, "FILE": "file", "BINARY": "binary", "LOCKED": "/proc/version"}
    (cut / "file").write_text("x,y\n1,2\n")
    (cut / "binary").write_bytes(bytes(range(256)))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None, raising=False)
    raw = []

    def hangs(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    every = cases()
    for path, extra in every:
        words = [real.get(word, word) for word in BASES[path]]
        extra = tuple(real.get(w, w) for w in (e.replace("=LOCKED", "=/proc/version").replace(
            "=FILE", "=file").replace("=BINARY", "=binary") for e in extra))  # fmt: skip
        words = [extra[1]] if extra[:1] == ("REPLACE",) else [*words, *extra]
        line = [*path.split(), *words]
        signal.alarm(60)
        try:
            code = main(line)
            said = capsys.readouterr().err
            if code not in (0, 1, 2) or (code == 2 and not said.strip()) or "Traceback" in said:
                raw.append((line, code, said))
            if code == 2 and not said.isascii() and "\ufffd" in said:
                raw.append((line, code, said))
        except SystemExit as ended:
            said = capsys.readouterr().err
            if ended.code not in (0, 2) or (ended.code == 2 and "error:" not in said):
                raw.append((line, ended.code, said))
        except BaseException as error:
            raw.append((line, type(error).__name__, str(error)[:300]))
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    print(f"{len(every)} command lines")
    assert not raw, f"{len(raw)}: " + "\n".join(map(repr, raw[:40]))


LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "C.UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"},
    "unknown": {"LANG": "xx", "LC_ALL": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"},
}
LINES = [
    ["env"], ["env", "--json"], ["bench", "report", "--no-plots"], ["bench", "compare"],
    ["eval", "--checkpoint", "NET", "--count", "2", "--max-steps", "2"],
    ["eval", "--checkpoint", "modèle é.pt"],
    ["solve", "--checkpoint", "NET", "1...4....1.....2", "--json"],
    ["solve", "--checkpoint", "NET", "é" * 16], ["train", "sörtieren"],
    ["train", "sudoku-4x4", "--steps", "1", "--eval-count", "2", "--set", "hidden_size=16", "--set",
     "num_heads=2", "--out", "lauf é"],
    ["profile", "--checkpoint", "é"], ["experiment", "sort", "--task", "é", "--no-plot"],
    ["demo", "é"], ["demo", "--puzzles", "é"], *([name, "--help"] for name in COMMANDS),
]  # fmt: skip


@pytest.mark.parametrize("name", LOCALES)
def test_every_command_in_every_locale(name: str, net: str, tmp_path: Path) -> None:
    lines = LINES if ALL else [LINES[2], LINES[5 + [*LOCALES].index(name) % 2 * 3]]
    for words in lines:
        line = [net if word == "NET" else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "recurx", *line], cwd=tmp_path, capture_output=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **LOCALES[name]},
        )  # fmt: skip
        said = done.stderr.decode(errors="replace")
        assert "Traceback" not in said and done.returncode in (0, 1, 2), (name, line, said[-800:])
        assert done.returncode != 2 or said.strip(), line
        if "--json" in words and done.returncode < 2:
            json.loads(done.stdout)
