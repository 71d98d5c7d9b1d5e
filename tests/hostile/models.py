"""Nets that look like a stack of TRM blocks and compute something else, each by one twist.

Attribute names, shapes and signatures are those of the official code. A twist is a word; the layers
look it up while they run, so that neither names nor parameters tell it.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalike import Config, LossHead, Wrapper, turn

WIDTH, HEADS, INNER, TOKENS = 32, 2, 48, 10

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "mish": F.mish,
    "hard silu": F.hardswish,
    "silu of 1.02 x": lambda x: x * torch.sigmoid(1.02 * x),
}
NORMS = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "eps 0.03": lambda x: rms(x, 0.03),
    "l2 norm": lambda x: F.normalize(x, dim=-1),
    "no norm": lambda x: x,
    "rms of half the row": lambda x: x * torch.rsqrt(
        x[..., : x.shape[-1] // 2].square().mean(-1, keepdim=True) + 1e-5
    ),
    "clipped norm": lambda x: rms(x, 1e-5).clamp(-2, 2),
}  # fmt: skip
# Twists that neither add a parameter nor a buffer: only behaviour tells them.
BEHAVIOUR = (
    *ACTIVATIONS, *NORMS, "pre-norm", "sandwich norm", "norm in front too", "gate and up swapped",
    "scaled residual", "no second residual", "residual of the start", "parallel halves",
    "causal in code", "windowed attention", "scores unscaled", "softmax off by one",
    "queries normed", "no rope", "rope in pairs", "rope of keys only", "masked last token",
    "mixed twice", "layers reversed", "layers twice", "output scaled", "injection twice",
    "tokens beyond 7 differ", "large values differ", "odd calls differ",
)  # fmt: skip
# Twists that run in training only.
TRAINING = (
    "dropout", "small dropout", "functional dropout", "drop path", "drop path by random",
    "noise in training", "scaled in training", "norm off in training", "detached in training",
)  # fmt: skip
# Twists that add something to the modules.
STRUCTURE = (
    "bias of qkv", "bias of down", "gain of the norm", "learned scale", "buffer scale",
    "convolution", "norm module", "tied layers", "extra layer", "module between", "wide head",
)  # fmt: skip
TWISTS = (*BEHAVIOUR, *TRAINING, *STRUCTURE)
# Twists that a `BlockSpec` can spell, and the field: these give their own answer fused.
SPELLED = {
    **dict.fromkeys(("gelu", "gelu tanh", "relu", "relu2", "sigmoid"), "activation"),
    "layer norm": "norm", "pre-norm": "placement", "sandwich norm": "placement",
    "causal in code": "mask", "bias of qkv": "biases", "bias of down": "biases",
}  # fmt: skip


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Gated(nn.Module):
    def __init__(self, width: int, inner: int, twist: str) -> None:
        super().__init__()
        self.twist = twist
        self.gate_up_proj = Dense(width, 2 * inner)
        self.down_proj = Dense(inner, width, twist == "bias of down")
        if twist == "convolution":
            self.dwconv = nn.Conv1d(inner, inner, 2, padding=1, groups=inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        if self.twist == "gate and up swapped":
            gate, up = up, gate
        middle = ACTIVATIONS.get(self.twist, F.silu)(gate) * up
        if self.twist == "convolution":
            middle = self.dwconv(middle.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.down_proj(middle)


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int, twist: str) -> None:
        super().__init__()
        self.twist, self.causal = twist, False
        self.num_heads = self.num_key_value_heads = heads
        self.head_dim = width // heads
        self.qkv_proj = Dense(width, 3 * width, twist == "bias of qkv")
        self.o_proj = Dense(width, width)

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, tokens, 3 * self.num_heads, self.head_dim)
        q, k, v = qkv.split(self.num_heads, dim=2)
        if self.twist == "queries normed":
            q, k = rms(q, 1e-6), rms(k, 1e-6)
        if cos_sin is not None and self.twist != "no rope":
            if self.twist == "rope in pairs":
                q, k = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in (q, k))
            if self.twist != "rope of keys only":
                q = turn(q, *cos_sin)
            k = turn(k, *cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        if self.twist != "scores unscaled":
            scores = scores / math.sqrt(self.head_dim)
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
        if self.twist == "causal in code":
            seen = seen.tril()
        if self.twist == "windowed attention":
            seen = seen.tril(3).triu(-3)
        if self.twist == "masked last token" and tokens > 1:
            seen = seen & (torch.arange(tokens, device=q.device) < tokens - 1)
        scores = scores.masked_fill(~seen, float("-inf"))
        if self.twist == "softmax off by one":
            zero = torch.zeros_like(scores[..., :1])
            share = torch.cat((scores, zero), -1).softmax(-1)[..., :-1]
        else:
            share = scores.softmax(-1)
        return self.o_proj((share @ v).transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    def __init__(self, twist: str, token_mlp: bool) -> None:
        super().__init__()
        self.twist, self.norm_eps, self.calls = twist, 1e-5, 0
        if token_mlp:
            self.mlp_t = Gated(TOKENS, 16, twist)
        else:
            self.self_attn = Mixer(WIDTH, 1 if twist == "wide head" else HEADS, twist)
        self.mlp = Gated(WIDTH, INNER, twist)
        if twist == "gain of the norm":
            self.gain = nn.Parameter(1 + 0.3 * torch.randn(WIDTH))
        if twist == "learned scale":
            self.scale = nn.Parameter(torch.tensor(0.7))
        if twist == "buffer scale":
            self.register_buffer("scale", torch.tensor(0.7))
        if twist == "norm module":
            self.norm = nn.LayerNorm(WIDTH)
        if twist in ("dropout", "small dropout"):
            self.dropout = nn.Dropout(0.2 if twist == "dropout" else 0.001)

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h, twist = hidden_states, self.twist
        self.calls += 1
        if hasattr(self, "mlp_t"):
            first = lambda h: self.mlp_t(h.transpose(1, 2)).transpose(1, 2)  # noqa: E731
        else:
            first = lambda h: self.self_attn(cos_sin, h)  # noqa: E731
        tokens_normed = hasattr(self, "mlp_t")
        if twist == "parallel halves":
            return self.normed(h + first(h) + self.mlp(h))
        if twist in ("pre-norm", "sandwich norm"):
            after = self.normed if twist == "sandwich norm" else lambda h: h
            h = h + after(first(self.normed(h)))
            return h + after(self.mlp(self.normed(h)))
        if twist == "norm in front too":
            h = self.normed(h)
        start = h
        mixed = first(first(h)) if twist == "mixed twice" else first(h)
        h = h + self.dropped(mixed)
        h = self.normed(h.transpose(1, 2)).transpose(1, 2) if tokens_normed else self.normed(h)
        out = self.dropped(self.mlp(h))
        if twist == "scaled residual":
            out = 0.9 * out
        if hasattr(self, "scale"):
            out = self.scale * out
        base = start if twist == "residual of the start" else h
        h = self.normed(out if twist == "no second residual" else base + out)
        if twist == "gain of the norm":
            h = h * self.gain
        if twist == "norm module":
            h = self.norm(h)
        if twist == "output scaled":
            h = 1.05 * h
        if twist == "tokens beyond 7 differ" and h.shape[1] > 7:
            h = torch.cat((h[:, :7], -h[:, 7:]), 1)
        if twist == "large values differ":
            h = torch.where(h > 1.5, 1.5, h)
        if twist == "odd calls differ" and self.calls % 2:
            h = -h
        return h

    def normed(self, x: Tensor) -> Tensor:
        if self.training and self.twist == "norm off in training":
            return x / 2
        return NORMS[self.twist](x) if self.twist in NORMS else rms(x, self.norm_eps)

    def dropped(self, x: Tensor) -> Tensor:
        if hasattr(self, "dropout"):
            return self.dropout(x)
        if not self.training:
            return x
        if self.twist == "functional dropout":
            return F.dropout(x, 0.1, self.training)
        if self.twist == "drop path":
            return x * (torch.rand(x.shape[0], 1, 1) > 0.3)
        if self.twist == "drop path by random":
            return x * (random.random() > 0.5)
        if self.twist == "noise in training":
            return x + 0.1 * torch.randn_like(x)
        if self.twist == "scaled in training":
            return 0.5 * x
        if self.twist == "detached in training":
            return x.detach()
        return x


class Stack(nn.Module):
    def __init__(self, twist: str = "", token_mlp: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.twist = twist
        self.layers = nn.ModuleList(Layer(twist, token_mlp) for _ in range(layers))
        if twist == "tied layers":
            self.layers[1].mlp = self.layers[0].mlp
        if twist == "extra layer":
            self.extra = nn.Linear(WIDTH, WIDTH)
        if twist == "module between":
            self.between = nn.GELU()

    def forward(
        self, hidden_states: Tensor, input_injection: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        h = hidden_states if input_injection is None else hidden_states + input_injection
        if self.twist == "injection twice" and input_injection is not None:
            h = h + input_injection
        layers = list(self.layers)
        if self.twist == "layers reversed":
            layers = layers[::-1]
        for layer in layers * (2 if self.twist == "layers twice" else 1):
            h = layer(hidden_states=h, **kwargs)
            if self.twist == "module between":
                h = self.between(h)
        return self.extra(h) if self.twist == "extra layer" else h


def stack(twist: str = "", token_mlp: bool = False, seed: int = 0) -> Stack:
    """A net alone, with random weights."""
    torch.manual_seed(seed)
    return Stack(twist, token_mlp)


def model(twist: str = "", token_mlp: bool = False, seed: int = 0) -> LossHead:
    """A whole model around such a net, as `recurx.patch` takes it."""
    torch.manual_seed(seed)
    built = LossHead(Wrapper(Config(mlp_t=token_mlp, seq_len=TOKENS - 1, hidden_size=WIDTH)))
    built.model.inner.L_level = Stack(twist, token_mlp)
    return built
