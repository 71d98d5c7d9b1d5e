"""Modules with the layout of URM, EqR, RSM, SIC and FPRM, written anew and small.

Attribute names, signatures and the split into methods are those that the code has; the text is not.
`twist` plants a deviation in the recursion that `patch` has to notice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import lookalike
from tests.lookalike import Config, Dense, Lookup, Tables

WIDTH, TOKENS = 32, 9


class ConvGated(lookalike.Gated):
    """URM's: a convolution over the tokens before `down`, in its own dtype."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.dwconv = nn.Conv1d(inner, inner, 2, padding=1, groups=inner)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        middle = (F.silu(gate) * up).transpose(1, 2).to(self.dwconv.weight.dtype)
        middle = self.act(self.dwconv(middle)[..., : x.shape[1]])
        return self.down_proj(middle.transpose(1, 2).contiguous())


class Parts(nn.Module):
    """Embeddings and heads that all of them have."""

    def __init__(self, config: Config, twist: str, puzzles: int = 1) -> None:
        super().__init__()
        self.config, self.twist, self.puzzle_emb_len = config, twist, puzzles
        self.embed_tokens = Lookup(config.vocab_size, WIDTH, torch.float32)
        if puzzles:
            self.puzzles = Lookup(config.num_puzzle_identifiers, WIDTH, torch.float32)
        self.lm_head, self.q_head = Dense(WIDTH, config.vocab_size), Dense(WIDTH, 2, bias=True)
        self.rotary_emb = Tables(TOKENS + puzzles, WIDTH // config.num_heads)

    def _embedded(self, tokens: Tensor, puzzles: Tensor | None = None) -> Tensor:
        found = self.embed_tokens(tokens.to(torch.int32))
        if puzzles is not None:
            found = torch.cat((self.puzzles(puzzles).unsqueeze(1), found), dim=1)
        return math.sqrt(WIDTH) * found


@dataclass
class OneState:
    current_hidden: Tensor
    steps: Tensor | None = None


class Urm(Parts):
    def __init__(self, config: Config, twist: str = "") -> None:
        super().__init__(config, twist)
        self.layers = nn.ModuleList(lookalike.Layer(config) for _ in range(2))
        for layer in self.layers:
            layer.mlp = ConvGated(WIDTH, 48)
        self.register_buffer("init_hidden", torch.randn(WIDTH))

    def _input_embeddings(self, input: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        return self._embedded(input, puzzle_identifiers)

    def empty_carry(self, batch_size: int) -> OneState:
        return OneState(torch.empty(batch_size, TOKENS + 1, WIDTH))

    def reset_carry(self, reset_flag: Tensor, carry: OneState) -> OneState:
        fresh = torch.where(reset_flag.view(-1, 1, 1), self.init_hidden, carry.current_hidden)
        return replace(carry, current_hidden=fresh)

    def forward(self, carry: OneState, batch: dict[str, Tensor]) -> Any:
        tables = self.rotary_emb()
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        h, low = carry.current_hidden, self.config.L_cycles
        calls = self.config.H_cycles * low
        for call in range(calls):
            with torch.set_grad_enabled(call >= calls - low - (self.twist == "window")):
                h = h + x
                for layer in self.layers:
                    h = layer(hidden_states=h, cos_sin=tables)
        q = self.q_head(h[:, 0]).float()
        new = replace(carry, current_hidden=h.detach())
        return new, self.lm_head(h)[:, 1:], (q[..., 0], q[..., 1])


class Level(nn.Module):
    def __init__(self, config: Config, twist: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(lookalike.Layer(config) for _ in range(2))
        self.lambda_, self.noise_scale, self.twist = 0.8, 0.1, twist

    def forward(self, hidden_states: Tensor, input_injection: Tensor, **info: Any) -> Tensor:
        h = hidden_states + input_injection
        base = h if self.twist == "damps the sum" else hidden_states
        for layer in self.layers:
            h = layer(hidden_states=h, **info)
        noise = torch.randn_like(hidden_states) * self.noise_scale
        noise = noise * 2 if self.twist == "noise" else noise
        return (1 - self.lambda_) * base + self.lambda_ * h + noise


@dataclass
class TwoStates:
    z_H: Tensor
    z_L: Tensor


class EqR(Parts):
    def __init__(self, config: Config, twist: str = "") -> None:
        super().__init__(config, twist, puzzles=0)
        del self.puzzle_emb_len
        self.L_level = Level(config, twist)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.randn(WIDTH), persistent=False)

    def _input_embeddings(self, input_ids: Tensor) -> Tensor:
        return self._embedded(input_ids)

    def _cos_sin(self) -> Any:
        return self.rotary_emb()

    def empty_carry(self, batch_size: int, device: Any = None) -> TwoStates:
        shape = batch_size, TOKENS, WIDTH
        return TwoStates(torch.empty(shape, device=device), torch.empty(shape, device=device))

    def reset_carry(self, reset_flag: Tensor, carry: TwoStates) -> TwoStates:
        return carry

    def forward(self, carry: TwoStates, batch: dict[str, Tensor]) -> Any:
        x, info = self._input_embeddings(batch["inputs"]), {"cos_sin": self._cos_sin()}
        z_H, z_L = carry.z_H, carry.z_L
        for cycle in range(self.config.H_cycles):
            with torch.set_grad_enabled(cycle == self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z_L = self.L_level(z_L, z_H + x, **info)
                z_H = self.L_level(z_H, z_L, **info)
        q = self.q_head(z_H[:, 0]).float()
        return TwoStates(z_H.detach(), z_L.detach()), self.lm_head(z_H), q[..., 0]


class Core(nn.Module):
    """RSM's stack; its token MLP has the norm over the hidden width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HiddenNorm(config) for _ in range(2))

    def forward(self, hidden_states: Tensor, injection: Tensor, cos_sin: Any) -> Tensor:
        h = hidden_states + injection
        for layer in self.layers:
            h = layer(cos_sin=cos_sin, hidden_states=h)
        return h


class HiddenNorm(lookalike.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        h = hidden_states
        if not hasattr(self, "mlp_t"):
            return super().forward(cos_sin, h)
        h = lookalike.normed(h + self.mlp_t(h.transpose(1, 2)).transpose(1, 2), self.norm_eps)
        return lookalike.normed(h + self.mlp(h), self.norm_eps)


@dataclass
class Data:
    current_data: dict[str, Tensor]


class RSM(Parts):
    def __init__(self, config: Config, twist: str = "") -> None:
        super().__init__(config, twist)
        self.cfg, self.forward_dtype = self.config, torch.bfloat16
        self.cfg.prob_detach_prev_H = 0.5  # type: ignore[attr-defined]
        del self.q_head
        self.core = Core(config)
        self.lm_head.weight = self.embed_tokens.embedding_weight
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.randn(WIDTH))

    @property
    def puzzle_embedding_module(self) -> Any:
        return None

    def initial_carry(self, batch: dict[str, Tensor]) -> Data:
        return Data(batch)

    def _input_embeddings(self, tokens: Tensor, puzzle_ids: Tensor) -> Tensor:
        return self._embedded(tokens, puzzle_ids)

    def forward(
        self,
        carry: Data,
        batch: dict[str, Tensor],
        override_H_cycles: int | None = None,
        debug_structure: bool = False,
        alpha: float = 1.0,
    ) -> Any:
        cycles = self.cfg.H_cycles if override_H_cycles is None else override_H_cycles
        cycles, joined = max(2, cycles) if self.training else cycles, True
        if self.training and torch.rand(1).item() < self.cfg.prob_detach_prev_H:  # type: ignore[attr-defined]
            joined = False
        x = self._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
        z_H, z_L = (start.view(1, 1, -1).expand_as(x) for start in (self.H_init, self.L_init))
        tables = self.rotary_emb()
        for cycle in range(cycles):
            last, before = cycle == cycles - 1, cycle == cycles - 2
            if not (last and joined) or self.twist == "never joined":
                z_H, z_L = z_H.detach(), z_L.detach()
            with torch.set_grad_enabled(last):
                for _ in range(self.cfg.L_cycles):
                    z_L = self.core(z_L, z_H + x, cos_sin=tables)
            with torch.set_grad_enabled(last or (before and joined)):
                z_H = self.core(z_H, z_L, cos_sin=tables)
        return Data(batch), {"logits": self.lm_head(z_H)[:, 1:]}


class Heads(nn.Module):
    """One matrix a head."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, size, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,edc->bted", x, self.weight.to(x.dtype))


class SicMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = self.num_key_value_heads = 2
        self.causal = False
        self.qkv_proj, self.o_proj = Heads(WIDTH, 6, WIDTH // 2), Dense(WIDTH, WIDTH)
        self.o_norm = nn.RMSNorm(WIDTH, eps=1e-5, elementwise_affine=False)
        self.qk_norm = nn.RMSNorm(WIDTH // 2, eps=1e-5)

    def forward(self, x: Tensor, cos_sin: Any = None) -> Tensor:
        q, k, v = self.qkv_proj(x).split(2, dim=-2)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if cos_sin is not None:
            cos, sin = (torch.cat((table, table), -1).squeeze(-2) for table in cos_sin)
            q, k = lookalike.turn(q, cos, sin), lookalike.turn(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.o_proj(self.o_norm(mixed))


class SicGated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Dense(width, 2 * inner), Dense(inner, width)
        self.norm = nn.RMSNorm(inner, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(torch.sigmoid(gate) * self.norm(gate * up))


class SicLayer(nn.Module):
    def __init__(self, tokens: int, prenorm: bool) -> None:
        super().__init__()
        self.prenorm, self.tokens = prenorm, tokens
        self.attn = SicGated(tokens, 16) if tokens else SicMixer()
        self.mlp = SicGated(WIDTH, 48)
        self.norm1 = nn.LayerNorm(tokens or WIDTH, eps=1e-5)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-5)

    def forward(self, x: Tensor, cos_sin: Any = None) -> Tensor:
        more = () if self.tokens else (cos_sin,)
        x = x.transpose(1, 2) if self.tokens else x
        if self.prenorm:
            x = x + self.attn(self.norm1(x), *more)
        else:
            x = self.norm1(x + self.attn(x, *more))
        x = x.transpose(1, 2) if self.tokens else x
        return x + self.mlp(self.norm2(x)) if self.prenorm else self.norm2(x + self.mlp(x))


class InTurn(nn.Sequential):
    def forward(self, z: Tensor, *more: Any, **named: Any) -> Tensor:  # type: ignore[override]
        for block in self:
            z = block(z, *more, **named)
        return z


class Settings:
    L_cycles, core_damping, anchor_seq_index, q_halt_seq_index = 2, 0.0, None, 0
    total_seq_len, rms_norm_eps = TOKENS, 1e-5


class Sic(nn.Module):
    def __init__(self, kind: str = "attention", twist: str = "", prenorm: bool = False) -> None:
        super().__init__()
        self.config, self.twist = Settings(), twist
        tokens = TOKENS if kind == "mixer" else 0
        self.reasoning = InTurn(*(SicLayer(tokens, prenorm) for _ in range(2)))
        self.embed_tokens = nn.Embedding(7, WIDTH)
        self.head, self.q_head = Dense(WIDTH, 7, bias=True), Dense(WIDTH, 1, bias=True)
        self.rope = None if kind == "mixer" else Tables(TOKENS, WIDTH // 2)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.randn(1, WIDTH))

    def _get_cos_sin(self, device: Any) -> Any:
        if self.rope is None:
            return None
        return tuple(table[:, None, : WIDTH // 4] for table in self.rope())

    def core(self, input_emb: Tensor, z_H: Tensor, z_L: Tensor, cos_sin: Any) -> Any:
        a, c = self.config.core_damping or 1.0, z_H + input_emb
        for _ in range(self.config.L_cycles):
            z_L = (1 - a) * z_L + a * self.reasoning(z_L + c, cos_sin)
            c = c + input_emb if self.twist == "injected again" else c
        z_H = (1 - a) * z_H + a * self.reasoning(z_H + z_L, cos_sin)
        q = self.q_head(z_H[:, self.config.q_halt_seq_index]).squeeze(-1)
        return self.head(z_H), q, z_H, z_L

    def run_h_cycles(self) -> None: ...

    def wta_forward(self) -> None: ...


class Masked(Dense):
    """FPRM's linear layer: in training its weights are multiplied by a mask."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.register_buffer("mask", torch.ones_like(self.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask if self.training else self.weight
        return F.linear(x, weight.to(x.dtype))


class FprmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.causal, self.softmax_temp = 2, False, 1.0
        self.qkv_proj, self.o_proj = Masked(WIDTH, 3 * WIDTH), Masked(WIDTH, WIDTH)

    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        heads = self.qkv_proj(hidden_states).unflatten(-1, (6, WIDTH // 2))
        q, k, v = heads.split(2, dim=-2)
        if cos_sin is not None:
            q, k = lookalike.turn(q, *cos_sin), lookalike.turn(k, *cos_sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class FprmGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Masked(WIDTH, 96), Masked(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class FprmLayer(nn.Module):
    """h = alpha_1 h + beta_1 f(norm h), twice."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.norm_type, self.norm_eps, self.twist = "pre-norm", 1e-5, twist
        self.self_attn, self.mlp = FprmAttention(), FprmGated()

    def forward(self, cos_sin: Any, hidden_states: Tensor, alpha_1: Any, beta_1: Any) -> Tensor:
        h = hidden_states
        h = alpha_1 * h + beta_1 * self.self_attn(cos_sin, lookalike.normed(h, self.norm_eps))
        h = h * 1.01 if self.twist == "grows" else h
        alpha_1 = 1 if self.twist == "keeps all of h once" else alpha_1
        alpha_1 = alpha_1.mean() if self.twist == "one factor for all channels" else alpha_1
        return alpha_1 * h + beta_1 * self.mlp(lookalike.normed(h, self.norm_eps))


class FprmLevel(nn.Module):
    """`scale`: "outer", as if outer_only; else alpha_1 and, tied to it, beta_1 are of a kind."""

    def __init__(self, twist: str, scale: str) -> None:
        super().__init__()
        self.config, self.twist = Settings(), twist
        self.residual_scale, self.outer_only = scale, scale == "outer"
        self.norm_placement = "output"
        self.layers = nn.ModuleList(FprmLayer(twist) for _ in range(2))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 2, padding=1, groups=WIDTH, bias=False)
        for name in ("alpha_2_param", "alpha_1_param")[: 2 - self.outer_only]:
            fixed = nn.Parameter(torch.tensor(-0.4), requires_grad=False)
            setattr(self, name, fixed if scale == "fixed" else nn.Parameter(torch.randn(WIDTH)))

    def forward(self, hidden_states: Tensor, input_injection: Tensor, **info: Any) -> Tensor:
        info.pop("puzzle_emb_len")
        mixed = self.conv(hidden_states.transpose(1, 2))[..., : hidden_states.shape[1]]
        share = torch.sigmoid(self.alpha_2_param)
        alpha = beta = hidden_states.new_ones(1, 1, 1)
        rest = 1 - share
        if not self.outer_only:
            alpha, halves = torch.sigmoid(self.alpha_1_param), 2 * len(self.layers)
            alpha = alpha if alpha.ndim == 0 else alpha.reshape(1, 1, -1)
            rest = 1 - share * alpha**halves
            beta = rest * (1 - alpha) / (1 - alpha**halves + 1e-5)
        h = share * mixed.transpose(1, 2) + rest * input_injection
        for layer in self.layers:
            h = layer(hidden_states=h, alpha_1=alpha, beta_1=beta, **info)
        h = lookalike.normed(h, 1e-5) if self.norm_placement == "output" else h
        return h + input_injection if self.twist == "injected again" else h


class Solver(nn.Module):
    """Damps by a step size of each sample, which shrinks where its residual did not."""

    def reset(self, flags: Tensor, shape: Any, dtype: Any, device: Any, state: Any) -> Any:
        state = {"y": torch.randn(shape, dtype=dtype, device=device)}
        state["stepsize"] = torch.full((shape[0], 1, 1), 0.9, dtype=dtype, device=device)
        return state | {"residues": torch.full((shape[0],), torch.inf, device=device)}

    def step(self, state: Any, y: Tensor) -> Any:
        residues = (state["y"] - y).detach().abs().amax((1, 2))
        y = y * state["stepsize"] + state["y"] * (1 - state["stepsize"])
        shrinks = (residues >= state["residues"]).view(-1, 1, 1)
        state["stepsize"] = torch.where(shrinks, 0.8, 1.0) * state["stepsize"]
        state["y"], state["residues"] = y, residues
        return state


class Fprm(Parts):
    def __init__(self, config: Config, twist: str = "", scale: str = "outer") -> None:
        super().__init__(config, twist, puzzles=0)
        self.L_level, self.L_optimizer = FprmLevel(twist, scale), Solver()
        self.forward_dtype = torch.float32

    def _input_embeddings(self, tokens: Tensor) -> Tensor:
        return self._embedded(tokens)

    def reset_carry(self) -> None: ...

    def _jacobian_reg(self) -> None: ...

    def _z_step(
        self, state: Any, input_embeddings: Tensor, dropout_mask: Tensor, seq_info: Any
    ) -> Any:
        new = dropout_mask * self.L_level(state["y"], input_embeddings, **seq_info)
        return self.L_optimizer.step(state, new)

    def forward(self, y: Tensor, tokens: Tensor) -> Any:
        x, state = (
            self._input_embeddings(tokens),
            self.L_optimizer.reset(tokens[:, 0] >= 0, y.shape, y.dtype, y.device, None),
        )
        state["y"] = y
        info = {"cos_sin": self.rotary_emb(), "puzzle_emb_len": 0}
        for _ in range(3):
            state = self._z_step(state, x, torch.ones_like(y), info)
        return self.lm_head(state["y"]), state
