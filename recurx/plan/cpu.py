"""The plan of backend "cpu": one call into the C++ engine (csrc/cpu/).

Samples are spread over threads, about four a thread at once; a single sample is split over the
threads by columns, with four barriers a block.
"""

from __future__ import annotations

import math

from recurx.plan.count import PRODUCTS, step_stages, weight_values
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan, Work
from recurx.problem import Problem

# Share of the rate of PyTorch's products that the engine's reach, epilogues and attention
# included: from the CPU rows of bench/results/, within 10 % on AVX2; AMX and AVX-512 not measured.
EFFICIENCY_MANY, EFFICIENCY_ONE = 0.95, 0.90
BARRIERS_A_BLOCK = 4


def candidates(problem: Problem, device: Device) -> list[LaunchPlan]:
    """One plan on a CPU, by whether there are samples enough for all threads."""
    if device.kind != "cpu":
        return []
    found = step_stages(problem)
    flops = sum(stage.flops for stage in found)
    products = sum(stage.flops for stage in found if stage.name in PRODUCTS)
    single = problem.batch < device.units
    # Packed weights stream through once a net call and group of samples, unseen from the last cache
    # and at the price of memory beyond it; activations stay in L2.
    itemsize = 2 if problem.dtype.itemsize == 2 else 4
    passes = 1 if single else math.ceil(problem.batch / (4 * device.units))
    streamed = itemsize * sum(stage.weights for stage in found) * passes
    cached = itemsize * weight_values(problem) <= device.l2_bytes
    specs = dict(problem.nets)
    blocks = sum(len(specs[s.net].blocks) for s in problem.schedule.steps if s.net in specs)
    work = Work(
        flops=flops, padded_flops=products,
        dram_bytes=0 if cached else streamed, l2_bytes=0, launches=1, overlap=False,
        barriers=BARRIERS_A_BLOCK * blocks if single else 0,
        # Without matrix instructions bf16 is a storage format: the engine multiplies in fp32.
        itemsize=2 if itemsize == 2 and _has_amx() else 4,
        efficiency=EFFICIENCY_ONE if single else EFFICIENCY_MANY,
    )  # fmt: skip
    kind = "columns" if single else "samples"
    settings = (("threads", device.units), ("passes", passes))
    why = (
        "too few samples for all threads: each takes a share of the columns"
        if single
        else "whole samples to each thread, no barrier"
    )
    return [LaunchPlan("cpu", kind, settings, work, why)]


def refusals(problem: Problem, device: Device) -> list[str]:
    return [] if device.kind == "cpu" else [f"backend cpu does not run on {device.name}"]


def _has_amx() -> bool:
    try:
        from recurx import _C
    except ImportError:
        return False
    return bool(_C.cpu_isa() == "amx")
