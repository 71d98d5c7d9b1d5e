"""What is left of a block beside its products, one launch each: for the plan "library".

    add_norm           sum = skip * residual + branch, out = norm(sum)  over D or over T
    add_rms            out = rms(residual + product), what add_norm is in TRM and HRM
    add_rms_backward   d_x = scale * (d - y * mean(d * y)),  d = d_out + product
    swiglu             gate <- act(gate) * up, or act(gate) alone; silu in TRM and HRM

The branch is learned * scale * norm(product + bias), less what is dropped (kernels/noise.py), each
part where a block has it.

bf16 or fp32 storage, fp32 arithmetic: products come rounded to the storage dtype, as PyTorch's do,
and are added in fp32. A program holds whole rows; over T a row is a column of [T, D], and
neighbours are read together. A result may lie in the place of an operand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurx.errors import bad_argument

from . import checks
from .branch import PLAIN, PLAIN_NORM, Branch, Norm, check_vectors, single
from .fields import MAX_ROW, MAX_ROW_OVER_T
from .noise import kept, kept_of

BLOCK = 1024  # elements a program of the SwiGLU's: 8 a thread, one 16-byte access of bf16
TILE = 2048  # elements of an rms's program, unless its least rows have more
TOGETHER = 8  # least rows over T in a program: 16 bytes of bf16
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile(M, R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    """A program's rows, where its elements lie, and which of them there are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols, wide = tl.arange(0, COLS)[None, :], rows.to(tl.int64)[:, None]
    at = wide * N + cols
    if OVER_T:  # R columns a sample
        at = wide // R * (R * N) + wide % R + cols * R
    return rows, at, (rows < M)[:, None] & (cols < N)


@triton.jit
def centred(x, inside, N: tl.constexpr, KIND: tl.constexpr):
    """Rows of which a norm takes the mean square: less their mean for layer norm."""
    if KIND == "layer":
        x = tl.where(inside, x - (tl.sum(x, 1) / N)[:, None], 0.0)
    return x


@triton.jit
def affine(x, weight, bias, N: tl.constexpr, COLS: tl.constexpr):
    """Rows of N columns times a weight and plus a bias, if there are such."""
    cols = tl.arange(0, COLS)[None, :]
    if weight is not None:
        x *= _load(weight, cols, cols < N)
    if bias is not None:
        x += _load(bias, cols, cols < N)
    return x


