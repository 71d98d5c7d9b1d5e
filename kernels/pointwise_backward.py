"""Backward of what a variant's block has around its branches, one launch each.

    add_norm_backward   of `add_norm`: d_residual and d_product, from the gradients of out and total
    gate_backward       of sigmoid(gate) * mixed: gate <- d_gate

bf16 or fp32 storage, fp32 arithmetic; what the forward computed between its operands and its result
is computed again in registers. For each vector (weights and biases of norms, learned factors) that
is `wanted` a program leaves the sum over its rows, fp32, in a row of its own; whoever calls adds
these rows up in one order. So there are no atomics.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurx.errors import bad_argument

from . import checks
from .branch import PLAIN, PLAIN_NORM, Branch, Norm, check_vectors, single
from .noise import kept_of
from .pointwise import BLOCK, OPTIONS, TILE, _load, _rows, _tile, affine, centred, dropped, times

LEAST_OVER_T = 4  # rows over T in a program: 8 bytes of bf16; more would not stay in registers
SHARE = 16  # elements of each operand that a thread holds
Sums = dict[str, Tensor]  # by name [programs, N]


@triton.jit
def norm_backward(d, hat, factor, inside, N: tl.constexpr, KIND: tl.constexpr):
    """The gradient of x from that of hat = factor * (x - mean), a norm of rows of N values."""
    result = d - hat * (tl.sum(d * hat, 1) / N)[:, None]
    if KIND == "layer":
        result -= (tl.sum(d, 1) / N)[:, None]
    return tl.where(inside, result * factor[:, None], 0.0)


@triton.jit
def leave_sum(sums, x, N: tl.constexpr, COLS: tl.constexpr):
    """The sum over a program's rows, in its row of `sums`, if somebody wants it."""
    if sums is not None:
        cols = tl.arange(0, COLS)
        tl.store(sums + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(x, 0), mask=cols < N)


