"""One block of published size, forward and backward, from the PTX of its Triton kernels.

    cd tests; PYTHONPATH=.. python -m emulator.ptx.block_backward --arch 90 --kind attention

Race checker on; minutes, not seconds. Prints each gradient's distance to fp64 beside that of
PyTorch's own bf16, and exits with 1 if one is further than 1.25 times that.
"""

from __future__ import annotations

import argparse
import sys
import time
from unittest import mock

import torch

from recurx import reference_backward, rope_tables
from recurx.nets import ATTENTION, KINDS, WEIGHT_NAMES, BlockSpec, NetSpec

HIDDEN, INNER, HEADS, TOKEN_INNER = 512, 1536, 8, 512


def run(arch: str, kind: str, tokens: int) -> bool:
    """Whether every gradient is near enough to fp64."""
    from recurx.kernels import tiles
    from recurx.kernels.block_training import Saved, WeightGrads, feed_forward, mix, net_backward

    from .triton_launch import emulating

    if kind == ATTENTION:
        spec = BlockSpec(kind, HIDDEN, INNER, num_heads=HEADS)
        cos_sin = rope_tables(tokens, HIDDEN // HEADS)
    else:
        spec = BlockSpec(kind, HIDDEN, INNER, tokens=tokens, token_inner=TOKEN_INNER)
        cos_sin = None
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(shape, generator=generator) / shape[1] ** 0.5).bfloat16()
        for shape in spec.weight_shapes
    ]
    h, d_out = (torch.randn(1, tokens, HIDDEN, generator=generator).bfloat16() for _ in range(2))

    start = time.perf_counter()
    shared = tiles.SHARED_BYTES[int(arch)]
    with mock.patch.object(tiles, "shared_bytes", lambda device: shared), emulating(arch):
        tape = Saved(h)
        mix(tape, spec, weights, cos_sin)
        feed_forward(tape, spec, weights)
        grads = WeightGrads([w.float() for w in weights], [True] * 4)
        d_h = net_backward([tape], NetSpec((spec,)), [tuple(weights)], cos_sin, d_out, grads, 0)
        got = [d_h, *(grads.take(i) for i in range(4))]
    print(f"sm_{arch}, {kind}, T={tokens}: no race, {time.perf_counter() - start:.0f} s")

    wide = [w.double() for w in weights]
    d_exact, w_exact = reference_backward.block_backward(
        h.double(), spec, wide, cos_sin, d_out.double()
    )
    d_plain, w_plain = reference_backward.block_backward(h, spec, weights, cos_sin, d_out)
    near = True
    names = ("h", *WEIGHT_NAMES[kind])
    plain, exact = [d_plain, *w_plain], [d_exact, *w_exact]
    for name, a, b, want in zip(names, got, plain, exact, strict=True):
        ours, theirs = (((t.double() - want).norm() / want.norm()).item() for t in (a, b))
        near &= ours <= 1.25 * theirs
        print(f"  d_{name}: {ours:.2e} from fp64, PyTorch {theirs:.2e}")
    return near


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90")
    parser.add_argument("--kind", default=ATTENTION, choices=KINDS)
    parser.add_argument("--tokens", type=int, default=97)
    chosen = parser.parse_args()
    sys.exit(not run(chosen.arch, chosen.kind, chosen.tokens))
