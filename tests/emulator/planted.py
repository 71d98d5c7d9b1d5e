"""Bugs planted in real kernels: each an exact substitution in a copy of their sources.

    python -m emulator.planted              # the table: how many of 10 runs find each
    python -m emulator.planted early        # only those whose name contains "early", with reports

The bugs themselves are in bugs_gemm.py and bugs_wrappers.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .gemm_residual_rms import copy_sources
from .wrapper_cases import FOLDER as WRAPPERS

SM80, SM90A = "sm80", "sm90a"
# Small, but every ring goes round twice, and the last row block is not full.
SHAPES = {
    SM80: ["--m", "43", "--n", "128", "--k", "320"],
    SM90A: ["--m", "200", "--n", "128", "--k", "832", "--cluster-rows", "2"],
}
WIDTH = 128  # the only width compiled, to save time


@dataclass(frozen=True)
class Bug:
    """`edits` are (old, new) in `file`; `found` matches what must be reported.

    kernel: SM80 or SM90A for the GEMM kernels, "sm90.cu dsmem" for a wrapper kernel.
    """

    name: str
    kernel: str
    edits: tuple[tuple[str, str], ...]
    found: str
    file: str | None = None

    @property
    def is_gemm(self) -> bool:
        return self.kernel in (SM80, SM90A)

    def edited_file(self) -> str:
        if self.file:
            return self.file
        return f"gemm_residual_rms_{self.kernel}.cuh" if self.is_gemm else self.kernel.split()[0]

    def plant(self, folder: Path) -> None:
        """Makes a copy of the sources with the bug in it."""
        if self.is_gemm:
            copy_sources(folder)
        else:
            shutil.copytree(WRAPPERS, folder, dirs_exist_ok=True)
        path = folder / self.edited_file()
        text = path.read_text()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{self.name}: {old!r} occurs {text.count(old)} times"
            text = text.replace(old, new)
        path.write_text(text)
        if self.is_gemm:
            _keep_one_width(folder / f"gemm_residual_rms_{self.kernel}.cu")
        elif " " in self.kernel:
            _keep_one_entry(folder / self.kernel.split()[0], self.kernel.split()[1])

    def command(self) -> list[str]:
        if self.is_gemm:
            arguments = ["gemm_residual_rms", self.kernel, "--json", *SHAPES[self.kernel]]
        else:
            arguments = ["wrapper_cases", *self.kernel.split()]
        return [sys.executable, "-m", f"emulator.{arguments[0]}", *arguments[1:]]


def _keep_one_width(path: Path) -> None:
    """Compile one template instead of all: drop the other cases of the host's switch."""

    def keep(case: re.Match[str]) -> str:
        return case[0] if int(case[1]) == WIDTH else ""

    text, count = re.subn(r"    case (\d+):\s+return [^;]+;\n", keep, path.read_text())
    assert count >= 4, f"the switch over widths in {path.name} is not as expected"
    path.write_text(text)


def _keep_one_entry(path: Path, name: str) -> None:
    """Compile the templates of one entry of the file's table: nobody runs the others."""

    def keep(entry: re.Match[str]) -> str:
        return entry[0] if entry[1] == name else ""

    text, count = re.subn(r'    \{"(\w+)", [^;]+?\},\n', keep, path.read_text())
    assert count >= 10 and f'{{"{name}", ' in text, f"the table of {path.name} is not as expected"
    path.write_text(text)


_MODES = ("in-order", "random", "checked")


def run(bug: Bug, mode: str = "checked", seeds: int = 10) -> list[str]:
    """The outcome of each seed: 'right', or what was found. A fresh process: bugs may crash it."""
    flags = {"checked": [], "random": ["--plain"], "in-order": ["--plain", "--in-order"]}[mode]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "sources"
        bug.plant(folder)
        command = [*bug.command(), "--folder", str(folder), "--seeds", str(seeds), *flags]
        where = Path(__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, cwd=where, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{bug.name}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def main() -> None:
    from .bugs_gemm import BUGS as GEMM
    from .bugs_wrappers import BUGS as IN_WRAPPERS

    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| bug | kernel | in-order | random | checked |")
    for bug in [*GEMM, *IN_WRAPPERS]:
        if wanted not in bug.name:
            continue
        modes = _MODES if bug.is_gemm and not wanted else _MODES[-1:]
        runs = {mode: run(bug, mode) for mode in modes}
        counts = [str(sum(o != "right" for o in runs[m])) if m in runs else "-" for m in _MODES]
        print(f"| {bug.name} | {bug.kernel} | {' | '.join(counts)} |", flush=True)
        missed = [o for o in runs["checked"] if not re.search(bug.found, o)]
        for text in missed[:1] or (runs["checked"][:1] if wanted else []):
            print(f"    {'not as expected: ' if missed else ''}{text[:1500]}", flush=True)


if __name__ == "__main__":
    main()
