"""How a kernel's result is judged: against fp64, by the error plain PyTorch makes in its dtype."""

from __future__ import annotations

import torch

# A fused kernel rounds less often than PyTorch's separate operations, so it should be closer to
# fp64; the quarter allows for another summation order.
ERROR_RATIO = 1.25


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact| in the 2-norm; inf where `got` is not finite."""
    difference = got.double().cpu() - exact.cpu()
    if not torch.isfinite(difference).all():
        return float("inf")
    return (difference.norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_exact(
    got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, ratio: float = ERROR_RATIO
) -> None:
    """`got` is at most `ratio` times as far from `exact` (fp64) as `plain` (PyTorch) is."""
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    allowed = ratio * relative_error(plain, exact)
    error = relative_error(got, exact)
    if error > allowed:
        worst = (got.double().cpu() - exact.cpu()).abs()
        first = torch.nonzero(~(worst <= 8 * allowed * exact.cpu().abs().mean()))[:1].tolist()
        where = tuple(first[0]) if first else ()
        values = f"; first at {where}: {got[where]} for {exact[where]}" if where else ""
        raise AssertionError(f"relative error {error:.3g}, allowed {allowed:.3g}{values}")
