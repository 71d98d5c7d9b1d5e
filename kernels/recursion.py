"""Every call of a recursion in one launch: a program owns whole samples from first to last call.

For small nets (D up to 256, at most 128 rows a program). Samples never meet, so programs need no
barrier between them; the calls are data (recurx/program.py), not code.

    arena [slots, B, T, D]   x, the states, a sum that is kept; read and written in place
    tape                     all matrices of all nets (recurx/packed.py)
    calls, blocks            int32 tables: a row of 8 words a call (kernels/call_table.py), a block

A program holds GROUP samples as one matrix h of ROWS >= GROUP * T rows, and runs each half block
without storing an intermediate:

    attention   for each head: q, k, v of all rows, scores, softmax, o, and acc += o @ O_head
    token-MLP   for each chunk of the inner width: gate, up, middle, and acc += down_chunk @ middle
    SwiGLU      the same over D:                                     acc += middle @ down_chunk
    then        h = rms(h + acc), written to the slot that the call runs in
    at last     the slot that the call writes, where damping or noise make another of it

Between the halves h lies in global memory, that is in L1 and L2: a sample is 2 T D bytes in bf16.
NOTE: a thread may read what another one wrote, so a barrier stands after each store of h, and one
before it, because h is overwritten where it was read. Compilers so far give an element to the same
thread in loads and stores, which would need no barrier, but promise nothing; the race checker,
which watches the arena, shows them to be needed otherwise (tests/emulator/ptx/test_recursion.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec
from recurx.operands import CosSin
from recurx.packed import (
    ALIGN,
    Nets,
    PackedNets,
    blocks_of,
    device_words,
    padded_columns,
)
from recurx.program import Program

from .arena import rows_of
from .call_table import ROW, call_table, load_factor
from .finish import damped, noisy
from .inject import call_input
from .products import add_product

FINISHED = tl.constexpr(16)  # rows at a time of what a call with damping or noise writes


@triton.jit
def _transposed(w, n, k, N: tl.constexpr, K: tl.constexpr, W_ROW: tl.constexpr):
    """W[n, k]^T, as the right operand of a product: [k, n]."""
    inside = (n < N)[None, :] & (k < K)[:, None]
    return tl.load(w + n[None, :] * W_ROW + k[:, None], mask=inside, other=0.0)


@triton.jit
def _project(h, w, n, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):
    """h @ W[n]^T, fp32."""
    return tl.dot(h, _transposed(w, n, tl.arange(0, DP), N, D, D), input_precision=PRECISION)


@triton.jit
def _head(
    h, w, first, cos, sin, token,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of Q or K, rotated: its first and its second half, so that pairs are in a thread."""
    HALF: tl.constexpr = HEAD_DIM // 2
    j = tl.arange(0, HALF)
    low = _project(h, w, first + j, N, D, DP, PRECISION)
    high = _project(h, w, first + HALF + j, N, D, DP, PRECISION)
    if ROTATE:
        at = token[:, None] * HEAD_DIM + j[None, :]
        turned = low * tl.load(cos + at) - high * tl.load(sin + at)
        high = high * tl.load(cos + at + HALF) + low * tl.load(sin + at + HALF)
        low = turned
    return low.to(h.dtype), high.to(h.dtype)


