"""The gradient window of blocks that kernels/sublayers.py runs: a net call's backward.

A call keeps its input h, by whatever `save` keeps more for TRM's blocks. Its backward runs the
halves of all blocks once more, keeping what each reads for the time of the call, then goes back
through them:

    d_h, d_product    `add_norm_backward`, through the norms, scales and the residual sum
    d_x               through attention or the MLP, products by the vendor's library
    d_h + d_x         or, where x = norm(h), through that norm

Data gradients are rounded to the storage dtype where they leave a kernel or a product. Gradients
of weights are summed in fp32 over the calls: of matrices as in kernels/library.py, of vectors from
sums that kernels left. Names are those of kernels/sublayers.py and recurx/reference_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurx.nets import NetSpec
from recurx.operands import Beside, CosSin, Span
from recurx.packed import PackedNets
from recurx.problem import Problem
from recurx.specs import ATTENTION, NO_MIXER, NORM

from . import library
from .attention_backward import attention_backward
from .branch import Norm
from .kept_layout import Saved
from .middles_backward import depthwise_backward, gated_norm_backward, middle_backward
from .pointwise import add_norm
from .pointwise_backward import Sums, add_norm_backward, gate_backward
from .sublayers import Half, Kept, branch_of, halves_of, mixed, run_call
from .vendor import exact_products, multiply

# ---- what a window asks of a way, see recurx/backends/triton_window.py ---------------------------


def weights_of(packed: PackedNets, net: str) -> list[Half]:
    return halves_of(packed, net)


def of_call(halves: Sequence[Half], beside: Beside) -> list[Half]:
    """The halves with what their blocks read beside h and weights in one call."""
    return [h._replace(beside=beside._replace(block=h.beside.block)) for h in halves]


def kept_shapes(
    problem: Problem, span: Span, save: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each kept tensor: h of each call."""
    shape = (span.stop - span.start, problem.batch, problem.tokens, problem.hidden)
    return [] if save == "states" else [(shape, problem.dtype)]


def saved_in(
    kept: Sequence[Tensor], problem: Problem, span: Span, k: int, final: Tensor | None = None
) -> list[Saved]:
    return [Saved(kept[0][k])]


def unsaved(x: Tensor, spec: NetSpec) -> list[Saved]:
    return [Saved(torch.empty_like(x))]


def run_net(
    saved: list[Saved], spec: NetSpec, halves: Sequence[Half], cos_sin: CosSin | None, keep: bool,
    again: bool = False,
) -> Tensor:  # fmt: skip
    """The net on saved[0].h, which is all that its backward reads; so nothing is run `again`.

    NOTE: half by half, as the backward runs it again: no norm is of a sum that was not rounded. A
    backward through other values than those that left was up to 1.4 times as far from fp64 as
    PyTorch's in bf16 (placement "sandwich"), through the same ones 0.8 to 1.05 times.
    """
    out = saved[0].h
    if not again:
        out = out.clone()
        for half in halves:
            run_call(out, [half], cos_sin)
    return out


class WeightGrads(library.WeightGrads):
    """Those of vectors too, as [1, 1, N]."""

    def wants(self, index: int) -> bool:
        return self._wanted[index]

    def add_sum(self, index: int, parts: Tensor, *dims: int) -> None:
        """Add the sum of `parts` over `dims` to the gradient of vector `index`."""
        total = parts.sum(dims, dtype=torch.float32).view(1, 1, -1)
        if self._weights[index].numel() == 1:  # a factor for all, summed by column
            total = total.sum(2, keepdim=True)
        seen = self._partials.get(index)
        self._partials[index] = total if seen is None else seen.add_(total)

    def take(self, index: int) -> Tensor:
        return super().take(index).view_as(self._weights[index])


