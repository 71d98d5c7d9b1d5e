"""The pointwise kernels of the plan "library" as they are compiled (see triton_cases.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch

from aot.triton_cases import ARCHS, GENERATIONS, Launch, TritonCase, _meta, _short


def _launched(call: Callable[[], object]) -> tuple[object, Launch]:
    """The kernel that `call` launches first, and its arguments; nothing runs."""
    from triton.runtime.jit import JITFunction

    found = []

    def note(kernel, *args, grid, warmup=False, **named):
        constants = {name: named.pop(name) for name in kernel.arg_names if name in named}
        found.append((kernel, (args, constants, named)))

    with mock.patch.object(JITFunction, "run", note):
        call()
    return found[0]


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
        from recurx.kernels.middles_backward import middle_backward
        from recurx.kernels.pointwise import swiglu

        gate_up = _meta(rows, 2 * width, dtype=dtype)
        if backward:
            return middle_backward(gate_up, rows, _meta(rows, width, dtype=dtype))
        return swiglu(gate_up, rows)

    return call


def _variants(dtype: torch.dtype) -> dict[str, Callable]:
    """What blocks that differ from TRM's launch, each with all that a kernel can do."""

    def vector(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _meta(n, dtype=dtype)

    def row(tokens: int = 97, width: int = 512) -> torch.Tensor:
        return _meta(64, tokens, width, dtype=dtype)

    def norms() -> object:
        from recurx.kernels.branch import Branch, Drops, Norm
        from recurx.kernels.pointwise import add_norm

        norm = Norm("layer", 1e-5, vector(512), vector(512))
        drops = Drops(0.1, 0.1, vector(2, torch.int64), 1, 11)
        branch = Branch(
            vector(97, dtype), True, norm, 0.5, vector(512, dtype), 0.8, vector(512, dtype), drops
        )
        return add_norm(row(), row(), row(), norm, branch=branch, total=row())

    def activation() -> object:
        from recurx.kernels.pointwise import swiglu

        bias = vector(2 * 512, dtype)
        return swiglu(row(2 * 512), 64, activation="gelu", bias=bias)

    def inner_norm() -> object:
        from recurx.kernels.branch import Norm
        from recurx.kernels.middles import gated_norm

        how = dict(activation="silu", gated=True, of_product=True, bias=vector(2 * 1536, dtype))
        return gated_norm(row(97, 2 * 1536), Norm("layer", 1e-5, vector(1536)), **how)

    def convolution() -> object:
        from recurx.kernels.middles import depthwise

        x = row(97, 2 * 1536).narrow(2, 0, 1536)
        return depthwise(x, _meta(1536, 1, 2, dtype=dtype), vector(1536, dtype), "gelu_tanh")

    def heads() -> object:
        from recurx.kernels.attention import Heads, attention

        qkv, table = _meta(64, 97, 8 + 2 * 2, 64, dtype=dtype), _meta(97, 64, dtype=torch.float32)
        how = Heads(2, True, 16, 40, "layer", 1e-5, vector(64), vector(64))
        unseen = _meta(64, 97, dtype=torch.bool)
        return attention(qkv, cos_sin=(table, table), heads=how, gate=row(), unseen=unseen)

    def columns() -> object:
        from recurx.kernels.attention import Heads, attention

        qkv, table = _meta(64, 99, 3 * 8, 64, dtype=dtype), _meta(11, 64, dtype=torch.float32)
        return attention(qkv, cos_sin=(table, table), heads=Heads(axial=(11, 9, 0)))

    def norms_backward() -> object:
        from recurx.kernels.branch import Branch, Drops, Norm
        from recurx.kernels.pointwise_backward import add_norm_backward

        norm = Norm("layer", 1e-5, vector(512), vector(512))
        branch = Branch(
            vector(97, dtype),
            True,
            norm,
            0.5,
            vector(512, dtype),
            0.8,
            vector(512, dtype),
            Drops(0.1, 0.2, _meta(2, dtype=torch.int64), 3, 4),
        )
        wanted = "weight", "bias", "before_weight", "before_bias", "learned", "skip"
        how = dict(branch=branch, d_out=row(), d_total=row(), wanted=wanted)
        return add_norm_backward(row(), row(), norm, **how)

    def norms_backward_t() -> object:
        from recurx.kernels.pointwise import Norm
        from recurx.kernels.pointwise_backward import add_norm_backward

        x, norm = row(1024), Norm("layer", 1e-5, vector(1024), vector(1024))
        how = dict(d_out=x, d_total=x, over_tokens=True, wanted=("weight", "bias"))
        return add_norm_backward(x, x, norm, **how)

    def activation_backward() -> object:
        from recurx.kernels.middles_backward import middle_backward

        bias = vector(2 * 512, dtype)
        how = dict(activation="gelu", gated=True, bias=bias)
        return middle_backward(row(2 * 512), 64, row(512), **how)

    def inner_norm_backward() -> object:
        from recurx.kernels.middles_backward import gated_norm_backward
        from recurx.kernels.pointwise import Norm

        how = dict(activation="silu", gated=True, of_product=True, bias=vector(2 * 1536, dtype))
        norm = Norm("layer", 1e-5, vector(1536))
        return gated_norm_backward(row(97, 2 * 1536), row(97, 1536), norm, **how)

    def convolution_backward(activation: str = "gelu_tanh") -> object:
        from recurx.kernels.middles_backward import depthwise_backward

        x, d = row(97, 2 * 1536).narrow(2, 0, 1536), row(97, 1536)
        given = _meta(1536, 1, 2, dtype=dtype), vector(1536, dtype), d, activation
        return depthwise_backward(x, *given, wanted=activation != "")

    def convolution_spread() -> object:
        return convolution_backward("")

    def gate_backward() -> object:
        from recurx.kernels.pointwise_backward import gate_backward

        return gate_backward(row(), row(), row())

    def heads_backward(tokens: int = 97) -> object:
        from recurx.kernels.attention import Heads
        from recurx.kernels.attention_backward import attention_backward

        qkv = _meta(64, tokens, 8 + 2 * 2, 64, dtype=dtype)
        out, table = _meta(64, tokens, 8, 64, dtype=dtype), vector(tokens * 64).view(tokens, 64)
        how = Heads(2, True, 16, 40, "layer", 1e-5, vector(64), vector(64))
        lse = _meta(64, 8, tokens, dtype=torch.float32)
        given, unseen = (qkv, out, lse, out, (table, table)), _meta(64, tokens, dtype=torch.bool)
        how = dict(heads=how, gate=row(tokens), unseen=unseen)
        return attention_backward(*given, rotated=False, **how)

    def queries_backward() -> object:
        return heads_backward(300)

    made = (
        norms, activation, inner_norm, convolution, heads, columns, norms_backward,
        norms_backward_t, activation_backward, inner_norm_backward, convolution_backward,
        convolution_spread, gate_backward, heads_backward, queries_backward,
    )  # fmt: skip
    return {f"variant {call.__name__}": call for call in made}


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
                    label, dtype, ARCHS if thorough else GENERATIONS,
                    lambda call=call: _launched(call)[0],
                    lambda _, __, call=call: _launched(call)[1], products=False,
                )  # fmt: skip
    for name, call in _variants(torch.bfloat16).items():
        yield TritonCase(
            f"{name} bf16", torch.bfloat16, ARCHS if thorough else GENERATIONS,
            lambda call=call: _launched(call)[0], lambda _, __, call=call: _launched(call)[1],
            products=False,
        )  # fmt: skip
