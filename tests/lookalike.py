"""A model with the layout of the official TRM / HRM code, written anew: what `patch` meets.

Attribute names, signatures and the split into methods are those that the official code has; the
text is not. `Quirk` plants deviations that `patch` has to notice.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    """Fields that the official configuration has (those that matter here)."""

    variant: str = "trm"
    vocab_size: int = 7
    seq_len: int = 9
    hidden_size: int = 32
    num_heads: int = 2
    H_cycles: int = 2
    L_cycles: int = 2
    H_layers: int = 1
    L_layers: int = 2
    mlp_t: bool = False
    num_puzzle_identifiers: int = 3
    forward_dtype: str = "float32"
    quirks: frozenset[str] = field(default_factory=frozenset)


class Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Gated(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Dense(width, 2 * inner, bias)
        self.down_proj = Dense(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Mixer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = self.num_key_value_heads = heads
        self.head_dim = width // heads
        self.causal = causal
        self.qkv_proj = Dense(width, 3 * width)
        self.o_proj = Dense(width, width)

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, tokens, 3 * self.num_heads, self.head_dim)
        q, k, v = qkv.split(self.num_heads, dim=2)
        q, k = turn(q, *cos_sin), turn(k, *cos_sin)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    low, high = wide.chunk(2, -1)
    swapped = torch.cat((-high, low), -1)
    return (wide * cos.unsqueeze(-2) + swapped * sin.unsqueeze(-2)).to(x.dtype)


def normed(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        tokens = config.seq_len + 1
        if config.mlp_t:
            self.mlp_t = Gated(tokens, 16)
        else:
            self.self_attn = Mixer(config.hidden_size, config.num_heads, "causal" in config.quirks)
        self.mlp = Gated(config.hidden_size, 48, bias="bias" in config.quirks)
        self.norm_eps = 1e-5
        self.scale = 0.5 if "scaled residual" in config.quirks else 1.0

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h = hidden_states
        if hasattr(self, "mlp_t"):
            h = h.transpose(1, 2)
            h = normed(h + self.mlp_t(h), self.norm_eps).transpose(1, 2)
        else:
            h = normed(h + self.self_attn(cos_sin, h), self.norm_eps)
        return normed(h + self.scale * self.mlp(h), self.norm_eps)


class Stack(nn.Module):
    def __init__(self, config: Config, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))
        if "gain" in config.quirks:
            self.gain = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self, hidden_states: Tensor, input_injection: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        h = hidden_states if input_injection is None else hidden_states + input_injection
        for layer in self.layers:
            h = layer(hidden_states=h, **kwargs)
        return h


class Tables(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        rate = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(tokens).float(), rate).repeat(1, 2)
        self.register_buffer("cos_cached", angle.cos(), persistent=False)
        self.register_buffer("sin_cached", angle.sin(), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.cos_cached, self.sin_cached


class Lookup(nn.Module):
    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.randn(rows, width) / math.sqrt(width))
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding_weight.to(self.dtype))


LOW = tuple(f"z_L{k}" for k in range(1, 7))
STATES = {
    "trm": ("z_H", "z_L"), "hrm": ("z_H", "z_L"), "single_z": ("z_L",), "hier6": ("z_H", *LOW)
}  # fmt: skip
CARRIES = {
    variant: make_dataclass(f"Carry_{variant}", [(name, Tensor) for name in names])
    for variant, names in STATES.items()
}
for _carry in CARRIES.values():
    _carry.__module__ = __name__
globals().update({carry.__name__: carry for carry in CARRIES.values()})


class Inner(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = getattr(torch, config.forward_dtype)
        width, self.puzzle_emb_len = config.hidden_size, 1
        self.embed_tokens = Lookup(config.vocab_size, width, self.dtype)
        self.puzzles = Lookup(config.num_puzzle_identifiers, width, self.dtype)
        self.lm_head = Dense(width, config.vocab_size)
        self.q_head = Dense(width, 2, bias=True)
        if not config.mlp_t:
            self.rotary_emb = Tables(config.seq_len + 1, width // config.num_heads)
        self.L_level = Stack(config, config.L_layers)
        if config.variant == "hrm":
            self.H_level = Stack(config, config.H_layers)
        for state in STATES[config.variant]:
            name = f"{state.removeprefix('z_')}_init"
            self.register_buffer(name, torch.randn(width).to(self.dtype))

    def _input_embeddings(self, input: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        prefix = self.puzzles(puzzle_identifiers).unsqueeze(1)
        tokens = torch.cat((prefix, self.embed_tokens(input.to(torch.int32))), dim=1)
        return math.sqrt(self.config.hidden_size) * tokens

    def empty_carry(self, batch_size: int) -> Any:
        shape = (batch_size, self.config.seq_len + 1, self.config.hidden_size)
        names = STATES[self.config.variant]
        return CARRIES[self.config.variant](*(torch.empty(shape, dtype=self.dtype) for _ in names))

    def reset_carry(self, reset_flag: Tensor, carry: Any) -> Any:
        flag = reset_flag.view(-1, 1, 1)
        fresh = {
            name: torch.where(flag, getattr(self, f"{name.removeprefix('z_')}_init"), state)
            for name, state in vars(carry).items()
        }
        return type(carry)(**fresh)

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> Any:
        info = {"cos_sin": self.rotary_emb() if hasattr(self, "rotary_emb") else None}
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        z = {name: getattr(carry, name) for name in STATES[self.config.variant]}
        calls = list(self._calls(z, x, info))
        window = 2 if self.config.variant == "hrm" else self.config.L_cycles + 1
        window += "window" in self.config.quirks
        with torch.no_grad():
            for call in calls[: len(calls) - window]:
                call()
        for call in calls[len(calls) - window :]:
            call()
        answer = z["z_L" if self.config.variant == "single_z" else "z_H"]
        new = type(carry)(**{name: state.detach() for name, state in z.items()})
        q = self.q_head(answer[:, 0]).float()
        return new, self.lm_head(answer)[:, 1:], (q[..., 0], q[..., 1])

    def _calls(self, z: dict[str, Tensor], x: Tensor, info: dict[str, Any]) -> Any:
        """The net calls in order, each a function that changes z."""
        variant, level = self.config.variant, self.L_level
        flat = "flat sum" in self.config.quirks

        def low(name: str) -> None:
            if variant == "single_z":
                z["z_L"] = level(z["z_L"] + x, **info)
            elif flat:
                z[name] = level(z[name] + z["z_H"], x, **info)
            else:
                z[name] = level(total() if variant == "hier6" else z[name], z["z_H"] + x, **info)

        def high() -> None:
            if variant == "single_z":
                z["z_L"] = level(z["z_L"], **info)
            else:
                net = self.H_level if variant == "hrm" else level
                z["z_H"] = net(z["z_H"], total() if variant == "hier6" else z["z_L"], **info)

        def total() -> Tensor:
            first, *rest = (z[name] for name in LOW)
            for state in rest:
                first = first + state
            return first

        for _ in range(self.config.H_cycles):
            for k in range(self.config.L_cycles):
                yield functools.partial(low, LOW[k] if variant == "hier6" else "z_L")
            yield high


class Wrapper(nn.Module):
    """Resets, runs, counts steps: the least of an ACT wrapper."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.inner = Inner(config)

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> Any:
        return self.inner(carry, batch)


class LossHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
        new, logits, (q_halt, q_continue) = self.model(carry, batch)
        loss = logits.float().square().mean() + q_halt.sum() - 0.5 * q_continue.square().sum()
        return new, logits, loss


def build(variant: str = "trm", seed: int = 0, **fields: Any) -> LossHead:
    """Loss head, wrapper and inner with random weights."""
    torch.manual_seed(seed)
    return LossHead(Wrapper(Config(variant=variant, **fields)))


def inputs(model: nn.Module, batch: int = 3) -> tuple[Any, dict[str, Tensor]]:
    """A random carry and a batch for `model`."""
    inner = next(m for m in model.modules() if isinstance(m, Inner))
    generator = torch.Generator().manual_seed(1)
    carry = inner.empty_carry(batch)
    for state in vars(carry).values():
        state.copy_(torch.randn(state.shape, generator=generator))
    return carry, {
        "inputs": torch.randint(0, 7, (batch, 9), generator=generator),
        "puzzle_identifiers": torch.arange(batch, dtype=torch.int32) % 3,
    }
