"""AdamATan2 in plain PyTorch: Adam without epsilon, for weights of any scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from recurx.errors import bad_argument


class AdamATan2(torch.optim.Optimizer):
    """Adam whose step is `lr * atan2(m, sqrt(v))` instead of `lr * m / (sqrt(v) + eps)`.

    The step is bounded by lr * pi / 2 and does not depend on the scale of the loss; weight decay is
    decoupled. Source: Everett et al., arXiv 2407.05872, section 4.3; used by HRM and TRM.

    Args:
        params: parameters or groups.
        lr: 0 is accepted: official training loops set it later, per group.
        betas, weight_decay: as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        for arg, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise bad_argument("train.AdamATan2", arg, "a number >= 0", repr(value))
        if not all(0 <= beta < 1 for beta in betas):
            raise bad_argument("train.AdamATan2", "betas", "two numbers in [0, 1)", repr(betas))
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        grads, states = [p.grad for p in params], [self.state[p] for p in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())  # a tensor, so that state_dict is all tensors
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for param, state in zip(params, states, strict=True):
            count = int(state["step"])
            mean = state["exp_avg"] / (1 - beta1**count)
            square = state["exp_avg_sq"] / (1 - beta2**count)
            param.add_(torch.atan2(mean, square.sqrt_()), alpha=-lr)
