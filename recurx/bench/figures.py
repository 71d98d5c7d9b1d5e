"""Figures of rows: quantiles, counted work, rates against ceilings, predictions."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from recurx.bench.ceilings import peak_tflops
from recurx.bench.suites import Group
from recurx.bench.variants import Variant


def describe(variant: Variant) -> dict[str, Any]:
    return {
        "variant": variant.name, "engine": variant.engine, "backend": variant.backend,
        "dtype": variant.dtype, "ours": variant.ours,
    }  # fmt: skip


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def timed(times: list[float], repeats: int) -> dict[str, Any]:
    """Quantiles in milliseconds, and the rounds themselves, in their order."""
    kept = [round(1e3 * t, 5) for t in times]
    ordered = sorted(kept)
    return {
        "status": "timed",
        "p20_ms": quantile(ordered, 0.2),
        "p50_ms": statistics.median(ordered),
        "p80_ms": quantile(ordered, 0.8),
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
        from recurx.bench.cases import build
        from recurx.explain import problem_of_model
        from recurx.plan import count

        problems, sizes = {}, {}
        for dtype in group.dtypes:
            model = build(group.case, dtype, "eager", 1)
            problem = problem_of_model(model, group.batch)
            problem = dataclasses.replace(problem, device_type=device)
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

    def rates(
        self, variant: Variant, seconds: float, row: dict[str, Any], ceilings: dict[str, Any]
    ) -> dict[str, Any]:
        """Achieved rates, their share of the machine's, and the prediction.

        `of_peak` is FLOP/s against the fastest product measured in this run; `of_floor` is the
        least possible time, by that product and by the copy bandwidth, against the measured one.
        """
        flops = self.flops * (row["steps_mean"] if self.group.mode == "solve" else 1)
        found: dict[str, Any] = {"tflops": round(flops / seconds / 1e12, 6)}
        if ceilings:
            peak = 1e12 * peak_tflops(ceilings, variant.dtype)
            floor = max(flops / peak, self.bytes[variant.dtype] / (1e9 * ceilings["copy_gbs"]))
            found |= {"of_peak": round(flops / seconds / peak, 4)}
            found |= {"of_floor": round(floor / seconds, 4)}
        predicted = self.predicted(variant)
        found["predicted_ms"] = None if predicted is None else round(1e3 * predicted, 4)
        if self.group.mode == "solve":
            found["puzzles_per_s"] = round(row["puzzles"] / seconds, 2)
        return found

    def predicted(self, variant: Variant) -> float | None:
        """Seconds by `recurx.cost`, of inference steps of eager and of our backends."""
        from recurx.plan import cost

        if self.group.mode != "step" or not (variant.ours or variant.engine == "eager"):
            return None
        try:
            return cost(self.problems[variant.dtype]).seconds(variant.backend)
        except KeyError:
            return None
