"""What a reasoning net is to recurx: a hashable description and a flat list of weights.

A net is a stack of blocks (`BlockSpec`). This file alone reads modules: which attribute of which
code base is which weight and which field. Weights stay the caller's own tensors (fp32
masters as a rule); every backend casts or packs them as it needs, and never modifies them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.specs import ATTENTION, KINDS, TOKEN_MLP, VARIANT, WEIGHT_NAMES, BlockSpec, NetSpec

# MKL finds the processor at its first vector function. Two threads that called it at once computed
# half of a table by other code, 7e-5 off, so one seed made two nets: one number alone comes first.
torch.erfinv(torch.zeros(1, dtype=torch.float32, device="cpu"))

__all__ = ["ATTENTION", "KINDS", "TOKEN_MLP", "WEIGHT_NAMES", "BlockSpec", "Net", "NetSpec"]


class Net:
    """A `NetSpec` with its weights (flat, block after block, in the order of `WEIGHT_NAMES`).

    Raises:
        InvalidArgument: a weight is missing or has another shape than the spec says.
    """

    def __init__(self, spec: NetSpec, weights: Sequence[Tensor]) -> None:
        self.spec = spec
        self.weights = list(weights)
        if len(self.weights) != spec.num_weights:
            raise bad_argument(
                "Net", "weights", f"{spec.num_weights} tensors", f"{len(self.weights)}"
            )
        slots = [(n, slot) for n, block in enumerate(spec.blocks) for slot in block.slots]
        for index, (weight, (number, (name, shape))) in enumerate(
            zip(self.weights, slots, strict=True)
        ):
            if tuple(weight.shape) != shape or not weight.is_floating_point():
                what = "[out, in] = " if len(shape) == 2 else ""
                raise bad_argument(
                    "Net", f"weights[{index}] (block {number}, {name})",
                    f"a floating {what}{list(shape)} tensor",
                    f"{weight.dtype} {list(weight.shape)}",
                )  # fmt: skip

    @classmethod
    def trusted(cls, spec: NetSpec, weights: Sequence[Tensor]) -> Net:
        """Without the checks, where they were made before."""
        net = cls.__new__(cls)
        net.spec, net.weights = spec, list(weights)
        return net

    def __repr__(self) -> str:
        kinds = ", ".join(block.kind for block in self.spec.blocks)
        return f"Net(D={self.spec.hidden}, [{kinds}])"


def numbers_of(block: BlockSpec) -> tuple[Any, ...]:
    """As the compiled CPU engine takes a block."""
    sizes = block.hidden, block.inner, block.num_heads, block.head_dim, block.tokens
    return block.kind != ATTENTION, *sizes, block.token_inner, block.eps


# ---- reading modules -----------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer as it was read: its block, and the dotted path of each weight of `spec.slots`.

    A path may occur twice (a norm that q and k share). A weight of more dimensions than its slot
    holds the same rows in order (one matrix a head, say), and is flattened.
    """

    spec: BlockSpec
    paths: tuple[str, ...]


class Unreadable(Exception):
    """(path below the layer, what is wrong with it)."""


# What a part is called. First TRM, HRM and what follows them (URM, EqR, RSM, nano-trm), then SIC,
# then priml; a part that is None is not there.
_CALLED = {
    "mixer": ("self_attn", "mlp_t", "attn", "token_mixer"),
    "mlp": ("mlp", "ffn", "channel_mixer"),
    "qkv": ("qkv_proj", "proj_qkv"),
    "o": ("o_proj", "proj_out"),
    "gate_up": ("gate_up_proj", "up_proj"),
    "down": ("down_proj",),
    "norm1": ("norm1", "norm_token"),
    "norm2": ("norm2", "norm_channel"),
    "q_norm": ("qk_norm", "norm_q"),
    "k_norm": ("qk_norm", "norm_k"),
    "attn_norm": ("o_norm", "norm_out"),
    "inner_norm": ("norm",),
    "conv": ("dwconv",),
    "heads": ("num_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_heads_kv"),
}
# Norms in modules of their own: (weight, part that it lies in, field that says its kind).
_NORMS = (
    ("norm1", "", "norm"), ("norm2", "", "norm"), ("q_norm", "mixer", "qk_norm"),
    ("k_norm", "mixer", "qk_norm"), ("attn_norm", "mixer", "attn_norm"),
    ("inner_norm", "mlp", "inner_norm"), ("t_inner_norm", "mixer", "inner_norm"),
)  # fmt: skip
_CONV_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _called(module: Any, part: str) -> str | None:
    """The name of a part of a module."""
    return next((n for n in _CALLED[part] if getattr(module, n, None) is not None), None)


