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
from recurx.noise import DRAWN

CosSin = tuple[Tensor, Tensor]


class Span(NamedTuple):
    """Calls start..stop-1 of a schedule."""

    start: int
    stop: int


class Beside(NamedTuple):
    """What the reference reads beside h and the weights of a block.

    Args:
        seed, key_mask: see `Operands`.
        call, block: number of the net call, and of the block within its net.
    """

    seed: Tensor | None = None
    key_mask: Tensor | None = None
    call: int = 0
    block: int = 0

    def entries(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the samples in streams of `recurx.noise`, and the seed of these."""
        assert self.seed is not None, "checked by recurx.checks"
        return torch.arange(len(like), device=like.device) + self.seed[1], self.seed[0]


ALONE = Beside()


class Operands(NamedTuple):
    """The tensors of one recursion.

    Args:
        x: [B, T, D], in the dtype of the states.
        states: [B, T, D] each, in the order of `schedule.states`.
        weights: flat, net after net in the order of `Problem.nets`, in the dtype of the masters.
        rope: (cos, sin), floating [T, head_dim] each, or None.
        seed: int64 [2], of noise and dropout, and the number of the first sample; None without.
        key_mask: bool [B, T], keys that blocks with `key_padding` do not see; None without.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    rope: CosSin | None
    seed: Tensor | None = None
    key_mask: Tensor | None = None

    @classmethod
    def from_flat(
        cls, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor | None,
        sin: Tensor | None, *rest: Tensor | None,
    ) -> Operands:  # fmt: skip
        """From the first arguments of an op of recurx/ops.py."""
        return cls(x, tuple(states), tuple(weights), rope_of(cos, sin), *rest)

    def flat(self) -> tuple[Any, ...]:
        """x, states, weights, cos, sin, seed, key_mask: what an op of recurx/ops.py begins with."""
        tables = self.rope or (None, None)
        return self.x, list(self.states), list(self.weights), *tables, self.seed, self.key_mask

    def contiguous(self) -> Operands:
        """With x, states and mask in contiguous memory."""
        states = tuple(state.contiguous() for state in self.states)
        mask = None if self.key_mask is None else self.key_mask.contiguous()
        return self._replace(x=self.x.contiguous(), states=states, key_mask=mask)

    def check_memory(self, states: Sequence[str], nets: Sequence[tuple[str, NetSpec]]) -> None:
        """Every tensor lies inside its storage, which FSDP frees between uses.

        Raises:
            InvalidArgument: naming the first tensor whose memory is gone.
        """
        beside = *(self.rope or (None, None)), self.seed, self.key_mask
        for index, tensor in enumerate((self.x, *self.states, *self.weights, *beside)):
            if tensor is not None and not _in_storage(tensor):
                names = ["x", *(f"carry[{name!r}]" for name in states)]
                names += [f"nets[{n!r}] weight {i}" for n, s in nets for i in range(s.num_weights)]
                names += ["cos_sin (cos)", "cos_sin (sin)", "seed", "key_mask"]
                raise bad_argument(
                    "recurse", names[index], f"a tensor with its memory, {tensor.nbytes} bytes",
                    f"a storage of {tensor.untyped_storage().nbytes()} bytes",
                    "It was freed or cut: gather or load it before the call.",
                )  # fmt: skip

    def numbers(self) -> tuple[int, ...]:
        """The seed, as 64 bits, and the number of the first sample; zeros without."""
        seed, first = (0, 0) if self.seed is None else self.seed.tolist()
        return seed & (1 << 64) - 1, first

    def float_rope(self) -> CosSin | None:
        """cos and sin as kernels read them: fp32, contiguous, without gradient."""
        return None if self.rope is None else (_plain(self.rope[0]), _plain(self.rope[1]))


def checked_beside(
    changed: Sequence[str], seed: int | Tensor | None, key_mask: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is asked for with blocks and steps that differ in these fields: the seed with the number
    of the first sample, drawn from PyTorch's generator if not given, and the key mask.

    Raises:
        InvalidArgument: one of them is wrong, or is not asked for.
    """
    if not changed and seed is None and key_mask is None:
        return None, None  # the nets of TRM and HRM, at every call
    if not {"noise", *DRAWN} & set(changed):
        if seed is not None:
            expected = "None where no step has noise and no block drops anything"
            raise bad_argument("recurse", "seed", expected, repr(seed))
    elif isinstance(seed, Tensor):
        kind = seed.dtype, seed.device
        if kind != (torch.int64, x.device) or seed.shape not in ((), (2,)):
            expected = f"an int64 tensor, 0-d or [2], on {x.device}"
            raise bad_argument("recurse", "seed", expected, kind_of(seed))
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise bad_argument("recurse", "seed", "a whole number below 2^63", repr(seed))
    else:
        seed = torch.tensor(seed, device=x.device)
    if seed is not None and not seed.ndim:
        seed = torch.stack((seed, torch.zeros_like(seed)))
    fits, expected = key_mask is None, "None where no block has `key_padding`"
    if "key_padding" in changed:
        kind = [getattr(key_mask, name, None) for name in ("dtype", "shape", "device")]
        fits = kind == [torch.bool, x.shape[:2], x.device]
        expected = "a bool tensor [B, T] beside x, for blocks with `key_padding`"
    if not fits:
        raise bad_argument("recurse", "key_mask", expected, kind_of(key_mask))
    return seed, key_mask


def kind_of(value: Any) -> str:
    """What was given, for messages."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}"


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
