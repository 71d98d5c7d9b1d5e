"""What a training loop in the official style holds, written anew: loss head, optimisers, average.

Signatures, attribute names and rules are those that the official code has; the text is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurx.models import ACTLossHead


def stablemax(logits: Tensor, labels: Tensor, ignore_index: int = -100, valid_mask: Any = None):
    wide = logits.double()
    s = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
    mask = labels != ignore_index if valid_mask is None else valid_mask
    index = torch.where(mask, labels, 0).long().unsqueeze(-1)
    picked = torch.log(s / s.sum(-1, keepdim=True)).gather(-1, index).squeeze(-1)
    return -torch.where(mask, picked, 0)


def softmax(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    wide, flat = logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    loss = nn.functional.cross_entropy(wide, flat, ignore_index=ignore_index, reduction="none")
    return loss.view(labels.shape)


class LossHead(ACTLossHead):
    """Calls its `loss_fn` the way the official head does, with the mask."""

    def __init__(self, model: nn.Module, loss: Any = stablemax) -> None:
        super().__init__(model)
        self.loss_fn = loss


class Atan2(torch.optim.Optimizer):
    """AdamATan2 as a package would have it, weight by weight, counting on the host."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def angle(self, mean: Tensor, root: Tensor) -> Tensor:
        return torch.atan2(mean, root)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=p * 0, exp_avg_sq=p * 0)
                state["step"] += 1
                b1, b2 = group["betas"]
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                mean = state["exp_avg"] / (1 - b1 ** state["step"].item())
                root = (state["exp_avg_sq"] / (1 - b2 ** state["step"].item())).sqrt()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * self.angle(mean, root))


class Quotient(Atan2):
    """Looks like AdamATan2 and is not."""

    def angle(self, mean: Tensor, root: Tensor) -> Tensor:
        return mean / (root + 1e-8)


class SignSGD(torch.optim.Optimizer):
    """The sparse rule with `unique`, one process."""

    def __init__(self, params, world_size, lr=1e-3, weight_decay=1e-2):
        defaults = {"lr": lr, "weight_decay": weight_decay, "world_size": world_size}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            local = next(p for p in group["params"] if p.requires_grad)
            ids = next(p for p in group["params"] if p.ndim == 1)
            table = next(p for p in group["params"] if p.ndim == 2 and not p.requires_grad)
            if local.grad is None:
                continue
            rows, where = ids.unique(return_inverse=True)
            total = torch.zeros(len(rows), local.shape[1]).index_add_(0, where, local.grad)
            keep = 1 - group["lr"] * group["weight_decay"]
            table[rows.long()] = table[rows.long()] * keep - group["lr"] * total.sign()


class Ema:
    """The helper that keeps `shadow`."""

    def __init__(self, mu: float = 0.999) -> None:
        self.mu, self.shadow = mu, {}

    def register(self, module: nn.Module) -> None:
        self.shadow = {n: p.data.clone() for n, p in module.named_parameters() if p.requires_grad}

    def update(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            if p.requires_grad:
                old = self.shadow[name].data
                self.shadow[name].data = (1.0 - self.mu) * p.data + self.mu * old
