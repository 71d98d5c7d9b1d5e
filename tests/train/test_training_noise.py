"""300 steps with and without recurx end within run-to-run noise, which is measured here.

The net is the smallest that learns: one cycle before the gradient window, so that an engine runs in
every step. Seeds change the weights, the data and the exploration; what they change in the final
loss is the noise. Two engines from one seed differ by rounding only, which training amplifies: they
must stay well inside that noise.
"""

from __future__ import annotations

import functools

import pytest
import torch

from recurx.train import Trainer
from tests.train.simulated import on
from tests.train.test_train import tiny

STEPS, LAST = 300, 60  # the mean loss of the last steps is what a run ends with
SEEDS = (0, 1, 2)


def losses(
    backend: str, seed: int, steps: int = STEPS, lr: float = 5e-3, slots: int = 16
) -> list[float]:
    config = tiny(
        seed=seed, batch_size=slots, lr=lr, ema=0.9, loss="fused_stablemax_cross_entropy",
        model={"hidden_size": 32, "H_cycles": 2, "L_cycles": 1},
    )  # fmt: skip
    with on(backend) as ran:
        run = Trainer(config, backend=backend)
        found = [run.train_step().loss for _ in range(steps)]
    assert len(ran) == (0 if backend == "eager" else steps), "the engine runs in every step"
    return found


def final_loss(backend: str, seed: int) -> float:
    return sum(losses(backend, seed)[-LAST:]) / LAST


@functools.cache
def eager_losses() -> dict[int, float]:
    return {seed: final_loss("eager", seed) for seed in SEEDS}


def noise() -> float:
    """Standard deviation of what a run ends with, over seeds."""
    return float(torch.tensor(list(eager_losses().values()), dtype=torch.float64).std())


def assert_within_noise(ends: dict[int, float]) -> None:
    off = {seed: end - eager_losses()[seed] for seed, end in ends.items()}
    worst = max(map(abs, off.values()))
    shift = abs(sum(off.values())) / len(off)
    assert worst <= 4 * noise() and shift <= 2 * noise(), (
        f"ends {worst:.3g} off in one seed and {shift:.3g} off in the mean, noise {noise():.3g}"
    )


@pytest.mark.slow
def test_the_cpu_engine_trains_like_eager() -> None:
    assert 0 < noise() < 0.2
    assert_within_noise({seed: final_loss("cpu", seed) for seed in SEEDS})


@pytest.mark.slow
def test_the_comparison_notices_a_worse_training() -> None:
    """Planted: half as many steps at a tenth of the rate, as one that lags behind."""
    ends = losses("cpu", 0, STEPS // 2, lr=5e-4)[-LAST:]
    with pytest.raises(AssertionError, match="noise"):
        assert_within_noise({0: sum(ends) / LAST})


@pytest.mark.slow
def test_the_triton_engine_starts_like_eager() -> None:
    """300 steps in the interpreter take minutes; rounding has not grown much in the first three."""
    got, want = (losses(backend, 0, steps=3, slots=3) for backend in ("triton", "eager"))
    assert got == pytest.approx(want, rel=1e-4)
    assert want[2] != pytest.approx(want[0], rel=1e-3)  # it has learned something
