"""What official training loops do beside the model, in plain PyTorch: the baseline of that part.

Multi-tensor operations where PyTorch has them; no kernel of recurx. The official optimiser is a
CUDA extension that many machines cannot build; this is what its users fall back to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2(m, sqrt(v)) as its step, decoupled weight decay, and a host-side count."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
                    }  # fmt: skip
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            (beta1, beta2), lr = group["betas"], group["lr"]
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            tops = torch._foreach_div(means, 1 - beta1**self.count)
            bottoms = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**self.count))
            steps = [torch.atan2(top, bottom) for top, bottom in zip(tops, bottoms, strict=True)]
            torch._foreach_add_(params, steps, alpha=-lr)


class Average:
    """Exponential moving average of the weights, parameter by parameter."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.weights[name] = (1 - self.decay) * p.detach() + self.decay * self.weights[name]


@torch.no_grad()
def sign_sgd_(table: Tensor, local: Tensor, ids: Tensor, lr: float, weight_decay: float) -> None:
    """Sign SGD on the rows that a batch touched; `unique` waits for the device."""
    if local.grad is None:
        return
    rows, index = ids.unique(return_inverse=True)
    total = torch.zeros(len(rows), table.shape[1], dtype=local.grad.dtype, device=table.device)
    total.index_add_(0, index, local.grad)
    rows = rows.long()
    table[rows] = table[rows] * (1 - lr * weight_decay) - lr * torch.sign(total)
    local.grad = None
