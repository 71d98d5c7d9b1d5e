"""What a whole step takes on a CPU: the recursion by its plan, and what stands around it.

    step_seconds    inference: embedding, recursion, heads
    train_seconds   forward, backward of the window, optimiser and weight average
    solve_seconds   supervision steps until the samples halt

Around the recursion PyTorch runs small operators; their number and passes over a [B, T, D] tensor
are counted from `recurx.models`, `recurx.solving.halting_loop` and the optimisers, their price is
that of the eager plan.
"""

from __future__ import annotations

from recurx.plan.count import weight_values
from recurx.plan.device import Device
from recurx.plan.eager import CPU_BANDWIDTH
from recurx.plan.launch import LaunchPlan
from recurx.problem import Problem

# Embedding, its scale and prefix, heads; with the wrapper's resets and halting, and answers.
STEP_OPERATORS, STEP_PASSES = 12, 8
SOLVE_OPERATORS, SOLVE_PASSES = 33, 18
# A training step with its carry, loss, and the optimiser's operators that are not of its size.
TRAIN_OPERATORS = 200
# Bytes a parameter: AdamATan2 reads and writes 92 in its passes, the average 28.
OPTIMISER_BYTES = 120
# A backward does two products where the forward did one, on the same packed or attended operands.
BACKWARD_PRODUCTS = 2


def step_seconds(problem: Problem, device: Device, backend: str) -> float:
    """One supervision step without gradient.

    Raises:
        BackendUnavailable: the backend has no plan for it.
    """
    fixed, growing = _inference(problem, device, backend, STEP_OPERATORS, STEP_PASSES)
    return fixed + growing


def solve_seconds(
    problem: Problem, device: Device, backend: str, mean_steps: float, most_steps: int
) -> float:
    """`recurx.solve` on a batch whose samples take `mean_steps` of at most `most_steps`.

    A step of the few samples that are left costs its operators as one of all does.
    """
    fixed, growing = _inference(problem, device, backend, SOLVE_OPERATORS, SOLVE_PASSES)
    return most_steps * fixed + mean_steps * growing


def train_seconds(problem: Problem, device: Device, backend: str) -> float:
    """One training step: the calls before the window on `backend`, the window under autograd."""
    schedule = problem.schedule
    share = schedule.window / len(schedule)
    before = LaunchPlan.pick(problem, device, backend).seconds(device)
    parts = LaunchPlan.pick(problem, device, "eager").work.parts(device)
    forward = sum(parts.values())
    work = parts["products"] + parts["vectors"] + parts["l2"]
    backward = forward + (BACKWARD_PRODUCTS - 1) * work
    parameters = weight_values(problem) * OPTIMISER_BYTES / _bandwidth(device)
    around = _around(problem, device, TRAIN_OPERATORS, SOLVE_PASSES)
    return (1 - share) * before + share * (forward + backward) + parameters + sum(around)


def _inference(
    problem: Problem, device: Device, backend: str, count: int, passes: int
) -> tuple[float, float]:
    """Seconds of a step that do not depend on the batch, and those that grow with it."""
    plan = LaunchPlan.pick(problem, device, backend)
    parts = plan.work.parts(device)
    fixed = parts["launches"] + parts["barriers"]
    operators, moved = _around(problem, device, count, passes)
    return fixed + operators, plan.seconds(device) - fixed + moved


def _around(problem: Problem, device: Device, count: int, passes: int) -> tuple[float, float]:
    """Seconds of `count` operators and of `passes` over the states."""
    values = problem.batch * problem.tokens * problem.hidden
    moved = passes * values * problem.dtype.itemsize
    return 1e-6 * count * device.launch_us, moved / _bandwidth(device)


def _bandwidth(device: Device) -> float:
    return device.dram_gbs * 1e9 * CPU_BANDWIDTH
