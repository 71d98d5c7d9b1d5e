"""`recurx.cost`: what a recursion asks for, and what each plan is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recurx.errors import bad_argument
from recurx.plan import count
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, all_candidates, all_refusals
from recurx.problem import Problem


@dataclass(frozen=True)
class Costs:
    """Every plan for one problem on one device, the fastest prediction first; prints as a table.

    Args:
        problem, device: what was asked.
        flops: FLOPs that the mathematics asks for.
        weight_bytes: all parameters once, in the dtype of the states.
        plans: plans that fit, by predicted time.
        refused: why other kinds do not fit.
    """

    problem: Problem
    device: Device
    flops: float
    weight_bytes: int
    plans: tuple[LaunchPlan, ...]
    refused: tuple[str, ...]

    def __getitem__(self, backend: str) -> LaunchPlan:
        """The fastest plan of a backend (KeyError if it has none)."""
        for plan in self.plans:
            if plan.backend == backend:
                return plan
        raise KeyError(backend)

    def seconds(self, backend: str) -> float:
        """Predicted seconds of the fastest plan of a backend."""
        return self[backend].seconds(self.device)

    def __str__(self) -> str:
        lines = [
            f"{self.problem}",
            f"on {self.device.name} (rates: {self.device.source}): {self.flops / 1e9:.2f} GFLOP, "
            f"weights {self.weight_bytes / 1e6:.1f} MB; times are reckoned, not measured",
            f"{'plan':24} {'ms':>9} {'TFLOP/s':>8} {'busy':>8} {'DRAM MB':>9} {'L2 MB':>9} "
            f"{'shared MB':>9} {'launches':>8} {'barriers':>8}  limited by  sizes",
        ]
        for plan in self.plans:
            seconds, work = plan.seconds(self.device), plan.work
            parts = work.parts(self.device)
            limit = max(parts, key=lambda name: parts[name])
            shared = f"{work.shared_bytes / 1e6:.1f}" if work.shared_bytes else "-"
            busy = f"{min(work.parallel, self.device.units):.0f}/{self.device.units}"
            sizes = " ".join(f"{name}={value}" for name, value in plan.settings)
            lines.append(
                f"{plan.backend + '/' + plan.kind:24} {1e3 * seconds:9.3f} "
                f"{work.flops / seconds / 1e12:8.2f} {busy:>8} {work.dram_bytes / 1e6:9.1f} "
                f"{work.l2_bytes / 1e6:9.1f} {shared:>9} {work.launches:8.0f} "
                f"{work.barriers:8.0f}  {limit:10} {sizes}".rstrip()
            )
        return "\n".join([*lines, *(f"  not: {reason}" for reason in self.refused)])


def cost(problem: Problem, device: torch.device | str | Device | None = None) -> Costs:
    """Count FLOPs, bytes, launches and barriers of each plan and predict its time.

    Args:
        problem: a `recurx.Problem` (`recurx.models.problem_of_model` makes one of a model).
        device: a torch device, a name of `recurx.plan.DEVICES` ("h100", "l4", ...), or None for the
            device of the problem's type in this machine. A CPU's rates are measured, once.

    Raises:
        InvalidArgument: no Problem, or an unknown device.
    """
    if not isinstance(problem, Problem):
        raise bad_argument(
            "cost", "problem", "a recurx.Problem", type(problem).__name__,
            "Make one of a TRM or HRM by recurx.models.problem_of_model(model, batch_size).",
        )  # fmt: skip
    found = Device.of(problem.device_type if device is None else device)
    plans = all_candidates(problem, found)
    return Costs(
        problem=problem,
        device=found,
        flops=count.flops(problem),
        weight_bytes=count.weight_values(problem) * problem.dtype.itemsize,
        plans=tuple(sorted(plans, key=lambda plan: plan.order(found))),
        refused=tuple(all_refusals(problem, found)),
    )
