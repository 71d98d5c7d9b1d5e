"""Exponential moving average of weights, the ones that are evaluated and shipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """A running average of the parameters of `model`; buffers are those of the model.

    The decay grows from 0.1 to `decay` over the first updates (min(decay, (1 + n) / (10 + n))), so
    that a short run is not an average of its random start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averaged weights into `model`."""
        for name, p in model.named_parameters():
            p.copy_(self.weights[name])

    def tensors(self) -> dict[str, Tensor]:
        return self.weights
