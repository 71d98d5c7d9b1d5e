"""What a reasoning net is to recurx: a hashable description and a flat list of weights.

A net is a stack of post-norm blocks (DESIGN of HRM/TRM): an attention block or a token-MLP block,
each followed by a SwiGLU over the hidden dimension. Weights stay the caller's own tensors (fp32
masters as a rule); every backend casts or packs them as it needs, and never modifies them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.hashing import hash_once

ATTENTION = "attention"
TOKEN_MLP = "token_mlp"
KINDS = (ATTENTION, TOKEN_MLP)

# The four weights of one block, in the flat order of the op. All are [out, in], no biases.
WEIGHT_NAMES = {
    ATTENTION: ("qkv", "o", "gate_up", "down"),
    TOKEN_MLP: ("t_gate_up", "t_down", "gate_up", "down"),
}


@dataclass(frozen=True)
class BlockSpec:
    """Shape of one block.

    Args:
        kind: `"attention"` or `"token_mlp"`.
        hidden: D, the width of the states.
        inner: F, inner width of the SwiGLU over D: `gate_up` [2F, D], gate first; `down` [D, F].
        num_heads: H of an attention block, which divides D; 0 for a token-MLP block.
        tokens: T that a token-MLP block is built for; 0 for attention (any T).
        token_inner: inner width of the SwiGLU over T; 0 for attention.
        eps: added to the mean square inside the rms norm.

    Raises:
        InvalidArgument: a size is no whole number from 1 on, or the heads do not divide D.
    """

    kind: str
    hidden: int
    inner: int
    num_heads: int = 0
    tokens: int = 0
    token_inner: int = 0
    eps: float = 1e-5
    key: str = field(init=False, repr=False, compare=False)  # all fields as one string

    def __post_init__(self) -> None:
        attends = self.kind == ATTENTION
        names = ("num_heads",) if attends else ("tokens", "token_inner")
        for name in ("hidden", "inner", *names):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise bad_argument("BlockSpec", name, "a whole number from 1 on", repr(value))
            if type(value) is not int and not isinstance(value, torch.SymInt):
                object.__setattr__(self, name, operator.index(value))  # NumPy's, say
        if attends and self.hidden % self.num_heads:
            expected = f"a divisor of hidden={self.hidden}"
            raise bad_argument("BlockSpec", "num_heads", expected, self.num_heads)
        # Formed once, here: torch.compile may not format a size that it has made symbolic.
        sizes = f"{self.hidden},{self.inner},{self.num_heads},{self.tokens},{self.token_inner}"
        object.__setattr__(self, "key", f"{self.kind},{sizes},{self.eps}")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads if self.num_heads else 0

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes in the order of `WEIGHT_NAMES[kind]`."""
        d, f = self.hidden, self.inner
        if self.kind == ATTENTION:
            mixer = ((3 * d, d), (d, d))
        else:
            mixer = ((2 * self.token_inner, self.tokens), (self.tokens, self.token_inner))
        return (*mixer, (2 * f, d), (d, f))

    @property
    def numbers(self) -> tuple[Any, ...]:
        """As the compiled CPU engine takes a block."""
        sizes = self.hidden, self.inner, self.num_heads, self.head_dim, self.tokens
        return self.kind != ATTENTION, *sizes, self.token_inner, self.eps

    @classmethod
    def from_key(cls, key: str) -> BlockSpec:
        """The block whose `key` is given."""
        kind, *sizes, eps = key.split(",")
        return cls(kind, *(int(size) for size in sizes), eps=float(eps))


