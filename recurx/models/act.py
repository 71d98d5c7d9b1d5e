"""Deep supervision with adaptive computation time (ACT): halting, exploration, replacement.

A batch is a set of slots. Each call is one supervision step of every slot; a slot whose sample
halted takes the sample that `batch` holds for it at the next call. So one batch carries samples
of different depths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.models.config import HRMConfig, ModelConfig, TRMConfig
from recurx.models.exploration import Exploration
from recurx.models.inner import Inner, States
from recurx.models.puzzle_embedding import PuzzleEmbedding


@dataclass
class Carry:
    """What a supervision step hands to the next.

    Args:
        inner_carry: {state: [B, T, D]} in the forward dtype, detached.
        steps: [B] int32, supervision steps of the present sample.
        halted: [B] bool, slots whose sample is finished and will be replaced.
        current_data: {key: [B, ...]}, the sample in each slot.
        last: {"last_answer": [B, seq_len, vocab]}, see `Inner.answer_of`; {} without feedback.
    """

    inner_carry: States
    steps: Tensor
    halted: Tensor
    current_data: dict[str, Tensor]
    last: dict[str, Tensor] = field(default_factory=dict)


class RecursiveModel(nn.Module):
    """Base of `TRM` and `HRM`: the ACT wrapper around `inner`, with the official call contract.

    Args:
        config: a configuration, or a dict with its (official) keys, or None with `fields` given.
        backend: name of the backend that runs the recursion ("auto" chooses).
        fields: the configuration's fields, instead of `config`.

    Attributes:
        exploration: draws of halting that are the same on every device and in captured replays;
            None (at first) draws from PyTorch's generator, as the official code does.

    Raises:
        InvalidArgument: the configuration does not fit this class or itself.
    """

    config_class: type[ModelConfig] = ModelConfig
    inner_class: type[Inner] = Inner

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any] | None = None,
        backend: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = self._read_config(config, fields)
        self.inner = self.inner_class(self.config, backend)
        self.exploration: Exploration | None = None

    @classmethod
    def _read_config(
        cls, config: ModelConfig | Mapping[str, Any] | None, fields: dict[str, Any]
    ) -> ModelConfig:
        if config is None or isinstance(config, Mapping):
            return cls.config_class.from_dict({**(config or {}), **fields})
        if not isinstance(config, cls.config_class):
            raise bad_argument(
                cls.__name__, "config", f"a {cls.config_class.__name__} or a dict",
                type(config).__name__,
            )  # fmt: skip
        return config.replace(**fields)

    @property
    def backend(self) -> str:
        """Name of the backend that runs the recursion; assign to change it."""
        return self.inner.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self.inner.backend = name

    @property
    def puzzle_emb(self) -> PuzzleEmbedding:
        """The sparse puzzle embedding (AttributeError without one)."""
        return self.inner.puzzle_emb

    def initial_carry(self, batch: Mapping[str, Tensor]) -> Carry:
        """A carry whose slots are all halted: the first call takes every sample of `batch`."""
        inputs = batch["inputs"]
        slots = inputs.shape[0]
        none = inputs.new_zeros(()).expand(slots, self.config.seq_len, self.config.vocab_size)
        return Carry(
            inner_carry=self.inner.empty_carry(slots),
            steps=torch.zeros(slots, dtype=torch.int32, device=inputs.device),
            halted=torch.ones(slots, dtype=torch.bool, device=inputs.device),
            current_data={key: torch.zeros_like(value) for key, value in batch.items()},
            last={key: torch.zeros_like(said) for key, said in self.inner.answer_of(none).items()},
        )

    def forward(
        self, carry: Carry, batch: Mapping[str, Tensor], **how: Any
    ) -> tuple[Carry, dict[str, Tensor]]:
        """One supervision step of every slot.

        Args:
            carry: from `initial_carry` or the last call.
            batch: {key: [B, ...]}: a fresh sample for every slot; halted slots take theirs.
            how: `training` and `backend` of this call alone, whatever the attributes say.

        Returns:
            The new carry, and "logits" [B, seq_len, vocab], "q_halt_logits" [B],
            "q_continue_logits" [B]; with Q-learning in training also "target_q_continue" [B].
        """
        data = _take_fresh(carry, batch)
        states = self.inner.reset_carry(carry.halted, carry.inner_carry)
        steps = torch.where(carry.halted, 0, carry.steps) + 1
        last = {k: torch.where(carry.halted.view(-1, 1, 1), 0, v) for k, v in carry.last.items()}

        states, logits, (q_halt, q_continue) = self.inner(states, data | last, **how)
        last = self.inner.answer_of(logits)
        outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}

        with torch.no_grad():
            ends = steps >= self.config.halt_max_steps
            halted = ends
            # Evaluation takes all the steps, so that one batch ends as one.
            if how.get("training", self.training) and self.config.halt_max_steps > 1:
                halted = self._halt(ends, steps, q_halt, q_continue)
                if not self.config.no_ACT_continue:
                    outputs["target_q_continue"] = self._target(ends, states, data | last)
        return Carry(states, steps, halted, data, last), outputs

    def _halt(self, last: Tensor, steps: Tensor, q_halt: Tensor, q_continue: Tensor) -> Tensor:
        """Which slots halt: by their q, but not before an explored minimum of steps."""
        if self.exploration is not None:
            bar = None if self.config.no_ACT_continue else q_continue
            most, probability = self.config.halt_max_steps, self.config.halt_exploration_prob
            return self.exploration.halt(steps, q_halt, bar, most, probability)
        threshold = 0 if self.config.no_ACT_continue else q_continue
        wants = last | (q_halt > threshold)
        explores = torch.rand_like(q_halt) < self.config.halt_exploration_prob
        drawn = torch.randint_like(steps, low=2, high=self.config.halt_max_steps + 1)
        return wants & (steps >= explores * drawn)

    def _target(self, ends: Tensor, states: States, data: dict[str, Tensor]) -> Tensor:
        """Bootstrapped target of q_continue: the better q of one more step (arXiv 2506.21734)."""
        _, _, (next_halt, next_continue) = self.inner(states, data)
        return torch.sigmoid(torch.where(ends, next_halt, torch.maximum(next_halt, next_continue)))


def _take_fresh(carry: Carry, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sample of each slot: that of `batch` where the last one halted."""
    if set(batch) != set(carry.current_data):
        raise bad_argument(
            "models", "batch", f"the keys of the carry: {sorted(carry.current_data)}",
            sorted(batch), "Start again with initial_carry(batch).",
        )  # fmt: skip
    data = {}
    for key, present in carry.current_data.items():
        fresh = batch[key]
        if fresh.shape != present.shape or fresh.shape[:1] != carry.halted.shape:
            wanted = [len(carry.halted), *present.shape[1:]]
            raise bad_argument(
                "models", f"batch[{key!r}]", f"shape {wanted}, as in the carry",
                list(fresh.shape), "The number of slots is fixed by initial_carry(batch).",
            )  # fmt: skip
        halted = carry.halted.view(-1, *[1] * (fresh.ndim - 1))
        data[key] = torch.where(halted, fresh, present)
    return data


class TRM(RecursiveModel):
    """Tiny Recursive Model, with its variants single-z and hier6 (arXiv 2510.04871).

    >>> model = TRM(TRMConfig.sudoku_att(), backend="cpu")
    """

    config_class = TRMConfig


class HRM(RecursiveModel):
    """Hierarchical Reasoning Model: two nets and a 1-step gradient (arXiv 2506.21734)."""

    config_class = HRMConfig


def build_model(config: ModelConfig, backend: str = "auto") -> RecursiveModel:
    """The untrained model of a configuration: an HRM or a TRM."""
    return (HRM if config.variant == "hrm" else TRM)(config, backend)
