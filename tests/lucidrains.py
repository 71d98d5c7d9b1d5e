"""What tests of lucidrains' package share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def two_steps(model: Any, puzzles: Tensor) -> dict[str, Tensor]:
    """Two supervision steps with labels: losses, carry, predictions and every gradient."""
    outputs, latents = model.get_initial()
    model.zero_grad()
    found: dict[str, Tensor] = {}
    for number in range(2):
        loss, _, outputs, latents, pred, halt = model(
            puzzles, outputs, latents, labels=puzzles.flip(1)
        )
        loss.backward()
        names = ("loss", "outputs", "latents", "pred", "halt")
        values = (loss, outputs, latents, pred, halt)
        found |= {f"{number}.{name}": v.detach() for name, v in zip(names, values, strict=True)}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"gradient of {name}": grad.clone() for name, grad in grads.items()}
