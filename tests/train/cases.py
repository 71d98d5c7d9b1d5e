"""Inputs of the step's small ops, their fp64 formulas, and how far from them is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recurx.models.exploration import Exploration

U = 2.0**-24  # half a unit in the last place of fp32
BF16_ROUNDING = 2.0**-8  # half a unit in the last of 8 bits

# ---- stablemax ----------------------------------------------------------------------------------

LOGITS = {
    "usual": lambda g: 3 * torch.randn(6, 7, 11, generator=g),
    "sure of the label": lambda g: 60 * F.one_hot(torch.arange(42) % 11, 11).view(6, 7, 11) - 30.0,
    # the loss passes through every size of q below 1, where log1p is its series
    "leaning to the label": lambda g: (
        torch.randn(6, 7, 11, generator=g)
        + F.one_hot(torch.arange(42) % 11, 11).view(6, 7, 11)
        * 200
        * torch.rand(6, 7, 1, generator=g)
    ),
    "large": lambda g: 1e4 * torch.randn(6, 7, 11, generator=g),
    "extreme": lambda g: (
        10 ** (76 * torch.rand(6, 7, 11, generator=g) - 38)
        * torch.randn(6, 7, 11, generator=g).sign()
    ),
    "largest": lambda g: (
        torch.full((6, 7, 11), torch.finfo(torch.float32).max)
        * torch.randn(6, 7, 11, generator=g).sign()
    ),
    "all very negative": lambda g: -(10 ** (38 * torch.rand(6, 7, 11, generator=g))),
    "zeros and ties": lambda g: torch.randint(-1, 2, (6, 7, 11), generator=g).float(),
    "one word": lambda g: torch.randn(6, 7, 1, generator=g),
    "wide": lambda g: 5 * torch.randn(2, 3, 300, generator=g),
}


def logits_and_labels(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = LOGITS[name](generator).to(dtype)
    if dtype == torch.bfloat16:  # 3.4e38 rounds up to infinity
        logits = logits.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % logits.shape[-1]
    labels[0, :2] = -100
    return logits, labels


def stablemax_fp64(logits: Tensor, labels: Tensor) -> Tensor:
    """The published formula, with its logarithm taken of the ratio."""
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x.clamp(min=0) + 1)
    counts = labels != -100
    own = s.gather(-1, labels.clamp(min=0).unsqueeze(-1))
    others = s.scatter(-1, labels.clamp(min=0).unsqueeze(-1), 0).sum(-1)
    return torch.where(counts, torch.log1p(others / own.squeeze(-1)), 0)


def stablemax_grad_fp64(logits: Tensor, labels: Tensor, outer: Tensor) -> Tensor:
    x = logits.detach().double().requires_grad_()
    return torch.autograd.grad((stablemax_fp64(x, labels) * outer.double()).sum(), x)[0]


def assert_stablemax(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Within the bound that the docstring of `fused_stablemax_cross_entropy` states."""
    bound = (logits.shape[-1] + 40) * U
    _relative("loss", loss, stablemax_fp64(logits, labels), bound)


def assert_stablemax_grad(grad: Tensor, logits: Tensor, labels: Tensor, outer: Tensor) -> None:
    bound = (logits.shape[-1] + 40) * U
    if logits.dtype == torch.bfloat16:
        bound += BF16_ROUNDING
    assert grad.dtype == logits.dtype
    _relative("gradient", grad, stablemax_grad_fp64(logits, labels, outer), bound)


def _relative(what: str, got: Tensor, exact: Tensor, bound: float) -> None:
    assert got.shape == exact.shape
    # Numbers below the normal range of fp32 have no relative precision there.
    error = (got.double() - exact).abs() - bound * exact.abs() - 2.0**-125
    worst = int(error.argmax())
    assert torch.isfinite(got).all() and error.flatten()[worst] <= 0, (
        f"{what} {got.flatten()[worst].item()!r} at {worst}, exactly "
        f"{exact.flatten()[worst].item()!r}, allowed relative error {bound:.3g}"
    )


