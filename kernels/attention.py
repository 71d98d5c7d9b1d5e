"""out = softmax(Q K^T / sqrt(head_dim)) V for every head, not causal, one launch.

    qkv [B, T, 3H, head_dim] as X @ W^T makes it; out [B, T, H, head_dim]
    bf16 or fp32 storage, fp32 accumulation and softmax
    with cos and sin [T, head_dim] fp32, Q and K are rotated as they are loaded:
    rope(x)[j]        = x[j] cos[t, j] - x[j + half] sin[t, j]         for j < half = head_dim / 2
    rope(x)[j + half] = x[j + half] cos[t, j + half] + x[j] sin[t, j + half]

A program owns `rows` queries of one head. If a step holds every key (T up to 128 in bf16, where a
program also owns all queries), the softmax has one pass. Else it goes over the keys once, with a
running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention); only the
last step has a mask. Scores are never stored. For the backward it can keep `lse` [B, H, T] fp32,
log2 of a row's sum of exp: p = exp2(score - lse). The halves of a head of Q and K are kept apart,
so that the pair (j, j + half) of the rotation is in one thread.

Blocks that differ from TRM's (`Heads`) have fewer heads of K and V, a mask by places, a norm of
each head of Q and K before the rotation, keys that nobody sees (a row that sees none is 0), a gate
(out = sigmoid(gate) * mixed), or attend along the lines of a grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument
from recurx.operands import CosSin

from . import checks, tiles
from .products import add_product

HEAD_DIMS = (32, 64, 128)
MAX_TOKENS = 1024


@triton.jit
def load_rows(tensor, tokens, columns, STRIDE: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    """[tokens, columns] of rows that lie STRIDE apart; 0 beyond T, unless WHOLE: nothing is."""
    at = tensor + tokens[:, None] * STRIDE + columns[None, :]
    return tl.load(at, mask=(tokens[:, None] < T) | WHOLE, other=0.0)


@triton.jit
def head_norm(low, high, weight, HALF: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """The halves of a head after its norm, in fp32."""
    low, high, j = low.to(tl.float32), high.to(tl.float32), tl.arange(0, HALF)[None, :]
    if NORM == "layer":
        mean = (tl.sum(low + high, 1) / (2 * HALF))[:, None]
        low, high = low - mean, high - mean
    factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + EPS)[:, None]
    low, high = low * factor, high * factor
    if weight is not None:
        low, high = low * tl.load(weight + j), high * tl.load(weight + HALF + j)
    return low, high


@triton.jit
def load_head(
    head, cos, sin, tokens, STRIDE: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, NORM: tl.constexpr = "", EPS: tl.constexpr = 0.0,
    weight=None,
):  # fmt: skip
    """The two halves of a head of Q or K, normed where NORM says so, with ROTATE turned, both in
    fp32; then rounded to storage."""
    j = tl.arange(0, HALF)
    low = load_rows(head, tokens, j, STRIDE, T, WHOLE)
    high = load_rows(head + HALF, tokens, j, STRIDE, T, WHOLE)
    dtype = low.dtype
    if NORM != "":
        low, high = head_norm(low, high, weight, HALF, NORM, EPS)
    if ROTATE:
        low, high = low.to(tl.float32), high.to(tl.float32)
        cos_low = load_rows(cos, tokens, j, 2 * HALF, T, WHOLE)
        sin_low = load_rows(sin, tokens, j, 2 * HALF, T, WHOLE)
        cos_high = load_rows(cos + HALF, tokens, j, 2 * HALF, T, WHOLE)
        sin_high = load_rows(sin + HALF, tokens, j, 2 * HALF, T, WHOLE)
        # NOTE: `here` is always true and costs nothing (LLVM knows), but Triton does not. Without
        # it Triton rotates in the layout of mma.sync's operands, where each warp holds all keys.
        here = j[None, :] < HALF
        turned = (low * cos_low - high * sin_low).to(dtype)
        high = (high * cos_high + low * sin_high).to(dtype)
        low, high = tl.where(here, turned, 0.0), tl.where(here, high, 0.0)
    elif NORM != "":
        low, high = low.to(dtype), high.to(dtype)
    return low, high


@triton.jit
def seen(rows, keys, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a row sees; its own always."""
    i, j = rows[:, None], keys[None, :]
    sees = (j <= i) | (j < PREFIX) if CAUSAL else (j >= 0) & (i >= 0)
    if WINDOW:
        sees = sees & (tl.abs(i - j) < WINDOW)
    return sees


