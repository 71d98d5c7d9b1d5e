"""The specification: the recursion in plain PyTorch, slow and obvious.

    attention block   h = rms(h + O(attn(rope(Q h), rope(K h), V h)));  h = rms(h + swiglu_D(h))
    token-MLP block   h' = h^T [B, D, T];  h' = rms(h' + swiglu_T(h'));  h = h'^T;
                      h = rms(h + swiglu_D(h))
    rms(x) = x * rsqrt(mean(x^2) + eps), no weight;   swiglu(x) = down(silu(gate x) * (up x))
    one call          write <- N(sum(state) + (sum(inject)))

Every backend is this file, faster. It runs in any floating dtype; norms, rotary embeddings and
attention accumulate in fp32 (fp64 for fp64 states). In fp32 and bf16 on CPU it gives the bits of
the official TRM and HRM code, gradients included, because it performs the same operations in the
same order. Shapes: h, x and states [B, T, D]; cos and sin [T, head_dim].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from recurx.nets import ATTENTION, BlockSpec, Net
from recurx.operands import CosSin
from recurx.schedule import INPUT, Schedule, Step

# Whoever puts another function in their place in torch changes other code, but never these, which
# a proof compares it with.
_linear, _attend = torch._C._nn.linear, torch._C._nn.scaled_dot_product_attention
silu, rsqrt = torch._C._nn.silu, torch._C._VariableFunctions.rsqrt
AnyNet = Net | Callable[[Tensor], Tensor]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) over the last dimension, in fp32 (fp64 for fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with the master weight cast to the dtype of x, as the official layers do."""
    return _linear(x, weight.to(x.dtype))


def rope_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim/2) of x [B, T, H, head_dim] by the angle of their row."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


def attention(h: Tensor, qkv: Tensor, o: Tensor, num_heads: int, cos_sin: CosSin | None) -> Tensor:
    """O(softmax(q k^T / sqrt(head_dim)) v), not causal; qkv [3D, D] holds Q, K, V in this order."""
    batch, tokens, hidden = h.shape
    heads = linear(h, qkv).view(batch, tokens, 3 * num_heads, hidden // num_heads)
    query, key, value = heads.split(num_heads, dim=2)
    if cos_sin is not None:
        query, key = rope_rotate(query, *cos_sin), rope_rotate(key, *cos_sin)
    mixed = _attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return linear(mixed.transpose(1, 2).reshape(batch, tokens, hidden), o)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * (up x)); gate_up is packed, gate first."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, down)


def block(h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None) -> Tensor:
    """One post-norm block; `weights` in the order of `WEIGHT_NAMES[spec.kind]`."""
    mixer_in, mixer_out, gate_up, down = weights
    if spec.kind == ATTENTION:
        h = rms_norm(h + attention(h, mixer_in, mixer_out, spec.num_heads, cos_sin), spec.eps)
    else:
        columns = h.transpose(1, 2)
        columns = rms_norm(columns + swiglu(columns, mixer_in, mixer_out), spec.eps)
        h = columns.transpose(1, 2)
    return rms_norm(h + swiglu(h, gate_up, down), spec.eps)


def call(h: Tensor, net: AnyNet, cos_sin: CosSin | None) -> Tensor:
    """One net call on h [B, T, D]."""
    if not isinstance(net, Net):
        return net(h)
    for spec, weights in net.spec.by_block(net.weights):
        h = block(h, spec, weights, cos_sin)
    return h


def call_input(step: Step, values: Mapping[str, Tensor]) -> Tensor:
    """sum(state) + (sum(inject)), each sum left to right, in the dtype of the states."""
    h = functools.reduce(torch.add, [values[name] for name in step.state])
    if not step.inject:
        return h
    return h + functools.reduce(torch.add, [values[name] for name in step.inject])


def run(
    schedule: Schedule,
    nets: Mapping[str, AnyNet],
    x: Tensor,
    carry: Mapping[str, Tensor],
    cos_sin: CosSin | None = None,
    start: int = 0,
    stop: int | None = None,
) -> dict[str, Tensor]:
    """Run calls start..stop-1 on `carry`; gradient as PyTorch's mode says, for all of them.

    Returns a new dict with every state; a state that no call wrote is the tensor that came in.
    """
    values = {INPUT: x, **carry}
    for step in schedule.steps[start:stop]:
        values[step.write] = call(call_input(step, values), nets[step.net], cos_sin)
    return {name: values[name] for name in carry}