# ---- backward ------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """A half on its way back: what its forward had, and where its gradients go."""

    half: Half
    h: Tensor
    x: Tensor  # h, or norm(h)
    product: Tensor | None
    kept: Kept
    index: dict[str, int]  # of each weight of the block
    grads: WeightGrads

    def wants(self, name: str) -> bool:
        return name in self.index and self.grads.wants(self.index[name])

    def add(self, name: str, d_out: Tensor, x: Tensor, over_tokens: bool = False) -> None:
        """To the gradient of a matrix, and of its bias, from that of the product with x."""
        if over_tokens:
            d_out, x = d_out.transpose(1, 2), x.transpose(1, 2)
        self.grads.add(self.index[name], d_out, x)
        if self.wants(f"{name}_bias"):
            self.grads.add_sum(self.index[f"{name}_bias"], d_out, 0, 1)

    def add_sums(self, sums: Sums, **names: str) -> None:
        for name, parts in sums.items():
            self.grads.add_sum(self.index[names[name]], parts, 0)

    def normed(
        self, x: Tensor, norm: Norm, d_out: Tensor, name: str, d_total: Tensor | None = None,
        over_tokens: bool = False,
    ) -> Tensor:  # fmt: skip
        """The gradient of x where norm(x) has d_out, plus d_total; `name` is that of its weight."""
        names = {"weight": name, "bias": f"{name}_bias"}
        d_x, _, sums = add_norm_backward(
            x, None, norm, d_out=d_out, d_total=d_total, over_tokens=over_tokens,
            wanted=[each for each, weight in names.items() if self.wants(weight)],
        )  # fmt: skip
        self.add_sums(sums, **names)
        return d_x


@exact_products()
def net_backward(
    saved: Sequence[Saved], spec: NetSpec, halves: Sequence[Half], cos_sin: CosSin | None,
    d_out: Tensor, grads: WeightGrads, first: int,
) -> Tensor:  # fmt: skip
    """d_h of one net call, from d_out of its last block; as `block_training.net_backward`."""
    turns: list[_Turn] = []
    h, index = saved[0].h, dict[str, int]()
    for number, half in enumerate(halves):
        if half.number == "1" or half.spec.kind == NO_MIXER:  # the first of its block
            index = {name: first + i for i, (name, _) in enumerate(half.spec.slots)}
            first += len(index)
        turns.append(_forward(half, h, cos_sin, index, grads))
        if number + 1 < len(halves):
            h = _left(turns[-1])
    while turns:
        d_out = _backward(turns.pop(), d_out, cos_sin)
    return d_out


def _forward(
    half: Half, h: Tensor, cos_sin: CosSin | None, index: dict[str, int], grads: WeightGrads
) -> _Turn:
    x, product, kept = h, None, Kept()
    if half.begins:
        x = torch.empty_like(h)
        add_norm(h, None, x, half.norm(f"norm{half.number}"), over_tokens=half.over_tokens)
    if half.spec.kind != NORM:
        product = mixed(x, half, cos_sin, kept=kept)
    return _Turn(half, h, x, product, kept, index, grads)


def _left(turn: _Turn) -> Tensor:
    """What a half makes of h."""
    half = turn.half
    if turn.product is None:
        return turn.x
    norm = None if half.begins else half.norm(f"norm{half.number}")
    to = torch.empty_like(turn.h)
    out, total = (None, to) if half.begins else (to, None)
    add_norm(
        turn.h, turn.product, out, norm, branch=branch_of(half), total=total,
        over_tokens=half.over_tokens,
    )  # fmt: skip
    return to


def _backward(turn: _Turn, d: Tensor, cos_sin: CosSin | None) -> Tensor:
    """d_h, from the gradient of what the half makes of it."""
    half, h, over = turn.half, turn.h, turn.half.over_tokens
    name, mixes = f"norm{half.number}", half.number == "1"
    norm = half.norm(name)
    if turn.product is None:
        return turn.normed(h, norm, d, name)
    names = {
        "weight": name, "bias": f"{name}_bias", "before_weight": f"out_{name}",
        "before_bias": f"out_{name}_bias", "learned": f"scale{half.number}",
        "skip": f"skip{half.number}",
    }  # fmt: skip
    of = {"d_total": d} if half.begins else {"d_out": d}
    d_h, d_product, sums = add_norm_backward(
        h, turn.product, None if half.begins else norm, branch=branch_of(half), over_tokens=over,
        wanted=[each for each, weight in names.items() if turn.wants(weight)], **of,
    )  # fmt: skip
    turn.add_sums(sums, **names)
    assert d_product is not None
    if mixes and half.spec.kind == ATTENTION:
        d_x = _attended_backward(turn, d_product, cos_sin)
    else:
        d_x = _mlp_backward(turn, d_product, "t_" if mixes else "")
    return turn.normed(h, norm, d_x, name, d_h, over) if half.begins else d_h.add_(d_x)


