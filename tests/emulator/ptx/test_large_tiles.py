"""The 128-row tiles of large batches (kernels/tiles.py), from their PTX, on a small problem."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from .. import build

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.slow,
]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_gate_up(arch, monkeypatch):
    from recurx.kernels import tiles
    from recurx.kernels.gate_up_swiglu import gate_up_swiglu, launch_arguments

    from .triton_launch import emulating

    monkeypatch.setattr(tiles, "LARGE_PROGRAMS", 1)
    shared = tiles.SHARED_BYTES[int(arch)]
    monkeypatch.setattr(tiles, "shared_bytes", lambda device: shared)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 128, generator=generator).bfloat16()
    w = (torch.randn(2 * 144, 128, generator=generator) * 128**-0.5).bfloat16()
    _, constants, _ = launch_arguments(x, w, x.new_empty(130, 144), shared)
    assert (constants["ROWS"], constants["COLS"]) == (128, 128)
    with emulating(arch):
        got = gate_up_swiglu(x, w)
    gate, up = (x.double() @ w.double().T).chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=4e-3)
