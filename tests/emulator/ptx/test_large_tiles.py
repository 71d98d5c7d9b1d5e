"""The largest tile, of large batches (kernels/tiles.py), from their PTX, on a small problem."""

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
@pytest.mark.parametrize("what", ["gate_up", "residual"])
def test_the_largest_tile(arch, what, monkeypatch):
    from recurx.kernels import tiles
    from recurx.kernels.linear import gate_up_swiglu, linear_residual, new_squares

    from .triton_launch import emulating

    monkeypatch.setattr(tiles, "PRODUCT_TILES", {2: ((128, 256),)})
    shared = tiles.SHARED_BYTES[int(arch)]
    monkeypatch.setattr(tiles, "shared_bytes", lambda device: shared)
    tiles.product_tile.cache_clear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 128, generator=generator).bfloat16()
    w = (torch.randn(2 * 144, 128, generator=generator) * 128**-0.5).bfloat16()
    residual = torch.randn(130, 288, generator=generator).bfloat16()
    tile = tiles.product_tile(130, 288, 128, 2, tiles.chip(x.device))
    assert (tile.rows, tile.cols) == (128, 128)
    sums = new_squares(130, residual)
    with emulating(arch):
        got = gate_up_swiglu(x, w) if what == "gate_up" else linear_residual(x, w, residual, sums)
    product = x.double() @ w.double().T
    gate, up = product.chunk(2, dim=1)
    want = torch.nn.functional.silu(gate) * up if what == "gate_up" else product + residual
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=4e-3)
    if what == "residual":
        torch.testing.assert_close(sums.sum(0).double(), want.square().sum(1), rtol=1e-4, atol=0)
    tiles.product_tile.cache_clear()


@pytest.mark.parametrize("rotate", [False, True])
def test_attention_in_steps_of_128_keys(rotate, monkeypatch):
    from recurx.kernels import tiles
    from recurx.kernels.attention import attention, launch_arguments

    from recurx.nets import rope_tables
    from recurx.reference import rope_rotate

    from .triton_launch import emulating

    monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[90])
    qkv = torch.randn(1, 300, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = rope_tables(300, 32) if rotate else None
    out = torch.empty(1, 300, 1, 32, dtype=torch.bfloat16)
    _, constants, _ = launch_arguments(qkv, out, tiles.SHARED_BYTES[90], None, tables)
    assert (constants["ROWS"], constants["COLS"]) == (128, 128)
    with emulating("90"):
        attention(qkv, cos_sin=tables, out=out)
    q, k, v = qkv.chunk(3, dim=2)
    if rotate:
        q, k = (rope_rotate(part, *tables) for part in (q, k))
    q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out.double(), want, rtol=2**-7, atol=4e-3)