def _attended_backward(turn: _Turn, d_product: Tensor, cos_sin: CosSin | None) -> Tensor:
    spec, w, kept = turn.half.spec, turn.half.weights, turn.kept
    turn.add("o", d_product, kept["normed"])
    d_gated = multiply(d_product, w["o"].t())
    if spec.attn_norm:
        norm = turn.half.norm("attn_norm", spec.attn_norm)
        d_gated = turn.normed(kept["out"].flatten(2), norm, d_gated, "attn_norm")
    qkv, out, gate = kept["qkv"], kept["out"], kept["gate"]
    d_qkv = attention_backward(
        qkv, out, kept["lse"], d_gated.view_as(out), cos_sin, rotated=False, heads=kept["heads"],
        gate=gate, unseen=turn.half.beside.key_mask if spec.key_padding else None,
    )  # fmt: skip
    if spec.qk_norm:
        kv = spec.kv_heads or spec.num_heads
        for name, at, count in (("q_norm", 0, spec.num_heads), ("k_norm", spec.num_heads, kv)):
            part, d_part = (t.narrow(2, at, count) for t in (qkv, d_qkv))
            x, d = (t.flatten(0, 1).contiguous() for t in (part, d_part))
            norm = Norm(spec.qk_norm, spec.eps, w.get(name))
            d_part.copy_(turn.normed(x, norm, d, name).view_as(d_part))
    d_qkv = d_qkv.flatten(2)
    turn.add("qkv", d_qkv, turn.x)
    d_x = multiply(d_qkv, w["qkv"].t())
    if gate is not None:
        d_gate = gate_backward(gate, out, d_gated)
        turn.add("attn_gate", d_gate, turn.x)
        d_x.add_(multiply(d_gate, w["attn_gate"].t()))
    return d_x


def _mlp_backward(turn: _Turn, d_product: Tensor, over: str) -> Tensor:
    spec, w, kept, inside = turn.half.spec, turn.half.weights, turn.kept, not over
    d_wide, early = kept["wide"], inside and spec.conv and spec.conv_of == "gate_up"
    late = inside and spec.conv and not early
    middle = d_middle = multiply(d_product, w[f"{over}down"].t(), not inside)
    if late:
        d_middle, middle = _convolved_backward(turn, d_middle, spec.activation), kept["middle"]
    how: dict[str, Any] = {"activation": spec.activation, "gated": spec.gated}
    how["bias"] = None if early else w.get(f"{over}gate_up_bias")
    if spec.inner_norm and (inside or spec.inner_norm_tokens):
        name = f"{over}inner_norm"
        sums = gated_norm_backward(
            d_wide, d_middle, turn.half.norm(name, spec.inner_norm), over_tokens=not inside,
            of_product=spec.inner_norm_of == "product", wanted=turn.wants(name), **how,
        )  # fmt: skip
        turn.add_sums({} if sums is None else {"weight": sums}, weight=name)
    else:
        rows = d_wide.shape[0] * d_wide.shape[1] if inside else len(d_wide)
        middle_backward(d_wide, rows, d_middle, **how)
    turn.add(f"{over}down", d_product, middle, not inside)
    if early:
        d_wide = _convolved_backward(turn, d_wide)
    turn.add(f"{over}gate_up", d_wide, turn.x, not inside)
    return multiply(d_wide, w[f"{over}gate_up"].t(), not inside)


def _convolved_backward(turn: _Turn, d_out: Tensor, activation: str = "") -> Tensor:
    w = turn.half.weights
    wanted = [name for name in ("conv", "conv_bias") if turn.wants(name)]
    d_x, sums = depthwise_backward(
        turn.kept["convolved"], w["conv"], w["conv_bias"], d_out, activation, bool(wanted)
    )
    for name in wanted:
        assert sums is not None
        own = sums[:, :-1].transpose(1, 2) if name == "conv" else sums[:, -1]
        turn.grads.add_sum(turn.index[name], own, 0)
    return d_x
