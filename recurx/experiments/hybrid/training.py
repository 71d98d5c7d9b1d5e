"""Training a hybrid: the trainer of recurx with another model, on a task that has English."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from recurx import tasks
from recurx.errors import bad_argument
from recurx.experiments.hybrid.config import HybridConfig
from recurx.experiments.hybrid.encoder import PassageBank, packaged_encoder
from recurx.experiments.hybrid.model import HybridReasoner
from recurx.experiments.tasks.english import EnglishTask
from recurx.models import ModelConfig, RecursiveModel
from recurx.tasks.base import Examples
from recurx.train import TaskData, TrainConfig, Trainer


def task_bank(name: str, bank: PassageBank | None = None) -> PassageBank:
    """A bank in which passage t is token t of the English task `name`, for all its tokens.

    Args:
        bank: one that is empty, or made by this function; None: the packaged encoder's, with as
            much room for a passage as the longest needs.

    Raises:
        InvalidArgument: the task has no English, or `bank` holds something else.
    """
    task = tasks.get(name)
    if not isinstance(task, EnglishTask):
        raise bad_argument("hybrid", "task", "a task in English: order or trades", repr(name))
    if bank is None:
        encoder, tokenizer = packaged_encoder()
        lengths = tokenizer(list(task.passages), add_special_tokens=False)["input_ids"]
        bank = PassageBank(encoder, tokenizer, max(map(len, lengths)))
    if bank.numbers(task.passages) != list(range(1, task.vocab_size)):
        raise bad_argument("hybrid", "bank", "one without passages of other texts", repr(bank))
    return bank


class EnglishData(TaskData):
    """A task in English, tested on its hardest examples: easier ones are the curriculum."""

    task: EnglishTask

    def held_out(self, count: int) -> Examples:
        hardest = self.task.hardest()
        return tasks.Sampler(hardest, self.config.seed, "held-out").draw_distinct(count)


class HybridTrainer(Trainer):
    """A `Trainer` of a `HybridReasoner`.

    Args:
        config: as for `Trainer`; its `task` is one in English, its `model` fields of HybridConfig.
        folder, arguments: as for `Trainer`.
        data: as for `Trainer`; None: `EnglishData` of the task.
        bank: from `task_bank`; None makes one of the packaged encoder, as `resume` does.
    """

    data: EnglishData

    def __init__(
        self,
        config: TrainConfig,
        folder: str | Path | None = None,
        data: EnglishData | None = None,
        *,
        bank: PassageBank | None = None,
        **arguments: Any,
    ) -> None:
        self.bank = task_bank(config.task, bank)
        if data is None:
            task = tasks.get(config.task)
            data = EnglishData(config, task, tasks.Sampler(task, config.seed))
        super().__init__(config, folder, data, **arguments)

    def make_model(self, config: ModelConfig, backend: str) -> RecursiveModel:
        task = self.data.task
        sizes = {
            "vocab_size": task.choices + 1,
            "passages": task.seq_len,
            "passage_tokens": self.bank.passage_tokens,
            "encoder_width": self.bank.width,
            "answer_per_passage": task.answer_per_passage,
        }
        hybrid = HybridConfig.from_dict({**dataclasses.asdict(config), **sizes})
        model = HybridReasoner(self.bank, None, hybrid, backend)
        model.inner.whiten_()
        return model