@triton.jit
def times(x, CONSTANT: tl.constexpr, learned, ONE: tl.constexpr, N: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    """x times a constant, and times a learned factor, ONE for all or one a column."""
    if CONSTANT != 1.0:
        x *= CONSTANT
    if learned is not None and ONE:
        x *= tl.load(learned).to(tl.float32)
    elif learned is not None:
        x = affine(x, learned, None, N, COLS)
    return x


@triton.jit
def dropped(
    x, stream, rows, call, use, R: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr,
    ELEMENTS: tl.constexpr, SAMPLES: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    """Rows of N values, R of a sample, less what is dropped of them."""
    seed, entry = tl.load(stream), (rows // R)[:, None] + tl.load(stream + 1).to(tl.int32)
    element = (rows % R)[:, None] * N + tl.arange(0, COLS)[None, :]
    x *= GROWN
    if ELEMENTS > 0:
        x = tl.where(kept(seed, entry, call, element, use, ELEMENTS), x, 0.0)
    if SAMPLES > 0:
        x = tl.where(kept(seed, entry, call, 0 * entry, use + 4, SAMPLES), x, 0.0)
    return x


@triton.jit(do_not_specialize=["call", "use"])
def add_norm_kernel(
    residual, product, out, scale, M, weight, shift, total, bias, before_weight, before_shift,
    learned, skip, stream, call, use, KIND: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BIAS_OF_ROW: tl.constexpr, BEFORE: tl.constexpr, BEFORE_EPS: tl.constexpr,
    FACTOR: tl.constexpr, ONE_LEARNED: tl.constexpr, SKIP: tl.constexpr, ONE_SKIP: tl.constexpr,
    ELEMENTS: tl.constexpr, SAMPLES: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    """Pointers that are None are no part of the compiled kernel."""
    rows, at, inside = _tile(M, R, N, OVER_T, ROWS, COLS)
    x = _load(residual, at, inside)
    if product is not None:
        branch = _load(product, at, inside)
        if bias is not None and BIAS_OF_ROW:  # [T] beside rows over D
            branch += tl.where(inside, tl.load(bias + rows % R).to(tl.float32)[:, None], 0.0)
        elif bias is not None:
            branch = affine(branch, None, bias, N, COLS)
        if BEFORE != "":
            branch = centred(branch, inside, N, BEFORE)
            branch *= tl.rsqrt(tl.sum(branch * branch, 1) / N + BEFORE_EPS)[:, None]
            branch = affine(branch, before_weight, before_shift, N, COLS)
        x = times(x, SKIP, skip, ONE_SKIP, N, COLS)
        branch = times(branch, FACTOR, learned, ONE_LEARNED, N, COLS)
        if stream is not None:
            branch = dropped(branch, stream, rows, call, use, R, N, COLS, ELEMENTS, SAMPLES, GROWN)
        x += branch
    if total is not None:
        tl.store(total + at, x.to(total.dtype.element_ty), mask=inside)
    if KIND != "":
        x = centred(x, inside, N, KIND)
        factor = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
        y = affine(x * factor[:, None], weight, shift, N, COLS)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(scale + rows, factor, mask=rows < M)


@triton.jit
def add_rms_backward_kernel(
    y, scale, d_out, product, d_x, M, ADD: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, at, inside = _tile(M, R, N, OVER_T, ROWS, COLS)
    normed, d = _load(y, at, inside), _load(d_out, at, inside)
    if ADD:
        d += _load(product, at, inside)
    along = tl.sum(d * normed, 1) / N
    factor = tl.load(scale + rows, mask=rows < M, other=0.0)
    result = factor[:, None] * (d - normed * along[:, None])
    tl.store(d_x + at, result.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _half(R, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A program's columns of [R, WIDTH], where its elements lie, as gates of [R, 2 WIDTH] and
    there, and which of them there are."""
    across: tl.constexpr = (WIDTH + COLS - 1) // COLS
    rows = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (tl.program_id(0) % across * COLS + tl.arange(0, COLS))[None, :]
    return cols, rows * (2 * WIDTH) + cols, rows * WIDTH + cols, (rows < R) & (cols < WIDTH)


@triton.jit
def activated(x, ACT: tl.constexpr):
    """The activation `BlockSpec.activation` of x in fp32."""
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # on a GPU tl.maximum makes 0 of NaN
    elif ACT == "relu2":
        x = tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACT == "sigmoid")
        x = tl.sigmoid(x)
    return x


@triton.jit
def swiglu_kernel(
    gate_up, R, bias, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Without GATED there is no up and rows are WIDTH long. EACH neighbours share a bias."""
    cols, at, place, inside = _half(R, WIDTH, ROWS, COLS)
    if not GATED:
        at = place
    gate = _load(gate_up, at, inside)
    if GATED:
        up = _load(gate_up, at + WIDTH, inside)
    if bias is not None:
        gate += _load(bias, cols // EACH, cols < WIDTH)
        if GATED:
            up += _load(bias + WIDTH // EACH, cols // EACH, cols < WIDTH)
    middle = activated(gate, ACT)
    if GATED:
        middle = middle * up
    tl.store(gate_up + at, middle.to(gate_up.dtype.element_ty), mask=inside)


# ---- launches: contiguous bfloat16 or float32 of one device, else InvalidArgument ----------------


def add_rms(
    residual: Tensor, product: Tensor, out: Tensor, eps: float, *, over_tokens: bool = False,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """out = rms(residual + product) over D or over T, all [B, T, D]; the factors of the rows,
    [B, T] or [B, D] float32, go into `scale` if that is given."""
    checks.same_dtype_and_device("kernels.add_rms", residual=residual, product=product)
    norm = Norm("rms", eps)
    add_norm(residual, product, out, norm, over_tokens=over_tokens, scale=scale)


def add_norm(
    residual: Tensor, product: Tensor | None, out: Tensor | None, norm: Norm | None, *,
    branch: Branch = PLAIN, total: Tensor | None = None, over_tokens: bool = False,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """total = residual + branch of the product, out = norm(total), each if it is given; without a
    product the norm of `residual`. `out` has no part without a norm."""
    tensors = residual, out, total
    grid, m, sizes = _rows("add_norm", over_tokens, scale, *tensors, product=product)
    wanted, before = norm or PLAIN_NORM, branch.norm or PLAIN_NORM
    check_vectors("add_norm", sizes["N"], sizes["R"], wanted, branch)
    *shares, stream, call, use = branch.drops
    if m:
        args = residual, product, out, out if scale is None else scale, m
        vectors = wanted.weight, wanted.bias, total, branch.bias, before.weight, before.bias
        add_norm_kernel[grid](
            *args, *vectors, branch.learned, branch.learned_skip, stream, call, use,
            KIND=wanted.kind, EPS=wanted.eps, KEEP=scale is not None,
            BIAS_OF_ROW=branch.bias_of_token, BEFORE=before.kind, BEFORE_EPS=before.eps,
            FACTOR=float(branch.scale), ONE_LEARNED=single(branch.learned), SKIP=float(branch.skip),
            ONE_SKIP=single(branch.learned_skip), **kept_of(*shares), **sizes,
        )  # fmt: skip


def add_rms_backward(
    y: Tensor, scale: Tensor, d_out: Tensor, product: Tensor | None, *, over_tokens: bool = False
) -> Tensor:
    """The gradient of x where y = rms(x), from that of y, d_out (+ product), and the factors that
    `add_rms` wrote; all but those [B, T, D]."""
    d_x, added = torch.empty_like(y), product is not None
    grid, m, sizes = _rows("add_rms_backward", over_tokens, scale, y, d_out, product)
    if m:
        args = y, scale, d_out, product if added else d_out, d_x, m
        add_rms_backward_kernel[grid](*args, ADD=added, **sizes)
    return d_x


def _rows(
    op: str, over_tokens: bool, scale: Tensor | None, *tensors: Tensor | None,
    product: Tensor | None = None,
) -> Any:  # fmt: skip
    """(grid, rows, compile-time arguments and options) of a launch over rows; `product` may be in
    another dtype than the tensors."""
    given = {f"tensor {n}": t for n, t in enumerate(tensors) if t is not None}
    checks.same_dtype_and_device(f"kernels.{op}", **given)
    if product is not None:
        checks.same_dtype_and_device(f"kernels.{op}", product=product)
        if product.device != given["tensor 0"].device:
            raise bad_argument(op, "product", "the device of the residual", product.device)
        given["product"] = product
    first = given["tensor 0"]
    for name, tensor in given.items():
        checks.shape(op, name, tensor, tuple(first.shape))
        if tensor.ndim != 3 or not tensor.is_contiguous():
            raise bad_argument(op, name, "contiguous [B, T, D]", f"strides {tensor.stride()}")
    batch, tokens, hidden = first.shape
    n, r = (tokens, hidden) if over_tokens else (hidden, tokens)
    if n > (MAX_ROW_OVER_T if over_tokens else MAX_ROW):
        raise bad_argument(op, "tensor 0", f"rows of {MAX_ROW}, over T {MAX_ROW_OVER_T}", n)
    if scale is not None:
        checks.float32(op, "scale", scale, (batch, r))
    sizes = {"R": r, "N": n, "OVER_T": over_tokens, **row_tile(n, over_tokens)}
    return (triton.cdiv(batch * r, sizes["ROWS"]),), batch * r, sizes


def row_tile(n: int, over_tokens: bool) -> dict[str, Any]:
    """The tile of a program that holds rows of n values, and its options."""
    cols = triton.next_power_of_2(n)
    rows = max(TILE // cols, TOGETHER if over_tokens else 1)
    return {"ROWS": rows, "COLS": cols, **OPTIONS, "num_warps": 4 if rows * cols <= 2 * TILE else 8}


def swiglu(
    gate_up: Tensor, rows: int, *, activation: str = "silu", gated: bool = True,
    bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Of `rows` equal rows, replace gate, the first half of each, by act(gate) * up; if not
    `gated` all of it, by act(gate). First comes the bias, of as many neighbours each as it takes.
    """
    op, parts = "kernels.swiglu", 2 if gated else 1
    checks.same_dtype_and_device(op, gate_up=gate_up)
    if not gate_up.is_contiguous() or gate_up.numel() % (parts * max(1, rows)):
        raise bad_argument(op, "gate_up", f"contiguous, {rows} rows", tuple(gate_up.shape))
    if gate_up.numel():
        grid, sizes = gates_tile(
            op, gate_up.numel() // (rows * parts), rows, bias, activation, gated
        )
        swiglu_kernel[grid](gate_up, rows, bias, **sizes)


def gates_tile(
    op: str, width: int, rows: int, bias: Tensor | None, activation: str, gated: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, compile-time arguments and options) of a launch over `rows` rows of `width` values, or
    twice as many."""
    values = (2 if gated else 1) * width
    if bias is not None and (bias.ndim != 1 or values % bias.numel()):
        raise bad_argument(op, "bias", f"a divisor of {values} values", bias.shape)
    even = min(width & -width, BLOCK)  # columns that no edge cuts, where those are enough
    cols = even if even >= BLOCK // 8 else min(BLOCK, triton.next_power_of_2(width))
    sizes = {"WIDTH": width, "ROWS": BLOCK // cols, "COLS": cols, "ACT": activation, **OPTIONS}
    sizes |= {"GATED": gated, "EACH": 1 if bias is None else values // bias.numel()}
    return (triton.cdiv(rows, BLOCK // cols) * triton.cdiv(width, cols),), sizes
