"""The pointwise kernels of the plan "library" as they are compiled (see triton_cases.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch

from aot.triton_cases import ARCHS, Launch, TritonCase, _meta, _short


def _launched(call: Callable[[], object]) -> tuple[object, Launch]:
    """The kernel that `call` launches, and its arguments; nothing runs."""
    from triton.runtime.jit import JITFunction

    found = []

    def note(kernel, *args, grid, warmup=False, **named):
        constants = {name: named.pop(name) for name in kernel.arg_names if name in named}
        found.append((kernel, (args, constants, named)))

    with mock.patch.object(JITFunction, "run", note):
        call()
    ((kernel, launch),) = found
    return kernel, launch


def _rms(shape: tuple[int, ...], dtype: torch.dtype, over_tokens: bool, backward: bool) -> Callable:
    def call() -> object:
        from recurx.kernels.pointwise import add_rms, add_rms_backward

        x = _meta(*shape, dtype=dtype)
        scale = _meta(shape[0], shape[2 if over_tokens else 1], dtype=torch.float32)
        if backward:
            return add_rms_backward(x, scale, x, x, over_tokens=over_tokens)
        return add_rms(x, x, x, 1e-5, over_tokens=over_tokens, scale=scale)

    return call


def _swiglu(rows: int, width: int, dtype: torch.dtype, backward: bool) -> Callable:
    def call() -> object:
        from recurx.kernels.pointwise import swiglu

        d_middle = _meta(rows, width, dtype=dtype) if backward else None
        return swiglu(_meta(rows, 2 * width, dtype=dtype), rows, d_middle)

    return call


def cases(thorough: bool = False) -> Iterator[TritonCase]:
    """The published rows in bf16; if `thorough` also fp32, and the longest rows that are taken."""
    for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
        for backward in (False, True):
            made = {
                "rms": _rms((64, 97, 512), dtype, False, backward),
                "rms_t": _rms((64, 97, 512), dtype, True, backward),
                "swiglu": _swiglu(64 * 97, 1536, dtype, backward),
            }
            if thorough:
                made |= {
                    "rms d=4096": _rms((2, 97, 4096), dtype, False, backward),
                    "rms_t t=2048": _rms((2, 2048, 512), dtype, True, backward),
                    "swiglu_t": _swiglu(64, 512 * 512, dtype, backward),
                }
            for name, call in made.items():
                label = f"pointwise {name}{' backward' if backward else ''} {_short(dtype)}"
                yield TritonCase(
                    label, dtype, ARCHS, lambda call=call: _launched(call)[0],
                    lambda _, __, call=call: _launched(call)[1], products=False,
                )  # fmt: skip
