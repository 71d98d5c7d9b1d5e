"""kernels/recursion.py and kernels/inject.py as plans launch them; see triton_cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from aot.triton_cases import ARCHS, GENERATIONS, Launch, TritonCase, _each, _meta, _short
from recurx import Schedule
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec
from recurx.operands import Span
from recurx.plan import DEVICES
from recurx.program import lower

EQR = Schedule.trm(3, 6).with_factors(damping=0.95, scale=0.7, noise=0.01)


def _recursion(
    spec: BlockSpec, tokens: int, dtype: torch.dtype, archs: tuple[str, ...], spills: int = 0,
    schedule: Schedule | None = None,
) -> TritonCase:  # fmt: skip
    def kernel():
        from recurx.kernels.recursion import recursion_kernel

        return recursion_kernel

    def launch(dtype: torch.dtype, shared: int) -> Launch:
        from recurx.kernels.recursion import launch_constants

        from recurx.plan.triton_persistent import ROWS, launch_settings

        rows = next(rows for rows in ROWS if rows >= tokens)
        device = replace(DEVICES["a100"], shared_bytes=shared)
        settings = launch_settings(spec.hidden, rows, 1, dtype.itemsize, device)
        program = None if schedule is None else lower(schedule, Span(0, len(schedule)))
        constants, options = launch_constants(
            [spec], tokens, bool(spec.num_heads), dict(settings), program
        )
        arena = _meta(4, 64, tokens, spec.hidden, dtype=dtype)
        tape, words = _meta(1 << 20, dtype=dtype), _meta(4096, dtype=torch.int32)
        table = _meta(tokens, spec.head_dim or 1, dtype=torch.float32)
        seed = _meta((2,), dtype=torch.int64)
        args = (arena, tape, table, table, words, words, seed, 21, 64, arena.stride(0), 0)
        return args, constants, options

    kind = "a" if spec.kind == ATTENTION else "t"
    kind += "" if schedule is None else " factors"
    label = f"recursion_{kind} t={tokens} d={spec.hidden} {_short(dtype)}"
    return TritonCase(label, dtype, archs, kernel, launch, spills)


def _call_input(dtype: torch.dtype, archs: tuple[str, ...], learned: bool = False) -> TritonCase:
    def kernel():
        from recurx.kernels.inject import call_input_kernel

        return call_input_kernel

    def launch(dtype: torch.dtype, shared: int) -> Launch:
        from recurx.kernels.inject import launch_arguments

        arena = _meta(5, 64, 97, 512, dtype=dtype)
        squares = _meta(2, 64 * 97, dtype=torch.float32)
        scale = _meta(512, dtype=torch.float32) if learned else None
        return launch_arguments(
            arena, _meta(256, dtype=torch.int32), 3, 2, squares, 1e-5, scale=scale
        )

    label = f"call_input {'learned ' * learned}{_short(dtype)}"
    return TritonCase(label, dtype, archs, kernel, launch, products=False)


def _finish(dtype: torch.dtype, archs: tuple[str, ...], learned: bool = False) -> TritonCase:
    def kernel():
        from recurx.kernels.finish import finish_kernel

        return finish_kernel

    def launch(dtype: torch.dtype, shared: int) -> Launch:
        from recurx.kernels.finish import launch_arguments

        x, squares = _meta(64, 97, 512, dtype=dtype), _meta(2, 64 * 97, dtype=torch.float32)
        words, stream = _meta(256, dtype=torch.int32), _meta(2, dtype=torch.int64)
        share = _meta(512, dtype=torch.float32) if learned else None
        return launch_arguments(x, x, words, 3, stream, squares, 1e-5, share)

    label = f"finish {'learned ' * learned}{_short(dtype)}"
    return TritonCase(label, dtype, archs, kernel, launch, products=False)


def _attention(hidden: int, heads: int) -> BlockSpec:
    return BlockSpec(ATTENTION, hidden, 4 * hidden, num_heads=heads)


def _token_mlp(hidden: int, tokens: int) -> BlockSpec:
    return BlockSpec(TOKEN_MLP, hidden, 4 * hidden, tokens=tokens, token_inner=128)


def cases(thorough: bool = False) -> Iterator[TritonCase]:
    """bf16 of the small case everywhere, of the large ones by generation; fp32 if `thorough`.

    Spills that are put up with are addresses and masks kept over the loops, not accumulators:
    those would be hundreds (rows of 128 at D=256: 7,288).
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    some = ARCHS if thorough else GENERATIONS
    for learned in (False, True):
        yield _call_input(bf16, some, learned)
        yield _finish(bf16, some, learned)
    yield _recursion(_attention(64, 2), 17, bf16, ARCHS if thorough else _each(0))
    yield _recursion(_attention(64, 2), 17, bf16, some, schedule=EQR)
    yield _recursion(_attention(128, 2), 97, bf16, some, spills=100)
    yield _recursion(_token_mlp(128, 97), 97, bf16, some[-1:], spills=64)
    if thorough:
        yield _finish(fp32, ARCHS)
        yield _recursion(_attention(64, 2), 97, bf16, ARCHS)
        yield _recursion(_attention(128, 2), 97, bf16, ARCHS, spills=100, schedule=EQR)
        yield _recursion(_attention(128, 4), 33, bf16, ARCHS, spills=160)
        yield _recursion(_attention(256, 4), 17, bf16, ARCHS, spills=100)
        yield _recursion(_token_mlp(128, 33), 33, bf16, ARCHS, spills=64)
        yield _recursion(_attention(64, 2), 33, fp32, ARCHS, spills=160)
        yield _recursion(_token_mlp(64, 33), 33, fp32, ARCHS)
