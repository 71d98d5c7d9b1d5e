"""The inner half of a SwiGLU's backward, one launch: from d_out to d_gate_up, over D or over T.

    forward   gate, up = X @ Wg^T, X @ Wu^T;  mid = silu(gate) * up;  out = mid @ Wd^T
    here      d_mid = D @ Wd;  d_up = d_mid silu(gate);
              d_gate = d_mid up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
    X [M, N], D [M, N] (gradient of out), Wgu [2F, N] gate first, Wd [N, F]
    results: d_gate_up [M, 2F] and mid [M, F], which the weight gradient of Wd reads

Gate and up are computed again from X: reading 2F numbers a row costs about as much as the product,
and keeping them would double what a window keeps. Three products meet in the registers of one
program, so neither d_mid nor gate nor up is ever stored. X and D may be [B, R, N] with any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import backward_tiles, checks, tiles


@triton.jit
def swiglu_backward_kernel(
    x, d_out, w_gate_up, w_down, d_gate_up, mid,
    M, x_batch, d_batch,
    R: tl.constexpr, N: tl.constexpr, F: tl.constexpr,
    GATE_UP_ROW: tl.constexpr, DOWN_ROW: tl.constexpr,
    X_ROW: tl.constexpr, X_COL: tl.constexpr, D_ROW: tl.constexpr, D_COL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(F, COLS)
    rows = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    live, within = rows < M, cols < F
    batch, row = (rows // R).to(tl.int64), (rows % R).to(tl.int64)
    x_rows = x + (batch * x_batch + row * X_ROW)[:, None]
    d_rows = d_out + (batch * d_batch + row * D_ROW)[:, None]

    gate = tl.zeros((ROWS, COLS), tl.float32)
    up = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, N, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < N)
        slab = tl.load(x_rows + ks[None, :] * X_COL, mask=inside, other=0.0)
        w_inside = within[None, :] & (ks[:, None] < N)
        w_gate = w_gate_up + cols[None, :] * GATE_UP_ROW + ks[:, None]
        gate_slab = tl.load(w_gate, mask=w_inside, other=0.0)
        up_slab = tl.load(w_gate + F * GATE_UP_ROW, mask=w_inside, other=0.0)
        gate = tl.dot(slab, gate_slab, gate, input_precision=PRECISION)
        up = tl.dot(slab, up_slab, up, input_precision=PRECISION)

    d_mid = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, N, DEPTH):
        ks = start + tl.arange(0, DEPTH)
        inside = live[:, None] & (ks[None, :] < N)
        slab = tl.load(d_rows + ks[None, :] * D_COL, mask=inside, other=0.0)
        w_inside = within[None, :] & (ks[:, None] < N)
        down_g = w_down + ks[:, None] * DOWN_ROW + cols[None, :]
        down_slab = tl.load(down_g, mask=w_inside, other=0.0)
        d_mid = tl.dot(slab, down_slab, d_mid, input_precision=PRECISION)

    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_mid * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    inside = live[:, None] & within[None, :]
    dtype = mid.dtype.element_ty
    wide = rows.to(tl.int64)[:, None]
    d_g = d_gate_up + wide * (2 * F) + cols[None, :]
    tl.store(d_g, d_gate.to(dtype), mask=inside)
    tl.store(d_g + F, (d_mid * silu).to(dtype), mask=inside)
    tl.store(mid + wide * F + cols[None, :], (silu * up).to(dtype), mask=inside)


def swiglu_backward(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, d_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_gate_up [..., 2F], mid [..., F]) of down(silu(gate x) * (up x)), both contiguous.

    x and d_out [..., N] with one or two leading axes (any strides), gate_up [2F, N] and down [N, F]
    with contiguous rows, one dtype (bfloat16 or float32), one device. Raises InvalidArgument.
    """
    op = "kernels.swiglu_backward"
    checks.same_dtype_and_device(op, x=x, gate_up=gate_up, down=down, d_out=d_out)
    n, f = checks.matrix_of_rows(op, "down", down)
    checks.matrix_of_rows(op, "gate_up", gate_up)
    checks.shape(op, "gate_up", gate_up, (2 * f, n))
    if x.ndim not in (2, 3) or x.shape[-1] != n:
        raise bad_argument(op, "x", f"[M, {n}] or [B, R, {n}]", tuple(x.shape))
    checks.shape(op, "d_out", d_out, tuple(x.shape))
    d_gate_up = x.new_empty(*x.shape[:-1], 2 * f)
    mid = x.new_empty(*x.shape[:-1], f)
    if x.numel() == 0:
        return d_gate_up, mid
    args, constants, options = launch_arguments(
        x, gate_up, down, d_out, d_gate_up, mid, tiles.chip(x.device)
    )
    m = mid.numel() // f
    grid = (triton.cdiv(m, constants["ROWS"]) * triton.cdiv(f, constants["COLS"]),)
    swiglu_backward_kernel[grid](*args, **constants, **options)
    return d_gate_up, mid


def launch_arguments(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    d_out: torch.Tensor,
    d_gate_up: torch.Tensor,
    mid: torch.Tensor,
    chip: tiles.Chip,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    n, f = down.shape
    x3, d3 = (t.unsqueeze(0) if t.ndim == 2 else t for t in (x, d_out))
    m = x3.shape[0] * x3.shape[1]
    tile = backward_tiles.swiglu_backward_tile(m, f, n, x.element_size(), chip)
    constants = {
        "R": x3.shape[1], "N": n, "F": f,
        "GATE_UP_ROW": gate_up.stride(0), "DOWN_ROW": down.stride(0),
        "X_ROW": x3.stride(1), "X_COL": x3.stride(2),
        "D_ROW": d3.stride(1), "D_COL": d3.stride(2),
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": "ieee",
    }  # fmt: skip
    args = (x, d_out, gate_up, down, d_gate_up, mid, m, x3.stride(0), d3.stride(0))
    return args, constants, tiles.options(tile)
