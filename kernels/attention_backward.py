"""d_qkv of out = softmax(Q K^T / sqrt(head_dim)) V, rotated back, without atomics.

    qkv [B, T, 3H, head_dim] and lse [B, H, T] as the forward left them, qkv rotated or not yet
    (TURN: Q and K are turned as they are loaded); out and d_out [B, T, H, head_dim]; d_qkv like
    qkv, the gradient of what the rotary embedding was given (ROTATE: it is turned back)
    p = exp2(s log2(e) - lse);  d_v = p^T d_out;  delta = sum(out d_out)
    d_s = p (d_out v^T - delta)
    d_k = d_s^T q / sqrt(head_dim);  d_q = d_s k / sqrt(head_dim);  both rotated by minus the angle

A program owns `cols` keys of one head and goes over the queries (d_k, d_v; scores transposed, so
that p and d_s are the left operands as they stand in registers). Where a program owns all keys of
its head (T up to 128 in bf16 on sm_90) it has all of d_q too, and one launch does; else a second
kernel, launched first, goes over the keys for `cols` queries and leaves delta. The halves of a head
are kept apart, so that the pair (j, j + half) of the rotation is in one thread.

Of `Heads` (kernels/attention.py): what is masked has p = 0; heads that share one of K and V leave
their d_k and d_v side by side, added up afterwards; d_q and d_k are those of what a norm of q and k
gave. With a gate d_out is multiplied by its sigmoid first, and delta is of what the gate let out.
Source: Dao et al. 2022 (FlashAttention), algorithm 4, without its recomputed statistics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument
from recurx.operands import CosSin

from . import backward_tiles, checks, tiles
from .attention import PLAIN, Heads, check_qkv, load_head, load_rows, seen


@triton.jit
def _store_rotated_back(
    to, low, high, cos, sin, tokens, STRIDE: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """The transpose of low' = low cos - high sin, high' = high cos' + low sin' (rope forward)."""
    j = tl.arange(0, HALF)
    live = tokens[:, None] < T
    if ROTATE:
        at = tokens[:, None] * (2 * HALF) + j[None, :]
        cos_low = tl.load(cos + at, mask=live, other=1.0)
        sin_low = tl.load(sin + at, mask=live, other=0.0)
        cos_high = tl.load(cos + at + HALF, mask=live, other=1.0)
        sin_high = tl.load(sin + at + HALF, mask=live, other=0.0)
        first = low * cos_low + high * sin_high
        high = high * cos_high - low * sin_low
        low = first
    pointers = to + tokens[:, None] * STRIDE + j[None, :]
    tl.store(pointers, low.to(to.dtype.element_ty), mask=live)
    tl.store(pointers + HALF, high.to(to.dtype.element_ty), mask=live)


@triton.jit
def _through_gate(d, gate, rows, columns, STRIDE: tl.constexpr, T: tl.constexpr):
    """The gradient of what sigmoid(gate) multiplies, from that of the product."""
    logits = load_rows(gate, rows, columns, STRIDE, T, False).to(tl.float32)
    return (d.to(tl.float32) * tl.sigmoid(logits)).to(d.dtype)


@triton.jit
def attention_backward_keys_kernel(
    qkv, out, d_out, lse, delta, cos, sin, d_qkv, q_norm, k_norm, gate, unseen,
    SCALE: tl.constexpr, T: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
    ROTATE: tl.constexpr, TURN: tl.constexpr, WHOLE: tl.constexpr, PEEL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr, KV: tl.constexpr,
    CAUSAL: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(T, COLS)
    number = tl.program_id(0) // across  # of the head, over the batch
    batch, head = (number // H).to(tl.int64), number % H
    keys = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    e = tl.arange(0, 2 * HALF)
    stride = (2 * H + 4 * KV) * HALF  # elements from token to token in qkv
    d_stride = 6 * H * HALF  # and in its gradient, where each head has K and V of its own
    o_stride = 2 * H * HALF
    q_g = qkv + batch * T * stride + head * (2 * HALF)
    k_g = qkv + batch * T * stride + (H + head // (H // KV)) * (2 * HALF)
    v_g = k_g + 2 * KV * HALF
    at = batch * T * d_stride + head * (2 * HALF)
    o_at = batch * T * o_stride + head * (2 * HALF)
    row_at = (batch * H + head) * T

    k_low, k_high = load_head(
        k_g, cos, sin, keys, stride, T, HALF, TURN, T % COLS == 0, NORM, EPS, k_norm
    )
    value = load_rows(v_g, keys, e, stride, T, T % COLS == 0)
    dtype = value.dtype
    if unseen is not None:
        padding = tl.load(unseen + batch * T + keys, mask=keys < T, other=1)
    d_k_low = tl.zeros((COLS, HALF), tl.float32)
    d_k_high = tl.zeros((COLS, HALF), tl.float32)
    d_v = tl.zeros((COLS, 2 * HALF), tl.float32)
    REST: tl.constexpr = T % ROWS if PEEL else T
    for part in tl.static_range(2):  # steps of ROWS queries, then the rest, under a mask
        for start in range(part * (T - REST), T - REST + part * REST, ROWS):
            rows = start + tl.arange(0, ROWS)
            q_low, q_high = load_head(
                q_g, cos, sin, rows, stride, T, HALF, TURN, part == 0, NORM, EPS, q_norm
            )
            d_given = load_rows(d_out + o_at, rows, e, o_stride, T, part == 0)
            d_mixed = d_given
            if gate is not None:
                d_mixed = _through_gate(d_given, gate + o_at, rows, e, o_stride, T)
            # Transposed: [keys, rows]. A row beyond T has d_mixed = 0 and so adds nothing.
            scores = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)
            scores = tl.dot(k_high, tl.trans(q_high), scores, input_precision=PRECISION)
            live = (rows < T) | (part == 0)
            shift = tl.load(lse + row_at + rows, mask=live, other=0.0)
            p = tl.exp2(scores * (SCALE * 1.4426950408889634) - shift[None, :])
            if CAUSAL or WINDOW:
                p = tl.where(tl.trans(seen(rows, keys, CAUSAL, PREFIX, WINDOW)), p, 0.0)
            if unseen is not None:
                p = tl.where(padding[:, None] == 0, p, 0.0)
            if WHOLE and T % COLS != 0:  # else a key beyond T adds to its own, unstored, row alone
                p = tl.where(keys[:, None] < T, p, 0.0)
            d_v = tl.dot(p.to(dtype), d_mixed, d_v, input_precision=PRECISION)
            d_p = tl.dot(value, tl.trans(d_mixed), input_precision=PRECISION)
            if WHOLE:
                mixed = load_rows(out + o_at, rows, e, o_stride, T, part == 0)
                along = tl.sum(mixed.to(tl.float32) * d_given.to(tl.float32), 1)
            else:
                along = tl.load(delta + row_at + rows, mask=live, other=0.0)
            d_s = (p * (d_p - along[None, :])).to(dtype)
            d_k_low = tl.dot(d_s, q_low, d_k_low, input_precision=PRECISION)
            d_k_high = tl.dot(d_s, q_high, d_k_high, input_precision=PRECISION)
            if WHOLE:
                turned = tl.trans(d_s)
                d_q_low = tl.dot(turned, k_low, input_precision=PRECISION) * SCALE
                d_q_high = tl.dot(turned, k_high, input_precision=PRECISION) * SCALE
                _store_rotated_back(
                    d_qkv + at, d_q_low, d_q_high, cos, sin, rows, d_stride, T, HALF, ROTATE
                )

    to = d_qkv + at + 2 * H * HALF
    _store_rotated_back(
        to, d_k_low * SCALE, d_k_high * SCALE, cos, sin, keys, d_stride, T, HALF, ROTATE
    )
    v_to = to + 2 * H * HALF + keys[:, None] * d_stride + e[None, :]
    tl.store(v_to, d_v.to(dtype), mask=keys[:, None] < T)


@triton.jit
def attention_backward_queries_kernel(
    qkv, out, d_out, lse, delta, cos, sin, d_qkv, q_norm, k_norm, gate, unseen,
    SCALE: tl.constexpr, T: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
    ROTATE: tl.constexpr, TURN: tl.constexpr, PEEL: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PRECISION: tl.constexpr, KV: tl.constexpr, CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(T, ROWS)
    number = tl.program_id(0) // across
    batch, head = (number // H).to(tl.int64), number % H
    rows = (tl.program_id(0) % across) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, 2 * HALF)
    stride, d_stride, o_stride = (2 * H + 4 * KV) * HALF, 6 * H * HALF, 2 * H * HALF
    q_g = qkv + batch * T * stride + head * (2 * HALF)
    k_g = qkv + batch * T * stride + (H + head // (H // KV)) * (2 * HALF)
    v_g = k_g + 2 * KV * HALF
    at = batch * T * d_stride + head * (2 * HALF)
    o_at = batch * T * o_stride + head * (2 * HALF)
    row_at = (batch * H + head) * T

    q_low, q_high = load_head(
        q_g, cos, sin, rows, stride, T, HALF, TURN, T % ROWS == 0, NORM, EPS, q_norm
    )
    d_mixed = load_rows(d_out + o_at, rows, e, o_stride, T, T % ROWS == 0)
    mixed = load_rows(out + o_at, rows, e, o_stride, T, T % ROWS == 0)
    dtype = mixed.dtype
    along = tl.sum(mixed.to(tl.float32) * d_mixed.to(tl.float32), 1)
    tl.store(delta + row_at + rows, along, mask=rows < T)
    if gate is not None:
        d_mixed = _through_gate(d_mixed, gate + o_at, rows, e, o_stride, T)
    shift = tl.load(lse + row_at + rows, mask=rows < T, other=0.0)
    d_q_low = tl.zeros((ROWS, HALF), tl.float32)
    d_q_high = tl.zeros((ROWS, HALF), tl.float32)
    REST: tl.constexpr = T % COLS if PEEL else T
    for part in tl.static_range(2):  # as above, over keys
        for start in range(part * (T - REST), T - REST + part * REST, COLS):
            keys = start + tl.arange(0, COLS)
            k_low, k_high = load_head(
                k_g, cos, sin, keys, stride, T, HALF, TURN, part == 0, NORM, EPS, k_norm
            )
            value = load_rows(v_g, keys, e, stride, T, part == 0)
            scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
            p = tl.exp2(scores * (SCALE * 1.4426950408889634) - shift[:, None])
            if CAUSAL or WINDOW:
                p = tl.where(seen(rows, keys, CAUSAL, PREFIX, WINDOW), p, 0.0)
            if unseen is not None:
                padding = tl.load(unseen + batch * T + keys, mask=keys < T, other=1)
                p = tl.where(padding[None, :] == 0, p, 0.0)
            if part == 1:
                p = tl.where(keys[None, :] < T, p, 0.0)
            d_p = tl.dot(d_mixed, tl.trans(value), input_precision=PRECISION)
            d_s = (p * (d_p - along[:, None])).to(dtype)
            d_q_low = tl.dot(d_s, k_low, d_q_low, input_precision=PRECISION)
            d_q_high = tl.dot(d_s, k_high, d_q_high, input_precision=PRECISION)
    _store_rotated_back(
        d_qkv + at, d_q_low * SCALE, d_q_high * SCALE, cos, sin, rows, d_stride, T, HALF, ROTATE
    )


def attention_backward(
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    cos_sin: CosSin | None,
    *,
    rotated: bool = True,
    heads: Heads = PLAIN,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """d_qkv, like qkv [B, T, 3H, head_dim]: the gradient of X @ W^T, before the rotation.

    qkv with Q and K rotated; or, with rotated=False, as X @ W^T and as `attention` took it with the
    same cos_sin: then they are rotated as they are loaded. Where cos_sin is None there is no
    rotation at all. out and d_out [B, T, H, head_dim], lse [B, H, T] float32 of
    `attention`, cos and sin float32 [T, head_dim] or None; all contiguous, head_dim 32, 64 or 128,
    T at most 1024. `heads`, `gate` and `unseen` as `attention` took them; where q and k have a
    norm, d_qkv has the gradients of its results. Raises InvalidArgument on anything else.
    """
    op = "kernels.attention_backward"
    checks.same_dtype_and_device(op, qkv=qkv, out=out, d_out=d_out, gate=gate)
    batch, tokens, count, head_dim = check_qkv(op, qkv, cos_sin, heads)
    gate = None if gate is None else gate.view(batch, tokens, count, head_dim)
    for name, tensor in (("out", out), ("d_out", d_out), ("gate", gate)):
        if tensor is None:
            continue
        checks.shape(op, name, tensor, (batch, tokens, count, head_dim))
        if not tensor.is_contiguous():
            raise bad_argument(op, name, "a contiguous tensor", f"strides {tensor.stride()}")
    checks.float32(op, "lse", lse, (batch, count, tokens))
    if qkv.numel() == 0:
        return torch.empty_like(qkv)
    d_qkv = qkv.new_empty(batch, tokens, 3 * count, head_dim)
    delta = torch.empty_like(lse)
    shared = tiles.shared_bytes(qkv.device)
    args, constants, options = launch_arguments(
        qkv, out, lse, delta, d_out, cos_sin, d_qkv, shared, rotated, heads, gate, unseen
    )
    # One axis: the others of a grid end at 65535, which B * H may pass.
    grid = (triton.cdiv(tokens, constants["COLS"]) * batch * count,)
    if not constants["WHOLE"]:
        attention_backward_queries_kernel[grid](*args, **over_queries(constants), **options)
    attention_backward_keys_kernel[grid](*args, **constants, **options)
    if constants["KV"] == count:
        return d_qkv
    d_q, *rest = d_qkv.split(count, dim=2)
    groups = constants["KV"], count // constants["KV"]
    return torch.cat([d_q, *(d.unflatten(2, groups).sum(3) for d in rest)], dim=2)


def launch_arguments(
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    d_out: torch.Tensor,
    cos_sin: CosSin | None,
    d_qkv: torch.Tensor,
    shared: int,
    rotated: bool = True,
    heads: Heads = PLAIN,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of the launch over keys."""
    _, tokens, count, head_dim = out.shape
    turn = cos_sin is not None and not rotated
    tile, whole = backward_tiles.attention_backward_tile(
        tokens, head_dim, qkv.element_size(), shared, turn
    )
    cos, sin = cos_sin if cos_sin else (lse, lse)  # not read without ROTATE
    # Two loops want more registers than one: they are for wgmma, and not for the widest heads.
    peel = qkv.element_size() == 2 and shared >= backward_tiles.WGMMA_SHARED and head_dim < 128
    constants = {
        "SCALE": 1.0 / math.sqrt(head_dim),
        "T": tokens, "H": count, "HALF": head_dim // 2, "ROTATE": cos_sin is not None,
        "TURN": turn, "WHOLE": whole, "PEEL": peel,
        "ROWS": tile.rows, "COLS": tile.cols, "PRECISION": "ieee", "KV": heads.kv_heads or count,
        "CAUSAL": heads.causal, "PREFIX": heads.prefix, "WINDOW": heads.window, "NORM": heads.norm,
        "EPS": heads.eps,
    }  # fmt: skip
    hidden = None if unseen is None else unseen.view(torch.uint8)
    args = qkv, out, d_out, lse, delta, cos, sin, d_qkv, heads.q_norm, heads.k_norm, gate, hidden
    return args, constants, tiles.options(tile)


def over_queries(constants: dict) -> dict:
    """The compile-time arguments of the launch over queries: it owns as many queries as the other
    owns keys, and steps over as many keys."""
    rest = {name: value for name, value in constants.items() if name != "WHOLE"}
    return {**rest, "ROWS": constants["COLS"], "COLS": constants["ROWS"]}
