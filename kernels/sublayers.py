"""A net call of the plan "library", with all fields of blocks that it runs: half after half.

    x = h, or norm(h)                    a block's placement says which
    f(x) = attention or an MLP           products by the vendor's library, the rest by our kernels
    h = h + f(x), and norms around it    one launch of `add_norm`, which also makes the next half's
                                         x where that is a norm of h; a block "norm" is no more

What each field computes is said by recurx/reference.py. A block of TRM or HRM is eight launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recurx.noise import DROPS
from recurx.operands import ALONE, Beside, CosSin
from recurx.packed import PackedNets
from recurx.specs import ATTENTION, NO_MIXER, NORM, TOKEN_MLP, BlockSpec

from .attention import Heads, attention
from .branch import Branch, Drops, Norm
from .middles import depthwise, gated_norm
from .pointwise import add_norm, swiglu
from .vendor import exact_products, multiply

Kept = dict[str, Any]  # by the names of `_attended` and `_mlp`


class Half(NamedTuple):
    """The mixer ("1") or the MLP ("2") of a block, or a block "norm"; its weights by name, and
    what it reads beside them and h in a call."""

    spec: BlockSpec
    number: str
    weights: Mapping[str, Tensor]
    beside: Beside

    @property
    def over_tokens(self) -> bool:
        """Whether its norms run over T."""
        spec = self.spec
        return self.number == "1" and spec.kind == TOKEN_MLP and spec.token_norm == "tokens"

    @property
    def begins(self) -> bool:
        """Whether it reads norm(h)."""
        return self.spec.kind == NORM or self.spec.placement != "post"

    def norm(self, name: str, kind: str = "") -> Norm:
        found = self.weights.get(name), self.weights.get(f"{name}_bias")
        return Norm(kind or self.spec.norm, self.spec.eps, *found)


def halves_of(packed: PackedNets, net: str, beside: Beside = ALONE) -> list[Half]:
    """The halves of a net's blocks, in order; `beside` of the call, without the block."""
    halves = []
    for block, index in enumerate(range(*packed.of_net[net])):
        spec, matrices = packed.specs[index], packed.blocks[index]
        named = zip(spec.products, matrices, strict=True)
        weights = {name: matrix[:, :columns] for (name, _, columns), matrix in named}
        numbers = {NORM: "1", NO_MIXER: "2"}.get(spec.kind, "12")
        weights |= packed.vectors[index]
        own = beside._replace(block=block)
        halves += [Half(spec, number, weights, own) for number in numbers]
    return halves


@exact_products()
def run_call(h: Tensor, halves: Sequence[Half], cos_sin: CosSin | None) -> None:
    """One net call on h [B, T, D], in place."""
    made = None  # norm(h) for the next half, if the one before has made it
    for half, after in zip(halves, [*halves[1:], None], strict=True):
        x, over = made, half.over_tokens
        if half.begins and x is None:
            x = h if half.spec.kind == NORM else h.new_empty(h.shape)
            add_norm(h, None, x, half.norm(f"norm{half.number}"), over_tokens=over)
        made = None
        if half.spec.kind == NORM:
            continue
        product = mixed(h if x is None else x, half, cos_sin)
        norm, out, total = None, None, h
        if half.spec.placement == "post":
            norm, out, total = half.norm(f"norm{half.number}"), h, None
        elif after is not None and after.begins and after.over_tokens == over:
            norm, last = after.norm(f"norm{after.number}"), after.spec.kind == NORM
            # A block "norm" leaves its norm alone; of others h itself is needed, too.
            out = made = h if last else h.new_empty(h.shape)
            total = None if last else h
        branch = branch_of(half)
        add_norm(h, product, out, norm, branch=branch, total=total, over_tokens=over)


def branch_of(half: Half) -> Branch:
    spec, w, mixes, beside = half.spec, half.weights, half.number == "1", half.beside
    drops = Drops()
    if spec.dropout or spec.drop_path:
        use = DROPS + 4 * (4 * beside.block + 2 * int(half.number))
        drops = Drops(spec.dropout, spec.drop_path, beside.seed, beside.call, use)
    last = {ATTENTION: "o", TOKEN_MLP: "t_down"}[spec.kind] if mixes else "down"
    return Branch(
        bias=w.get(f"{last}_bias"),
        bias_of_token=last == "t_down" and not half.over_tokens,
        norm=half.norm(f"out_norm{half.number}") if spec.placement == "sandwich" else None,
        scale=spec.residual_scale,
        learned=w.get(f"scale{half.number}"),
        skip=spec.skip_scale,
        learned_skip=w.get(f"skip{half.number}"),
        drops=drops,
    )


