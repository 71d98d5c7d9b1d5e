"""Data-parallel training on paper, 1 GPU to many nodes, by the model of data_parallel.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from recurx.bench.cases import CASES, case
from recurx.bench.data_parallel import NETWORK_GBS, NODE, NVLINK_GBS, Scaling, data_parallel
from recurx.plan import Device, cost
from recurx.plan.count import weight_values
from recurx.problem import Problem

GPUS = (1, 2, 4, 8, 16, 64)
# A call of the window costs its forward and a backward of twice as many FLOPs.
BACKWARD = 2.0


def training_seconds(problem: Problem, device: Device, backend: str | None = None) -> float:
    """Predicted forward and backward of one training step; loss and optimiser are not in it.

    Args:
        problem: the recursion with the batch of one GPU.
        device: which GPU.
        backend: whose plan; None for the fastest predicted one that also trains.
    """
    costs = cost(problem, device)
    names = [plan.backend for plan in costs.plans if plan.backend in ("triton", "eager")]
    forward = costs.seconds(backend or names[0])
    return forward * (1 + BACKWARD * problem.schedule.window / len(problem.schedule))


def scaling(name: str, device: str, batch: int) -> list[Scaling]:
    """The case's training step on 1 to 64 GPUs of one kind with `batch` samples each.

    Raises:
        InvalidArgument: an unknown case or device.
    """
    problem = dataclasses.replace(_problem(name), batch=batch, device_type="cuda")
    parameters = weight_values(problem)
    seconds = training_seconds(problem, Device.of(device))
    return [data_parallel(parameters, seconds, batch, gpus, backward_share=0.0) for gpus in GPUS]


def _problem(name: str) -> Problem:
    from recurx.bench.problems import problem_of_config

    return problem_of_config(case(name).make(forward_dtype="bfloat16"))


def markdown(name: str, device: str, batch: int) -> str:
    """The table of one case, labelled as what it is."""
    lines = [
        f"Data-parallel training of {CASES[name].title}, {batch} samples a GPU ({device}): **a "
        f"model, not measured**. Gradients of up to {NODE} GPUs cross links of {NVLINK_GBS:.0f} "
        f"GB/s, those of more {NETWORK_GBS:.0f} GB/s a GPU, after the backward and not beside it.",
        "",
        "| GPUs | ms a step | of that all-reduce | samples/s | efficiency |",
        "|---|---|---|---|---|",
    ]
    for s in scaling(name, device, batch):
        lines.append(
            f"| {s.gpus} | {1e3 * s.step_seconds:.1f} | {1e3 * s.exchange_seconds:.2f} ms | "
            f"{s.samples_per_second:,.0f} | {s.efficiency:.0%} |"
        )
    return "\n".join(lines)


def report(cases: Sequence[str] = ("trm-att",), device: str = "h100", batch: int = 96) -> str:
    """What `bench report` prints after the measured tables: the published batch of 768 on 8 GPUs
    is 96 samples each."""
    return "\n\n".join(markdown(name, device, batch) for name in cases)