@hash_once
@dataclass(frozen=True)
class NetSpec:
    """Shape of one net: its blocks, first to last, all of one hidden width."""

    blocks: tuple[BlockSpec, ...]

    @property
    def hidden(self) -> int:
        return self.blocks[0].hidden

    @property
    def num_weights(self) -> int:
        return 4 * len(self.blocks)

    def by_block(self, weights: Sequence[Any]) -> list[tuple[BlockSpec, Sequence[Any]]]:
        """Each block with its part of the flat list of weights."""
        return [(block, weights[4 * i : 4 * i + 4]) for i, block in enumerate(self.blocks)]

    @property
    def key(self) -> str:
        """All blocks as one string; `from_key` reads it back."""
        return ";".join([block.key for block in self.blocks])

    @classmethod
    def from_key(cls, key: str) -> NetSpec:
        return cls(tuple(BlockSpec.from_key(block) for block in key.split(";")))


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
        for index, weight in enumerate(self.weights):
            number, slot = divmod(index, 4)
            block = spec.blocks[number]
            shape = block.weight_shapes[slot]
            if tuple(weight.shape) != shape or not weight.is_floating_point():
                raise bad_argument(
                    "Net",
                    f"weights[{index}] (block {number}, {WEIGHT_NAMES[block.kind][slot]})",
                    f"a floating [out, in] = {list(shape)} tensor",
                    f"{weight.dtype} {list(weight.shape)}",
                )

    @classmethod
    def trusted(cls, spec: NetSpec, weights: Sequence[Tensor]) -> Net:
        """Without the checks, where they were made before."""
        net = cls.__new__(cls)
        net.spec, net.weights = spec, list(weights)
        return net

    def __repr__(self) -> str:
        kinds = ", ".join(block.kind for block in self.spec.blocks)
        return f"Net(D={self.spec.hidden}, [{kinds}])"


def _block_of(layer: Any, where: str) -> tuple[BlockSpec, list[Tensor]]:
    """Read one block with the official attribute names (self_attn | mlp_t, mlp, norm_eps)."""
    mlp, attn, mlp_t = layer.mlp, getattr(layer, "self_attn", None), getattr(layer, "mlp_t", None)
    gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
    hidden, inner = down.shape
    eps = float(getattr(layer, "norm_eps", 1e-5))
    if attn is not None:
        if attn.num_key_value_heads != attn.num_heads or attn.causal:
            raise bad_argument(
                "recurse",
                f"nets[{where}].self_attn",
                "non-causal attention with as many K/V heads as heads",
                f"causal={attn.causal}, {attn.num_key_value_heads} K/V heads of {attn.num_heads}",
            )
        spec = BlockSpec(ATTENTION, hidden, inner, num_heads=attn.num_heads, eps=eps)
        mixer = [attn.qkv_proj.weight, attn.o_proj.weight]
    else:
        tokens, token_inner = mlp_t.down_proj.weight.shape
        spec = BlockSpec(TOKEN_MLP, hidden, inner, tokens=tokens, token_inner=token_inner, eps=eps)
        mixer = [mlp_t.gate_up_proj.weight, mlp_t.down_proj.weight]
    return spec, [*mixer, gate_up, down]


def is_block_stack(module: Any) -> bool:
    """Whether `module` is a stack of blocks under the official attribute names."""
    layers = getattr(module, "layers", None)
    return (
        isinstance(layers, (nn.ModuleList, nn.Sequential, list, tuple))
        and len(layers) > 0
        and all(
            hasattr(layer, "mlp")
            and hasattr(layer.mlp, "gate_up_proj")
            and (hasattr(layer, "self_attn") or hasattr(layer, "mlp_t"))
            for layer in layers
        )
    )


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
    return all(getattr(type(layer), "forward", None) is _no_forward for layer in module.layers)


def read_stack(module: Any, where: str = "?") -> Net:
    """The weights and sizes of a stack of blocks, by its attribute names alone.

    What its code computes is another matter: `recurx.proof.as_net` proves it first.

    Raises:
        InvalidArgument: a weight has another shape than its block, or attention is not ours.
    """
    specs: list[BlockSpec] = []
    weights: list[Tensor] = []
    for number, layer in enumerate(module.layers):
        spec, block_weights = _block_of(layer, f"{where!r}].layers[{number}")
        specs.append(spec)
        weights.extend(block_weights)
    return Net(NetSpec(tuple(specs)), weights)


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