@triton.jit
def _attention(
    h, wqkv, wo, cos, sin, table_step,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, SCALE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O(attention(h)), fp32; a row sees the rows of its own sample."""
    e = tl.arange(0, HEAD_DIM)
    acc = tl.zeros((ROWS, DP), tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        # The compiler would keep masks and rotary tables of all rows in registers over the loop,
        # and spill. table_step (0: all heads have one table) makes them look new for each head.
        row = tl.arange(0, ROWS) + head * table_step
        first = head * HEAD_DIM
        wk = wqkv + D * D
        q_low, q_high = _head(
            h, wqkv, first, cos, sin, row % T, D, D, DP, HEAD_DIM, ROTATE, PRECISION
        )
        k_low, k_high = _head(
            h, wk, first, cos, sin, row % T, D, D, DP, HEAD_DIM, ROTATE, PRECISION
        )
        scores = tl.dot(q_low, tl.trans(k_low), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
        if GROUP == 1:
            sees = (row < T)[None, :]
        else:  # rows behind the last sample see each other, which keeps them finite
            sees = (row // T)[:, None] == (row // T)[None, :]
        scores = tl.where(sees, scores * SCALE, float("-inf"))
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        v = _project(h, wk + D * D, first + e, D, D, DP, PRECISION).to(h.dtype)
        mixed = tl.dot(p.to(h.dtype), v, input_precision=PRECISION) / tl.sum(p, 1)[:, None]
        wo_head = _transposed(wo, tl.arange(0, DP), first + e, D, D, D)
        acc = add_product(acc, mixed.to(h.dtype), wo_head, PRECISION)
    return acc


@triton.jit
def _swiglu(
    h, wgu, wdown,
    D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, F_ROW: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """down(silu(gate h) * (up h)), fp32; the middle is made and used chunk by chunk."""
    acc = tl.zeros((ROWS, DP), tl.float32)
    for start in tl.range(0, F, CHUNK, num_stages=STAGES, disable_licm=True):
        f = start + tl.arange(0, CHUNK)
        gate = _project(h, wgu, f, F, D, DP, PRECISION)
        up = _project(h, wgu + F * D, f, F, D, DP, PRECISION)
        middle = (gate * tl.sigmoid(gate) * up).to(h.dtype)
        down = _transposed(wdown, tl.arange(0, DP), f, D, F_ROW, F_ROW)
        acc = add_product(acc, middle, down, PRECISION)
    return acc


@triton.jit
def _token_swiglu(
    h, wgu, wdown,
    T: tl.constexpr, T_ROW: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, F_ROW: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The SwiGLU over tokens without h^T: gate^T = W_gate @ h, and acc = W_down @ middle^T."""
    t = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, DP), tl.float32)
    for start in tl.range(0, F, CHUNK, num_stages=STAGES, disable_licm=True):
        f = start + tl.arange(0, CHUNK)
        inside = (f < F)[:, None] & (t < T_ROW)[None, :]
        at = f[:, None] * T_ROW + t[None, :]
        gate = tl.dot(tl.load(wgu + at, mask=inside, other=0.0), h, input_precision=PRECISION)
        wup = wgu + F * T_ROW
        up = tl.dot(tl.load(wup + at, mask=inside, other=0.0), h, input_precision=PRECISION)
        middle = (gate * tl.sigmoid(gate) * up).to(h.dtype)
        inside = (t < T)[:, None] & (f < F_ROW)[None, :]
        down = tl.load(wdown + t[:, None] * F_ROW + f[None, :], mask=inside, other=0.0)
        acc = add_product(acc, down, middle, PRECISION)
    return acc


@triton.jit
def _offsets(live_rows, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Where the elements of h lie from its first, and which of them there are.

    Formed anew at each use: kept over the loops they would cost a fifth of the registers.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, DP)
    inside = (row < live_rows)[:, None] & (column < D)[None, :]
    return row[:, None] * D + column[None, :], inside