@triton.jit
def attention_kernel(
    qkv, cos, sin, out, lse, q_norm, k_norm, gate, unseen,
    SCALE: tl.constexpr, ROTATE: tl.constexpr, KEEP_LSE: tl.constexpr, PEEL: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PRECISION: tl.constexpr, KV: tl.constexpr, CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr, WINDOW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """Pointers that are None are no part of the compiled kernel. A sequence of T tokens is one of
    LINES whose tokens alternate in memory."""
    # One axis: the others of a grid end at 65535, which B * H may pass.
    row_tiles = tl.cdiv(T, ROWS)
    sequence = tl.program_id(0) // row_tiles
    batch, head = (sequence // H).to(tl.int64), sequence % H
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = (H + 2 * KV) * HEAD_DIM
    # Elements from token to token of qkv, and of what has a head for each of Q.
    STRIDE: tl.constexpr = LINES * ALL
    OUT_STRIDE: tl.constexpr = LINES * H * HEAD_DIM
    first = batch // LINES * (LINES * T) + batch % LINES
    e = tl.arange(0, HEAD_DIM)
    q_g = qkv + first * ALL + head * HEAD_DIM
    k_g, v_g = q_g + H * HEAD_DIM, q_g + (H + KV) * HEAD_DIM
    if KV != H:  # several heads of Q for one of K and V
        k_g += (head // (H // KV) - head) * HEAD_DIM
        v_g += (head // (H // KV) - head) * HEAD_DIM
    q_low, q_high = load_head(
        q_g, cos, sin, rows, STRIDE, T, HALF, ROTATE, T % ROWS == 0, NORM, EPS, q_norm
    )

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    # Finite: a row that sees none of a step has NaN of infinities, but of these only a sum that the
    # first key which it sees rescales to 0. There is one, but where keys are padding.
    OUT: tl.constexpr = -1e30 if unseen is None else float("-inf")
    REST: tl.constexpr = T % COLS if PEEL else T
    for part in tl.static_range(2):  # steps of COLS keys, then the rest, which needs a mask
        for start in range(part * (T - REST), T - REST + part * REST, COLS):
            keys = start + tl.arange(0, COLS)
            k_low, k_high = load_head(
                k_g, cos, sin, keys, STRIDE, T, HALF, ROTATE, part == 0, NORM, EPS, k_norm
            )
            scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
            if CAUSAL or WINDOW or unseen is not None:
                sees = seen(rows, keys, CAUSAL, PREFIX, WINDOW)
                if unseen is not None:
                    padding = tl.load(unseen + first + LINES * keys, mask=keys < T, other=1)
                    sees = sees & (padding[None, :] == 0)
                scores = tl.where(sees, scores, OUT)
            if part == 1:
                scores = tl.where(keys[None, :] < T, scores, float("-inf"))
            # Maximum and sum are of scores times log2(e), so that exp2 serves; SCALE has it in it,
            # and costs nothing as part of a multiply-add.
            higher = tl.max(scores, 1) * SCALE
            if COLS < T:
                higher = tl.maximum(highest, higher)
            if unseen is not None:
                higher = tl.maximum(higher, -3e38)
            p = tl.exp2(scores * SCALE - higher[:, None])
            value = load_rows(v_g, keys, e, STRIDE, T, part == 0)
            if COLS < T:
                rescale = tl.exp2(highest - higher)
                total = total * rescale + tl.sum(p, 1)
                acc = add_product(acc * rescale[:, None], p.to(value.dtype), value, PRECISION)
            else:
                total = tl.sum(p, 1)
                acc = tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
            highest = higher

    mixed = acc / total[:, None]
    if unseen is not None:
        mixed = tl.where(total[:, None] == 0.0, 0.0, mixed)
        # Its lse is 0: it meets no key.
        highest, total = tl.where(total == 0.0, 0.0, highest), tl.where(total == 0.0, 1.0, total)
    if gate is not None:
        gate_g = gate + (first * H + head) * HEAD_DIM
        logits = load_rows(gate_g, rows, e, OUT_STRIDE, T, False)
        mixed *= tl.sigmoid(logits.to(tl.float32))
    mixed = mixed.to(out.dtype.element_ty)
    o_g = out + (first * H + head) * HEAD_DIM
    tl.store(o_g + rows[:, None] * OUT_STRIDE + e[None, :], mixed, mask=rows[:, None] < T)
    if KEEP_LSE:
        tl.store(lse + (batch * H + head) * T + rows, highest + tl.log2(total), mask=rows < T)


class Heads(NamedTuple):
    """In what attention differs from TRM's; as the fields of `BlockSpec`, whose defaults these are.

    q_norm and k_norm are float32 [head_dim].
    """

    kv_heads: int = 0
    causal: bool = False
    prefix: int = 0
    window: int = 0
    norm: str = ""
    eps: float = 0.0
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    axial: tuple[int, ...] = ()

    def line(self, tokens: int) -> int:
        """How many tokens attend to each other."""
        return self.axial[self.axial[2]] if self.axial else tokens


PLAIN = Heads()


def attention(
    qkv: torch.Tensor,
    *,
    cos_sin: CosSin | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    heads: Heads = PLAIN,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, T, H, head_dim] from qkv [B, T, 3H, head_dim] (contiguous, bfloat16 or float32), or
    [B, T, H + 2 kv_heads, head_dim]; multiplied by the sigmoid of `gate` [B, T, H * head_dim].
    Keys of `unseen`, contiguous bool [B, T], are seen by no query.

    With `heads.axial` lines of a grid attend each by itself, and T below is that of a line.
    With `cos_sin` (contiguous float32 [T, head_dim] each) Q and K are rotated as they are loaded,
    in fp32, and rounded to the dtype of qkv; without it qkv is taken as it is. Writes `lse`
    [B, H, T] (contiguous float32), if given, for the backward.
    head_dim 32, 64 or 128; T at most 1024. Raises InvalidArgument on anything else.
    """
    op = "kernels.attention"
    checks.same_dtype_and_device(op, qkv=qkv, out=out, gate=gate)
    batch, tokens, num_heads, head_dim = check_qkv(op, qkv, cos_sin, heads)
    if heads.axial and (math.prod(heads.axial[:2]) != tokens or lse is not None):
        raise bad_argument(op, "heads.axial", f"a grid of {tokens} tokens, no lse", heads.axial)
    expected = (batch, tokens, num_heads, head_dim)
    for name, norm in (("q_norm", heads.q_norm), ("k_norm", heads.k_norm)):
        if norm is not None:
            checks.float32(op, name, norm, (head_dim,))
    if gate is not None:
        checks.shape(op, "gate", gate, (batch, tokens, num_heads * head_dim))
        checks.contiguous_matrix(op, "gate", gate.flatten(0, 1))
    if unseen is not None:
        checks.shape(op, "unseen", unseen, (batch, tokens))
        if unseen.dtype != torch.bool or not unseen.is_contiguous():
            raise bad_argument(op, "unseen", "contiguous bool", unseen.dtype)
    if out is None:
        out = torch.empty(expected, dtype=qkv.dtype, device=qkv.device)
    checks.shape(op, "out", out, expected)
    if lse is not None:
        checks.float32(op, "lse", lse, (batch, num_heads, tokens))
    if out.numel() == 0:
        return out
    shared = tiles.shared_bytes(qkv.device)
    args, constants, options = launch_arguments(qkv, out, shared, lse, cos_sin, heads, gate, unseen)
    line = heads.line(tokens)
    grid = (triton.cdiv(line, constants["ROWS"]) * (batch * tokens // line) * num_heads,)
    attention_kernel[grid](*args, **constants, **options)
    return out


def check_qkv(
    op: str, qkv: torch.Tensor, cos_sin: CosSin | None, like: Heads = PLAIN
) -> tuple[int, int, int, int]:
    """(B, T, H, head_dim) of a qkv that the kernels take; raises InvalidArgument on another."""
    kv_heads = like.kv_heads
    if qkv.ndim != 4 or not qkv.is_contiguous() or (qkv.shape[2] % 3 and not kv_heads):
        raise bad_argument(op, "qkv", "a contiguous [B, T, 3H, head_dim]", tuple(qkv.shape))
    batch, tokens, all_heads, head_dim = qkv.shape
    heads = all_heads - 2 * kv_heads if kv_heads else all_heads // 3
    if kv_heads and (heads < kv_heads or heads % kv_heads):
        raise bad_argument(op, "qkv", f"{kv_heads} heads of K and V for H heads", all_heads)
    if head_dim not in HEAD_DIMS:
        raise bad_argument(op, "qkv", f"head_dim one of {HEAD_DIMS}", head_dim)
    if tokens > MAX_TOKENS:
        raise bad_argument(op, "qkv", f"at most {MAX_TOKENS} tokens", tokens)
    for name, table in zip(("cos", "sin"), cos_sin or (), strict=False):
        checks.float32(op, name, table, (like.line(tokens), head_dim))
    return batch, tokens, heads, head_dim


def launch_arguments(
    qkv: torch.Tensor,
    out: torch.Tensor,
    shared: int,
    lse: torch.Tensor | None = None,
    cos_sin: CosSin | None = None,
    heads: Heads = PLAIN,
    gate: torch.Tensor | None = None,
    unseen: torch.Tensor | None = None,
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    all_heads, head_dim, tokens = *qkv.shape[2:], heads.line(qkv.shape[1])
    kv = heads.kv_heads or all_heads // 3
    rotate = cos_sin is not None
    tile = tiles.attention_tile(tokens, head_dim, qkv.element_size(), shared, rotate)
    cos, sin = cos_sin if cos_sin else (out, out)  # not read without ROTATE
    constants = {
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "ROTATE": rotate, "KEEP_LSE": lse is not None,
        # Two loops want more registers than one: too many where fp32 operands come from registers.
        "PEEL": qkv.element_size() == 2, "T": tokens, "H": all_heads - 2 * kv, "HEAD_DIM": head_dim,
        "ROWS": tile.rows, "COLS": tile.cols, "PRECISION": "ieee", "KV": kv,
        "CAUSAL": heads.causal, "PREFIX": heads.prefix, "WINDOW": heads.window, "NORM": heads.norm,
        "EPS": heads.eps, "LINES": heads.axial[1] if heads.axial and not heads.axial[2] else 1,
    }  # fmt: skip
    kept = out if lse is None else lse
    hidden = None if unseen is None else unseen.view(torch.uint8)
    args = qkv, cos, sin, out, kept, heads.q_norm, heads.k_norm, gate, hidden
    return args, constants, tiles.options(tile)
