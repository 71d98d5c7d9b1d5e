"""What a training step tells, read from the device only when somebody asks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """What one training step tells: the mean loss of its batch, and its finished samples.

    Its numbers are read from the device when they are first asked for: on a GPU, who asks after
    every step waits for every step.

    Args:
        step: steps done.
        seconds: time spent in steps so far; on a GPU the time to launch them.
        slots: samples in the batch.
        names, values: the metrics of the step (sums), and a copy of them on the device.
    """

    step: int
    seconds: float
    slots: int
    names: tuple[str, ...]
    values: Tensor

    @functools.cached_property
    def sums(self) -> dict[str, float]:
        """The metrics of the loss head, as sums over the samples that they are about."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    @property
    def loss(self) -> float:
        return self.sums["loss"] / self.slots

    @property
    def finished(self) -> int:
        """Number of samples that halted in this step."""
        return int(self.sums["count"])

    @property
    def exact(self) -> float | None:
        """Share of them that are solved, None if there are none."""
        return self.sums["exact_accuracy"] / self.finished if self.finished else None

    @property
    def steps_mean(self) -> float | None:
        """Supervision steps that they took, None if there are none."""
        return self.sums["steps"] / self.finished if self.finished else None
