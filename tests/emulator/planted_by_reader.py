"""More planted bugs, by a reader who had not seen the race checker; the list: bugs_by_reader.py.

    python -m emulator.planted_by_reader            # the table: what each of ten runs found
    python -m emulator.planted_by_reader parity     # only those whose name contains "parity"

All mutants are compiled as one library, a translation unit for each kernel, each mutant under a
name of its own: many times faster than a library each. Each runs in a process of its own: it may
crash or spin.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import mmap
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import gemm_residual_rms as gemm
from .build import FIXTURES, KERNELS, Emulated, EmulatorFault, build
from .planted import SM80, SM90A, Bug

TIMEOUT = 60  # seconds; a mutant that spins is stopped by max_switches long before
SEEDS = 10
# m, n, k, cluster rows. As in planted.py: every ring goes round twice, the last rows are not full.
SHAPES = {SM80: (43, 128, 320, 1), SM90A: (200, 128, 832, 2)}
# How a finding is called, by what the emulator says; the first that matches.
KINDS = {
    "harmless": r"^right$",
    "illegal address": r"^crash$",
    "wrong result": r"elements are wrong|words are wrong|rows beyond m were written",
    "deadlock": r"deadlock: \d+ threads? wait",
    "race": r"race: |uninitialised",
    "misuse": r".",  # an instruction used against its rules: the report names the rule
}

# Why changes are `not_yet` judged right, where several share a reason.
EXITED = (
    "false alarm: a warp's collective waits for its lanes that have not exited, here also for "
    "those that exit after the first has come"
)


@dataclass(frozen=True)
class ReaderBug(Bug):
    """`found` is a name of KINDS, or several with "|" between them where schedules differ."""

    shape: tuple[int, int, int, int] | None = None
    guarded: bool = False  # the page after the last row of A and of the residual is unmapped
    not_yet: str = ""  # why the emulator does not see it, or sees what is not there


def kind_of(outcome: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, outcome))


def _mutant_text(bug: Bug, name: str) -> str:
    """Kernel and host code in one piece, every name of theirs replaced by the mutant's."""
    stem = f"gemm_residual_rms_{bug.kernel}" if bug.is_gemm else Path(bug.kernel).stem
    with tempfile.TemporaryDirectory() as work:
        bug.plant(Path(work))
        files = [Path(work) / f"{stem}{end}" for end in (".cuh", ".cu")]
        text = "".join(path.read_text() for path in files if path.exists())
    text = text.replace("#pragma once\n", "").replace(f'#include "{stem}.cuh"\n', "")
    return text.replace(stem, name)


@functools.cache
def library(bugs: tuple[Bug, ...]) -> Path:
    """All mutants; bug number i answers to rx_mutant<i>."""
    with tempfile.TemporaryDirectory() as work:
        sources = []
        for kernel in sorted({bug.kernel for bug in bugs}):
            names = {f"mutant{i}": bug for i, bug in enumerate(bugs) if bug.kernel == kernel}
            folder = Path(work) / Path(kernel).stem
            source = folder / f"mutants_{folder.name}.cu"
            folder.mkdir()
            source.write_text("\n".join(_mutant_text(bug, name) for name, bug in names.items()))
            sources.append(source)
        shared = [FIXTURES / "pack_tape.cu", KERNELS / "runtime.cu"]
        # No line numbers: they would be those of the joined text, and cost most of the time.
        return build([*sources, *shared], checked=True, flags=["-O1", "-g0"])


class Mutant:
    """Looks to gemm.Case like the library of the kernel itself."""

    def __init__(self, path: Path, number: int) -> None:
        self.emulated, self.number = Emulated(path, checked=True), number
        self.emulated.configure(max_switches=20_000_000)
        self.configure = self.emulated.configure

    def call(self, entry: str, *arguments: object) -> None:
        own = entry != "rx_pack_tape_sm90a"
        self.emulated.call(f"rx_mutant{self.number}" if own else entry, *arguments)


def at_page_end(x: np.ndarray) -> np.ndarray:
    """A copy of x whose end is followed by a page that may not be touched."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    end = ctypes.c_void_p(memory.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = memory[size - x.nbytes : size].view(x.dtype).reshape(x.shape)
    copy[:] = x
    return copy


def handover_outcome(mutant: Mutant, seed: int) -> str:
    """wrappers/handover.cu: per CTA seven buffers of 128 words, then the other's last."""
    out = np.full(2 * 8 * 128 + 4, 0xFFFFFFFF, np.uint32)
    out = out[-out.ctypes.data % 16 // 4 :][: 2 * 8 * 128].reshape(2, 8, 128)
    step = np.array([[*range(7), 13], [*range(7, 14), 6]], np.uint32)
    mutant.configure(seed=seed)
    try:
        mutant.call("rx_handover", gemm.pointer(out))
    except EmulatorFault as fault:
        return str(fault)
    wrong = int((out != step[:, :, None] * 1000 + np.arange(128)).sum())
    return f"{wrong} words are wrong" if wrong else "right"


def _run(bug: ReaderBug, path: Path, number: int, seeds: Iterable[int], answer) -> None:
    faulthandler.disable()  # pytest's: a crash is an answer here
    mutant = Mutant(path, number)
    if not bug.is_gemm:
        for seed in seeds:
            answer.send(handover_outcome(mutant, seed))
        return
    case = gemm.Case(*(bug.shape or SHAPES[bug.kernel]))
    if bug.guarded:
        case.a, case.residual = at_page_end(case.a), at_page_end(case.residual)
    for seed in seeds:
        answer.send(gemm.outcome(mutant, case, bug.kernel, seed=seed))


def outcomes(bug: ReaderBug, bugs: Sequence[Bug]) -> list[str]:
    """What each of ten seeded runs found: 'right', a report, 'crash' or 'timeout'."""
    bugs = tuple(bugs)
    path, number = library(bugs), bugs.index(bug)
    context = multiprocessing.get_context("fork")
    found: list[str] = []
    while len(found) < SEEDS:  # once more after each crash
        ours, theirs = context.Pipe(duplex=False)
        seeds = range(len(found) + 1, SEEDS + 1)
        child = context.Process(target=_run, args=(bug, path, number, seeds, theirs))
        child.start()
        theirs.close()
        try:
            for _ in seeds:
                if not ours.poll(TIMEOUT):
                    return [*found, "timeout"]
                found.append(ours.recv())
        except EOFError:
            found.append("crash")
        finally:
            child.kill()
            child.join()
    return found


def main() -> None:
    from .bugs_by_reader import ALL

    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print("| bug | kernel | found in ten runs | as |\n|---|---|---|---|")
    for bug in ALL:
        if wanted not in bug.name:
            continue
        runs = outcomes(bug, ALL)
        kinds = Counter(map(kind_of, runs))
        found = sum(kinds.values()) - kinds["harmless"]
        called = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        print(f"| {bug.name} | {bug.kernel} | {found} | {called} |", flush=True)
        strange = [text for text in runs if kind_of(text) not in bug.found.split("|")]
        for text in strange[:1] or (runs[:1] if wanted else []):
            print(f"    {'not as expected: ' if strange else ''}{text[:1500]}", flush=True)


if __name__ == "__main__":
    main()
