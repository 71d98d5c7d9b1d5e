"""Planted bugs that share one build: all of them sleep until the host wakes one.

In a bug's new text `BUG` is true while that bug is awake.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .build import KERNELS


class Sleeper(Protocol):
    """`old`, which occurs once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


def plant(folder: Path, bugs: Sequence[Sleeper], family: str) -> None:
    """Copies the kernels to `folder` with all bugs; those of `family` know which one is awake."""
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
    texts = {bug.file: (folder / bug.file).read_text() for bug in bugs}
    for number, bug in enumerate(bugs, 1):
        count = texts[bug.file].count(bug.old)
        assert count == 1, f"{bug.name}: {bug.old!r} occurs {count} times in {bug.file}"
        new = bug.new.replace("BUG", f"(rx_bug == {number})")
        texts[bug.file] = texts[bug.file].replace(bug.old, new)
    for name, text in texts.items():
        (folder / name).write_text(text)
    layout, begin = folder / family / "layout.cuh", f"namespace {family} {{"
    layout.write_text(layout.read_text().replace(begin, f"inline int rx_bug = 0;\n{begin}", 1))
    with (folder / family / "launch.cu").open("a") as host:
        host.write('\nextern "C" void rx_wake_bug(int number) { rx_bug = number; }\n')


def wake(library: ctypes.CDLL, bugs: Sequence[Sleeper], bug: Sleeper | None) -> None:
    """Wakes one of the bugs that were planted, and no other; None: all sleep."""
    library.rx_wake_bug(ctypes.c_int(0 if bug is None else bugs.index(bug) + 1))
