"""Times of a case: every kernel family plain and in a graph, and PyTorch, in one process.

    python -m bench.gpu_check.times                               # sizes.CASE at sizes.BATCHES
    python -m bench.gpu_check.times all CASE MODE BATCH           # another one
    python -m bench.gpu_check.times compiled CASE MODE BATCH WAY  # torch.compile of a net call

A way is judged as in `recurx bench run`, then timed in rounds, in turn with the others. Compilers
fill the processor, so such processes compile together and are timed one by one, when the last has
compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import journal, sizes
from bench.gpu_check.families import FAMILIES, Family, held, why_not
from bench.gpu_check.journal import emit
from bench.gpu_check.phases import LOCK
from recurx.bench import ceilings, checks, quantities, reference, runner, subjects
from recurx.bench.suites import Group
from recurx.bench.turns import Turn, interleave
from recurx.bench.variants import OURS, YARDSTICK, Variant
from recurx.plan import Device

ROUNDS = 30
LATEST = 70.0  # seconds after which a compiled way no longer waits for the others
WARM = 4  # steps: some record their graph in the second, some in the fourth
DTYPE = "bf16"


@dataclasses.dataclass(frozen=True)
class Way(Variant):
    """A variant that holds recurx to one family, or captures what it runs into a graph."""

    family: Family | None = None
    runs_on: str = "eager"
    graph: bool = False

    @property
    def backend(self) -> str:
        return self.runs_on

    @property
    def captured(self) -> bool:
        return self.graph

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.family is None else held(self.family):
            yield


def all_ways(mode: str) -> list[Way]:
    """Eager first: it judges the others. What trains makes its own graph."""
    found = [Way(YARDSTICK, DTYPE), Way("graph", DTYPE, graph=True)]
    for name, family in FAMILIES.items():
        for graph in (False, True) if mode == "step" else (False,):
            if mode == "train" and family.backend != "triton":
                continue  # they have no backward
            engine = OURS + name + ("-graph" if graph else "")
            found.append(Way(engine, DTYPE, family, family.backend, graph))
    return [*found, Way(OURS + "auto", DTYPE, runs_on="auto")]


def _proof(way: Way) -> tuple[str, str]:
    """The phase that proves a family, and how it ended in this call; "" if there was none."""
    named = f"proof {way.engine.removeprefix(OURS).removesuffix('-graph')}"
    lines = journal.read(Path(os.environ.get(journal.PATH, "no journal")))
    ends = (line for line in lines if line["kind"] == "end" and line["phase"] == named)
    return named, str(next(ends, {}).get("status", ""))


class Measured:
    """A case in a mode at a batch size, way after way or in turn.

    Args:
        ways: what is timed; eager is run in any case, to judge them.
        compiled: called between the first steps and the rounds.
    """

    def __init__(
        self, case: str, mode: str, batch: int, ways: list[Way],
        compiled: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:  # fmt: skip
        self.key = {"case": case, "mode": mode, "batch": batch}
        self.ways, self.compiled = ways, compiled
        self.work = quantities.Work.of(Group(case, mode, batch, dtypes=(DTYPE,)), "cuda")
        self.yard: dict[str, torch.Tensor] = {}
        self.good = True

    def run(self, with_ceilings: bool = False) -> bool:
        """Whether every way that this build and device have is right and was timed."""
        rows = self.key["batch"] * self.work.tokens
        found = {}
        if with_ceilings:
            found = ceilings.ceilings_of("cuda", rows, self.work.hidden, self.work.inner)
        together = self.key["mode"] != "train"  # else only one fits into the device's memory
        emit(
            "group", **self.key, **self.work.facts(), ceilings=found, compile_unit="net",
            cache=runner.CACHE["warm"], interleaved=together,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as self.folder:
            with torch.set_grad_enabled(self.key["mode"] != "step"):
                self.exact = reference.outputs(**self.key, device="cuda", folder=self.folder)
            if self.ways[0].engine != YARDSTICK:
                self._start(Way(YARDSTICK, DTYPE), told=False)
            # `auto` decides again whenever a backend is held to something, so it runs by itself.
            alone = [way for way in self.ways if way.runs_on == "auto" or not together]
            first = [way for way in self.ways if way not in alone]
            for some in [first, *([way] for way in alone)]:
                started = [(way, subject) for way in some if (subject := self._start(way))]
                with self.compiled():
                    self._time(started)
                del started
                gc.collect()
                torch.cuda.empty_cache()
        return self.good

    def _start(self, way: Way, told: bool = True) -> Any:
        """The subject after its first steps, or None with a row that says why not."""
        row = quantities.describe(way)
        try:
            with way.chosen():
                missing = self._missing(way)
                if missing is not None:
                    self._row(row | {"status": "refused", "reason": ": ".join(missing)})
                    return None
                begin = time.perf_counter()
                subject = subjects.subject(
                    **dict(zip(("case_name", "mode", "batch"), self.key.values(), strict=True)),
                    variant=way, device="cuda", unit="net", folder=self.folder,
                )  # fmt: skip
                torch.manual_seed(2)  # of the exploration of halting
                subject.step()
                torch.cuda.synchronize()
                row["first_seconds"] = time.perf_counter() - begin
                got = subject.outputs()
                if way.engine == YARDSTICK:
                    self.yard = got
                verdict = checks.judge(got, self.exact, self.yard)
                row |= {"drift": verdict.drift, "allowed": verdict.allowed}
                if verdict.reason:
                    self._row(row | {"status": "wrong", "reason": verdict.reason})
                    return None
                for _ in range(WARM if told else 0):
                    subject.step()
                torch.cuda.synchronize()
        except Exception as error:  # whatever a compiler or an engine meets becomes the reason
            text = f"{type(error).__name__}: {error}".strip()[:2000]
            self._row(row | {"status": "failed", "reason": text})
            return None
        subject.row = row
        return subject if told else None

    def _missing(self, way: Way) -> tuple[str, str] | None:
        if way.family is None:
            return None
        phase, status = _proof(way)
        if status not in ("", "passed"):  # it could take this process with it
            return status, f"phase {phase!r} ended so"
        problem = self.work.problems[DTYPE]
        at = dataclasses.replace(problem, device_type=torch.empty(0, device="cuda").device.type)
        return why_not(way.family, at, Device.of("cuda"))

    def _time(self, started: list[tuple[Way, Any]]) -> None:
        """Rounds, one sample of each way in turn; rows."""
        turns, repeats = [], {}
        for way, subject in started:
            seconds = self._sample(way, subject, 1)
            repeats[way] = max(1, min(200, round(runner.SAMPLE_SECONDS / max(seconds or 1, 1e-6))))
            turns.append(Turn(functools.partial(self._sample, way, subject, repeats[way])))
        end = time.monotonic() + sizes.SECONDS
        interleave(turns, ROUNDS, runner.FEWEST_ROUNDS, late=lambda: time.monotonic() > end)
        for (way, subject), turn in zip(started, turns, strict=True):
            row = subject.row
            if turn.times and "status" not in row:
                row |= quantities.timed(turn.times, repeats[way])
                row |= self.work.rates(row["p50_ms"] / 1e3, row)
            self._row(row)

    def _sample(self, way: Way, subject: Any, count: int) -> float | None:
        """Seconds a step as a user's clock sees them; None after an error, which is the reason."""
        try:
            with way.chosen() if not way.graph else contextlib.nullcontext():
                if way.family is not None and not way.graph:
                    subject.step()  # plans are looked up again
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(count):
                    subject.step()
                torch.cuda.synchronize()
                return (time.perf_counter() - begin) / count
        except Exception as error:
            subject.row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            return None

    def _row(self, row: dict[str, Any]) -> None:
        self.good &= row["status"] in ("timed", "refused")
        emit("row", **self.key, row=row)


@contextlib.contextmanager
def turns_of_compilers() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Inside, others may compile too; what it gives waits for them, and then for its turn."""
    folder = Path(os.environ.get(journal.PATH, tempfile.gettempdir())).parent
    begin = time.monotonic()
    with open(folder / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)

        @contextlib.contextmanager
        def alone() -> Iterator[None]:
            fcntl.flock(lock, fcntl.LOCK_UN)
            while time.monotonic() - begin < LATEST:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
            else:
                emit("note", text="timed while others compiled: waited long enough")
            yield
            fcntl.flock(lock, fcntl.LOCK_UN)

        yield alone


def main() -> int:
    if len(sys.argv) == 1:
        good = [Measured(sizes.CASE, "step", batch, all_ways("step")).run(index == 0)
                for index, batch in enumerate(sizes.BATCHES)]  # fmt: skip
        return int(not all(good))
    what, case, mode, batch = sys.argv[1:5]
    if what == "all":
        return int(not Measured(case, mode, int(batch), all_ways(mode)).run())
    with turns_of_compilers() as alone:
        return int(not Measured(case, mode, int(batch), [Way(sys.argv[5], DTYPE)], alone).run())


if __name__ == "__main__":
    sys.exit(main())
