"""What a reasoning net is made of, as hashable values: blocks and their variants, no tensors.

A block is a mixer over the tokens (attention, an MLP over T, or none) and an MLP over the hidden
width, each with a residual sum and a norm. The defaults of `BlockSpec` are the blocks of TRM and
HRM; each other field spells one thing in which a later system differs (see `recurx.reference`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from recurx.errors import bad_argument
from recurx.hashing import hash_once
from recurx.noise import DRAWN, MOST

ATTENTION = "attention"
TOKEN_MLP = "token_mlp"
NO_MIXER = "none"
NORM = "norm"  # a norm alone, as the last one of a pre-norm stack
KINDS = (ATTENTION, TOKEN_MLP)  # those of TRM and HRM
ALL_KINDS = (*KINDS, NO_MIXER, NORM)

# The matrices of one block, in the flat order of the op: [out, in] each. What its variant adds
# follows them, see `BlockSpec.slots`.
WEIGHT_NAMES = {
    ATTENTION: ("qkv", "o", "gate_up", "down"),
    TOKEN_MLP: ("t_gate_up", "t_down", "gate_up", "down"),
    NO_MIXER: ("gate_up", "down"),
    NORM: (),
}
_wrong = functools.partial(bad_argument, "BlockSpec")
_CHOICES = {
    "norm": ("rms", "layer"),
    "placement": ("post", "pre", "sandwich"),
    "token_norm": ("tokens", "hidden"),
    **dict.fromkeys(("learned_scale", "learned_skip"), ("", "scalar", "channel")),
    "mask": ("", "causal", "prefix"),
    **dict.fromkeys(("qk_norm", "attn_norm", "inner_norm"), ("", "rms", "layer")),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"),
    "inner_norm_of": ("middle", "product"),
    "conv_of": ("middle", "gate_up"),
    "conv_dtype": ("", "float32", "bfloat16"),
}


@dataclass(frozen=True)
class BlockSpec:
    """Shape of one block, and in what it differs from those of TRM and HRM.

    Args:
        kind: `"attention"`, `"token_mlp"`, `"none"` (no mixer) or `"norm"` (one norm, no more).
        hidden: D, the width of the states.
        inner: F, inner width of the MLP over D: `gate_up` [2F, D], gate first; `down` [D, F].
        num_heads: H of an attention block, which divides D; 0 for other kinds.
        tokens: T that a token-MLP block is built for; 0 for attention (any T).
        token_inner: inner width of the MLP over T; 0 for attention.
        eps: added to the mean square (or variance) inside every norm.
        norm: `"rms"` or `"layer"` (mean subtracted).
        norm_weight, norm_bias: whether norms have a weight [D], a bias [D].
        placement: `"post"`: h = norm(a h + s f(h)); `"pre"`: h = a h + s f(norm(h)); `"sandwich"`:
            h = a h + s norm(f(norm(h))).
        token_norm: over what the norm beside a token MLP runs: `"tokens"` (TRM) or `"hidden"`.
        residual_scale, skip_scale: s and a, constants.
        learned_scale, learned_skip: s or a times a weight, one (`"scalar"`) or [D] (`"channel"`).
        biases: names of the matrices that have a bias [out].
        kv_heads: K/V heads, which divide H; 0: as many as heads. `qkv` holds H + 2 kv_heads heads.
        head_size: width of a head; 0: D / H.
        mask: `"causal"`: token i sees j <= i; `"prefix"`: the first `prefix` tokens too.
        prefix: number of these.
        key_padding: whether no token sees the keys of `recurse(key_mask=)`.
        window: token i sees j only where |i - j| < window; 0: all.
        qk_norm, qk_norm_weight: norm of each head of q and k before the rotation, and its weights.
        attn_gate: whether heads are multiplied by sigmoid(G h) before `o`; G is `attn_gate`.
        attn_norm, attn_norm_weight: norm over all heads together before `o`.
        axial: (rows, columns, axis): attention within each column (axis 0) or row (axis 1) alone;
            T = rows x columns. Rotary tables then have one row a place along the axis.
        activation: `"silu"`, `"gelu"`, `"gelu_tanh"`, `"relu"`, `"relu2"` (squared), `"sigmoid"`.
        gated: whether MLPs are down(act(gate x) * (up x)); else down(act(up x)), `gate_up` [F, D].
        inner_norm, inner_norm_weight: norm inside of the MLP over D.
        inner_norm_tokens: whether the MLP over T has it too.
        inner_norm_of: `"middle"`: of what `down` reads; `"product"`: sigmoid(g) norm(g u) is it.
        conv: width k of a depthwise convolution over the tokens in the MLP over D, k // 2 zeros
            before the first; 0: none. Weights [C, 1, k] and [C].
        conv_of: `"middle"`: of what `down` reads, with the activation after it (URM); `"gate_up"`:
            of the 2F channels before the activation.
        conv_dtype: dtype in which the convolution, and `down`, are computed; "": the states'.
        dropout: share of the elements of f(h) that are zeroed before the residual sum, the others
            grow by 1 / (1 - share); drawn from a counter, as `Step.noise`. 0: evaluation.
        drop_path: share of samples for which f(h) is zeroed as a whole (stochastic depth).

    Raises:
        InvalidArgument: a size or a choice is impossible; the message says which and why.

    Sources: TRM (arXiv 2510.04871) section 4; URM (2512.14693) section 3; SIC (2601.19085), inner
    norms; FPRM (2606.18206), a learned a; x-transformers' `scale_residual` and its constant;
    dropout (1207.0580); stochastic depth (1603.09382).
    """

    kind: str
    hidden: int
    inner: int
    num_heads: int = 0
    tokens: int = 0
    token_inner: int = 0
    eps: float = 1e-5
    norm: str = "rms"
    norm_weight: bool = False
    norm_bias: bool = False
    placement: str = "post"
    token_norm: str = "tokens"
    residual_scale: float = 1.0
    learned_scale: str = ""
    skip_scale: float = 1.0
    learned_skip: str = ""
    biases: tuple[str, ...] = ()
    kv_heads: int = 0
    head_size: int = 0
    mask: str = ""
    prefix: int = 0
    window: int = 0
    qk_norm: str = ""
    qk_norm_weight: bool = False
    attn_gate: bool = False
    attn_norm: str = ""
    attn_norm_weight: bool = False
    axial: tuple[int, ...] = ()
    activation: str = "silu"
    gated: bool = True
    inner_norm: str = ""
    inner_norm_weight: bool = False
    inner_norm_tokens: bool = False
    inner_norm_of: str = "middle"
    conv: int = 0
    conv_of: str = "middle"
    conv_dtype: str = ""
    dropout: float = 0.0
    drop_path: float = 0.0
    key_padding: bool = False
    key: str = field(init=False, repr=False, compare=False)  # all fields as one string
    changed: tuple[str, ...] = field(init=False, repr=False, compare=False)  # not as TRM has them
    # Name and shape of each weight, in the flat order.
    slots: tuple[tuple[str, tuple[int, ...]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ALL_KINDS:
            raise _wrong("kind", f"one of {ALL_KINDS}", repr(self.kind))
        for name in (*_SIZES, *VARIANT):
            if type(getattr(self, name)) not in (int, str, bool, float, torch.SymInt):
                object.__setattr__(self, name, _plain(getattr(self, name)))
        needed = {ATTENTION: ("num_heads",), TOKEN_MLP: ("tokens", "token_inner")}
        for name in ("hidden", *["inner"] * (self.kind != NORM), *needed.get(self.kind, ())):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise _wrong(name, "a whole number from 1 on", repr(value))
        if type(self.eps) not in (int, float) or not 0 <= self.eps < math.inf:
            raise _wrong("eps", "a number from 0 on", repr(self.eps))
        if self.kind == ATTENTION and not self.head_size and self.hidden % self.num_heads:
            raise _wrong("num_heads", f"a divisor of hidden={self.hidden}", self.num_heads)
        # Plain loops over plain values: torch.compile traces this.
        changed = tuple(name for name, default in VARIANT.items() if getattr(self, name) != default)
        # Formed once, here: torch.compile may not format a size that it has made symbolic.
        key = ",".join([f"{getattr(self, name)}" for name in ("kind", *_SIZES)])
        if changed:
            self._check_variant(changed)
            key += "".join([f",{name}:{_text(getattr(self, name))}" for name in changed])
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "changed", ("kind",) * (self.kind not in KINDS) + changed)
        object.__setattr__(self, "slots", tuple(self._slots()))

    def _check_variant(self, changed: tuple[str, ...]) -> None:
        for name in changed:
            value = getattr(self, name)
            if name in _CHOICES:
                good, expected = value in _CHOICES[name], f"one of {_CHOICES[name]}"
            elif name in ("kv_heads", "head_size", "prefix", "window", "conv"):
                good, expected = type(value) is int and value > 0, "a whole number"
            elif name in ("residual_scale", "skip_scale"):
                good, expected = type(value) in (int, float) and math.isfinite(value), "a number"
            elif name in DRAWN:
                good, expected = type(value) in (int, float) and 0 <= value <= MOST, "0 to 1-2^-24"
            elif name == "biases":
                names = WEIGHT_NAMES[self.kind] + ("attn_gate",) * self.attn_gate
                good, expected = type(value) is tuple and {*value} <= {*names}, f"names of {names}"
            elif name == "axial":
                good = type(value) is tuple and [*map(type, value)] == [int] * 3
                good = good and min(value[:2]) > 0 and value[2] in (0, 1)
                expected = "(rows, columns, 0 or 1)"
            else:
                good, expected = type(value) is bool, "True or False"
            if not good:
                raise _wrong(name, expected, repr(value))
            if self.kind != (only := _ONLY_OF.get(name, self.kind)):
                raise _wrong(name, f"nothing without {only}", repr(value))
            if value == "channel" and self.kind == TOKEN_MLP and self.token_norm == "tokens":
                raise _wrong(name, "'scalar', or token_norm='hidden'", repr(value))
        for name, other in _NEEDS.items():
            if name in changed and other not in changed:
                raise _wrong(name, f"nothing without {other}", name)
        if self.prefix and self.mask != "prefix":
            raise _wrong("prefix", "nothing without mask='prefix'", self.prefix)
        if self.kv_heads and self.num_heads % self.kv_heads:
            raise _wrong("kv_heads", f"a divisor of num_heads={self.num_heads}", self.kv_heads)
        if self.inner_norm_of == "product" and not (self.gated and self.activation == "silu"):
            raise _wrong("inner_norm_of", "'middle' unless SwiGLU", "'product'")

    def _slots(self) -> list[tuple[str, tuple[int, ...]]]:
        d, f, both = self.hidden, self.inner, 2 if self.gated else 1
        shapes: dict[str, tuple[int, ...]] = {"gate_up": (both * f, d), "down": (d, f)}
        if self.kind == ATTENTION:
            heads = self.num_heads * self.head_dim
            shapes["qkv"] = heads + 2 * (self.kv_heads or self.num_heads) * self.head_dim, d
            shapes["o"] = d, heads
        elif self.kind == TOKEN_MLP:
            shapes["t_gate_up"] = both * self.token_inner, self.tokens
            shapes["t_down"] = self.tokens, self.token_inner
        slots = [(name, shapes[name]) for name in WEIGHT_NAMES[self.kind]]
        if not self.changed:
            return slots
        slots += [("attn_gate", shapes["o"][::-1])] if self.attn_gate else []
        slots += [(f"{name}_bias", shape[:1]) for name, shape in slots if name in self.biases]
        for number in {NORM: "1", NO_MIXER: "2"}.get(self.kind, "12"):
            over_tokens = number == "1" and self.kind == TOKEN_MLP and self.token_norm == "tokens"
            width = (self.tokens if over_tokens else d,)
            for name in ("norm", "out_norm")[: 1 + (self.placement == "sandwich")]:
                slots += [(f"{name}{number}", width)] * self.norm_weight
                slots += [(f"{name}{number}_bias", width)] * self.norm_bias
            for name, learned in (("scale", self.learned_scale), ("skip", self.learned_skip)):
                if learned and self.kind != NORM:
                    slots.append((f"{name}{number}", (d if learned == "channel" else 1,)))
        if self.qk_norm_weight:
            slots += [("q_norm", (self.head_dim,)), ("k_norm", (self.head_dim,))]
        slots += [("attn_norm", (self.num_heads * self.head_dim,))] * self.attn_norm_weight
        slots += [("inner_norm", (f,))] * self.inner_norm_weight
        if self.inner_norm_weight and self.inner_norm_tokens:
            slots.append(("t_inner_norm", (self.token_inner,)))
        if self.conv:
            channels = shapes["gate_up"][0] if self.conv_of == "gate_up" else f
            slots += [("conv", (channels, 1, self.conv)), ("conv_bias", (channels,))]
        return slots

    @property
    def head_dim(self) -> int:
        return self.head_size or (self.hidden // self.num_heads if self.num_heads else 0)

    @property
    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the weights in the flat order."""
        return tuple(shape for _, shape in self.slots)

    @property
    def products(self) -> list[tuple[str, int, int]]:
        """(name, rows, columns) of each matrix."""
        return [(name, shape[0], shape[1]) for name, shape in self.slots if len(shape) == 2]

    def line(self, tokens: int) -> int:
        """Tokens that one of them can see at most: those of a line of the grid."""
        return self.axial[self.axial[2]] if self.axial else tokens

    @classmethod
    def from_key(cls, key: str) -> BlockSpec:
        """The block whose `key` is given."""
        kind, *rest = key.split(",", 7)
        return cls(kind, *map(int, rest[:5]), float(rest[5]), **_fields("".join(rest[6:])))

    def with_fields(self, text: str) -> BlockSpec:
        """The same block with the fields that a text names: "conv:2,norm:layer,biases:qkv+o"."""
        return dataclasses.replace(self, **_fields(text))


