"""Exponential moving average of weights, the ones that are evaluated and shipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurx import small_ops


class Average:
    """A running average of the parameters of `model`, in fp32 at least; buffers are the model's.

    The decay grows from 0.1 to `decay` over the first updates (min(decay, (1 + n) / (10 + n))), so
    that a short run is not an average of its random start. The number of updates n lies on the
    device, so that a captured step counts on.

    Where no kernel runs, this is the call that `torch.optim.swa_utils.get_ema_multi_avg_fn` makes,
    to the bit; NOTES.md says why there is no `AveragedModel` around it.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            wide = torch.promote_types(p.dtype, torch.float32)
            self.weights[name] = p.detach().to(wide, copy=True)
        device = next((w.device for w in self.weights.values()), torch.device("cpu"))
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self._tables: Any = None

    @property
    def updates(self) -> int:
        """Number of updates so far; reading it waits for the device."""
        return int(self.count)

    @updates.setter
    def updates(self, value: int) -> None:
        self.count.fill_(value)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights."""
        # 1 - (1 + n) / (10 + n) = 9 / (10 + n), which does not cancel
        share = (9 / (self.count + 10)).clamp_min(1 - self.decay)
        values = [p.detach() for _, p in model.named_parameters()]
        self._tables = move_(list(self.weights.values()), values, share, self._tables)
        self.count.add_(1)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averaged weights into `model`."""
        for name, p in model.named_parameters():
            p.copy_(self.weights[name])


def move_(
    averages: Sequence[Tensor], values: Sequence[Tensor], share: float | Tensor, tables: Any = None
) -> Any:
    """average <- average + share * (value - average), in place, for all pairs of one shape.

    One launch a pair of dtypes on a GPU (`kernels/ema.py`). share: a float, or a 0-d tensor on the
    device. Pass the returned object (address tables) as `tables` the next time.
    """
    kinds: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
    for pair in zip(averages, values, strict=True):
        kind = (pair[0].device, *(t.dtype for t in pair)) if small_ops.takes(*pair) else ()
        kinds.setdefault(kind, []).append(pair)
    for kind, pairs in kinds.items():
        some, towards = (list(column) for column in zip(*pairs, strict=True))
        if kind:
            from recurx.kernels import ema, multi_tensor

            tables = multi_tensor.Tables() if tables is None else tables
            ema.ema(some, towards, share, tables=tables, name=kind)
            small_ops.wrote(some)
            continue
        towards = [v.to(a.dtype) for a, v in pairs]
        shares = [share.to(a.dtype) for a in some] if isinstance(share, Tensor) else share
        torch._foreach_lerp_(some, towards, shares)
    return tables
