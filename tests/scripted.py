"""A model that answers by the book, so that accuracy and steps of a test are known by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recurx.models import TRM, TRMConfig
from recurx.tasks import Examples


class Scripted(nn.Module):
    """An ACT wrapper that answers puzzle k right from step `right_at[k]` on (0: never), and is sure
    of itself (q = 5, else -5) from step `sure_at[k]` on.

    A wrong answer repeats the puzzle; before step right_at - 1 it also changes from step to step,
    so no answer stays the same by accident.
    """

    def __init__(
        self, examples: Examples, right_at: list[int], sure_at: list[int], vocab: int
    ) -> None:
        super().__init__()
        self.inner = TRM(TRMConfig.tiny(vocab, examples.inputs.shape[1])).inner
        self.config = self.inner.config
        self.inputs = torch.from_numpy(examples.inputs)
        self.answers = torch.from_numpy(examples.answers)
        self.right_at, self.sure_at = torch.tensor(right_at), torch.tensor(sure_at)
        self.rows: list[int] = []  # of every call

    def initial_carry(self, batch: dict[str, Tensor]) -> object:
        return TRM.initial_carry(self, batch)  # type: ignore[arg-type]

    def forward(self, carry, batch):
        carry.steps = carry.steps + 1
        inputs = batch["inputs"]
        self.rows.append(len(inputs))
        number = (inputs[:, None] == self.inputs).all(-1).int().argmax(1)
        right_at, steps = self.right_at[number], carry.steps
        right = (right_at > 0) & (steps >= right_at)
        said = torch.where(right[:, None], self.answers[number], inputs)
        said[:, 0] = torch.where(right, said[:, 0], 1 + steps % 2)
        logits = nn.functional.one_hot(said, self.config.vocab_size).float()
        sure = steps >= self.sure_at[number]
        return carry, {"logits": logits, "q_halt_logits": torch.where(sure, 5.0, -5.0)}
