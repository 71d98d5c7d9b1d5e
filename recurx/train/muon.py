"""PyTorch's Muon for steps that never wait for the device.

`torch.optim.Muon` hands its learning rate to `add_` as a number of the host: it reads the device
where the rate lies there, and a captured step would repeat the rate of its capture. Here the same
rule multiplies by the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.train.stepping import stepping

TORCH_MUON: Any = getattr(torch.optim, "Muon", None)  # torch 2.9 brought it


class Muon(TORCH_MUON or torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the 2-D weights of hidden layers.

    Source: Jordan et al., kellerjordan.github.io/posts/muon, in the form of `torch.optim.Muon`,
    whose arguments, state and numbers it has, up to the last rounding.

    Args:
        params: 2-D parameters, or groups of them; give embeddings, heads and biases to another.
        settings: of `torch.optim.Muon`; `lr` may be a 0-d tensor on the device.

    Raises:
        InvalidArgument: this PyTorch has no Muon.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        if TORCH_MUON is None:
            raise bad_argument(
                "train.Muon", "torch", "2.9 or newer, which has torch.optim.Muon",
                torch.__version__, "Install it, or choose another optimizer.",
            )  # fmt: skip
        super().__init__(params, **settings)

    step = stepping(lambda optimizer: muon_(optimizer))


def reads_the_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is PyTorch's Muon with its own `step`, which reads the learning rate."""
    own = TORCH_MUON is not None and type(optimizer).step is TORCH_MUON.step
    return own and "step" not in vars(optimizer)


def muon_(optimizer: torch.optim.Optimizer) -> None:
    """One step with the groups and the state of a `torch.optim.Muon`; runs without gradient."""
    for group in optimizer.param_groups:
        for param in (p for p in group["params"] if p.grad is not None):
            state, beta = optimizer.state[param], group["momentum"]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param.grad)
            mean = state["momentum_buffer"].lerp_(param.grad, 1 - beta)
            moved = param.grad.lerp(mean, beta) if group["nesterov"] else mean
            moved = _orthogonalised(
                moved, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.sub_(moved.to(param.dtype) * (group["lr"] * _scale(param, group["adjust_lr_fn"])))


def _scale(param: Tensor, rule: str | None) -> float:
    """What a matrix makes of the learning rate, by its shape."""
    rows, columns = param.shape
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


def _orthogonalised(matrix: Tensor, abc: tuple[float, ...], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iterations in bf16: singular values between about 0.7 and 1.2."""
    a, b, c = abc
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
