"""The plan "library": products by the vendor's library (cuBLAS), the rest pointwise.

A block is eight launches: of an attention block four products, attention, which rotates Q and K as
it loads them, and three of kernels/pointwise.py; a token MLP in attention's place makes it eight,
too. It is the first plan for a device that nobody has tested, and what a fused kernel must beat.
Without gradient kernels/sublayers.py runs it, other blocks too; with gradient `mix` and
`feed_forward` TRM's and HRM's, kernels/sublayers_training.py the others.
Names, and what is kept for the backward, are those of kernels/block_training.py.

Backward: gate and up are computed again; data gradients are products rounded to the storage dtype;
weight gradients are summed in fp32, those of a token MLP, which run over samples and channels, by
kernels/wgrad.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from recurx.nets import ATTENTION, BlockSpec, NetSpec
from recurx.operands import Beside, CosSin, Operands, Span
from recurx.packed import PackedNets
from recurx.problem import Problem
from recurx.program import Factors

from . import block_training
from .attention import attention
from .attention_backward import attention_backward
from .block_training import Matrices, Saved
from .block_training import kept_shapes as kept_shapes
from .block_training import saved_in as saved_in
from .block_training import unsaved as unsaved
from .block_training import weights_of as weights_of
from .inject import form_call_input
from .middles_backward import middle_backward
from .pointwise import add_rms, add_rms_backward, swiglu
from .sublayers import halves_of, run_call
from .tiled import TiledSlice
from .vendor import exact_products, multiply


def _trimmed(spec: BlockSpec, weights: Matrices) -> Matrices:
    """The matrices of a block without the padding of their rows."""
    return tuple(w[:, : shape[1]] for w, shape in zip(weights, spec.weight_shapes, strict=True))


# ---- forward -------------------------------------------------------------------------------------


class LibrarySlice(TiledSlice):
    """A slice whose intermediates are allocated as it goes: in a capture, from the graph's pool."""

    def __init__(
        self, problem: Problem, span: Span, packed: PackedNets, size: int, like: Operands
    ) -> None:
        super().__init__(problem, span, packed, size, like)
        self._first, mask = span.start, like.key_mask
        self._mask = None if mask is None else mask.new_zeros(size, problem.tokens)

    def enter(self, operands: Operands, live: slice) -> None:
        super().enter(operands, live)
        if self._mask is not None:
            self._mask[: live.stop - live.start].copy_(operands.key_mask[live])

    def _new_scratch(self, size: int, tokens: int) -> None:
        return None

    def _learned(self, factors: Factors) -> dict[str, Tensor]:
        """Learned factors [D] of a call, by field: each the weight of a norm among the nets."""
        packed = self._packed
        return {
            field: packed.vectors[packed.of_net[name][0]]["norm1"]
            for field, name in factors.learned
        }

    def launch(self) -> None:
        """Every row of the program, launch by launch."""
        call = self._first
        for number, row in enumerate(self._rows):
            learned = {} if row.factors is None else self._learned(row.factors)
            if not row.is_identity:
                form_call_input(
                    self._arena, self._words, number, scaled=row.factors is not None,
                    scale=learned.get("scale"),
                )  # fmt: skip
            if row.net is not None:
                beside = Beside(self._stream, self._mask, call)
                halves = halves_of(self._packed, row.net, beside)
                run_call(self._arena[row.place], halves, self._cos_sin)
                call += 1
            if row.finishes:
                self._finish(number, row, None, 0.0, learned.get("damping"))


@exact_products()
def mix(saved: Saved, spec: BlockSpec, weights: Matrices, cos_sin: CosSin | None) -> None:
    """The first half of a block, h -> mid, into `saved`; what it lacks is allocated."""
    h, own, attends = saved.h, _trimmed(spec, weights), spec.kind == ATTENTION
    batch, tokens, hidden = h.shape
    if saved.mid is None:
        saved.mid = torch.empty_like(h)
        saved.scale_mix = h.new_empty(batch, tokens if attends else hidden, dtype=torch.float32)
    if not attends:
        return _feed(h, *own[:2], spec.eps, saved.mid, saved.scale_mix, over_tokens=True)
    if saved.mixed is None:
        saved.mixed, saved.qkv = torch.empty_like(h), h.new_empty(batch, tokens, 3 * hidden)
        if saved.scale_mix is not None:
            saved.lse = h.new_empty(batch, spec.num_heads, tokens, dtype=torch.float32)
    multiply(h, own[0], out=saved.qkv)
    qkv, mixed = _by_head(saved.qkv, spec), _by_head(saved.mixed, spec)
    attention(qkv, cos_sin=cos_sin, out=mixed, lse=saved.lse)
    return add_rms(h, multiply(saved.mixed, own[1]), saved.mid, spec.eps, scale=saved.scale_mix)


@exact_products()
def feed_forward(saved: Saved, spec: BlockSpec, weights: Matrices) -> None:
    """The second half of a block, mid -> out, into `saved`."""
    if saved.out is None:
        saved.out = torch.empty_like(saved.h)
    if saved.scale_out is None and saved.scale_mix is not None:
        saved.scale_out = saved.h.new_empty(saved.h.shape[:2], dtype=torch.float32)
    _feed(saved.mid, *_trimmed(spec, weights)[2:], spec.eps, saved.out, saved.scale_out)


