"""The backward kernels in the configurations of the published cases (see triton_cases.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from aot.triton_cases import (
    ARCHS,
    GENERATIONS,
    UNITS,
    Maker,
    TritonCase,
    _case,
    _each,
    _linear,
    _meta,
)


def _rms_backward(batch: int, tokens: int, d: int, over_tokens: bool = False) -> Maker:
    def kernel():
        from recurx.kernels.rms_backward import rms_backward_kernel

        return rms_backward_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.rms_backward import launch_arguments

        y = _meta(batch, tokens, d, dtype=dtype)
        y = y.mT if over_tokens else y
        return launch_arguments(y, _meta(*y.shape[:-1], dtype=torch.float32), y, y)

    return f"rms_backward{'_t' if over_tokens else ''} t={tokens} d={d}", kernel, launch


def _swiglu_backward(m: int, n: int, f: int, over_tokens: bool = False) -> Maker:
    def kernel():
        from recurx.kernels.swiglu_backward import swiglu_backward_kernel

        return swiglu_backward_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels import tiles
        from recurx.kernels.swiglu_backward import launch_arguments

        x = _meta(8, n, m, dtype=dtype).mT if over_tokens else _meta(m, n, dtype=dtype)
        w, down = _meta(2 * f, n, dtype=dtype), _meta(n, f, dtype=dtype)
        d_gate_up, mid = (_meta(*x.shape[:-1], c, dtype=dtype) for c in (2 * f, f))
        return launch_arguments(x, w, down, x, d_gate_up, mid, tiles.Chip(shared, UNITS))

    return f"swiglu_backward{'_t' if over_tokens else ''} n={n} f={f}", kernel, launch


def _wgrad(m: int, n: int, k: int, over_tokens: bool = False) -> Maker:
    def kernel():
        from recurx.kernels.wgrad import wgrad_kernel

        return wgrad_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.wgrad import launch_arguments

        x = _meta(2, k, m, dtype=dtype).mT if over_tokens else _meta(m, k, dtype=dtype)
        d_out = _meta(*x.shape[:-1], n, dtype=dtype)
        return launch_arguments(d_out, x, _meta(2, n, k, dtype=torch.float32), True, shared)

    return f"wgrad{'_t' if over_tokens else ''} n={n} k={k}", kernel, launch


def _wgrad_sum(n: int, k: int) -> Maker:
    def kernel():
        from recurx.kernels.wgrad import wgrad_sum_kernel

        return wgrad_sum_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.wgrad import sum_arguments

        return sum_arguments(*(_meta(*s, dtype=torch.float32) for s in ((5, n, k), (n, k))))

    return f"wgrad_sum n={n} k={k}", kernel, launch


def _attention_backward(
    over: str, batch: int, tokens: int, heads: int, head_dim: int, rotated: bool = False
) -> Maker:
    def kernel():
        from recurx.kernels import attention_backward

        return getattr(attention_backward, f"attention_backward_{over}_kernel")

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.attention_backward import launch_arguments, over_queries

        qkv = _meta(batch, tokens, 3 * heads, head_dim, dtype=dtype)
        out = _meta(batch, tokens, heads, head_dim, dtype=dtype)
        lse = _meta(batch, heads, tokens, dtype=torch.float32)
        tables = (_meta(tokens, head_dim, dtype=torch.float32),) * 2
        args, constants, options = launch_arguments(
            qkv, out, lse, lse, out, tables, qkv, shared, rotated
        )
        return args, over_queries(constants) if over == "queries" else constants, options

    name = f"attention_backward_{over}" + (" rotated" if rotated else "")
    return f"{name} t={tokens} head={head_dim}", kernel, launch


# What the window of TRM-att and TRM-mlp Sudoku launches; compiled for every generation.
MAIN = (
    _rms_backward(64, 97, 512),
    _linear("dgrad", 97 * 64, 3072, 512),
    _swiglu_backward(97 * 64, 512, 1536),
    _wgrad(97 * 64, 1536, 512),
    _attention_backward("keys", 64, 97, 8, 64),
    _attention_backward("keys", 64, 97, 8, 64, rotated=True),
)
# Over tokens, the widest rows, long and wide attention.
MORE = (
    _linear("dgrad", 512, 1024, 97, over_tokens=True),
    _linear("dgrad", 97 * 8, 3072, 512),
    _wgrad(512, 97, 512, over_tokens=True),
    _attention_backward("queries", 64, 916, 8, 64),
    _attention_backward("keys", 2, 300, 2, 128),
)
THOROUGH = (
    _swiglu_backward(512, 97, 512, over_tokens=True),
    _attention_backward("keys", 64, 916, 8, 64),
    _rms_backward(64, 97, 512, over_tokens=True),
    _linear("dgrad", 17 * 64, 256, 64),
    _wgrad_sum(1536, 512),
    _attention_backward("keys", 2, 40, 2, 128),
    _attention_backward("queries", 2, 300, 2, 32),
    _attention_backward("queries", 64, 97, 8, 64),
    _attention_backward("queries", 64, 916, 8, 64, rotated=True),
    _attention_backward("keys", 64, 916, 8, 64, rotated=True),
    _attention_backward("keys", 2, 128, 2, 128),
)


def cases(thorough: bool = False) -> Iterator[TritonCase]:
    """bf16 on every generation; fp32, and the small shapes, only if `thorough`."""
    for number, maker in enumerate(MAIN):
        yield _case(maker, torch.bfloat16, ARCHS if thorough else _each(number))
    for maker in MORE:
        yield _case(maker, torch.bfloat16, ARCHS if thorough else GENERATIONS)
    for maker in (*MAIN, *MORE, *THOROUGH) if thorough else ():
        yield _case(maker, torch.float32, ARCHS)
    for maker in THOROUGH if thorough else ():
        yield _case(maker, torch.bfloat16, ARCHS)
