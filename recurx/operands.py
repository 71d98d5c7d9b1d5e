"""What a recursion runs on, as two values: its tensors and the range of its calls.

They are made anew at every call, so both are plain named tuples that check nothing; `api.recurse`
has checked the tensors. Only recurx/ops.py takes them apart, because torch.library wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CosSin = tuple[Tensor, Tensor]


class Span(NamedTuple):
    """Calls start..stop-1 of a schedule."""

    start: int
    stop: int


class Operands(NamedTuple):
    """The tensors of one recursion.

    Args:
        x: [B, T, D], in the dtype of the states.
        states: [B, T, D] each, in the order of `schedule.states`.
        weights: flat, net after net in the order of `Problem.nets`, in the dtype of the masters.
        rope: (cos, sin), floating [T, head_dim] each, or None.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    rope: CosSin | None

    @classmethod
    def from_flat(
        cls,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Operands:
        """From the first arguments of an op of recurx/ops.py."""
        return cls(x, tuple(states), tuple(weights), rope_of(cos, sin))

    def flat(self) -> tuple[Any, ...]:
        """x, states, weights, cos, sin: the first arguments of an op of recurx/ops.py."""
        return self.x, list(self.states), list(self.weights), *(self.rope or (None, None))

    def contiguous(self) -> Operands:
        """With x and states in contiguous memory."""
        states = tuple(state.contiguous() for state in self.states)
        return self._replace(x=self.x.contiguous(), states=states)

    def float_rope(self) -> CosSin | None:
        """cos and sin as kernels read them: fp32, contiguous, without gradient."""
        return None if self.rope is None else (_plain(self.rope[0]), _plain(self.rope[1]))


def rope_of(cos: Tensor | None, sin: Tensor | None) -> CosSin | None:
    """The pair of rotary tables, or None where an op was given none."""
    return None if cos is None or sin is None else (cos, sin)


def _plain(table: Tensor) -> Tensor:
    plain = table.dtype is torch.float32 and not table.requires_grad and table.is_contiguous()
    return table if plain else table.detach().float().contiguous()