def _is_block(layer: Any) -> bool:
    if isinstance(getattr(layer, "spec", None), BlockSpec):
        return True
    mlp, mixer = _called(layer, "mlp"), _called(layer, "mixer")
    return bool(mlp and mixer and _called(getattr(layer, mlp), "gate_up"))


def read_layer(layer: Any) -> Layer:
    """The block that a layer's names, attributes and shapes tell; a proof shows whether it is it.

    Raises:
        Unreadable: something is missing, or has no spelling.
        AttributeError, KeyError, TypeError, ValueError, InvalidArgument: it is no such layer.
    """
    if isinstance(spec := getattr(layer, "spec", None), BlockSpec):  # a model of ours
        return Layer(spec, tuple(f"weights.{name}" for name, _ in spec.slots))
    tops: dict[str, Any] = {top: _called(layer, top) for top in ("mixer", "mlp")} | {"": None}
    paths: dict[str, str] = {}
    fields: dict[str, Any] = {}
    eps: set[float] = set()
    sizes: dict[str, list[int]] = {}

    def part(top: str, name: str) -> tuple[str, Any]:
        """(path, child); the child is None if it is not there."""
        outer = getattr(layer, tops[top]) if top else layer
        called = _called(outer, name)
        path = ".".join(filter(None, (tops[top], called)))
        return path, called and getattr(outer, called)

    attends = tops["mixer"] == "self_attn" or part("mixer", "qkv")[1] is not None
    own = ("qkv", "o") if attends else ("t_gate_up", "t_down")
    for slot in (*own, "gate_up", "down"):
        path, child = part("mixer" if slot in own else "mlp", slot.removeprefix("t_"))
        weight = getattr(child, "weight", None)
        if not isinstance(weight, Tensor):
            raise Unreadable(path, "has no plain parameter `weight`")
        paths[slot] = f"{path}.weight"
        sizes[slot] = [math.prod(map(int, weight.shape[:-1])), int(weight.shape[-1])]
        if isinstance(getattr(child, "bias", None), Tensor):
            fields["biases"] = (*fields.get("biases", ()), slot)
            paths[f"{slot}_bias"] = f"{path}.bias"
    hidden, inner = sizes["down"]
    more: dict[str, Any] = {}
    if attends:
        mixer = getattr(layer, tops["mixer"])
        heads = getattr(mixer, _called(mixer, "heads") or "num_heads")
        kv_heads = getattr(mixer, _called(mixer, "kv_heads") or "", heads)
        rows, parts = sizes["qkv"][0], heads + 2 * kv_heads
        if not parts or rows % parts:
            raise bad_argument("BlockSpec", "num_heads", f"heads that share {rows} rows", heads)
        head_size = rows // parts
        more = {"num_heads": heads}
        fields |= {"mask": "causal" * bool(getattr(mixer, "causal", False))}
        fields |= {"kv_heads": kv_heads * (kv_heads != heads)}
        fields |= {"head_size": head_size * (head_size * heads != hidden)}
    else:
        more = dict(zip(("tokens", "token_inner"), sizes["t_down"], strict=True))
    for slot, top, field in _NORMS:
        path, child = part(top, slot.removeprefix("t_"))
        if child is None or (attends and slot == "t_inner_norm"):
            continue
        fields[field] = "layer" if isinstance(child, nn.LayerNorm) else "rms"
        eps.add(float(child.eps))
        for name, suffix in (("weight", ""), ("bias", "_bias")):
            if isinstance(getattr(child, name, None), Tensor):
                fields[f"{field}_{name}"] = True
                paths[f"{slot}{suffix}"] = f"{path}.{name}"
        if field == "inner_norm":
            fields |= {"inner_norm_of": "product", "inner_norm_tokens": slot == "t_inner_norm"}
    path, child = part("mlp", "conv")
    if child is not None:
        paths |= {"conv": f"{path}.weight", "conv_bias": f"{path}.bias"}
        fields |= {"conv": int(child.weight.shape[-1])}
        fields |= {"conv_of": "middle" if len(child.weight) == inner else "gate_up"}
        if type(child).forward is nn.Conv1d.forward:  # takes its own dtype only
            fields["conv_dtype"] = _CONV_DTYPES[child.weight.dtype]
    fields |= {"gated": sizes["gate_up"][0] != inner}
    fields |= {"placement": "pre" if getattr(layer, "prenorm", False) else "post"}
    eps = eps or {float(getattr(layer, "norm_eps", 1e-5))}
    if len(eps) > 1:
        raise Unreadable("", f"has norms of different eps: {sorted(eps)}")
    fields = {name: value for name, value in fields.items() if value != VARIANT[name]}
    kind = ATTENTION if attends else TOKEN_MLP
    spec = BlockSpec(kind, hidden, inner, eps=eps.pop(), **more, **fields)
    names = [name for name, _ in spec.slots]
    if set(names) != paths.keys():
        raise Unreadable("", f"has weights apart from its others: {set(names) ^ paths.keys()}")
    return Layer(spec, tuple(paths[name] for name in names))