@triton.jit(do_not_specialize=["call", "use"])
def add_norm_backward_kernel(
    residual, product, d_out, d_total, d_residual, d_product, M, weight, bias, before_weight,
    before_shift, learned, skip, d_weight, d_shift, d_before_weight, d_before_shift, d_learned,
    d_skip, stream, call, use, KIND: tl.constexpr, EPS: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr, OVER_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BIAS_OF_ROW: tl.constexpr, BEFORE: tl.constexpr, BEFORE_EPS: tl.constexpr, FACTOR: tl.constexpr,
    ONE_LEARNED: tl.constexpr, SKIP: tl.constexpr, ONE_SKIP: tl.constexpr,
    ELEMENTS: tl.constexpr, SAMPLES: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    """Names and steps of `add_norm_kernel`, then back through them."""
    rows, at, inside = _tile(M, R, N, OVER_T, ROWS, COLS)
    entered = _load(residual, at, inside)
    x = entered
    if product is not None:
        branch = _load(product, at, inside)
        if bias is not None and BIAS_OF_ROW:
            branch += tl.where(inside, tl.load(bias + rows % R).to(tl.float32)[:, None], 0.0)
        elif bias is not None:
            branch = affine(branch, None, bias, N, COLS)
        if BEFORE != "":
            hat = centred(branch, inside, N, BEFORE)
            before_factor = tl.rsqrt(tl.sum(hat * hat, 1) / N + BEFORE_EPS)
            hat *= before_factor[:, None]
            branch = affine(hat, before_weight, before_shift, N, COLS)
        x = times(x, SKIP, skip, ONE_SKIP, N, COLS)
        added = times(branch, FACTOR, learned, ONE_LEARNED, N, COLS)
        if stream is not None:
            added = dropped(added, stream, rows, call, use, R, N, COLS, ELEMENTS, SAMPLES, GROWN)
        x += added
    if KIND != "":
        x = centred(x, inside, N, KIND)
        factor = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
        x *= factor[:, None]
        d = _load(d_out, at, inside)
        leave_sum(d_weight, d * x, N, COLS)
        leave_sum(d_shift, d, N, COLS)
        d = norm_backward(affine(d, weight, None, N, COLS), x, factor, inside, N, KIND)
        if d_total is not None:
            d += _load(d_total, at, inside)
    else:
        d = _load(d_total, at, inside)
    d_entered = d
    if product is not None:
        leave_sum(d_skip, d * entered * SKIP, N, COLS)
        d_entered = times(d, SKIP, skip, ONE_SKIP, N, COLS)
        if stream is not None:
            d = dropped(d, stream, rows, call, use, R, N, COLS, ELEMENTS, SAMPLES, GROWN)
        leave_sum(d_learned, d * branch * FACTOR, N, COLS)
        d = times(d, FACTOR, learned, ONE_LEARNED, N, COLS)
        if BEFORE != "":
            leave_sum(d_before_weight, d * hat, N, COLS)
            leave_sum(d_before_shift, d, N, COLS)
            d = affine(d, before_weight, None, N, COLS)
            d = norm_backward(d, hat, before_factor, inside, N, BEFORE)
        tl.store(d_product + at, d.to(d_product.dtype.element_ty), mask=inside)
    tl.store(d_residual + at, d_entered.to(d_residual.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(gate, gated, d_gated, COUNT, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < COUNT
    shut = 1.0 - tl.sigmoid(_load(gate, at, inside))
    d = _load(d_gated, at, inside) * _load(gated, at, inside) * shut
    tl.store(gate + at, d.to(gate.dtype.element_ty), mask=inside)


# ---- launches: tensors as their forward takes them ----------------------------------------------


def add_norm_backward(
    residual: Tensor, product: Tensor | None, norm: Norm | None, *, branch: Branch = PLAIN,
    d_out: Tensor | None = None, d_total: Tensor | None = None, over_tokens: bool = False,
    wanted: Collection[str] = (),
) -> tuple[Tensor, Tensor | None, Sums]:  # fmt: skip
    """(d_residual, d_product, sums) of `add_norm` on the same operands, from the gradients of
    `out`, where there is a norm, and of `total`; one of the two may be None.

    The bias of a branch has the gradient d_product, summed over its rows. Sums are called "weight",
    "bias" (of the norm), "before_weight", "before_bias", "learned" and "skip"; a learned factor for
    all has one a column, to be added up.
    """
    op = "add_norm_backward"
    if (d_out is None) != (norm is None) or (norm is None and d_total is None):
        raise bad_argument(op, "d_out", "the gradient of the norm, where there is one", d_out)
    _, m, sizes = _rows(op, over_tokens, None, residual, product, d_out, d_total)
    sizes |= tile_backward(sizes["N"], over_tokens)
    programs = triton.cdiv(m, sizes["ROWS"])
    after, before = norm or PLAIN_NORM, branch.norm or PLAIN_NORM
    check_vectors(op, sizes["N"], sizes["R"], after, branch)
    *shares, stream, call, use = branch.drops
    d_residual = torch.empty_like(residual)
    d_product = None if product is None else torch.empty_like(product)
    names = ["weight", "bias"] * (norm is not None)
    if product is not None:
        names += ["before_weight", "before_bias"] * (branch.norm is not None) + ["learned", "skip"]
    sums = {name: new_sums(residual, programs, sizes["N"]) for name in names if name in wanted}
    if m:
        add_norm_backward_kernel[(programs,)](
            residual, product, d_out, d_total, d_residual, d_product, m, after.weight, branch.bias,
            before.weight, before.bias, branch.learned, branch.learned_skip, sums.get("weight"),
            sums.get("bias"), sums.get("before_weight"), sums.get("before_bias"),
            sums.get("learned"), sums.get("skip"), stream, call, use,
            KIND=after.kind, EPS=after.eps, BIAS_OF_ROW=branch.bias_of_token, BEFORE=before.kind,
            BEFORE_EPS=before.eps, FACTOR=float(branch.scale), ONE_LEARNED=single(branch.learned),
            SKIP=float(branch.skip), ONE_SKIP=single(branch.learned_skip),
            **kept_of(*shares), **sizes,
        )  # fmt: skip
    return d_residual, d_product, sums


def new_sums(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def tile_backward(n: int, over_tokens: bool) -> dict[str, Any]:
    """The tile of a program that holds rows of n values of some operands, and its options."""
    cols = triton.next_power_of_2(n)
    rows = max(2 * TILE // cols, LEAST_OVER_T if over_tokens else 1)
    warps = min(16, max(4, rows * cols // (32 * SHARE)))
    return {"ROWS": rows, "COLS": cols, **OPTIONS, "num_warps": warps}


def gate_backward(gate: Tensor, gated: Tensor, d_gated: Tensor) -> Tensor:
    """The gradient of `gate`, in its place, where gated = sigmoid(gate) * mixed; all contiguous."""
    op, count = "kernels.gate_backward", gate.numel()
    checks.same_dtype_and_device(op, gate=gate, gated=gated, d_gated=d_gated)
    for name, tensor in (("gate", gate), ("gated", gated), ("d_gated", d_gated)):
        if tensor.numel() != count or not tensor.is_contiguous():
            raise bad_argument(op, name, f"{count} contiguous values", tensor.shape)
    if count:
        gate_backward_kernel[(triton.cdiv(count, BLOCK),)](
            gate, gated, d_gated, count, SIZE=BLOCK, **OPTIONS
        )
    return gate
