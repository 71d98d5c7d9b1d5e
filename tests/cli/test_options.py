"""Options as dataclasses: their command lines, and the defaults that everybody shares."""

from __future__ import annotations

import argparse
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import pytest

import recurx
from recurx import experiments
from recurx.bench import command as bench
from recurx.bench.profile import words
from recurx.cli import options
from recurx.commands import COMMANDS, main
from recurx.options import file, option, stated
from recurx.solving.options import Rules
from recurx.train import TrainConfig


@dataclass(frozen=True)
class Base:
    count: int = option(3, "how many", least=1)
    json: bool = option(False, "one line")


@dataclass(frozen=True)
class Toy(Base):
    words: tuple[str, ...] = option((), "what is read", flag="", nargs="*")
    sizes: tuple[int, ...] = option((1, 2), "of 50 %", least=1)
    end: str | None = option("q", "the rule", choices=("q", None))
    share: float = option(0.5, "of all")
    path: str | None = file("where")
    how: dict[str, Any] = options.said(TrainConfig, title="training", description="as said")
    count: int = 7
    inner: int = 5  # no option


def parse(kind: type, *words: str) -> Any:
    parser = argparse.ArgumentParser(prog="toy")
    options.add(parser, kind)
    return options.read(parser.parse_args(words), kind)


def test_nothing_said_is_the_default_and_what_is_said_is_read() -> None:
    assert parse(Toy) == Toy() and Toy().count == 7
    words = ["a", "b", "--sizes", "4", "5", "--end", "none", "--share", "1", "--json"]
    found = parse(Toy, *words, "--lr", "2", "--grid-mixing", "--path", "x", "--count", "2")
    assert found == Toy(
        count=2, json=True, words=("a", "b"), sizes=(4, 5), end=None, share=1.0, path="x",
        how={"lr": 2.0, "grid_mixing": True},
    )  # fmt: skip


def test_what_was_said_can_be_said_again() -> None:
    said = "--share 0.25 --path 'a b' --json"
    assert words(Toy(path="a b", json=True, share=0.25)) == said


def test_own_options_come_before_inherited_ones_which_keep_their_meaning() -> None:
    assert list(stated(Toy)) == ["words", "sizes", "end", "share", "path", "count", "json"]
    assert stated(Toy)["count"] == (7, {"help": "how many", "least": 1})


def test_help_tells_defaults_once() -> None:
    parser = argparse.ArgumentParser()
    options.add(parser, Toy)
    text = " ".join(parser.format_help().split())
    assert "--count N how many (default 7)" in text and "of 50 % (default 1 2)" in text
    assert "{q,none} the rule (default q)" in text and "--path FILE where --" in text
    assert "learning rate (default: the preset's)" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--count", "0"], "expected a whole number from 1 on, got '0'"),
        (["--sizes", "x"], "expected a whole number from 1 on, got 'x'"),
        (["--end", "never"], "invalid choice: 'never'"),
        (["--share", "all"], "expected a number, got 'all'"),
        (["--inner", "1"], "unrecognized arguments"),
    ],
)
def test_bad_values_are_refused(words: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Toy, *words)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_solve_takes_its_defaults_from_its_options() -> None:
    parameters = inspect.signature(recurx.solve).parameters
    for name, (default, _) in stated(Rules).items():
        assert parameters[name].default == default, name
    named = ("max_steps", "halt", "rollouts", "sigma", "select", "patience")
    assert [parameters[name].default for name in named] == [16, "q", 1, 0.0, "q", 2]


def test_every_command_reads_back_its_defaults() -> None:
    named = {**COMMANDS}
    del named["export"]  # it has none: both of its files are to be named
    loaded = [importlib.import_module(module) for module, _ in named.values()]
    kinds = [module.Options for module in loaded if not hasattr(module, "add_arguments")]
    kinds += [experiments.load(name).Options for name in experiments.EXPERIMENTS]
    kinds += [bench.Run, bench.Report, bench.Compare]
    assert len(kinds) == 15
    for kind in kinds:
        assert parse(kind) == kind()


def test_profile_takes_one_model(capsys) -> None:
    assert main(["profile", "--preset", "small", "--checkpoint", "nowhere"]) == 2
    assert "--preset: not with --checkpoint" in capsys.readouterr().err


def test_bench_without_an_action_runs_with_its_defaults(monkeypatch) -> None:
    ran: list[bench.Run] = []
    monkeypatch.setattr(bench, "run", lambda asked: ran.append(asked) or 0)
    assert main(["bench"]) == 0 and ran == [bench.Run()]
