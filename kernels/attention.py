"""out = softmax(Q K^T / sqrt(head_dim)) V for every head, not causal, one launch.

    qkv [B, T, 3H, head_dim] as kernels/qkv_rope.py writes it; out [B, T, H, head_dim]
    bf16 or fp32 storage, fp32 accumulation and softmax

A program owns `rows` queries of one head and goes over the keys once, with a running maximum and
sum (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention), so scores are never stored. For
the backward it can keep `lse` [B, H, T] fp32, log2 of a row's sum of exp: p = exp2(score - lse).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from recurx.errors import bad_argument

from . import checks, tiles
from .products import add_product

HEAD_DIMS = (32, 64, 128)
MAX_TOKENS = 1024


@triton.jit
def attention_kernel(
    qkv, out, lse, SCALE: tl.constexpr, KEEP_LSE: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One axis: the others of a grid end at 65535, which B * H may pass.
    row_tiles = tl.cdiv(T, ROWS)
    sequence = tl.program_id(0) // row_tiles
    batch, head = (sequence // H).to(tl.int64), sequence % H
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, HEAD_DIM)
    live = rows[:, None] < T
    stride = 3 * H * HEAD_DIM  # elements from token to token
    q_g = qkv + batch * T * stride + head * HEAD_DIM
    query = tl.load(q_g + rows[:, None] * stride + e[None, :], mask=live, other=0.0)

    # Scores are kept times log2(e), so that exp2 serves; SCALE has it in it.
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for start in range(0, T, COLS):
        keys = start + tl.arange(0, COLS)
        k_g = q_g + H * HEAD_DIM + keys[None, :] * stride + e[:, None]
        key = tl.load(k_g, mask=keys[None, :] < T, other=0.0)
        scores = tl.dot(query, key, input_precision=PRECISION) * SCALE
        scores = tl.where(keys[None, :] < T, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))  # finite: a step has at least one key
        rescale = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * rescale + tl.sum(p, 1)
        v_g = q_g + 2 * H * HEAD_DIM + keys[:, None] * stride + e[None, :]
        value = tl.load(v_g, mask=keys[:, None] < T, other=0.0)
        acc = acc * rescale[:, None]
        acc = add_product(acc, p.to(value.dtype), value, PRECISION)
        highest = higher

    mixed = (acc / total[:, None]).to(out.dtype.element_ty)
    o_g = out + batch * T * H * HEAD_DIM + head * HEAD_DIM
    tl.store(o_g + rows[:, None] * (H * HEAD_DIM) + e[None, :], mixed, mask=live)
    if KEEP_LSE:
        tl.store(lse + (batch * H + head) * T + rows, highest + tl.log2(total), mask=rows < T)


def attention(
    qkv: torch.Tensor, *, out: torch.Tensor | None = None, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, T, H, head_dim] from qkv [B, T, 3H, head_dim] (contiguous, bfloat16 or float32).

    Writes `lse` [B, H, T] (contiguous float32), if given, for the backward.
    head_dim 32, 64 or 128; T at most 1024. Raises InvalidArgument on anything else.
    """
    op = "kernels.attention"
    checks.same_dtype_and_device(op, qkv=qkv, out=out)
    if qkv.ndim != 4 or qkv.shape[2] % 3 or not qkv.is_contiguous():
        raise bad_argument(op, "qkv", "a contiguous [B, T, 3H, head_dim]", tuple(qkv.shape))
    batch, tokens, heads, head_dim = qkv.shape
    if head_dim not in HEAD_DIMS:
        raise bad_argument(op, "qkv", f"head_dim one of {HEAD_DIMS}", head_dim)
    if tokens > MAX_TOKENS:
        raise bad_argument(op, "qkv", f"at most {MAX_TOKENS} tokens", tokens)
    expected = (batch, tokens, heads // 3, head_dim)
    if out is None:
        out = torch.empty(expected, dtype=qkv.dtype, device=qkv.device)
    checks.shape(op, "out", out, expected)
    if lse is not None:
        checks.float32(op, "lse", lse, (batch, heads // 3, tokens))
    if out.numel() == 0:
        return out
    args, constants, options = launch_arguments(qkv, out, tiles.shared_bytes(qkv.device), lse)
    grid = (triton.cdiv(tokens, constants["ROWS"]) * (batch * heads // 3),)
    attention_kernel[grid](*args, **constants, **options)
    return out


def launch_arguments(
    qkv: torch.Tensor, out: torch.Tensor, shared: int, lse: torch.Tensor | None = None
) -> tuple[tuple, dict, dict]:
    """(runtime arguments, compile-time arguments, compiler options) of one launch."""
    _, tokens, heads, head_dim = qkv.shape
    tile = tiles.attention_tile(tokens, head_dim, qkv.element_size(), shared)
    constants = {
        "SCALE": math.log2(math.e) / math.sqrt(head_dim), "KEEP_LSE": lse is not None,
        "T": tokens, "H": heads // 3, "HEAD_DIM": head_dim,
        "ROWS": tile.rows, "COLS": tile.cols, "PRECISION": "ieee",
    }  # fmt: skip
    return (qkv, out, out if lse is None else lse), constants, tiles.options(tile)
