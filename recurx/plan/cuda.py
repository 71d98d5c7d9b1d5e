"""Plans of backend "cuda": the kinds of recursion kernel, and what all of them need.

    owner    one CTA owns a group of samples and runs every call (cuda_owner.py)
    grid     every call is spread over all multiprocessors (cuda_grid.py)
    cluster  two CTAs of a cluster own a sample, or several short ones (cuda_cluster.py)

A kind is a family of kernels in csrc/cuda: owner_sm80/, grid_sm80/, cluster_sm90a/.
"""

from __future__ import annotations

import torch

from recurx.plan.cuda_cluster import cluster_plans, why_not_cluster
from recurx.plan.cuda_grid import grid_plans, why_not_grid
from recurx.plan.cuda_owner import OWNER_PLANS, Shapes, owner_plans, why_not_owner
from recurx.plan.device import Device
from recurx.plan.launch import LaunchPlan
from recurx.problem import Problem
from recurx.schedule import FACTORS

MAX_STATES, MAX_READS, MAX_NETS, MAX_BLOCKS = 8, 8, 2, 8  # csrc/cuda/api.h
KINDS = ("owner", "grid", "cluster")
QUEUES = ("owner", "cluster")  # those that take their samples from a queue (csrc/cuda/solve.cuh)

# What each kind runs of fields of blocks and factors of steps, beside those of TRM and HRM.
FIELDS: dict[str, tuple[str, ...]] = {
    "owner": (*FACTORS, "residual_scale", "activation", "kv_heads", "biases"),
    "grid": (*FACTORS,),
    "cluster": (*FACTORS,),
}


def candidates(
    problem: Problem,
    device: Device,
    compiled: Shapes = OWNER_PLANS,
    kinds: tuple[str, ...] = KINDS,
    fp8: bool = False,
) -> list[LaunchPlan]:
    """The plans that fit: an owner plan for each number of samples a CTA, one grid plan, a cluster
    plan for each size of a cluster.

    Args:
        compiled: the owner kernels that the build holds, as OWNER_PLANS.
        kinds: the kinds of kernel that the build holds.
        fp8: all weights are quantised; the grid kernel alone makes use of that.
    """
    if why_not_recursion(problem, device) is not None:
        return []
    plans = {
        "owner": lambda: owner_plans(problem, device, compiled),
        "grid": lambda: grid_plans(problem, device, fp8),
        "cluster": lambda: cluster_plans(problem, device),
    }
    return [plan for k in kinds if not problem.unknown(FIELDS[k]) for plan in plans[k]()]


def slots(plan: LaunchPlan) -> int:
    """Samples that a plan of QUEUES works on at once: the slots that a queue feeds."""
    units = plan.work.parallel // 2 if plan.kind == "cluster" else plan["owners"]
    return units * plan["samples"]


def refusals(
    problem: Problem, device: Device, compiled: Shapes = OWNER_PLANS, kinds: tuple[str, ...] = KINDS
) -> list[str]:
    """Why each kind does not run it; one sentence for all if none ever could."""
    general = why_not_recursion(problem, device)
    if general is not None:
        return [general]
    reasons = {
        "owner": why_not_owner(problem, device, compiled),
        "grid": why_not_grid(problem, device),
        "cluster": why_not_cluster(problem, device),
    }
    reasons = {kind: problem.unknown(FIELDS[kind]) or why for kind, why in reasons.items()}
    return [f"{kind}: {reasons[kind]}" for kind in kinds if reasons[kind] is not None]


def why_not_recursion(problem: Problem, device: Device) -> str | None:
    """What no kernel of csrc/cuda takes: the limits of RxRecursion, dtype and device."""
    if problem.opaque:
        return f"cannot look inside the plain callable {problem.opaque[0]!r}"
    if device.kind != "cuda":
        return f"runs on CUDA devices, not on {device.name}"
    if device.capability < (8, 0):
        major, minor = device.capability
        return (
            f"needs compute capability 8.0 (bf16 tensor cores), {device.name} has {major}.{minor}"
        )
    if problem.dtype != torch.bfloat16:
        return f"runs bfloat16 states, not {problem.dtype} (the products are bf16 tensor cores)"
    schedule = problem.schedule
    if len(schedule.states) > MAX_STATES:
        return f"holds up to {MAX_STATES} states, the schedule has {len(schedule.states)}"
    if max(max(len(s.state), len(s.inject)) for s in schedule.steps) > MAX_READS:
        return f"adds up to {MAX_READS} states a sum, the schedule has a longer one"
    if len(problem.nets) > MAX_NETS:
        return f"holds up to {MAX_NETS} nets, the schedule calls {len(problem.nets)}"
    if any(len(spec.blocks) > MAX_BLOCKS for _, spec in problem.nets):
        return f"holds up to {MAX_BLOCKS} blocks a net"
    return None