@triton.jit
def _load_state(h_g, live_rows, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    offset, inside = _offsets(live_rows, D, DP, ROWS)
    return tl.load(h_g + offset, mask=inside, other=0.0)


@triton.jit
def _add_and_norm(
    h_g, live_rows, acc, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    N: tl.constexpr, EPS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """h = rms(h + acc) over AXIS, in place; everybody may read h afterwards."""
    x = _load_state(h_g, live_rows, D, DP, ROWS).to(tl.float32) + acc
    scale = tl.rsqrt(tl.sum(x * x, AXIS) / N + EPS)
    tl.debug_barrier()  # before: h is still being read, as the operand of the products
    offset, inside = _offsets(live_rows, D, DP, ROWS)
    h = (x * tl.expand_dims(scale, AXIS)).to(h_g.dtype.element_ty)
    tl.store(h_g + offset, h, mask=inside)
    tl.debug_barrier()  # after: other threads read what this one wrote


@triton.jit
def _finish(
    own, calls, words, h_g, slot_stride, first, live_rows, seed_g,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Into the slot that the call writes, what is made of h; a few rows at a time, for noise of
    all would be as many instructions as the rest of the kernel."""
    out_g = own + tl.load(words + 7).to(tl.int64) * slot_stride
    column = tl.arange(0, DP)[None, :]
    for start in tl.range(0, ROWS, FINISHED, disable_licm=True):
        row = (start + tl.arange(0, FINISHED))[:, None]
        offset, inside = row * D + column, (row < live_rows) & (column < D)
        value = tl.load(h_g + offset, mask=inside, other=0.0)
        if tl.load(words + 2) != tl.load(words + 7):
            value = damped(calls, words, value, tl.load(out_g + offset, mask=inside, other=0.0))
        if NOISY and load_factor(calls, words, 3) != 0:
            entry = tl.load(seed_g + 1).to(tl.int32) + first + row // T
            element = row % T * D + column
            value = noisy(calls, words, value, tl.load(seed_g), entry, element)
        tl.debug_barrier()  # h may be what is written, and other threads' of what this one read
        tl.store(out_g + offset, value, mask=inside)
    tl.debug_barrier()  # other threads read what this one wrote


@triton.jit
def recursion_kernel(
    arena, tape, cos, sin, calls, blocks, seed,
    num_calls, batch, slot_stride, table_step,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, SCALE: tl.constexpr,
    F: tl.constexpr, F_ROW: tl.constexpr, CHUNK: tl.constexpr,
    TOKEN_F: tl.constexpr, TOKEN_F_ROW: tl.constexpr, T_ROW: tl.constexpr,
    TOKEN_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_STAGES: tl.constexpr, STAGES: tl.constexpr,
    CALL_WORDS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, FINISHES: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * GROUP
    live_rows = tl.minimum(GROUP, batch - first) * T
    own = arena + first.to(tl.int64) * (T * D)  # this program's samples in slot 0
    for call in tl.range(0, num_calls, disable_licm=True):
        words = calls + call * CALL_WORDS
        h_g = own + tl.load(words + 2).to(tl.int64) * slot_stride
        offset, inside = _offsets(live_rows, D, DP, ROWS)
        entering = call_input(own, calls, words, slot_stride, offset, inside, SCALED)
        tl.debug_barrier()  # the slot that is written may be one that is read
        tl.store(h_g + offset, entering, mask=inside)
        tl.debug_barrier()  # entered: other threads read what this one wrote
        for block in tl.range(tl.load(words), tl.load(words + 1), disable_licm=True):
            # Where the block's matrices start, in units that keep the alignment known.
            at = blocks + block * CALL_WORDS
            w0 = tape + tl.load(at + 1).to(tl.int64) * UNIT
            w1 = tape + tl.load(at + 2).to(tl.int64) * UNIT
            w2 = tape + tl.load(at + 3).to(tl.int64) * UNIT
            w3 = tape + tl.load(at + 4).to(tl.int64) * UNIT
            h = _load_state(h_g, live_rows, D, DP, ROWS)
            token_mlp = tl.load(at) if TOKEN_F > 0 and HEADS > 0 else TOKEN_F > 0
            if token_mlp:
                acc = _token_swiglu(
                    h, w0, w1, T, T_ROW, DP, TOKEN_F, TOKEN_F_ROW, TOKEN_CHUNK, ROWS, STAGES,
                    PRECISION,
                )  # fmt: skip
                _add_and_norm(h_g, live_rows, acc, D, DP, ROWS, T, EPS, 0)
            else:
                acc = _attention(
                    h, w0, w1, cos, sin, table_step, T, D, DP, HEADS, HEAD_DIM, ROTATE, SCALE,
                    GROUP, ROWS, HEAD_STAGES, PRECISION,
                )  # fmt: skip
                _add_and_norm(h_g, live_rows, acc, D, DP, ROWS, D, EPS, 1)
            h = _load_state(h_g, live_rows, D, DP, ROWS)
            acc = _swiglu(h, w2, w3, D, DP, F, F_ROW, CHUNK, ROWS, STAGES, PRECISION)
            _add_and_norm(h_g, live_rows, acc, D, DP, ROWS, D, EPS, 1)
        if FINISHES:
            _finish(own, calls, words, h_g, slot_stride, first, live_rows, seed, T, D, DP, ROWS,
                    NOISY)  # fmt: skip


def recursion(
    arena: torch.Tensor,
    program: Program,
    packed: PackedNets,
    cos_sin: CosSin | None,
    settings: Mapping[str, object],
    seed: torch.Tensor | None = None,
) -> None:
    """Run every call of the program on the arena [slots, B, T, D], in place; one launch.

    arena and packed contiguous, of one dtype (bfloat16 or float32), on one device; cos and sin
    float32 [T, head_dim]. `seed` int64 [2], with the number of the first sample, where a call has
    noise. `settings` are those of a plan of kind "persistent", and only the plan knows which
    problems fit (recurx/plan/triton.py). A call saves nothing for a backward.
    """
    words, constants, options = _prepared(
        program, packed.nets, arena.device, arena.shape[2], cos_sin is not None,
        tuple(settings.items()),
    )  # fmt: skip
    cos, sin = (arena, arena) if cos_sin is None else cos_sin  # not followed without ROTATE
    batch = arena.shape[1]
    args = (arena, packed.buffer, cos, sin, words, packed.words, words if seed is None else seed)
    args += (len(rows_of(program)), batch, arena.stride(0), 0)
    grid = (triton.cdiv(batch, constants["GROUP"]),)
    recursion_kernel[grid](*args, **constants, **options)


@functools.lru_cache(maxsize=64)
def _prepared(
    program: Program,
    nets: Nets,
    device: torch.device,
    tokens: int,
    rotate: bool,
    settings: tuple[tuple[str, object], ...],
) -> tuple[torch.Tensor, dict, dict]:
    """The table on the device, and `launch_constants`: made at the first launch of its kind."""
    words = device_words(call_table(program, blocks_of(nets)), device)
    specs = [block for _, spec in nets for block in spec.blocks]
    return words, *launch_constants(specs, tokens, rotate, dict(settings), program)


def launch_constants(
    specs: Sequence[BlockSpec], tokens: int, rotate: bool, settings: Mapping[str, object],
    program: Program | None = None,
) -> tuple[dict, dict]:  # fmt: skip
    """(compile-time arguments, compiler options); all blocks of a kind must be of one shape. What
    calls without factors do not need is left out for a program that has none, and for None."""
    factors = [row.factors for row in rows_of(program) if row.factors] if program else []
    attention = next((spec for spec in specs if spec.kind == ATTENTION), None)
    token_mlp = next((spec for spec in specs if spec.kind == TOKEN_MLP), None)
    d, f = specs[0].hidden, specs[0].inner
    heads, dim = (attention.num_heads, attention.head_dim) if attention else (0, 32)
    token_f = token_mlp.token_inner if token_mlp else 0
    constants = {
        "T": tokens, "D": d, "DP": triton.next_power_of_2(d), "EPS": specs[0].eps,
        "HEADS": heads, "HEAD_DIM": dim, "ROTATE": rotate,
        "SCALE": math.log2(math.e) / math.sqrt(dim),  # exp2 serves
        "F": f, "F_ROW": padded_columns(f), "CHUNK": settings["chunk"],
        "TOKEN_F": token_f, "TOKEN_F_ROW": padded_columns(token_f), "T_ROW": padded_columns(tokens),
        "TOKEN_CHUNK": settings["token_chunk"],
        "GROUP": settings["group"], "ROWS": settings["rows"],
        "HEAD_STAGES": settings["head_stages"], "STAGES": settings["stages"],
        "CALL_WORDS": ROW, "UNIT": ALIGN, "PRECISION": "ieee",
        "SCALED": any(f.scale != 1 for f in factors), "NOISY": any(f.noise for f in factors),
        "FINISHES": program is not None and any(row.finishes for row in rows_of(program)),
    }  # fmt: skip
    options = {"num_warps": settings["warps"], "num_stages": 1, "enable_fp_fusion": True}
    return constants, options
