"""Blocks that spell later systems, a field or a system each, as small specs with random weights."""

from __future__ import annotations

from typing import Any

import torch

from recurx import BlockSpec, Net, NetSpec, rope_tables
from recurx.operands import CosSin
from recurx.specs import ATTENTION, NO_MIXER, NORM, TOKEN_MLP

WIDTH, TOKENS = 32, 12
_ATTENTION: dict[str, Any] = dict(kind=ATTENTION, hidden=WIDTH, inner=48, num_heads=4)
_TOKENS: dict[str, Any] = dict(
    kind=TOKEN_MLP, hidden=WIDTH, inner=48, tokens=TOKENS, token_inner=20
)
_AFFINE = dict(norm_weight=True, norm_bias=True)
_BIASES = dict(biases=("qkv", "o", "gate_up", "down"))

VARIANTS: dict[str, dict[str, Any]] = {
    "pre-LayerNorm, ReLU": dict(
        _ATTENTION, norm="layer", **_AFFINE, **_BIASES, placement="pre", activation="relu",
        gated=False,
    ),
    "post-LayerNorm, GELU": dict(
        _ATTENTION, norm="layer", **_AFFINE, **_BIASES, activation="gelu", gated=False
    ),
    "norm weights": dict(_ATTENTION, **_AFFINE),
    "sandwich": dict(_ATTENTION, placement="sandwich", norm_weight=True, norm="layer"),
    "channel scales": dict(_ATTENTION, placement="pre", learned_scale="channel"),
    "scalar scales": dict(_ATTENTION, learned_scale="scalar", residual_scale=0.5),
    "channel skips": dict(
        _ATTENTION, placement="pre", learned_skip="channel", learned_scale="channel"
    ),
    "scalar skips": dict(
        _ATTENTION, learned_skip="scalar", skip_scale=0.7, learned_scale="scalar"
    ),
    "channel skips, sandwich": dict(
        _ATTENTION, placement="sandwich", learned_skip="channel", skip_scale=-1.3
    ),
    "constant skips": dict(_TOKENS, skip_scale=0.5, residual_scale=2.0),
    "token MLP over D, channel skips": dict(
        _TOKENS, token_norm="hidden", learned_skip="channel", norm="layer"
    ),
    "grouped heads, gate, prefix": dict(
        _ATTENTION, kv_heads=2, mask="prefix", prefix=4, attn_gate=True, biases=("attn_gate",)
    ),
    "causal window, QK-norm": dict(
        _ATTENTION, mask="causal", window=3, qk_norm="rms", qk_norm_weight=True, head_size=6
    ),
    "plain QK-norm, window": dict(_ATTENTION, qk_norm="layer", window=5),
    "norm of the product": dict(
        _ATTENTION, attn_norm="rms", attn_norm_weight=True, inner_norm="rms",
        inner_norm_of="product", inner_norm_weight=True,
    ),
    "inner norm, GEGLU": dict(_ATTENTION, inner_norm="layer", activation="gelu_tanh"),
    "ConvSwiGLU": dict(_ATTENTION, conv=2),
    "convolution before the gate": dict(_ATTENTION, conv=3, conv_of="gate_up"),
    "axial, columns": dict(_ATTENTION, axial=(3, 4, 0)),
    "axial, rows": dict(_ATTENTION, axial=(3, 4, 1)),
    "token MLP normed over D": dict(_TOKENS, token_norm="hidden"),
    "token MLP, pre-norm, biases": dict(
        _TOKENS, norm="layer", **_AFFINE, placement="pre", biases=("t_gate_up", "t_down"),
        activation="gelu",
    ),
    "no mixer, ReLU²": dict(
        kind=NO_MIXER, hidden=WIDTH, inner=48, activation="relu2", gated=False
    ),
    "sigmoid": dict(kind=NO_MIXER, hidden=WIDTH, inner=48, activation="sigmoid"),
    "a norm alone": dict(kind=NORM, hidden=WIDTH, inner=0, norm_weight=True),
}  # fmt: skip


def spec_of(name: str) -> BlockSpec:
    return BlockSpec(**VARIANTS[name])


def net_of(*specs: BlockSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """Random weights of the size that keeps sums near 1; vectors around 1, so that none is idle."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for spec in specs:
        for name, shape in spec.slots:
            weight = torch.randn(shape, dtype=dtype, generator=generator)
            fan_in = shape[-1] if len(shape) > 1 else 4
            weight = weight / fan_in**0.5
            weights.append(weight + (len(shape) == 1 and not name.endswith("bias")))
    return Net(NetSpec(specs), weights)


def tables_of(spec: BlockSpec) -> CosSin | None:
    """Rotary tables, as long as the lines that attention runs over."""
    if spec.kind != ATTENTION:
        return None
    tokens = spec.axial[spec.axial[2]] if spec.axial else TOKENS
    return rope_tables(tokens, spec.head_dim)
