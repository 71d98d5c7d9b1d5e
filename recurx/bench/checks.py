"""Whether a variant is right, before it is timed.

The first call alone, where nothing has drifted yet, is held against eager PyTorch's error in the
same dtype, times 1.25. Long recursions in bf16 drift chaotically, so a whole step is held against
eager's drift from fp32, times 1.5. Slack covers another order of summation in fp32.

A gradient in fp32 is held against the spread of eager's own, over several ways to round: for one
sample of a full-size TRM it is so badly conditioned that eager's drift from fp64 is 0.002, or 0.02
when its start states move by one rounding (boards of other seeds: 0.0004 to 0.085), while errors of
one call are 1e-6. Wrong gradients drift by more: a window that starts a call late by 0.26 and up.
In bf16 that gradient is chaos (eager's drifts on five boards: 0.94 to 3.2; torch.compile's on one:
11.7), so there the gradient of one call proves the arithmetic, and fp32 the bounds of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 1.25  # of eager's own error in that dtype
# A drift is one draw of a chaotic quantity: for one sample torch.compile's, which is eager but for
# the order of its sums, was 1.15 to 1.4 times eager's.
FACTOR_OF_A_STEP = 1.5
# Of the root mean square of eager's drifts: of 72 drifts of the engine on six boards, in three
# instruction sets, the largest was 2.9 times that of six of eager's.
FACTOR_OF_A_SPREAD = 4.0
CHAOS = 0.5  # where eager's gradient drifts by more, a drift says nothing
SPREAD = " spread"  # what that is called beside the exact values
# One call has errors of a few roundings (fp32: 1e-6, bf16: 1e-2); 21 calls amplify a rounding of
# fp32 to 1e-3 (measured on a Zen 3). A loss is one number: eager's error in it may be zero by luck.
SLACK = {"one call": 1e-4, "gradient of a call": 1e-4, "loss": 0.01, "gradient": 0.01}
SLACK_OF_A_STEP = 0.01
# Share of cells of the answers of a trained net that may differ.
SLACK_OF_ANSWERS = 0.01


@dataclass(frozen=True)
class Verdict:
    """`drift` and `allowed` of every output; `reason` is empty if all are right."""

    drift: dict[str, float]
    allowed: dict[str, float]
    reason: str = ""


def distance(got: Tensor, exact: Tensor) -> float:
    """Relative distance of floats; share of differing entries of integers."""
    if not exact.is_floating_point():
        return float((got != exact).float().mean())
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def judge(got: dict[str, Tensor], exact: dict[str, Tensor], yard: dict[str, Tensor]) -> Verdict:
    """Hold outputs against the exact ones, with eager of the same dtype as the yardstick."""
    drift, allowed, wrong = {}, {}, []
    for name, value in got.items():
        if name not in exact:
            continue
        if value.shape != exact[name].shape:
            shapes = f"{list(value.shape)} instead of {list(exact[name].shape)}"
            return Verdict(drift, allowed, f"{name}: {shapes}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            wrong.append(f"{name}: not finite")
            continue
        drift[name] = distance(value, exact[name])
        slack = SLACK.get(name, SLACK_OF_A_STEP)
        if not value.is_floating_point():
            slack = SLACK_OF_ANSWERS
        own = distance(yard[name], exact[name]) if name in yard else 0.0
        if name == "gradient" and own > CHAOS:
            continue
        factor = FACTOR if name in SLACK else FACTOR_OF_A_STEP
        spread = float(exact.get(name + SPREAD, 0.0))
        allowed[name] = max(factor * own, FACTOR_OF_A_SPREAD * spread) + slack
        if not drift[name] <= allowed[name]:
            wrong.append(f"{name}: drift {drift[name]:.3g}, allowed {allowed[name]:.3g}")
    if not drift and not wrong:
        wrong.append("nothing to compare")
    return Verdict(drift, allowed, "; ".join(wrong))