def _feed(
    h: Tensor, gate_up: Tensor, down: Tensor, eps: float, out: Tensor, scale: Tensor | None,
    over_tokens: bool = False,
) -> None:  # fmt: skip
    """out = rms(h + swiglu(h)) over D or over T."""
    wide = multiply(h, gate_up, over_tokens)
    swiglu(wide, len(h) if over_tokens else h.shape[0] * h.shape[1])
    middle = wide.narrow(1 if over_tokens else 2, 0, down.shape[1])
    add_rms(h, multiply(middle, down, over_tokens), out, eps, over_tokens=over_tokens, scale=scale)


run_net = functools.partial(block_training.run_net, halves=(mix, feed_forward))


def _by_head(x: Tensor, spec: BlockSpec) -> Tensor:
    return x.unflatten(2, (x.shape[2] // spec.head_dim, spec.head_dim))


# ---- backward ------------------------------------------------------------------------------------


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor | None:
    """a @ b as float32, summed in fp32; None where PyTorch cannot: bf16 before 2.8, or on a CPU."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type != "cuda" or not _has_wide_products():
        return None
    return torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def _has_wide_products() -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return "dtype" in torch.ops.aten.mm.overloads() and has_kernel("aten::mm.dtype", "CUDA")


class WeightGrads(block_training.WeightGrads):
    """Gradients of all weights, added up over calls in fp32; by the library where rows are one axis
    of memory."""

    def add(self, index: int, d_out: Tensor, x: Tensor) -> None:
        made = None
        if self._wanted[index] and d_out.is_contiguous() and x.is_contiguous():
            made = product_in_fp32(d_out.flatten(0, -2).t(), x.flatten(0, -2))
        if made is None:
            super().add(index, d_out, x)
        elif index in self._partials:
            self._partials[index][0].add_(made)
        else:
            self._partials[index] = made[None]


@exact_products()
def net_backward(
    saved: Sequence[Saved], spec: NetSpec, matrices: Sequence[Matrices], cos_sin: CosSin | None,
    d_out: Tensor, grads: block_training.WeightGrads, first: int,
) -> Tensor:  # fmt: skip
    """d_h of one net call, from d_out of its last block; as `block_training.net_backward`."""
    product = None
    for number in reversed(range(len(saved))):
        held, one, own = saved[number], spec.blocks[number], matrices[number]
        d_pre_out = add_rms_backward(held.out, held.scale_out, d_out, product)
        if held.mid is None:
            held = Saved(held.h, held.out, held.scale_out)
            mix(held, one, own, cos_sin)
        index = first + number * len(own)
        own = _trimmed(one, own)
        d_out, product = _block_backward(held, one, own, cos_sin, d_pre_out, grads, index)
    return d_out.add_(product)


def _block_backward(
    saved: Saved, spec: BlockSpec, weights: Matrices, cos_sin: CosSin | None,
    d_pre_out: Tensor, grads: block_training.WeightGrads, index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two summands of d_h: what comes past the mixer, and what comes through it."""
    mixer_in, mixer_out, gate_up, down = weights
    h, over_tokens = saved.h, spec.kind != ATTENTION
    product = _feed_backward(saved.mid, gate_up, down, d_pre_out, grads, index + 2)
    factors = saved.mid, saved.scale_mix
    d_pre_mix = add_rms_backward(*factors, d_pre_out, product, over_tokens=over_tokens)
    if over_tokens:
        return d_pre_mix, _feed_backward(h, mixer_in, mixer_out, d_pre_mix, grads, index, True)
    d_mixed = multiply(d_pre_mix, mixer_out.t())
    grads.add(index + 1, d_pre_mix, saved.mixed)
    qkv, mixed, d_mixed = (_by_head(t, spec) for t in (saved.qkv, saved.mixed, d_mixed))
    kept = qkv, mixed, saved.lse, d_mixed
    d_qkv = attention_backward(*kept, cos_sin, rotated=False).flatten(2)
    grads.add(index, d_qkv, h)
    return d_pre_mix, multiply(d_qkv, mixer_in.t())


def _feed_backward(
    x: Tensor, gate_up: Tensor, down: Tensor, d_out: Tensor, grads: block_training.WeightGrads,
    index: int, over_tokens: bool = False,
) -> Tensor:  # fmt: skip
    """The gradient of x through swiglu(x), from that of its result."""
    wide = multiply(x, gate_up, over_tokens)
    middle = multiply(d_out, down.t(), over_tokens)  # its gradient, until the next line
    middle_backward(wide, len(x) if over_tokens else x.shape[0] * x.shape[1], middle)
    rows = [t.transpose(1, 2) if over_tokens else t for t in (d_out, middle, wide, x)]
    grads.add(index + 1, *rows[:2])
    grads.add(index, *rows[2:])
    return multiply(wide, gate_up.t(), over_tokens)
