"""A few of the matmul layouts; `python -m emulator.ptx.matmuls` runs all of them."""

from __future__ import annotations

import pytest

from ..build import unavailable

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
from . import matmuls  # noqa: E402

# Each kind of operand at least once: K- and MN-major A and B, 32, 64 and 128-byte swizzles, one and
# two warpgroups; ldmatrix with and without .trans.
CHOSEN = [
    matmuls.Layout("90", 64, 16, 16, False, True, 4),
    matmuls.Layout("90", 64, 64, 64, True, False, 4),
    matmuls.Layout("90", 128, 128, 64, False, False, 8),
    matmuls.Layout("80", 64, 32, 32, False, True, 4),
    matmuls.Layout("80", 64, 64, 64, True, False, 4),
]


@pytest.mark.parametrize("layout", CHOSEN, ids=str)
def test_layout(layout):
    assert layout in matmuls.layouts()
    assert matmuls.check(layout) == "right"
    expected = "wgmma" if layout.arch == "90" else "mma.sync"
    assert matmuls.instructions(matmuls.compiled(layout).ptx).startswith(expected)