VARIANT = {f.name: f.default for f in fields(BlockSpec)[7:] if f.init}  # as TRM and HRM have them
_BOOLS = {"true": True, "false": False}
_SIZES = tuple(f.name for f in fields(BlockSpec)[1:7])  # and eps
_ONLY_OF = {"inner_norm_tokens": TOKEN_MLP} | dict.fromkeys((
    "kv_heads", "head_size", "mask", "prefix", "window", "qk_norm", "qk_norm_weight", "attn_gate",
    "attn_norm", "attn_norm_weight", "axial", "key_padding",
), ATTENTION)  # fmt: skip
_NEEDED = ("qk_norm", "attn_norm", "inner_norm", "conv")
_NEEDS = {name: other for name in VARIANT for other in _NEEDED if name.startswith(f"{other}_")}


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    """Python's own: NumPy's numbers and those of tensors, lists as tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _fields(text: str) -> dict[str, Any]:
    """The inverse of `_text`, by the type of each field's default."""
    found: dict[str, Any] = {}
    for name, _, value in (pair.strip().partition(":") for pair in text.split(",") if text):
        if name not in VARIANT:
            raise _wrong("field", f"one of {', '.join(VARIANT)}", name)
        kind = type(VARIANT[name])
        try:
            if kind is tuple:
                found[name] = tuple(map(int if name == "axial" else str, value.split("+")))
            else:
                found[name] = _BOOLS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise _wrong(name, kind.__name__, repr(value)) from None
    return found


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
        return sum([len(block.slots) for block in self.blocks])

    @property
    def changed(self) -> tuple[str, ...]:
        """Fields in which a block differs from those of TRM and HRM, each once."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.changed))

    def by_block(self, weights: Sequence[Any]) -> list[tuple[BlockSpec, Sequence[Any]]]:
        """Each block with its part of the flat list of weights."""
        parts, first = [], 0
        for block in self.blocks:
            parts.append((block, weights[first : first + len(block.slots)]))
            first += len(block.slots)
        return parts

    @property
    def key(self) -> str:
        """All blocks as one string; `from_key` reads it back."""
        return ";".join([block.key for block in self.blocks])

    @classmethod
    def from_key(cls, key: str) -> NetSpec:
        return cls(tuple(BlockSpec.from_key(block) for block in key.split(";")))