def mixed(x: Tensor, half: Half, cos_sin: CosSin | None, kept: Kept | None = None) -> Tensor:
    """The product that ends attention or an MLP, without its bias; into `kept`, if it is given,
    what a backward reads (kernels/sublayers_training.py)."""
    if half.number == "1" and half.spec.kind == ATTENTION:
        return _attended(x, half, cos_sin, kept)
    return _mlp(x, half, "" if half.number == "2" else "t_", kept)


def _attended(x: Tensor, half: Half, cos_sin: CosSin | None, kept: Kept | None) -> Tensor:
    spec, w = half.spec, half.weights
    unseen = half.beside.key_mask if spec.key_padding else None
    qkv = multiply(x, w["qkv"], bias=w.get("qkv_bias"))
    heads = Heads(
        kv_heads=spec.kv_heads, causal=spec.mask != "", window=spec.window,
        prefix=spec.prefix if spec.mask == "prefix" else 0,
        norm=spec.qk_norm, eps=spec.eps, q_norm=w.get("q_norm"), k_norm=w.get("k_norm"),
        axial=spec.axial,
    )  # fmt: skip
    gate = None
    if spec.attn_gate:
        gate = multiply(x, w["attn_gate"], bias=w.get("attn_gate_bias"))
    by_head = qkv.unflatten(2, (qkv.shape[2] // spec.head_dim, spec.head_dim))
    lse = None
    if kept is not None:
        lse = x.new_empty(len(x), spec.num_heads, x.shape[1], dtype=torch.float32)
    out = attention(by_head, cos_sin=cos_sin, heads=heads, gate=gate, lse=lse, unseen=unseen)
    normed = out.flatten(2)
    if spec.attn_norm:
        normed = normed if kept is None else torch.empty_like(normed)
        add_norm(out.flatten(2), None, normed, half.norm("attn_norm", spec.attn_norm))
    if kept is not None:
        kept |= dict(heads=heads, qkv=by_head, gate=gate, lse=lse, out=out, normed=normed)
    return multiply(normed, w["o"])


def _mlp(x: Tensor, half: Half, over: str, kept: Kept | None) -> Tensor:
    """The MLP over D (`over` is ""), or over T ("t_"), where hidden values are [B, F, D]. From a
    convolution on all is in its dtype."""
    spec, w, inside = half.spec, half.weights, not over
    bias, early = w.get(f"{over}gate_up_bias"), inside and spec.conv and spec.conv_of == "gate_up"
    dtype = getattr(torch, spec.conv_dtype) if spec.conv_dtype else None
    wide = multiply(x, w[f"{over}gate_up"], not inside, bias=bias if early else None)
    if early:  # the zeros before the first token stand beside sums with their bias
        if kept is not None:
            kept["convolved"] = wide
        wide, bias = depthwise(wide, w["conv"], w["conv_bias"], dtype=dtype), None
    if kept is not None:
        kept["wide"] = wide.clone()
    if spec.inner_norm and (inside or spec.inner_norm_tokens):
        gated_norm(
            wide, half.norm(f"{over}inner_norm", spec.inner_norm), activation=spec.activation,
            gated=spec.gated, of_product=spec.inner_norm_of == "product", over_tokens=not inside,
            bias=bias,
        )  # fmt: skip
    else:
        rows = wide.shape[0] * wide.shape[1] if inside else len(wide)
        swiglu(wide, rows, activation=spec.activation, gated=spec.gated, bias=bias)
    middle = wide.narrow(*((2, 0, spec.inner) if inside else (1, 0, spec.token_inner)))
    if inside and spec.conv and not early:
        source = middle
        middle = depthwise(source, w["conv"], w["conv_bias"], spec.activation, dtype)
        if kept is not None:
            kept |= dict(convolved=source, middle=middle)
    return multiply(middle, w[f"{over}down"].to(middle.dtype), not inside)
