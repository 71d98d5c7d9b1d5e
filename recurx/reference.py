"""The specification: the recursion in plain PyTorch, slow and obvious.

    attention block   h = rms(h + O(attn(rope(Q h), rope(K h), V h)));  h = rms(h + swiglu_D(h))
    token-MLP block   h' = h^T [B, D, T];  h' = rms(h' + swiglu_T(h'));  h = h'^T;
                      h = rms(h + swiglu_D(h))
    rms(x) = x * rsqrt(mean(x^2) + eps), no weight;   swiglu(x) = down(silu(gate x) * (up x))
    one call          write <- N(sum(state) + (sum(inject)))

That is TRM and HRM; `variant_block` is what the other fields of a `BlockSpec` say. A step may damp
what it writes, scale its first sum and add noise (`recurx.Step`).

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

from recurx.nets import Net
from recurx.noise import CALLS, DROPS, chances, normals
from recurx.operands import ALONE, Beside, CosSin
from recurx.schedule import INPUT, Schedule, Step
from recurx.specs import ATTENTION, NORM, TOKEN_MLP, BlockSpec

# Whoever puts another function in their place in torch changes other code, but never these, which
# a proof compares it with.
_linear, _attend = torch._C._nn.linear, torch._C._nn.scaled_dot_product_attention
silu, rsqrt = torch._C._nn.silu, torch._C._VariableFunctions.rsqrt
_gelu, _sigmoid = torch._C._nn.gelu, torch._C._VariableFunctions.sigmoid
_layer_norm, _conv1d = torch._C._VariableFunctions.layer_norm, torch._C._VariableFunctions.conv1d
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": _gelu,
    "gelu_tanh": functools.partial(_gelu, approximate="tanh"),
    "relu": torch._C._VariableFunctions.relu,
    "relu2": lambda x: torch._C._VariableFunctions.relu(x).square(),
    "sigmoid": _sigmoid,
}
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


def block(
    h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None,
    beside: Beside = ALONE,
) -> Tensor:  # fmt: skip
    """One block; `weights` in the order of `spec.slots`."""
    if spec.changed:
        return variant_block(h, spec, weights, cos_sin, beside)
    mixer_in, mixer_out, gate_up, down = weights
    if spec.kind == ATTENTION:
        h = rms_norm(h + attention(h, mixer_in, mixer_out, spec.num_heads, cos_sin), spec.eps)
    else:
        columns = h.transpose(1, 2)
        columns = rms_norm(columns + swiglu(columns, mixer_in, mixer_out), spec.eps)
        h = columns.transpose(1, 2)
    return rms_norm(h + swiglu(h, gate_up, down), spec.eps)


# ---- what differs from TRM and HRM ---------------------------------------------------------------


def variant_block(
    h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None,
    beside: Beside = ALONE,
) -> Tensor:  # fmt: skip
    """One block with all fields of its spec; see `BlockSpec` for what each means."""
    w = {name: weight for (name, _), weight in zip(spec.slots, weights, strict=True)}
    sublayer = functools.partial(_sublayer, beside, spec, w)
    if spec.kind == NORM:
        return norm(h, spec, w, "norm1")
    if spec.kind == ATTENTION:
        h = sublayer(h, "1", lambda x: variant_attention(x, spec, w, cos_sin, beside.key_mask))
    elif spec.kind == TOKEN_MLP and spec.token_norm == "tokens":
        columns = h.transpose(1, 2)
        columns = sublayer(columns, "1", lambda x: variant_mlp(x, spec, w, "t_"))
        h = columns.transpose(1, 2)
    elif spec.kind == TOKEN_MLP:
        h = sublayer(h, "1", lambda x: variant_mlp(x.mT, spec, w, "t_").mT)
    return sublayer(h, "2", lambda x: variant_mlp(x, spec, w, ""))


def _sublayer(
    beside: Beside, spec: BlockSpec, w: Mapping[str, Tensor], h: Tensor, number: str,
    f: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """h and f with its norms and the scales of both, by `spec.placement`."""
    out = f(h if spec.placement == "post" else norm(h, spec, w, f"norm{number}"))
    if spec.placement == "sandwich":
        out = norm(out, spec, w, f"out_norm{number}")
    if spec.residual_scale != 1:
        out = out * spec.residual_scale
    if spec.learned_scale:
        out = out * w[f"scale{number}"].to(out.dtype)
    if spec.dropout or spec.drop_path:
        out = dropped(out, spec, number, beside)
    if spec.skip_scale != 1:
        h = h * spec.skip_scale
    if spec.learned_skip:
        h = h * w[f"skip{number}"].to(h.dtype)
    h = h + out
    return norm(h, spec, w, f"norm{number}") if spec.placement == "post" else h


def dropped(out: Tensor, spec: BlockSpec, number: str, beside: Beside) -> Tensor:
    """`out` of branch "1" or "2" without what is dropped, the rest larger by 1 / (1 - share).

    Element e of sample s is dropped where its number of `recurx.noise.chances` is below the share:
    a stream for each call, block, branch and field. Elements count in the shape of `out`, which is
    [D, T] of a token MLP that is normed over T.
    """
    entries, seed = beside.entries(out)
    for field, shape in enumerate((out.shape[1:], (1, 1))):
        share = (spec.dropout, spec.drop_path)[field]
        if share:
            use = DROPS + 4 * (4 * beside.block + 2 * int(number) + field)
            kept = chances(entries, beside.call, shape, seed, use) >= share
            out = torch.where(kept, out * (1 / (1 - share)), 0)
    return out


def norm(x: Tensor, spec: BlockSpec, w: Mapping[str, Tensor], name: str, kind: str = "") -> Tensor:
    """RMS or layer norm over the last dimension in fp32 (fp64 for fp64), then weight and bias.

    `kind`: that of the spec if empty. The weights are `w[name]` and `w[name + "_bias"]` if there.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (w.get(name), w.get(f"{name}_bias")))
    if (kind or spec.norm) == "layer":
        return _layer_norm(x.to(wide), x.shape[-1:], weight, bias, spec.eps).to(x.dtype)
    out = rms_norm(x.to(wide), spec.eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(x.dtype)


def _with_bias(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    bias = w.get(f"{name}_bias")
    return _linear(x, w[name].to(x.dtype), None if bias is None else bias.to(x.dtype))


def seen(spec: BlockSpec, tokens: int, device: torch.device) -> Tensor | None:
    """[T, T], true where token i (row) sees token j; None: everywhere."""
    if not spec.mask and not spec.window:
        return None
    i, j = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    sees = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    if spec.mask:
        sees = (j <= i) | (j < (spec.prefix if spec.mask == "prefix" else 0))
    return sees & ((i - j).abs() < spec.window) if spec.window else sees


def _lines(t: Tensor, spec: BlockSpec) -> Tensor:
    """[B, R C, ..] of a grid with the lines along the axis of attention as samples."""
    return t.unflatten(1, spec.axial[:2]).movedim(1 + spec.axial[2], 2).flatten(0, 1)


def variant_attention(
    h: Tensor, spec: BlockSpec, w: Mapping[str, Tensor], cos_sin: CosSin | None,
    key_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention [B, T, D] with all fields of its spec; a token that sees none mixes zeros in."""
    whole, unseen = h, key_mask if spec.key_padding else None
    if spec.axial:
        h, unseen = _lines(h, spec), None if unseen is None else _lines(unseen, spec)
    batch, tokens, _ = h.shape
    kv = spec.kv_heads or spec.num_heads
    heads = _with_bias(h, w, "qkv").view(batch, tokens, spec.num_heads + 2 * kv, spec.head_dim)
    query, key, value = heads.split((spec.num_heads, kv, kv), dim=2)
    if spec.qk_norm:
        query = norm(query, spec, w, "q_norm", spec.qk_norm)
        key = norm(key, spec, w, "k_norm", spec.qk_norm)
    if cos_sin is not None:
        query, key = rope_rotate(query, *cos_sin), rope_rotate(key, *cos_sin)
    if kv != spec.num_heads:
        key, value = (t.repeat_interleave(spec.num_heads // kv, dim=2) for t in (key, value))
    mask, some = seen(spec, tokens, h.device), None
    if unseen is not None:
        mask = ~unseen[:, None, None] if mask is None else mask & ~unseen[:, None, None]
        some = mask.any(-1, keepdim=True)  # else the token sees all, and is zeroed: no NaN
        mask = mask | ~some
    mixed = _attend(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask)
    mixed = mixed if some is None else torch.where(some, mixed, 0)
    mixed = mixed.transpose(1, 2).flatten(2)
    if spec.attn_gate:
        mixed = _sigmoid(_with_bias(h, w, "attn_gate")) * mixed
    if spec.attn_norm:
        mixed = norm(mixed, spec, w, "attn_norm", spec.attn_norm)
    out = _with_bias(mixed, w, "o")
    if not spec.axial:
        return out
    lines = out.view(len(whole), spec.axial[1 - spec.axial[2]], *out.shape[1:])
    return lines.movedim(2, 1 + spec.axial[2]).reshape(whole.shape)


def variant_mlp(x: Tensor, spec: BlockSpec, w: Mapping[str, Tensor], over: str) -> Tensor:
    """The MLP over D (`over` is "") or over T ("t_"), which has no convolution."""
    inside, act = not over, ACTIVATIONS[spec.activation]
    normed, inner = spec.inner_norm and (inside or spec.inner_norm_tokens), f"{over}inner_norm"
    both = _with_bias(x, w, f"{over}gate_up")
    convolved = spec.conv if inside else 0
    dtype = getattr(torch, spec.conv_dtype) if convolved and spec.conv_dtype else x.dtype
    if convolved and spec.conv_of == "gate_up":
        both = depthwise(both.to(dtype), w)
    gate, up = both.chunk(2, dim=-1) if spec.gated else (both, None)
    if up is not None and normed and spec.inner_norm_of == "product":
        middle = _sigmoid(gate) * norm(gate * up, spec, w, inner, spec.inner_norm)
    else:
        middle = act(gate) if up is None else act(gate) * up
        if normed:
            middle = norm(middle, spec, w, inner, spec.inner_norm)
    if convolved and spec.conv_of == "middle":
        middle = act(depthwise(middle.to(dtype), w))
    return _with_bias(middle, w, f"{over}down")


def depthwise(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Each channel of x [B, T, C] convolved over the tokens, k // 2 zeros before the first."""
    weight, bias = w["conv"].to(x.dtype), w["conv_bias"].to(x.dtype)
    wide, width = x.transpose(1, 2), weight.shape[-1]
    out = _conv1d(wide, weight, bias, padding=width // 2, groups=len(weight))
    return out[..., : x.shape[1]].transpose(1, 2)


def call(
    h: Tensor, net: AnyNet, cos_sin: CosSin | None, beside: Beside = ALONE,
    each: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """One net call on h [B, T, D]; `each` runs a block (default `block`)."""
    if not isinstance(net, Net):
        return net(h)
    each = each or block  # as it is now: the profiler puts ranges around it
    for number, (spec, weights) in enumerate(net.spec.by_block(net.weights)):
        h = each(h, spec, weights, cos_sin, beside._replace(block=number))
    return h


def factor(value: float | str, nets: Mapping[str, AnyNet], like: Tensor) -> float | Tensor:
    """A factor of a step: the number, or what is learned under that name, at least in fp32."""
    if not isinstance(value, str):
        return value
    return nets[value].weights[0].to(torch.promote_types(like.dtype, torch.float32))


def call_input(step: Step, values: Mapping[str, Tensor], nets: Mapping[str, AnyNet]) -> Tensor:
    """scale * sum(state) + (sum(inject)), each sum left to right, in the dtype of the states."""
    h = functools.reduce(torch.add, [values[name] for name in step.state])
    h = h if step.scale == 1 else (factor(step.scale, nets, h) * h).to(h.dtype)
    if not step.inject:
        return h
    return h + functools.reduce(torch.add, [values[name] for name in step.inject])


def written(
    step: Step, before: Tensor, out: Tensor, beside: Beside, nets: Mapping[str, AnyNet]
) -> Tensor:
    """(1 - l) * before + l * out + sigma * noise; `out` where a step has neither.

    The noise is that of `recurx.noise.normals` with the numbers of the call and of the sample.
    """
    if step.damping != 1:
        share = factor(step.damping, nets, out)
        out = ((1 - share) * before + share * out).to(out.dtype)
    if not step.noise:
        return out
    entries, seed = beside.entries(out)
    noise = normals(entries, beside.call, out.shape[1:], seed, use=CALLS)
    return out + (step.noise * noise).to(out.dtype)


def run(
    schedule: Schedule, nets: Mapping[str, AnyNet], x: Tensor, carry: Mapping[str, Tensor],
    cos_sin: CosSin | None = None, start: int = 0, stop: int | None = None,
    seed: Tensor | None = None, key_mask: Tensor | None = None,
    each: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Run calls start..stop-1 on `carry`; gradient as PyTorch's mode says, for all of them.

    Of `seed` and `key_mask` see `recurx.operands.Operands`; `each` runs a block.

    Returns a new dict with every state; a state that no call wrote is the tensor that came in.
    """
    values = {INPUT: x, **carry}
    for number, step in enumerate(schedule.steps[start:stop], start):
        beside = Beside(seed, key_mask, number)
        out = call(call_input(step, values, nets), nets[step.net], cos_sin, beside, each)
        values[step.write] = written(step, values[step.write], out, beside, nets)
    return {name: values[name] for name in carry}
