"""The networks that TinyRecursiveModel is used with: its MLPMixer1D, and x-transformers' stacks.

    MLPMixer1D    depth x [h += conv1(norm h over tokens);  h += linear(norm h)], norm
    Encoder       depth x [h += attention(norm h);  h += mlp(norm h)], norm;  Decoder: causal

Both are pre-norm with a LayerNorm without bias, and MLPs without a gate. `scale_residual` of
x-transformers makes h of each sum a h, with a learned a. Options that add a parameter or a buffer
are refused as what no slot takes, those that change a function by the probe
(recurx/experiments/systems/foreign.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from recurx.experiments.systems.foreign import Layout, Slot, Unspelled, layout_of
from recurx.specs import ATTENTION, NORM, TOKEN_MLP, BlockSpec

_ACTIVATIONS: dict[type, str] = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
_PRE: dict[str, Any] = {
    "norm": "layer", "norm_weight": True, "placement": "pre", "gated": False,
}  # fmt: skip


def usual_net(module: Any) -> Layout | None:
    """The layout of a network of these kinds; None of others."""
    if type(module) is nn.Sequential and _is_mixer(module):
        return _mixer(module)
    kinds = {"Encoder": "", "Decoder": "causal"}
    if type(module).__module__.startswith("x_transformers") and type(module).__name__ in kinds:
        return _transformer(module, kinds[type(module).__name__])
    return None


def _activation(module: Any) -> str:
    found = _ACTIVATIONS.get(type(module))
    if found is None:
        raise Unspelled(f"its activation is a {type(module).__name__}")
    tanh = getattr(module, "approximate", "none") == "tanh"
    return found + "_tanh" if tanh else found


# ---- MLPMixer1D ----------------------------------------------------------------------------------


def _is_mixer(module: nn.Sequential) -> bool:
    *blocks, last = module
    parts = [part for block in blocks if isinstance(block, nn.Sequential) for part in block]
    return (
        isinstance(last, nn.LayerNorm) and len(blocks) > 0 and len(parts) == 2 * len(blocks)
        and all(hasattr(part, "fn") and hasattr(part, "norm") for part in parts)
    )  # fmt: skip


def _mixer(module: Any) -> Layout:
    """Convolutions of one place over channels that are the tokens: matrices [out, in, 1]."""
    *blocks, last = module
    found = []
    for number, (mixing, mlp) in enumerate(blocks):
        rows = mixing.fn[0].weight.shape
        spec = BlockSpec(
            TOKEN_MLP, mlp.norm.weight.shape[0], mlp.fn[0].weight.shape[0], tokens=rows[1],
            token_inner=rows[0], token_norm="hidden", eps=last.eps,
            biases=("t_gate_up", "t_down", "gate_up", "down"),
            activation=_activation(mlp.fn[1]), **_PRE,
        )  # fmt: skip
        if mixing.fn[0].kernel_size != (1,) or mixing.fn[3].kernel_size != (1,):
            raise Unspelled("its convolutions over the tokens' channels are wider than one place")
        if type(mixing.fn[1]) is not type(mlp.fn[1]):
            raise Unspelled("its two MLPs have different activations")
        slots = {}
        for part, over in enumerate(("t_", "")):
            for name, layer in ((f"{over}gate_up", 0), (f"{over}down", 3)):
                for suffix, kind in (("", "weight"), ("_bias", "bias")):
                    slots[name + suffix] = Slot((f"{number}.{part}.fn.{layer}.{kind}",))
            slots[f"norm{part + 1}"] = Slot((f"{number}.{part}.norm.weight",))
        found.append((spec, slots))
    eps = {last.eps, *(part.norm.eps for block in blocks for part in block)}
    if len(eps) > 1:
        raise Unspelled(f"it has norms of different eps: {sorted(eps)}")
    end = BlockSpec(NORM, last.weight.shape[0], 0, eps=last.eps, norm="layer", norm_weight=True)
    return layout_of([*found, (end, {"norm1": Slot((f"{len(blocks)}.weight",))})])


# ---- x-transformers ------------------------------------------------------------------------------


def _transformer(module: Any, mask: str) -> Layout:
    """Its layers lie one after the other: attention and MLP in turn, norms and residuals beside."""
    if tuple(module.layer_types) != ("a", "f") * (len(module.layers) // 2):
        raise Unspelled(f"its layers are {module.layer_types}, no ('a', 'f') in turn")
    found, eps = [], {_eps(module.final_norm)}
    for number in range(0, len(module.layers), 2):
        slots: dict[str, Slot] = {}
        skips: set[float] = set()
        for place, (norms, _, residual) in enumerate(module.layers[number : number + 2], number):
            if any(norm is not None for norm in norms[1:]):
                raise Unspelled("it has norms after its sublayers (`sandwich_norm`)")
            half = place - number + 1
            if getattr(residual, "residual_scale", None) is not None:
                slots[f"skip{half}"] = Slot((f"layers.{place}.2.residual_scale",))
            skips.add(float(getattr(residual, "scale_residual_constant", 1)))
            eps.add(_eps(norms[0]))
            slots[f"norm{half}"] = _norm(f"layers.{place}.0.0", norms[0])
        if len(skips) > 1:
            raise Unspelled(f"it scales h by different constants in one block: {sorted(skips)}")
        attn, mlp = module.layers[number][1], module.layers[number + 1][1].ff
        if type(mlp[0]).__name__ == "GLU":
            raise Unspelled("its gated MLP keeps the gate in its second half (`ff_glu`)")
        start = f"layers.{number}.1"
        slots["qkv"] = Slot(tuple(f"{start}.to_{name}.weight" for name in "qkv"))
        slots["o"] = Slot((f"{start}.to_out.weight",))
        inner, down = mlp[0][0], next(part for part in mlp[1:] if isinstance(part, nn.Linear))
        last = next(name for name, part in mlp.named_children() if part is down)
        biases = ()
        for name, path, part in (("gate_up", "0.0", inner), ("down", last, down)):
            slots[name] = Slot((f"layers.{number + 1}.1.ff.{path}.weight",))
            if part.bias is not None:
                slots[f"{name}_bias"] = Slot((f"layers.{number + 1}.1.ff.{path}.bias",))
                biases += (name,)
        head, kv = attn.to_q.weight.shape[0] // attn.heads, attn.to_k.weight.shape[0]
        kv_heads = kv // head
        hidden = int(module.dim)
        spec = BlockSpec(
            ATTENTION, hidden, inner.weight.shape[0], num_heads=attn.heads, mask=mask,
            head_size=0 if head * attn.heads == hidden else head, biases=biases,
            kv_heads=0 if kv_heads == attn.heads else kv_heads,
            activation=_activation(mlp[0][-1]), skip_scale=skips.pop(),
            learned_skip="channel" * ("skip1" in slots), **_PRE,
        )  # fmt: skip
        found.append((spec, slots))
    if len(eps) > 1:
        raise Unspelled(f"it has norms of different eps: {sorted(eps)}")
    end = BlockSpec(NORM, int(module.dim), 0, norm="layer", norm_weight=True)
    found.append((end, {"norm1": _norm("final_norm", module.final_norm)}))
    return layout_of(
        [(dataclasses.replace(spec, eps=next(iter(eps))), slots) for spec, slots in found]
    )


def _eps(norm: Any) -> float:
    if type(getattr(norm, "ln", None)) is not nn.LayerNorm:
        raise Unspelled(f"it has a norm of class {type(norm).__name__}, or none where one is due")
    return float(norm.ln.eps)


def _norm(path: str, norm: Any) -> Slot:
    return Slot((f"{path}.gamma",), plus=float(norm.unit_offset))
