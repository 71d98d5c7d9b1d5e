"""Data-parallel training on paper: gradient bytes against the interconnect. A model, not a run.

One optimiser step moves the gradients through a ring all-reduce: every GPU sends and receives
2 (n - 1) / n of them over its slowest link. Tiny nets have 7 million parameters, so the question is
whether 28 MB an optimiser step can hide behind a supervision step.
"""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8  # GPUs
NVLINK_GBS = 450.0  # a GPU and direction, NVLink 4
NETWORK_GBS = 50.0  # a GPU and direction, 400 Gb/s
# One ring step: about 3 us inside a node, 10 us between nodes (published NCCL latencies).
NVLINK_US, NETWORK_US = 3.0, 10.0


@dataclass(frozen=True)
class Scaling:
    """Predicted training on `gpus` GPUs.

    Args:
        gpus: number of GPUs, eight a node.
        step_seconds: one supervision step with its all-reduce.
        exchange_seconds: the all-reduce alone.
        samples_per_second: over all GPUs.
        efficiency: share of `gpus` times one GPU's rate.
    """

    gpus: int
    step_seconds: float
    exchange_seconds: float
    samples_per_second: float
    efficiency: float


def all_reduce_seconds(gradient_bytes: float, gpus: int) -> float:
    """A ring all-reduce over `gpus` GPUs: bandwidth and latency of the slowest link."""
    if gpus == 1:
        return 0.0
    inside = gpus <= NODE
    bandwidth = NVLINK_GBS if inside else NETWORK_GBS
    latency = NVLINK_US if inside else NETWORK_US
    steps = 2 * (gpus - 1)
    return steps / gpus * gradient_bytes / (bandwidth * 1e9) + steps * latency * 1e-6


def data_parallel(
    parameters: int,
    step_seconds: float,
    batch: int,
    gpus: int,
    *,
    backward_share: float = 0.5,
    gradient_itemsize: int = 4,
) -> Scaling:
    """Scale one GPU's training step to `gpus` GPUs with the same batch a GPU.

    Args:
        parameters: trained parameters.
        step_seconds: one training step on one GPU (measured, or predicted).
        batch: samples a GPU.
        gpus: how many.
        backward_share: share of the step during which gradients are exchanged unseen. All calls of
            the window share their weights, so a gradient is complete only when the backward is: 0
            is the honest value without bucketing, 0.5 an optimistic one.
        gradient_itemsize: bytes of a gradient value.
    """
    exchange = all_reduce_seconds(parameters * gradient_itemsize, gpus)
    step = step_seconds + max(0.0, exchange - backward_share * step_seconds)
    return Scaling(gpus, step, exchange, batch * gpus / step, step_seconds / step)
