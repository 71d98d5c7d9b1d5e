"""What a recursion runs on, as two values: its tensors and the range of its calls.

They are made anew at every call, so both are plain named tuples that check nothing; `api.recurse`
has checked the tensors. Only recurx/ops.py takes them apart, because torch.library wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.nets import NetSpec

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

    def check_memory(self, states: Sequence[str], nets: Sequence[tuple[str, NetSpec]]) -> None:
        """Every tensor lies inside its storage, which FSDP frees between uses.

        Raises:
            InvalidArgument: naming the first tensor whose memory is gone.
        """
        everything = (self.x, *self.states, *self.weights, *(self.rope or ()))
        for index, tensor in enumerate(everything):
            if not _in_storage(tensor):
                names = ["x", *(f"carry[{name!r}]" for name in states)]
                names += [f"nets[{n!r}] weight {i}" for n, s in nets for i in range(s.num_weights)]
                raise bad_argument(
                    "recurse", [*names, "cos_sin (cos)", "cos_sin (sin)"][index],
                    f"a tensor with its memory, {tensor.nbytes} bytes",
                    f"a storage of {tensor.untyped_storage().nbytes()} bytes",
                    "It was freed or cut: gather or load it before the call.",
                )  # fmt: skip

    def float_rope(self) -> CosSin | None:
        """cos and sin as kernels read them: fp32, contiguous, without gradient."""
        return None if self.rope is None else (_plain(self.rope[0]), _plain(self.rope[1]))


def rope_of(cos: Tensor | None, sin: Tensor | None) -> CosSin | None:
    """The pair of rotary tables, or None where an op was given none."""
    return None if cos is None or sin is None else (cos, sin)


def _in_storage(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        size = tensor.nbytes
    else:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        size = tensor.itemsize * (1 + sum((n - 1) * step for n, step in sizes))
    end = size + tensor.storage_offset() * tensor.itemsize
    return end <= tensor.untyped_storage().nbytes() or not tensor.numel()


def _plain(table: Tensor) -> Tensor:
    plain = table.dtype is torch.float32 and not table.requires_grad and table.is_contiguous()
    return table if plain else table.detach().float().contiguous()
