"""The parts of TRM and HRM that hold weights, under the official attribute names.

Blocks hold weights only: their arithmetic is `recurx.reference` and the backends, once. Embeddings
and heads run here. Weights are fp32 masters that are cast to the dtype of the activations.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurx import reference
from recurx.errors import bad_argument
from recurx.models.config import ModelConfig
from recurx.nets import computes_the_reference, plain_linears, read_stack, rope_tables
from recurx.noise import DRAWN

# A standard normal that is cut at +-CUT: the probability of what is left, and its deviation.
CUT = 2.0
MASS = math.erf(CUT / math.sqrt(2))
LEFT = math.sqrt(1 - 2 * CUT * math.exp(-0.5 * CUT**2) / math.sqrt(2 * math.pi) / MASS)


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with a normal of standard deviation `std` after its truncation at 2 underlying sigmas.

    `torch.nn.init.trunc_normal_` has a smaller deviation than its argument: truncation at +-2
    removes 12 % of it. Sampled by the inverse of the distribution function.
    """
    if std == 0:
        return tensor.zero_()
    sigma = std / LEFT
    tensor.uniform_(-MASS, MASS).erfinv_().mul_(math.sqrt(2) * sigma)
    return tensor.clamp_(-CUT * sigma, CUT * sigma)


def check_ids(arg: str, ids: Tensor, count: int, ndim: int) -> None:
    """Refuse what is no integer ids within 0..count-1. Values are not looked at in a trace, or on a
    GPU, which asserts that indices are in range."""
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.ndim != ndim:
        shape = "[B, seq_len]" if ndim == 2 else "[B]"
        raise bad_argument("models", arg, f"integer ids {shape}", f"{ids.dtype} {[*ids.shape]}")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    traced = torch._C._len_torch_dispatch_stack() > 0  # fake tensors, recorders
    if ids.numel() and ids.device.type == "cpu" and not traced:
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= count:
            raise bad_argument(
                "models", arg, f"ids within 0..{count - 1}", low if low < 0 else high,
                "The data are of another task or vocabulary than the model.",
            )  # fmt: skip


class CastLinear(nn.Module):
    """Linear layer whose fp32 master `weight` [out, in] is cast to the input's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(truncated_normal_(weight, std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class CastEmbedding(nn.Module):
    """Embedding whose fp32 master `embedding_weight` [rows, width] is cast to `cast_to`."""

    def __init__(self, rows: int, width: int, init_std: float, cast_to: torch.dtype) -> None:
        super().__init__()
        self.cast_to = cast_to
        self.embedding_weight = nn.Parameter(
            truncated_normal_(torch.empty(rows, width), std=init_std)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding_weight.to(self.cast_to))


class RotaryEmbedding(nn.Module):
    """Holds the cos and sin tables, fp32 [tokens, head_dim], outside the state_dict."""

    def __init__(self, tokens: int, head_dim: int, base: float) -> None:
        super().__init__()
        cos, sin = rope_tables(tokens, head_dim, base)
        self.register_buffer("cos_cached", cos, persistent=False)
        self.register_buffer("sin_cached", sin, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.cos_cached, self.sin_cached


class Attention(nn.Module):
    """Weights of a non-causal attention: `qkv_proj` [3D, D] (Q, K, V in turn), `o_proj` [D, D]."""

    causal = False

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = self.num_key_value_heads = num_heads
        self.qkv_proj = CastLinear(hidden_size, 3 * hidden_size)
        self.o_proj = CastLinear(hidden_size, hidden_size)


class SwiGLU(nn.Module):
    """Weights of down(silu(gate x) * up x): `gate_up_proj` [2F, width], `down_proj` [width, F]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = CastLinear(width, 2 * inner)
        self.down_proj = CastLinear(inner, width)


class Block(nn.Module):
    """Weights of one block: `self_attn` or `mlp_t`, then `mlp`; those of a variant by their slots.

    Of these, matrices and convolutions start as TRM's matrices do, biases at 0, other vectors at 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = dataclasses.replace(config.block_spec, **dict.fromkeys(DRAWN, 0.0))
        if spec.changed:
            self.spec, self.weights = spec, nn.ParameterDict()
            for name, shape in spec.slots:
                if len(shape) > 1:
                    start = truncated_normal_(torch.empty(shape), std=shape[-1] ** -0.5)
                else:
                    start = torch.full(shape, 0.0 if name.endswith("_bias") else 1.0)
                self.weights[name] = nn.Parameter(start)
            return
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.tokens, config.inner_width(config.tokens))
        else:
            self.self_attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.inner_width(config.hidden_size))
        self.norm_eps = config.rms_norm_eps


plain_linears |= {CastLinear.forward, nn.ParameterDict.forward}  # the latter has none


@computes_the_reference
class ReasoningNet(nn.Module):
    """A stack of blocks; `recurx.recurse` takes it as a net. Calling it runs the reference."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(num_layers))

    def forward(self, h: Tensor, cos_sin: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return reference.call(h, read_stack(self), cos_sin)
