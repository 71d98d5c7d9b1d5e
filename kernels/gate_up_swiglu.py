"""out = silu(X @ Wg^T) * (X @ Wu^T), one launch: the first half of a SwiGLU, over D or over T.

    X [M, K], W [2F, K] (gate rows first, then up rows), out [M, F]
    silu(x) = x / (1 + exp(-x)); bf16 or fp32 storage, fp32 accumulation and activation

A program computes one tile of the gate product and the same tile of the up product from one slab of
X, so that the activation is local and neither product is ever stored. X may be [B, R, K] with any
strides and M = B * R rows: the token-MLP passes `h.transpose(1, 2)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles
from .products import add_product


@triton.jit
def gate_up_swiglu_kernel(
    x, w, out,
    M, x_batch,
    R: tl.constexpr, K: tl.constexpr, F: tl.constexpr, W_ROW: tl.constexpr,
    X_ROW: tl.constexpr, X_COL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = rows < M
    batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
    x_rows = x + (batch * x_batch + row * X_ROW)[:, None]

    gate = tl.zeros((ROWS, COLS), tl.float32)
    up = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, K, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < K)
        slab = tl.load(x_rows + ks[None, :] * X_COL, mask=inside, other=0.0)
        w_inside = (cols[None, :] < F) & (ks[:, None] < W_ROW)
        w_gate = w + cols[None, :] * W_ROW + ks[:, None]
        gate_slab = tl.load(w_gate, mask=w_inside, other=0.0)
        up_slab = tl.load(w_gate + F * W_ROW, mask=w_inside, other=0.0)
        gate = add_product(gate, slab, gate_slab, PRECISION)
        up = add_product(up, slab, up_slab, PRECISION)

    middle = gate * tl.sigmoid(gate) * up
    pointers = out + rows.to(tl.int64)[:, None] * F + cols[None, :]
    inside = live[:, None] & (cols[None, :] < F)
    tl.store(pointers, middle.to(out.dtype.element_ty), mask=inside)


def gate_up_swiglu(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x @ gate^T) * (x @ up^T) with weight [2F, K] holding gate, then up.

    x [..., K] with one or two leading axes (any strides), weight contiguous (its rows may be padded
    with zeros to a multiple of 16 columns), one dtype (bfloat16 or float32), one device. Returns a
    contiguous [..., F] (`out`, if given). Raises InvalidArgument.
    """
    op = "kernels.gate_up_swiglu"
    checks.same_dtype_and_device(op, x=x, weight=weight, out=out)
    if x.ndim not in (2, 3):
        raise bad_argument(op, "x", "[M, K] or [B, R, K]", tuple(x.shape))
    twice, _ = checks.weight_matrix(op, "weight", weight, x.shape[-1])
    if twice % 2:
        raise bad_argument(op, "weight", "an even number of rows: gate, then up", twice)
    expected = (*x.shape[:-1], twice // 2)
    if out is None:
        out = torch.empty(expected, dtype=x.dtype, device=x.device)
    checks.shape(op, "out", out, expected)
    if not out.is_contiguous():
        raise bad_argument(op, "out", "a contiguous tensor", f"strides {out.stride()}")
    if out.numel() == 0:
        return out
    args, constants, options = launch_arguments(x, weight, out, tiles.shared_bytes(x.device))
    m = out.numel() // out.shape[-1]
    grid = (triton.cdiv(m, constants["ROWS"]), triton.cdiv(constants["F"], constants["COLS"]))
    gate_up_swiglu_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, shared: int
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    f, k = weight.shape[0] // 2, x.shape[-1]
    m = out.numel() // f
    x3 = x.unsqueeze(0) if x.ndim == 2 else x
    tile = tiles.gate_up_tile(m, f, k, x.element_size(), shared, plain=x3.stride(2) == 1)
    constants = {
        "R": x3.shape[1], "K": k, "F": f, "W_ROW": weight.stride(0),
        "X_ROW": x3.stride(1), "X_COL": x3.stride(2),
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": "ieee",
    }  # fmt: skip
    return (x, weight, out, m, x3.stride(0)), constants, tiles.options(tile)