# ---- AdamATan2 ----------------------------------------------------------------------------------

SHAPES = ((7, 3), (1,), (1500,), (32, 64), (0,), (5, 205))
ADAM = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.5}


def weights_and_grads(
    steps: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights of odd sizes and `steps` gradients of each, over twelve decades and zero."""
    generator = torch.Generator().manual_seed(9)

    def one(shape: tuple[int, ...]) -> Tensor:
        scale = 10 ** (-12 * torch.rand(shape, generator=generator))
        values = scale * torch.randn(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.1, 0, values)

    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grads = [[one(s).to(grad_dtype or dtype) for s in SHAPES] for _ in range(steps)]
    return weights, grads


def adam_atan2_fp64(
    weights: list[Tensor], grads: list[list[Tensor]], lr: float = ADAM["lr"],
    betas: tuple[float, float] = ADAM["betas"], weight_decay: float = ADAM["weight_decay"],
    step_of: Callable[[int], int] = lambda t: t, angle: Callable = torch.atan2,
) -> list[Tensor]:  # fmt: skip
    """The weights after all steps, in fp64."""
    found = []
    for index, weight in enumerate(weights):
        w, m, v = weight.double(), 0.0, 0.0
        for t, now in enumerate(grads, start=1):
            g = now[index].double()
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            c1, c2 = (1 - beta ** step_of(t) for beta in betas)
            w = w * (1 - lr * weight_decay) - lr * angle(m / c1, (v / c2).sqrt())
        found.append(w)
    return found


def assert_weights(got: list[Tensor], exact: list[Tensor], steps: int) -> None:
    """Each step rounds the weight a few times; moments of one sign change nothing more.

    m / sqrt(v) is ill-conditioned where gradients of several steps cancel, by the size of the
    largest of them; lr bounds what that can do.
    """
    for index, (a, b) in enumerate(zip(got, exact, strict=True)):
        if not b.numel():
            continue
        unit = U if a.dtype == torch.float32 else BF16_ROUNDING
        allowed = steps * (4 * unit * b.abs().clamp_min(0.5) + 16 * U * ADAM["lr"])
        error = (a.double() - b).abs() - allowed
        assert (error <= 0).all(), (
            f"weight {index}: {int((error > 0).sum())} entries differ, worst by "
            f"{(a.double() - b).abs().max():.3g} at {int(error.argmax())}"
        )


# ---- halting ------------------------------------------------------------------------------------


def halting() -> tuple[Exploration, Tensor, Tensor, Tensor]:
    """A seeded exploration; steps 1..6, q_halt and q_continue of 300 samples."""
    generator = torch.Generator().manual_seed(4)
    steps = torch.randint(1, 7, (300,), generator=generator, dtype=torch.int32)
    q_halt, q_continue = torch.randn(2, 300, generator=generator)
    return Exploration(2**62 + 12345), steps, q_halt.contiguous(), q_continue.contiguous()


# ---- sign SGD -----------------------------------------------------------------------------------


def table_and_batch(duplicates: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """A table [50, 70], gradients [21, 70] whose sums are exact, ids [21] with repetitions."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(50, 70, generator=generator)
    grads = torch.randint(-8, 9, (21, 70), generator=generator) / 4
    ids = torch.randint(0, 9, (21,), generator=generator, dtype=torch.int32)
    return table, grads, ids if duplicates else torch.randperm(50, generator=generator)[:21].int()


def official_sign_sgd(
    table: Tensor, grads: Tensor, ids: Tensor, lr: float, weight_decay: float
) -> Tensor:
    """The rule with `unique`: sums of equal ids, sign, decay on touched rows."""
    out = table.clone()
    for row in ids.unique().tolist():
        total = grads[ids == row].double().sum(0).float()
        out[row] = table[row] * (1 - lr * weight_decay) - lr * total.sign()
    return out
