"""What a profile advises: the reasons behind a gain."""

from __future__ import annotations

import pytest
import torch

from recurx import trials, verdicts
from recurx.bench.problems import problem_of_config
from recurx.bench.profiler import advice
from recurx.models import TRMConfig
from recurx.plan import Device
from recurx.plan.device import cpu_device


@pytest.mark.parametrize(
    "dtype, rate, reason",
    [
        (torch.bfloat16, 0.02, "bf16 ones of PyTorch reach 0.02 TFLOP/s on this processor"),
        (torch.bfloat16, 0.30, ""),
        (torch.float32, 0.02, "pack the weights anew at every call"),
    ],
)
def test_advice_says_why_products_gain_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rate: float, reason: str
) -> None:
    made = cpu_device(2, 20.0, 0.2, rate, 10.0, 1 << 20, "avx2")
    monkeypatch.setattr(Device, "of", staticmethod(lambda name: made))
    name = str(dtype).removeprefix("torch.")
    problem = problem_of_config(TRMConfig.tiny(11, 17, forward_dtype=name))
    said = "".join(advice._products_on_a_cpu(problem))
    assert reason in said and bool(said) == bool(reason)


def test_advice_is_not_to_patch_where_pytorch_was_measured_faster(native) -> None:
    problem = problem_of_config(TRMConfig.tiny(11, 17))
    trials.forget()
    assert advice._not_here(problem, training=False) == []
    slower = verdicts.Verdict("eager", (("cpu", 3e-3), ("eager", 2e-3)), 7)
    verdicts.VERDICTS.pin({verdicts.subject_of("calls", problem): slower.json()})
    try:
        (line,) = advice._not_here(problem, training=False)
    finally:
        trials.forget()
    assert line == (
        "Do not patch here: `auto` would leave the recursion on PyTorch "
        "(measured, 1.50x as fast as cpu)."
    )
