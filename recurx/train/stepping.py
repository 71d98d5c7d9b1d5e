"""A rule that changes the weights of an optimizer, as its method `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def stepping(rule: Callable[[torch.optim.Optimizer], None]) -> Callable[..., Any]:
    """A method `step` by a rule that changes the weights of an optimizer; runs without gradient."""

    @torch.no_grad()
    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; what `closure` returned, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rule(self)
        return loss

    return step
