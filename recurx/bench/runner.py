"""Measures groups: workers, correctness, interleaved rounds, rows.

Every round times each variant once, in turn, so that slow minutes of the machine hit all alike.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recurx.bench import checks, quantities
from recurx.bench.lanes import Lane, Options
from recurx.bench.remote import Remote, WorkerFailed
from recurx.bench.rounds import Turn, interleave
from recurx.bench.suites import Group, variants_of
from recurx.bench.variants import YARDSTICK

SAMPLE_SECONDS = 0.02  # short steps are repeated until a sample takes about this long
MOST_ROUNDS, FEWEST_ROUNDS = 200, 3
SLOW = 20  # a variant this many times slower than the fastest takes part in fewer rounds
RECORDED = 4  # torch.compile records its graphs in the second step, CapturedStep in the fourth
ENERGY_SECONDS = 0.5
CACHE = {
    "warm": "warm: a sample is steps back to back",
    "interleaved": "other variants' steps run between two samples, so a sample starts with their "
    "data in the caches; within a step the weights are read again by every call",
    "cold": "cold: the L2 is overwritten before every step, and the step timed by events",
}


class Measurement:
    """One group. `document()` is valid at any moment: what is not measured yet has no row."""

    def __init__(self, group: Group, options: Options) -> None:
        self.group, self.options = group, options
        self.work = quantities.Work.of(group, options.device)
        self.ceilings: dict[str, Any] = {}
        self.lanes: list[Lane] = []
        self.exact: dict[str, torch.Tensor] = {}
        self.yards: dict[str, dict[str, torch.Tensor]] = {}

    def run(self) -> None:
        """Measure. On an exception (Ctrl-C included) the rounds so far stay in `document()`."""
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+b") as log:
            self.folder, self.log = folder, log
            try:
                self._reference()
                if self.group.interleave:
                    self._together(self._lanes())
                else:
                    for lane in self._lanes():
                        self._together([lane])
                        lane.end()
            finally:
                for lane in self.lanes:
                    if lane.remote is not None:
                        lane.remote.kill()

    def _lanes(self) -> list[Lane]:
        """Yardsticks first: the others are judged by them."""
        found = []
        for variant in variants_of(self.group, self.options.device):
            row = quantities.describe(variant)
            reason = self.work.refusal(variant) if variant.ours else None
            lane = Lane(variant, row)
            self.lanes.append(lane)
            if reason:
                lane.drop("refused", reason)
            else:
                found.append(lane)
        return sorted(found, key=lambda lane: lane.variant.engine != YARDSTICK)

    # ---- before the rounds -------------------------------------------------------------------

    def _remote(self, variant: str) -> Remote:
        options, group = self.options, self.group
        return Remote(
            self.log, case=group.case, mode=group.mode, variant=variant, batch=group.batch,
            device=options.device, unit=options.unit, threads=options.threads, folder=self.folder,
            imports=list(options.imports),
        )  # fmt: skip

    def _timeout(self) -> float:
        return max(1.0, min(self.options.start_timeout, self.options.left()))

    def _reference(self) -> None:
        """The exact results, and the ceilings of the machine."""
        self._say("reference and ceilings")
        remote = self._remote("eager/fp32")
        try:
            path = Path(self.folder) / "exact.pt"
            remote.ask("reference", self._timeout(), output=str(path))
            self.exact = torch.load(path)
            self.ceilings = remote.ask(
                "ceilings", self._timeout(), rows=self.group.batch * self.work.tokens,
                hidden=self.work.hidden, inner=self.work.inner,
            )  # fmt: skip
        finally:
            remote.kill()

    def _start(self, lanes: list[Lane]) -> None:
        """Start some at once, wait for each, and judge its first results."""
        for lane in lanes:
            self._say(f"starting {lane.variant.name}")
            lane.remote = self._remote(lane.variant.name)
            lane.remote.send("start", output=self._output(lane))
        for lane in lanes:
            assert lane.remote is not None
            try:
                lane.row |= lane.remote.receive(self._timeout())
            except WorkerFailed as error:
                lane.drop("failed", str(error))
                self._say(f"{lane.variant.name} failed: {error}")
                continue
            got = torch.load(self._output(lane))
            dtype = lane.variant.dtype
            if lane.variant.engine == YARDSTICK:
                self.yards[dtype] = got
            elif dtype not in self.yards:
                lane.drop("failed", f"nothing to judge it by: {YARDSTICK}/{dtype} has no results")
                continue
            verdict = checks.judge(got, self.exact, self.yards[dtype])
            lane.row |= {"drift": verdict.drift, "allowed": verdict.allowed}
            if verdict.reason:
                lane.drop("wrong", verdict.reason)
                self._say(f"{lane.variant.name} is wrong: {verdict.reason}")

    def _output(self, lane: Lane) -> str:
        return str(Path(self.folder) / f"{lane.variant.name.replace('/', '-')}.pt")

    # ---- rounds ------------------------------------------------------------------------------

    def _together(self, lanes: list[Lane]) -> None:
        jobs = self.options.jobs
        for first in range(0, len(lanes), jobs):
            if self.options.left() <= 0:
                for lane in lanes[first:]:
                    lane.drop("failed", "not started: the time limit of the run was over")
                break
            self._start(lanes[first : first + jobs])
        running = [lane for lane in lanes if lane.remote is not None]
        self._warm(running)
        self._rounds([lane for lane in running if lane.remote is not None])
        for lane in running:
            self._count(lane)
            lane.end()

    def _count(self, lane: Lane) -> None:
        """Launches, memory and energy of a timed lane; times stay if that fails."""
        if lane.remote is None or not lane.times:
            return
        if "note" in lane.row:
            lane.row |= {"launches": None, "launches_are": "not counted: too slow"}
            return
        try:
            lane.row |= lane.remote.ask("count", self._timeout(), seconds=ENERGY_SECONDS)
        except WorkerFailed as error:
            lane.row |= {"launches": None, "launches_are": f"not counted: {error}"}

    def _ask(self, lane: Lane, question: Callable[[Remote], dict[str, Any]]) -> dict[str, Any]:
        """A reply, put into the row unless it is a time; a failure ends the lane, {}."""
        assert lane.remote is not None
        try:
            reply = question(lane.remote)
        except WorkerFailed as error:
            lane.drop("failed", str(error))
            return {}
        lane.row |= {name: value for name, value in reply.items() if name != "seconds"}
        return reply

    def _sample(self, lane: Lane) -> float | None:
        cold = self.options.cold
        reply = self._ask(lane, lambda r: r.ask("time", repeats=lane.repeats, cold=cold))
        return reply.get("seconds")

    def _warm(self, lanes: list[Lane]) -> None:
        """One step each, which says how often it is repeated in a sample, and how many rounds.

        A way of PyTorch whose first step, nothing compiled in it, took most of the group's time is
        not asked again: that step becomes its sample. One that took a quarter is asked once.
        """
        warm: dict[str, float] = {}
        for lane in lanes:
            way = lane.variant.way
            compiled = way is not None and way.compile is not None
            share = lane.row["first_seconds"] / self.group.seconds
            plain = way is not None and not compiled
            if compiled or self.options.device == "cuda":
                self._ask(lane, lambda remote: remote.ask("time", repeats=RECORDED))
            if plain and share > 0.6:
                lane.times.append(lane.row["first_seconds"])
                lane.row["note"] = "too slow for rounds: its first step is the sample"
                continue
            seconds = self._sample(lane) if lane.remote is not None else None
            if seconds is None:
                continue
            if plain and share > 0.25:
                lane.times.append(seconds)
                lane.row["note"] = "too slow for rounds: one sample"
            else:
                warm[lane.variant.name] = seconds
        for lane in lanes:
            if lane.variant.name in warm:
                seconds = warm[lane.variant.name]
                lane.repeats = max(1, min(1000, round(SAMPLE_SECONDS / seconds)))
                lane.every = max(1, round(seconds / (SLOW * min(warm.values()))))
            else:
                lane.every = 0
        cost = [warm[lane.variant.name] * lane.repeats / lane.every for lane in lanes if lane.every]
        self.rounds = 0
        if cost:
            self.rounds = round(self.group.seconds / sum(cost))
            self.rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, self.rounds))

    def _rounds(self, lanes: list[Lane]) -> None:
        if self.rounds:
            self._say(f"{self.rounds} rounds")
        turns = [
            Turn(functools.partial(self._sample, lane), lane.times, lane.every)
            for lane in lanes
            if lane.every
        ]
        interleave(turns, self.rounds, fewest=FEWEST_ROUNDS, late=lambda: self.options.left() <= 0)

    def _say(self, text: str) -> None:
        group = self.group
        self.options.say(f"{group.case} {group.mode} B={group.batch}: {text}")

    # ---- what came out -----------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """The group for the result file."""
        group = self.group
        alone = not group.interleave or self.options.device == "cuda"
        cache = "cold" if self.options.cold else "warm" if alone else "interleaved"
        rows = []
        for lane in self.lanes:
            row = dict(lane.row)
            if lane.times:
                row |= quantities.timed(lane.times, lane.repeats)
                row |= self.work.rates(row["p50_ms"] / 1e3, row)
            if "status" in row:
                rows.append(row)
        return {
            "case": group.case, "mode": group.mode, "batch": group.batch, **self.work.facts(),
            "cache": CACHE[cache], "interleaved": group.interleave, "ceilings": self.ceilings,
            "compile_unit": self.options.unit, "rows": rows,
        }  # fmt: skip
