"""backend="eager": the reference itself, on any device, in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurx import reference
from recurx.backends import Backend
from recurx.problem import Problem


class Eager(Backend):
    name = "eager"
    device_types = ()

    def why_unavailable(self) -> str | None:
        return None

    def why_unsupported(self, problem: Problem) -> str | None:
        return None

    def run(
        self,
        problem: Problem,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        cos: Tensor | None,
        sin: Tensor | None,
        start: int,
        stop: int,
    ) -> list[Tensor]:
        cos_sin = None if cos is None or sin is None else (cos, sin)
        carry = dict(zip(problem.schedule.states, states, strict=True))
        with torch.no_grad():
            out = reference.run(
                problem.schedule, problem.bind(weights), x, carry, cos_sin, start, stop
            )
            # A custom op may not return its inputs: copy the states that no call wrote.
            return [out[n].clone() if out[n] is carry[n] else out[n].contiguous() for n in carry]


BACKEND = Eager()
