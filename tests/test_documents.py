"""The code of the documents runs, and their commands exist.

Blocks of README.md and docs/ run in order, in a folder that holds the documents and the reader's
own files, as a reader would run them: ```python in one namespace a page, ```bash one command after
the other. What would take minutes is shortened by the rules of `SHORTER`, or only read by the real
parser (`only_parsed`). A block that needs what a test machine may lack has a comment above it,
<!-- cannot run here: REASON -->, with one of the reasons below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lookalike
import official
import pages
import recurx.experiments.tasks  # noqa: F401
from pages import PAGES, ROOT
from recurx import tasks
from recurx.commands import COMMANDS, build_parser, main

RUN = [name for name in PAGES if name == "README.md" or name.startswith("docs/")]
# Seconds to half a minute.
SLOW = ("examples", "sudoku", "tasks", "training", "mazes", "language", "budgets")

GPU, PACKAGES, OFFICIAL = "needs a GPU", "installs packages", "needs the official code"
CHECKPOINT = "needs an official checkpoint"
REASONS = (GPU, PACKAGES, OFFICIAL, CHECKPOINT)
LANGUAGES = ("python", "bash", "text")  # text: what a command prints, or a formula

# Options appended to a command, of which the last one counts: the same code in seconds.
SHORTER = {
    "train": "--steps 2 --eval-count 2 --warmup 1 --batch-size 4 --set halt_max_steps=2",
    "train --resume": "--steps 3 --eval-count 2",
    "eval": "--count 4",
    "profile": "--preset small --batch 1 --seconds 0.2",
}
HOLD_OUT = "--hold-out 8"  # of the 64 puzzles that stand for the reader's


def only_parsed(arguments: list[str]) -> bool:
    """Whether even a short run takes minutes. Other tests run these commands."""
    if arguments[0] == "bench":
        return arguments[1:2] != ["report"]
    if arguments[0] == "experiment":
        return "--redraw" not in arguments
    return arguments[0] == "demo" and "--puzzle" not in arguments


# ---- blocks run ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: the documents, their results, and nothing else."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def bring_files(folder: Path, text: str) -> None:
    """The reader's own files, as the pages call them, if a page does."""
    if "puzzles.txt" in text:
        boards = tasks.get("sudoku:clues=40").generate(np.random.default_rng(0), 64).inputs - 1
        lines = ["".join(map(str, board)) for board in boards]
        (folder / "puzzles.txt").write_text("\n".join(lines) + "\n")
    if "mazes.csv" in text:
        hard = tasks.get("maze-hard")
        mazes = [hard.text(maze) for maze in hard.generate(np.random.default_rng(0), 4).inputs]
        rows = ["question", *(maze.replace("\n", "") for maze in mazes)]
        (folder / "mazes.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (PAGES[name].stem in SLOW)) for name in RUN],
)
def test_every_block_runs_as_it_stands(name, folder, monkeypatch):
    bring_files(folder, PAGES[name].read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in pages.blocks(PAGES[name]):
        if block.reason in (GPU, PACKAGES, CHECKPOINT):
            continue
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # a traceback tells the page's line
            with official_code(monkeypatch, block.reason == OFFICIAL):
                exec(compile(source, str(block.page), "exec"), namespace)
        elif block.language == "bash":
            for command in commands(block.text):
                run(command, f"{block}: {command}", monkeypatch)


def commands(text: str) -> list[str]:
    """The commands of a block of bash: continued lines joined, comments dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run(command: str, where: str, monkeypatch: Any) -> None:
    """Run one command of a page by the rules above; fails if it fails, or if there is no rule."""
    variables, words = words_of(command)
    assert check(words), f"{where}: no rule of this test runs or checks this"
    arguments = of_recurx(words)
    if arguments is None or only_parsed(arguments):
        return
    resumed = arguments[0] == "train" and "--resume" in arguments
    extra = SHORTER.get("train --resume" if resumed else arguments[0], "")
    if "--hold-out" in arguments:
        extra += f" {HOLD_OUT}"
    with monkeypatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        assert main([*arguments, *extra.split()]) == 0, where


class Official(lookalike.Wrapper):
    """The official class as far as the documents call it."""

    def __init__(self, config: dict[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(lookalike.Config)}
        super().__init__(lookalike.Config(**{k: v for k, v in config.items() if k in known}))

    def initial_carry(self, batch: dict[str, Any]) -> Any:
        carry = self.inner.empty_carry(len(batch["inputs"]))
        everywhere = torch.ones(len(batch["inputs"]), dtype=torch.bool)
        return self.inner.reset_carry(everywhere, carry)

    def forward(self, carry: Any, batch: dict[str, Any]) -> Any:
        new, logits, _ = super().forward(carry, batch)
        return new, {"logits": logits}


@contextlib.contextmanager
def official_code(monkeypatch: Any, wanted: bool) -> Iterator[None]:
    """`models` is the official TRM where RECURX_OFFICIAL_TRM names it, else a small look-alike."""
    if not wanted:
        yield
    elif os.environ.get("RECURX_OFFICIAL_TRM"):
        with official.importable("trm"):
            yield
    else:
        names = ("models", "models.recursive_reasoning", "models.recursive_reasoning.trm")
        with monkeypatch.context() as patched:
            for name in names:
                patched.setitem(sys.modules, name, ModuleType(name))
            sys.modules[names[-1]].TinyRecursiveReasoningModel_ACTV1 = Official
            yield


# ---- commands checked ----------------------------------------------------------------------------


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """(variables that are set in front, words) of a command."""
    words, variables = shlex.split(command, comments=True), {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def of_recurx(words: list[str]) -> list[str] | None:
    """The arguments of recurx in `recurx ...`, `python -m recurx ...`, `torchrun ... -m recurx`.

    Of torchrun's processes the test is one.
    """
    if words[:1] == ["recurx"]:
        return words[1:]
    if "-m" in words and words[words.index("-m") :][1:2] == ["recurx"]:
        return words[words.index("-m") + 2 :]
    return None


def check(words: list[str]) -> bool:
    """Check a command as far as that goes without running it; whether there is a rule for it."""
    arguments = of_recurx(words)
    if arguments is not None:
        parse(arguments)
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    elif words[0] == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for found in re.findall(r"recurx\[([\w,]+)\]", " ".join(words)):
            assert set(found.split(",")) <= set(extras), f"{words}: the extras are {extras}"
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        name = module.replace(".", "/")
        ours = any(
            (place / f"{name}.py").exists() or (place / name).is_dir()
            for place in (ROOT, ROOT / "tests")
        )
        assert ours or importlib.util.find_spec(module), f"{words}: no module {module}"
        files(words[words.index("-m") + 2 :])
    elif words[0] in ("python", "bash", "sh"):
        files(words[1:2])
    else:
        return words[0] in ("cd", "git") or any(
            (ROOT / p / words[0]).exists() for p in (".", "tests")
        )
    return True


def files(words: list[str]) -> None:
    """Files of the repository that a command names must exist."""
    for word in words:
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+(\.py)?", word) and not word.startswith("docs/"):
            assert any((ROOT / place / word).exists() for place in (".", "tests")), word


@functools.cache
def parser_of(command: str) -> ArgumentParser:
    return build_parser([command])


def parse(arguments: list[str]) -> Namespace:
    """Parse a command line by the real parser; its message becomes the failure."""
    line = f"recurx {' '.join(arguments)}"
    assert arguments and arguments[0] in COMMANDS, f"{line}: the commands are {list(COMMANDS)}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return parser_of(arguments[0]).parse_args(arguments)
    except SystemExit as stop:
        raise AssertionError(f"{line}: {printed.getvalue()}") from stop


def test_a_command_that_does_not_exist_is_found():
    for line in ("train sort --no-such-option", "trian sort", "eval sort --count many"):
        with pytest.raises(AssertionError):
            parse(line.split())
    with pytest.raises(AssertionError, match="no module"):
        check(["python", "-m", "tests.nowhere"])
    with pytest.raises(AssertionError, match="extras"):
        check(["pip", "install", "recurx[nothing]"])
    with pytest.raises(AssertionError, match="nothing"):
        check(["make", "nothing"])
    assert not check(["unheard-of"])


@pytest.mark.parametrize("name", PAGES)
def test_blocks_say_what_they_are_and_why_they_cannot_run(name):
    for block in pages.blocks(PAGES[name]):
        assert block.language in LANGUAGES, f"{block}: ```{block.language}, not one of {LANGUAGES}"
        assert block.reason is None or block.reason in REASONS, f"{block}: {block.reason}"
        installs = re.search(r"^(pip|git clone|make setup)\b", block.text, re.MULTILINE)
        if name in RUN and block.language == "bash":
            assert bool(installs) == (block.reason == PACKAGES), f"{block}: {block.reason}"
        if block.language == "bash":
            for command in commands(block.text):
                assert check(words_of(command)[1]), f"{block}: {command}"


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_in_the_text_exist(name):
    options = {option for command in COMMANDS for option in options_of(parser_of(command))}
    for span in pages.spans(PAGES[name]):
        words = (
            words_of(span)[1] if re.match(r"([A-Z_]+=\S+ )?(python|torchrun|make) ", span) else []
        )
        if words:
            assert check([placeholder(word) for word in words]), span
        elif re.match(r"--[a-z]", span) and span.split()[0].partition("=")[0] not in OTHERS:
            found = [w.partition("=")[0] for w in span.split() if re.match(r"--[a-z]", w)]
            assert set(found) <= options, f"{name}: `{span}` is no option of recurx"


# Of other programs.
OTHERS = (
    "--hypothesis-profile", "--nproc-per-node", "--figures", "--help", "--no-loadscope-reorder"
)  # fmt: skip


def placeholder(word: str) -> str:
    """A value of the kind that a word in capitals stands for."""
    return {"N": "1", "K": "1", "STEPS": "1", "TIME": "1s", "P": "0.5"}.get(word, word)


def options_of(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, _SubParsersAction):
            for below in action.choices.values():
                yield from options_of(below)
