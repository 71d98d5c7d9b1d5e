"""backend="cuda" in training: its kernel runs the calls before the window, Triton's the window."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from simulate import triton_on_cpu
from window_gradients import gradients_of

import recurx
from emulator.build import unavailable
from emulator.owner import emulate, installed
from recurx import Schedule, backends
from recurx.operands import Span
from tests.factories import make_inputs, make_net, rope

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SIZES = dict(tokens=9, hidden=64, heads=2)


def on(backend, **arguments):
    def run(schedule, nets, x, carry):
        cos_sin = rope(*SIZES.values())
        return recurx.recurse(
            schedule, nets, x, carry, backend=backend, cos_sin=cos_sin, **arguments
        )

    return run


def test_the_carry_is_handed_from_cuda_to_tritons_window():
    schedule = Schedule.trm(2, 1)
    nets = {"L": make_net("attention", inner=48, blocks=1, **SIZES)}
    x, carry = make_inputs(schedule, batch=2, tokens=9, hidden=64, dtype=torch.bfloat16)
    cuda = emulate(((64, 2),), checked=False)
    given = schedule, nets, x, carry
    with triton_on_cpu() as triton, installed(cuda):
        with (
            mock.patch.object(cuda, "run", wraps=cuda.run) as before,
            mock.patch.object(triton, "window", wraps=triton.window) as window,
        ):
            got = gradients_of(on("cuda"), *given)
        assert [call.args[-1] for call in before.call_args_list] == [Span(0, 2)]
        assert window.called
        want = gradients_of(on("triton"), *given)
        skipped = gradients_of(on("triton", start_from=schedule.grad_from), *given)
    for name in got:
        assert cosine(got[name], want[name]) > 0.99, name  # the carry differs by its rounding
        assert cosine(skipped[name], want[name]) < 0.95, f"{name} does not depend on the carry"


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten().float(), b.flatten().float(), 0))


def test_without_triton_the_window_is_pytorchs():
    cuda = emulate(((64, 2),), checked=False)
    with installed(cuda):
        problem = recurx.Problem(
            Schedule.trm(2, 1), (("L", make_net("attention", **SIZES).spec),), 2, 9, 64,
            torch.bfloat16, "cpu",
        )  # fmt: skip
        assert backends.why_not("triton", problem) is not None
        assert cuda.window(problem) is None
