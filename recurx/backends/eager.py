"""backend="eager": the reference itself, on any device, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from recurx import reference
from recurx.backends import EVERY_FIELD, Backend
from recurx.operands import Operands, Span
from recurx.problem import Problem


class Eager(Backend):
    name = "eager"
    device_types = ()
    fields = EVERY_FIELD

    def why_unavailable(self) -> str | None:
        return None

    def why_unsupported(self, problem: Problem) -> str | None:
        return None

    def run(self, problem: Problem, operands: Operands, span: Span) -> list[Tensor]:
        carry = dict(zip(problem.schedule.states, operands.states, strict=True))
        nets = problem.bind(operands.weights)
        with torch.no_grad():
            fixed = problem.schedule, nets, operands.x, carry, operands.rope
            out = reference.run(*fixed, *span, operands.seed, operands.key_mask)
            # A custom op may not return its inputs: copy the states that no call wrote.
            return [out[n].clone() if out[n] is carry[n] else out[n].contiguous() for n in carry]


BACKEND = Eager()
