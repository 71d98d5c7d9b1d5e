"""One net call of the published sizes, on every backend of the registry."""

from __future__ import annotations

import pytest
import torch

import recurx
from bench.ops import DEVICE, draw
from recurx import backends, reference
from recurx.errors import BackendUnavailable
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec, rope_tables

TOKENS, HIDDEN, INNER = 97, 512, 1536
SPECS = {
    "attention": BlockSpec(ATTENTION, HIDDEN, INNER, num_heads=8),
    "token-mlp": BlockSpec(TOKEN_MLP, HIDDEN, INNER, tokens=TOKENS, token_inner=512),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCHEDULE = recurx.Schedule((recurx.Step("L", "z", ("z",), ("x",)),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("backend", backends.ORDER)
def test_call(timed, check, backend, batch, kind, dtype):
    spec = NetSpec((SPECS[kind],) * 2)
    shapes = [shape for block in spec.blocks for shape in block.weight_shapes]
    weights = [draw(*s, seed=i) / s[1] ** 0.5 for i, s in enumerate(shapes)]
    net = Net(spec, weights)
    x, z = (draw(batch, TOKENS, HIDDEN, dtype=DTYPES[dtype], seed=s) for s in (50, 51))
    tables = rope_tables(TOKENS, HIDDEN // 8, device=DEVICE) if kind == "attention" else None

    def call():
        return recurx.recurse(SCHEDULE, {"L": net}, x, {"z": z}, backend=backend, cos_sin=tables)

    with torch.no_grad():
        try:
            got = call()["z"]
        except BackendUnavailable as error:
            pytest.skip(str(error))
        exact = Net(spec, [w.double() for w in weights])
        check(got, reference.call((z + x).double(), exact, tables))
        timed(call)
