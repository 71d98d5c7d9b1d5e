"""The backward of `reference`, written out, with the names that the kernels mirror.

Each function takes what its forward took, plus the gradient of its result (`d_out`), and returns
the gradients of its inputs. Forward values are recomputed, so a call keeps only its input h.
Sums are taken in the dtype of the values, weight gradients in that of the master weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recurx import reference
from recurx.nets import ATTENTION, BlockSpec, Net
from recurx.operands import ALONE, Beside, CosSin, Operands, Span
from recurx.problem import Problem
from recurx.schedule import INPUT


def rms_norm_backward(x: Tensor, eps: float, d_out: Tensor) -> Tensor:
    """d_x = r (d_out - y mean(d_out y)) with r = rsqrt(mean(x^2) + eps), y = r x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    d_wide = d_out.to(wide.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * scale
    return (scale * (d_wide - y * (d_wide * y).mean(-1, keepdim=True))).to(x.dtype)


def linear_backward(x: Tensor, weight: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """d_x = d_out W; d_W = d_out^T x over all rows."""
    d_weight = d_out.flatten(0, -2).T @ x.flatten(0, -2)
    return d_out @ weight.to(d_out.dtype), d_weight.to(weight.dtype)


def rope_backward(d_out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of a rotation: rotate back by the same angle."""
    return reference.rope_rotate(d_out, cos, -sin)


def swiglu_backward(
    x: Tensor, gate_up: Tensor, down: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_gate_up, d_down of down(silu(gate x) * (up x))."""
    gate, up = reference.linear(x, gate_up).chunk(2, dim=-1)
    silu = F.silu(gate)
    d_mid, d_down = linear_backward(silu * up, down, d_out)
    sigmoid = torch.sigmoid(gate)
    d_gate = d_mid * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    d_x, d_gate_up = linear_backward(x, gate_up, torch.cat((d_gate, d_mid * silu), dim=-1))
    return d_x, d_gate_up, d_down


def attention_backward(
    h: Tensor, qkv: Tensor, o: Tensor, num_heads: int, cos_sin: CosSin | None, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_h, d_qkv, d_o; softmax and its products in fp32 (fp64 for fp64), like fused attention."""
    batch, tokens, hidden = h.shape
    wide = torch.promote_types(h.dtype, torch.float32)
    heads = reference.linear(h, qkv).view(batch, tokens, 3 * num_heads, hidden // num_heads)
    query, key, value = heads.split(num_heads, dim=2)
    if cos_sin is not None:
        query = reference.rope_rotate(query, *cos_sin)
        key = reference.rope_rotate(key, *cos_sin)
    q, k, v = (t.transpose(1, 2).to(wide) for t in (query, key, value))  # [B, H, T, head_dim]
    scale = 1.0 / math.sqrt(q.shape[-1])
    p = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    mixed = (p @ v).transpose(1, 2).reshape(batch, tokens, hidden).to(h.dtype)

    d_mixed, d_o = linear_backward(mixed, o, d_out)
    d_mixed = d_mixed.view(batch, tokens, num_heads, -1).transpose(1, 2).to(wide)
    d_v = p.transpose(-1, -2) @ d_mixed
    d_p = d_mixed @ v.transpose(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
    d_q, d_k, d_v = (
        t.transpose(1, 2).to(h.dtype) for t in (d_s @ k, d_s.transpose(-1, -2) @ q, d_v)
    )
    if cos_sin is not None:
        d_q, d_k = rope_backward(d_q, *cos_sin), rope_backward(d_k, *cos_sin)
    d_heads = torch.cat((d_q, d_k, d_v), dim=2).reshape(batch, tokens, 3 * hidden)
    d_h, d_qkv = linear_backward(h, qkv, d_heads)
    return d_h, d_qkv, d_o


def block_backward(
    h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None, d_out: Tensor,
    beside: Beside = ALONE,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """d_h and the weight gradients of one block, the latter in the order of its weights."""
    if spec.changed:
        return _by_autograd(h, spec, weights, cos_sin, d_out, beside)
    mixer_in, mixer_out, gate_up, down = weights
    if spec.kind == ATTENTION:
        x = h
        mixed = reference.attention(x, mixer_in, mixer_out, spec.num_heads, cos_sin)
    else:
        x = h.transpose(1, 2)
        mixed = reference.swiglu(x, mixer_in, mixer_out)
    pre_mix = x + mixed
    mid = reference.rms_norm(pre_mix, spec.eps)
    mid = mid if spec.kind == ATTENTION else mid.transpose(1, 2)
    pre_out = mid + reference.swiglu(mid, gate_up, down)

    d_pre_out = rms_norm_backward(pre_out, spec.eps, d_out)
    d_swiglu, d_gate_up, d_down = swiglu_backward(mid, gate_up, down, d_pre_out)
    d_mid = d_pre_out + d_swiglu
    d_mid = d_mid if spec.kind == ATTENTION else d_mid.transpose(1, 2)
    d_pre_mix = rms_norm_backward(pre_mix, spec.eps, d_mid)
    if spec.kind == ATTENTION:
        d_x, d_in, d_proj = attention_backward(
            x, mixer_in, mixer_out, spec.num_heads, cos_sin, d_pre_mix
        )
        d_h = d_pre_mix + d_x
    else:
        d_x, d_in, d_proj = swiglu_backward(x, mixer_in, mixer_out, d_pre_mix)
        d_h = (d_pre_mix + d_x).transpose(1, 2)
    return d_h, [d_in, d_proj, d_gate_up, d_down]


def _by_autograd(
    h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None, d_out: Tensor,
    beside: Beside,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`block_backward` of a variant: there are too many to write out, and PyTorch's is right.

    Inside an op of ours autograd is switched off below the dispatcher, so it is switched on there.
    """
    keys = torch._C.DispatchKey
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in (h, *weights)]
        out = reference.variant_block(leaves[0], spec, leaves[1:], cos_sin, beside)
        d_h, *d_weights = torch.autograd.grad(out, leaves, d_out, materialize_grads=True)
    return d_h, d_weights


def call_backward(
    h: Tensor, net: Net, cos_sin: CosSin | None, d_out: Tensor, beside: Beside = ALONE
) -> tuple[Tensor, list[Tensor]]:
    """d_h and all weight gradients of one net call."""
    blocks, inputs = net.spec.by_block(net.weights), []
    for number, (spec, weights) in enumerate(blocks):
        inputs.append((h, beside._replace(block=number)))
        h = reference.block(h, spec, weights, cos_sin, inputs[-1][1])
    grads: list[Tensor] = []
    for (spec, weights), (entered, own) in zip(reversed(blocks), reversed(inputs), strict=True):
        d_out, d_weights = block_backward(entered, spec, weights, cos_sin, d_out, own)
        grads = d_weights + grads
    return d_out, grads


def run(
    problem: Problem, operands: Operands, span: Span, d_states: Sequence[Tensor]
) -> list[Tensor]:
    """Backward of the calls of `span`: [d_x, d_state.., d_weight..], zeros where nothing flows.

    `operands` entered at the first of them; `d_states` are the gradients of what left, in the order
    of `problem.schedule.states`.
    """
    schedule, nets, cos_sin = problem.schedule, problem.bind(operands.weights), operands.rope
    x, steps = operands.x, schedule.steps[span.start : span.stop]
    values = {INPUT: x, **dict(zip(schedule.states, operands.states, strict=True))}
    entered = []
    for number, step in enumerate(steps, span.start):
        beside = Beside(operands.seed, operands.key_mask, number)
        before = values[step.write]
        h = reference.call_input(step, values, nets)
        out = reference.call(h, nets[step.net], cos_sin, beside)
        # The gradient of a learned factor: that of the product, times what it multiplies.
        by = {"scale": step.learned and sum(values[name] for name in step.state),
              "damping": step.learned and out - before}  # fmt: skip
        entered.append((h, beside, by))
        values[step.write] = reference.written(step, before, out, beside, nets)

    d_values = {INPUT: torch.zeros_like(x), **dict(zip(schedule.states, d_states, strict=True))}
    d_weights = {name: [torch.zeros_like(w) for w in net.weights] for name, net in nets.items()}
    for step, (h, beside, by) in zip(reversed(steps), reversed(entered), strict=True):
        d_written = d_values[step.write]
        share, scale = (reference.factor(f, nets, h) for f in (step.damping, step.scale))
        d_out = d_written if step.damping == 1 else (share * d_written).to(h.dtype)
        d_h, d_net = call_backward(h, nets[step.net], cos_sin, d_out, beside)
        for total, part in zip(d_weights[step.net], d_net, strict=True):
            total += part
        for field, name in step.learned.items():
            d_product = d_written if field == "damping" else d_h
            d_product = d_product.to(torch.promote_types(h.dtype, torch.float32))
            d_weights[name][0] += (d_product * by[field]).sum((0, 1))
        rest = torch.zeros_like(h) if step.damping == 1 else ((1 - share) * d_written).to(h.dtype)
        d_values[step.write] = rest
        d_first = d_h if step.scale == 1 else (scale * d_h).to(h.dtype)
        for name in step.state:
            d_values[name] = d_values[name] + d_first
        for name in step.inject:
            d_values[name] = d_values[name] + d_h
    # A custom op may not return its inputs: a state that no call touched passes its gradient on.
    flat = [d_values[INPUT], *(d_values[name].clone() for name in schedule.states)]
    return flat + [grad for name, _ in problem.nets for grad in d_weights[name]]
