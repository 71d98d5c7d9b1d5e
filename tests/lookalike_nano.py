"""A module with the layout of nano-trm's `TRMModule`, written anew and without Lightning.

Attribute names, signatures and the split into methods are those that the code has; the text is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import lookalike


@dataclass
class Carry:
    z_H: Tensor
    z_L: Tensor


@dataclass
class Slots:
    inner_carry: Carry
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]


class Settings(dict):
    """Keys that are attributes too, as Lightning's."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Nano(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        hparams = Settings(
            hidden_size=32, num_heads=2, num_layers=2, seq_len=9, vocab_size=7, num_puzzles=3,
            puzzle_emb_len=1, H_cycles=2, L_cycles=2, N_supervision=4, use_mlp_t=False, twist="",
        )  # fmt: skip
        self.hparams = Settings(hparams | changes)
        hp, self.forward_dtype = self.hparams, torch.float32
        config = lookalike.Config(
            mlp_t=hp.use_mlp_t,
            quirks=frozenset({"scaled residual"} if hp.twist == "residual" else {}),
        )
        self.puzzle_emb_len = hp.puzzle_emb_len
        self.input_embedding = lookalike.Lookup(hp.vocab_size, hp.hidden_size, torch.float32)
        self.puzzle_emb = lookalike.Lookup(hp.num_puzzles, hp.hidden_size, torch.float32)
        if not hp.use_mlp_t:
            head_dim = hp.hidden_size // hp.num_heads
            self.pos_embedding = lookalike.Tables(hp.seq_len + 1, head_dim)
        self.lenet = lookalike.Stack(config, hp.num_layers)
        self.lm_head = lookalike.Dense(hp.hidden_size, hp.vocab_size)
        self.q_head = lookalike.Dense(hp.hidden_size, 1, bias=True)
        for name in ("z_H_init", "z_L_init"):
            self.register_buffer(name, torch.randn(hp.hidden_size))

    def _input_embeddings(self, input: Tensor, puzzle_identifiers: Tensor) -> Tensor:
        prefix = self.puzzle_emb(puzzle_identifiers).unsqueeze(1)
        return 4 * torch.cat((prefix, self.input_embedding(input)), 1)

    def empty_carry(self, batch_size: int, device: Any) -> Carry:
        shape = (batch_size, self.hparams.seq_len + 1, self.hparams.hidden_size)
        return Carry(*(torch.empty(shape, device=device) for _ in range(2)))

    def reset_carry(self, reset_flag: Tensor, carry: Carry) -> Carry:
        flag = reset_flag.view(-1, 1, 1)
        starts = self.z_H_init, self.z_L_init
        return Carry(*map(torch.where, (flag, flag), starts, (carry.z_H, carry.z_L)))

    def initial_carry(self, batch: dict[str, Tensor]) -> Slots:
        size, device = len(batch["input"]), batch["input"].device
        return Slots(
            self.empty_carry(size, device),
            torch.zeros(size, dtype=torch.int32, device=device),
            torch.ones(size, dtype=torch.bool, device=device),
            {name: torch.zeros_like(value) for name, value in batch.items()},
        )

    def inner_forward(self, carry: Carry, batch: dict[str, Tensor]) -> Any:
        info = {"cos_sin": self.pos_embedding() if hasattr(self, "pos_embedding") else None}
        x = self._input_embeddings(batch["input"], batch["puzzle_identifiers"])
        z_H, z_L = carry.z_H, carry.z_L
        cycles = self.hparams.H_cycles
        for cycle in range(cycles):
            last = cycle >= cycles - (2 if self.hparams.twist == "window" else 1)
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                for _ in range(self.hparams.L_cycles):
                    z_L = self.lenet(z_L, z_H + x, **info)
                z_H = self.lenet(z_H, z_L, **info)
        q = self.q_head(z_H[:, 0]).float()
        logits = self.lm_head(z_H)[:, self.puzzle_emb_len :]
        return Carry(z_H.detach(), z_L.detach()), logits, q[..., 0]

    def forward(self, carry: Slots, batch: dict[str, Tensor]) -> tuple[Slots, dict[str, Tensor]]:
        states = self.reset_carry(carry.halted, carry.inner_carry)
        data = {
            name: torch.where(carry.halted.view(-1, *[1] * (value.ndim - 1)), batch[name], value)
            for name, value in carry.current_data.items()
        }
        steps = torch.where(carry.halted, 0, carry.steps) + 1
        states, logits, q_halt = self.inner_forward(states, data)
        with torch.no_grad():
            halted = (steps >= self.hparams.N_supervision) | (self.training & (q_halt > 0))
        out = {"logits": logits, "q_halt_logits": q_halt}
        return Slots(states, steps, halted, data), out


def build(seed: int = 0, **fields: Any) -> Nano:
    torch.manual_seed(seed)
    return Nano(**fields)


def batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input": torch.randint(0, 7, (size, 9), generator=generator, dtype=torch.int32),
        "output": torch.randint(0, 7, (size, 9), generator=generator),
        "puzzle_identifiers": torch.arange(size) % 3,
    }


def train(model: nn.Module, steps: int = 6) -> list[Tensor]:
    """Losses, logits and carries of training steps, then the weights and their gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    carry, trace = model.initial_carry(batch()), []
    for step in range(steps):
        optimizer.zero_grad()
        carry, out = model(carry, batch(seed=step))
        labels = carry.current_data["output"]
        loss = nn.functional.cross_entropy(out["logits"].flatten(0, 1), labels.flatten())
        loss = loss + out["q_halt_logits"].sigmoid().mean()
        loss.backward()
        optimizer.step()
        trace += [loss.detach(), out["logits"].detach(), carry.inner_carry.z_H, carry.halted]
    return trace + [p.detach().clone() for p in model.parameters()]
