"""Figures of rows: quantiles, counted work, rates against ceilings."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from recurx.bench.ceilings import peak_tflops
from recurx.bench.suites import Group
from recurx.bench.variants import Variant


def describe(variant: Variant) -> dict[str, Any]:
    return {
        "variant": variant.name, "engine": variant.engine, "backend": variant.backend,
        "dtype": variant.dtype, "ours": variant.ours,
    }  # fmt: skip


def timed(times: list[float], repeats: int) -> dict[str, Any]:
    """Quantiles in milliseconds, and the rounds themselves, in their order."""
    kept = [round(1e3 * t, 5) for t in times]
    # The time of a round each: the slower one where a share falls on the border of two.
    p20, p80 = np.quantile(kept, (0.2 + 1e-9, 0.8 + 1e-9), method="inverted_cdf")
    return {
        "status": "timed",
        "p20_ms": float(p20),
        "p50_ms": statistics.median(kept),
        "p80_ms": float(p80),
        "rounds": len(kept),
        "repeats": repeats,
        "times_ms": kept,
    }


@dataclass
class Work:
    """The counted work of one unit of a group: FLOPs and least bytes.

    FLOPs are those of the net calls; embedding, heads, loss and optimiser are left out (under 2 %
    of a published net). A backward counts twice the forward of its window; recomputing counts
    nothing. Bytes are weights, x and states once: what a perfect engine must move.
    """

    group: Group
    problems: dict[str, Any]  # dtype -> Problem
    flops: float
    bytes: dict[str, int]  # dtype -> bytes
    tokens: int
    hidden: int
    inner: int
    calls: int

    @classmethod
    def of(cls, group: Group, device: str) -> Work:
        from recurx.bench.cases import DTYPES, case
        from recurx.bench.problems import problem_of_config
        from recurx.plan import count

        problems, sizes = {}, {}
        for dtype in group.dtypes:
            config = case(group.case).make(forward_dtype=DTYPES[dtype])
            problem = problem_of_config(config, group.batch, device)
            problems[dtype] = problem
            state = problem.batch * problem.tokens * problem.hidden
            values = count.weight_values(problem) + state * (1 + 2 * len(problem.schedule.states))
            sizes[dtype] = values * problem.dtype.itemsize
        schedule = problem.schedule
        flops = float(count.flops(problem))
        if group.mode == "train":
            steps = schedule.steps[schedule.grad_from :]
            window = dataclasses.replace(schedule, steps=steps, grad_from=0)
            flops += 2 * count.flops(dataclasses.replace(problem, schedule=window))
        block = problem.nets[0][1].blocks[0]
        return cls(
            group, problems, flops, sizes, problem.tokens, problem.hidden, block.inner,
            len(schedule),
        )  # fmt: skip

    def refusal(self, variant: Variant) -> str | None:
        """Why a backend cannot run the group, or None. The registry is asked."""
        from recurx import backends

        return backends.why_not(variant.backend, self.problems[variant.dtype])

    def facts(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "hidden": self.hidden, "calls": self.calls,
            "flops": self.flops, "bytes": self.bytes,
        }  # fmt: skip

    def rates(self, seconds: float, row: dict[str, Any]) -> dict[str, Any]:
        """Achieved rates."""
        flops = self.flops * (row["steps_mean"] if self.group.mode == "solve" else 1)
        found: dict[str, Any] = {"tflops": round(flops / seconds / 1e12, 6)}
        if self.group.mode == "solve":
            found["puzzles_per_s"] = round(row["puzzles"] / seconds, 2)
        return found


def against_ceilings(document: dict[str, Any]) -> None:
    """Write into every timed row how near it came to the machine, in place.

    `of_peak` is FLOP/s against the fastest product measured in the run; `of_floor` is the least
    possible time, by that product and by the copy bandwidth, against the measured one. The best of
    all groups counts: on a shared machine one group's ceilings can be below what a row reached.
    """
    best: dict[str, float] = {}
    for group in document["groups"]:
        for name, value in group.get("ceilings", {}).items():
            if isinstance(value, (int, float)):
                best[name] = max(value, best.get(name, value))
    for group in document["groups"] if best else ():
        for row in group["rows"]:
            if row["status"] != "timed" or "tflops" not in row:
                continue
            peak, seconds = peak_tflops(best, row["dtype"]), row["p50_ms"] / 1e3
            least = group["bytes"][row["dtype"]] / (1e9 * best["copy_gbs"])
            floor = max(row["tflops"] * seconds / peak, least)
            row["of_peak"] = round(row["tflops"] / peak, 4)
            row["of_floor"] = round(floor / seconds, 4)
