"""Runs the phases, each a process in a session of its own, and keeps the result file up to date.

Standard library alone: a torch that crashes must not take this process with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_check import journal
from bench.gpu_check.child import ABSENT, NO_GPU
from bench.gpu_check.phases import ALONE, BESIDE, ROOT, Phase

GRACE = 5.0  # seconds from SIGINT to SIGKILL
LEAST = 8.0  # seconds: with less left a phase is not started
TAIL = 60  # lines of its output that a phase leaves in the result file, if it did not pass
STATUS = {0: "passed", ABSENT: "absent", NO_GPU: "no gpu"}
PR_SET_PDEATHSIG = 1


@dataclass
class Running:
    phase: Phase
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    limit: float
    asked: float | None = None  # when SIGINT was sent


@dataclass
class Runner:
    """One call.

    Args:
        result: the result file; journal and log lie beside it, under its name.
        environ: of the phases.
        end: time.monotonic() at which all must be over.
    """

    result: Path
    environ: Mapping[str, str]
    end: float
    running: list[Running] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    written: int = -1  # bytes of the journal that the result file has

    @property
    def journal(self) -> Path:
        return self.result.with_suffix(".jsonl")

    def run(self, todo: Sequence[Phase]) -> None:
        pending = list(todo)
        names = {phase.name for phase in todo}
        try:
            while pending or self.running:
                for one in list(self.running):
                    self._look_at(one)
                for phase in list(pending):
                    if "no gpu" in self.ended.values() or self.end - time.monotonic() < LEAST:
                        pending.remove(phase)  # the journal knows what was planned
                    elif self._may_start(phase, names):
                        pending.remove(phase)
                        self._start(phase)
                self.write()
                time.sleep(0.02)
        finally:
            for one in self.running:
                self._interrupt(one)
            while self.running:
                for one in list(self.running):
                    self._look_at(one)
                time.sleep(0.02)
            self.write()

    def write(self) -> None:
        """The result file, if the journal has grown."""
        size = self.journal.stat().st_size if self.journal.exists() else 0
        if size != self.written:
            journal.write(self.result, journal.document(journal.read(self.journal)))
            self.written = size

    def _may_start(self, phase: Phase, names: set[str]) -> bool:
        if any(need in names and need not in self.ended for need in phase.needs):
            return False
        if phase.quiet:
            return not self.running
        lanes = {one.phase.lane for one in self.running} - {BESIDE}
        if any(one.phase.quiet for one in self.running):
            return False
        return phase.lane == BESIDE or not lanes or (phase.lane != ALONE and lanes == {phase.lane})

    def _start(self, phase: Phase) -> None:
        limit = min(phase.limit, self.end - time.monotonic() - GRACE / 2)
        self._say(phase.name, "start", command=" ".join(phase.command), limit=round(limit, 1))
        command = phase.command
        if shutil.which(command[0], path=self.environ.get("PATH")) is None:
            self._end(phase.name, "missing", 0.0, [f"{command[0]}: not found"])
            return
        log = self.result.parent / f"running-{len(self.ended) + len(self.running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env={
                    **self.environ, **phase.environ,
                    journal.PATH: str(self.journal), journal.PHASE: phase.name,
                },
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.running.append(Running(phase, process, log, time.monotonic(), limit))

    def _look_at(self, one: Running) -> None:
        """Interrupt it, kill it or take note of its end, whichever it is time for."""
        code, now = one.process.poll(), time.monotonic()
        if code is None and one.asked is None and now - one.began > one.limit:
            self._interrupt(one)
        elif code is None and one.asked is not None and now - one.asked > GRACE:
            _signal(one, signal.SIGKILL)
            one.process.wait()
        elif code is not None:
            _signal(one, signal.SIGKILL)  # what the process has left behind in its session
            self.running.remove(one)
            text = one.log.read_text(errors="replace")
            with self.result.with_suffix(".log").open("a") as log:
                log.write(f"\n===== {one.phase.name}\n{text}")
            one.log.unlink()
            status = "timeout" if one.asked is not None else STATUS.get(code, "failed")
            tail = text.splitlines()[-TAIL:] if status != "passed" else []
            if code < 0:
                tail.append(f"ended by signal {-code}")
            self._end(one.phase.name, status, now - one.began, tail)

    def _interrupt(self, one: Running) -> None:
        one.asked = time.monotonic()
        _signal(one, signal.SIGINT)

    def _end(self, name: str, status: str, seconds: float, tail: list[str]) -> None:
        self.ended[name] = status
        self._say(name, "end", status=status, seconds=round(seconds, 1), tail=tail)
        print(f"{name:32s} {status:8s} {seconds:6.1f} s", flush=True)

    def _say(self, name: str, kind: str, **fields: object) -> None:
        line = {"phase": name, "kind": kind, "at": round(time.time(), 3), **fields}
        journal.append(self.journal, line)


def _signal(one: Running, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, number)


def _die_with_parent() -> None:
    """Between fork and exec: a phase must not hold the GPU after the check was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