def respelled(spec: NetSpec) -> Iterator[dict[str, Any]]:
    """What no name tells of a layer's code, each as fields that differ from those that were read:
    of RSM where the norm beside its token MLP runs; of others activation, mask, kind and place of
    norms."""
    first = spec.blocks[0]
    axes: dict[str, tuple[Any, ...]] = {
        "token_norm": ("tokens", "hidden")[: 1 + (first.kind == TOKEN_MLP)],
        "placement": ("post", "pre", "sandwich")[: 3 - first.norm_weight],
        "norm": ("rms", "layer"),
        "mask": ("", "causal")[: 1 + (first.kind == ATTENTION)],
        "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"),
    }
    if first.inner_norm_of == "product":
        del axes["activation"]
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        changes = {name: value for name, value in fields.items() if value != getattr(first, name)}
        if changes:
            yield changes


def spelled(spec: NetSpec, changes: Mapping[str, Any]) -> NetSpec:
    """The same blocks but for some fields, which change no weight."""
    if not changes:
        return spec
    return NetSpec(tuple(dataclasses.replace(block, **changes) for block in spec.blocks))


def layers_of(module: Any) -> Any:
    """The layers of a stack: its `layers`, or itself if it is a list of them."""
    layers = getattr(module, "layers", None)
    alone = layers is None and isinstance(module, (nn.ModuleList, nn.Sequential))
    return module if alone else layers


def is_block_stack(module: Any) -> bool:
    """Whether `module` is a stack of blocks under names that are known."""
    layers = layers_of(module)
    kinds = (nn.ModuleList, nn.Sequential, list, tuple)
    return isinstance(layers, kinds) and len(layers) > 0 and all(map(_is_block, layers))


# Forwards that are `recurx.reference` of the attributes, whatever code the layers hold.
_by_attributes: set[Any] = set()
plain_linears: set[Any] = {nn.Linear.forward}
_no_forward = nn.Module.forward


def computes_the_reference(cls: type[nn.Module]) -> type[nn.Module]:
    """Decorate a stack whose `forward` is `recurx.reference` on the weights of its attributes."""
    _by_attributes.add(cls.forward)
    return cls


def by_attributes(module: Any) -> bool:
    """Whether a stack has no code but ours, or none at all: its weights say what it computes."""
    forward = getattr(type(module), "forward", _no_forward)
    if forward is not _no_forward:
        return forward in _by_attributes
    layers = layers_of(module)
    return all(getattr(type(layer), "forward", None) is _no_forward for layer in layers)


def read_stack(module: Any, where: str = "?") -> Net:
    """The weights and sizes of a stack of blocks, by its names and shapes alone.

    What its code computes is another matter: `recurx.proof.as_net` proves it first.

    Raises:
        InvalidArgument: a weight has another shape than its block.
        Unreadable: see `read_layer`.
    """
    read = [read_layer(layer) for layer in layers_of(module)]
    spec = NetSpec(tuple(layer.spec for layer in read))
    return Net(spec, weights_at(module, spec, [layer.paths for layer in read]))


def weights_at(module: Any, spec: NetSpec, paths: Sequence[Sequence[str]]) -> list[Tensor]:
    """The weights of a stack's layers in the flat order, as their slots have them."""
    weights = []
    for layer, block, own in zip(layers_of(module), spec.blocks, paths, strict=True):
        for path, (_, shape) in zip(own, block.slots, strict=True):
            weight = functools.reduce(getattr, path.split("."), layer)
            weights.append(weight if weight.ndim == len(shape) else weight.flatten(0, -len(shape)))
    return weights


def rope_tables(
    tokens: int, head_dim: int, base: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary position embeddings, both fp32 [T, head_dim], rotate-half pairing.

    Source: RoFormer (arXiv 2104.09864), section 3.2, in the pairing (j, j + head_dim/2).
    """
    if head_dim % 2:
        raise bad_argument("rope_tables", "head_dim", "an even number", head_dim)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(tokens, dtype=torch.float32, device=device)
    angle = torch.outer(position, 1.0 / (base**exponent))
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()
