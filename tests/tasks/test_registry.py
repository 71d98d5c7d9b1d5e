"""Tasks of other packages: found by entry points, or registered; and recurx's own among them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from recurx import InvalidArgument, RecurxError, _checkout, tasks
from recurx.experiments.tasks import TASKS, Maze, Sorting
from tests.checkouts import ROOT

MODULE = """
from dataclasses import dataclass
from recurx.experiments.tasks import Sudoku

@dataclass(frozen=True)
class Nonogram(Sudoku):
    size: int = 6
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_MAKERS", dict(tasks._MAKERS))


def install(folder: Path, name: str, entries: str) -> Path:
    """What an installer leaves of a distribution with these entry points."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[recurx.tasks]\n{entries}\n")
    return folder


def test_a_package_adds_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_puzzles.py").write_text(MODULE)
    entries = "nonogram = my_puzzles:Nonogram\nlost = my_puzzles:Lost\ngone = no_such_module:Task"
    monkeypatch.syspath_prepend(install(tmp_path, "my-puzzles", entries))
    names = tasks.names()
    assert {"nonogram", "lost", "gone", "sudoku", *TASKS} <= set(names) == set(tasks.NAMES)
    assert len(names) == len(set(names)) and "my_puzzles" not in sys.modules  # listing loads none
    task = tasks.get("nonogram:size=4")
    assert (type(task).__name__, task.name, task.seq_len) == ("Nonogram", "nonogram:size=4", 16)
    assert tasks.get("nonogram").seq_len == 36
    with pytest.raises(InvalidArgument, match="options size, clues, max_guesses, got 'side'"):
        tasks.get("nonogram:side=4")
    with pytest.raises(RecurxError, match=r"lost is my_puzzles:Lost, which fails: .*no attribute"):
        tasks.get("lost")
    with pytest.raises(RecurxError, match=r"gone is no_such_module:Task, .*No module named"):
        tasks.get("gone")
    with pytest.raises(InvalidArgument, match=r"one of sudoku, .*nonogram, .*got 'nonogramm'"):
        tasks.get("nonogramm")


def test_the_tasks_of_the_experiments_are_entry_points(tmp_path: Path) -> None:
    """In a process that imported nothing of the experiments."""
    points = {point.name: point for point in _checkout_points()}
    assert {name: point.load() for name, point in points.items()} == TASKS
    lines = "\n".join(f"{name} = {point.value}" for name, point in points.items())
    install(tmp_path, "recurx-again", lines)
    assert made_in_a_process("", tmp_path, ROOT) == "20 order"


def test_a_checkout_without_metadata_has_its_tasks(tmp_path: Path) -> None:
    """Nor is it taken for a distribution by those who ask for versions."""
    no_site = "import sys; sys.path = [p for p in sys.path if not p.endswith('site-packages')]\n"
    for module in ("numpy", "torch"):  # found from now on, as those of a system's Python are
        no_site = f"import {module}\n{no_site}"
    assert made_in_a_process(no_site, ROOT) == "20 order"
    assert {point.dist.name for point in _checkout_points()} == {_checkout.NAME}
    assert next(metadata.distributions(name="recurx"), None) is None or metadata.version("recurx")
    assert not [d for d in metadata.distributions(name="numpy") if d.name == _checkout.NAME]


def test_a_copy_without_its_project_has_no_entry_points(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_checkout, "ROOT", tmp_path)
    assert _checkout.entries() == "" and not _checkout_points()


def _checkout_points() -> metadata.EntryPoints:
    return metadata.distribution(_checkout.NAME).entry_points.select(group=tasks.GROUP)


def made_in_a_process(before: str, *path: Path) -> str:
    source = before + "import sys; from recurx import tasks\n"
    source += "assert 'recurx.experiments' not in sys.modules; print(*tasks.names())\n"
    source += "print(tasks.get('sort:length=20').seq_len, tasks.get('order').name)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment
    )
    listed, made = done.stdout.splitlines() if done.returncode == 0 else pytest.fail(done.stderr)
    assert set(TASKS) <= set(listed.split())
    return made


def test_registering() -> None:
    tasks.register("records", Sorting)
    tasks.register("records", Sorting)  # again, as an import does
    assert tasks.get("records:tags=2").vocab_size == tasks.get("sort:tags=2").vocab_size
    assert "records" in tasks.names()
    with pytest.raises(InvalidArgument, match="another task is called 'records'"):
        tasks.register("records", Maze)
    with pytest.raises(InvalidArgument, match="without options, got 'maze:size=9'"):
        tasks.register("maze:size=9", Maze)
    with pytest.raises(AttributeError, match="no attribute 'Sorting'"):
        tasks.Sorting  # noqa: B018
