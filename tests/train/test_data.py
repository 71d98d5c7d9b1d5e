"""A trainer takes any data: it asks for what `recurx.train.Data` says, and knows no task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurx import tasks
from recurx.experiments.tasks import Sorting
from recurx.models import RecursiveModel
from recurx.models.stablemax import IGNORE
from recurx.tasks import Examples, Sampler
from recurx.tasks.base import Stream
from recurx.train import TrainConfig, Trainer, evaluate, open_data
from tests.test_import_graph import ROOT, arrows
from tests.train.test_train import differing

MODEL = {"hidden_size": 16, "num_heads": 2, "inner_multiple": 16, "expansion": 1.0, "L_layers": 1,
         "H_cycles": 1, "L_cycles": 1, "forward_dtype": "float32", "halt_max_steps": 2,
         "pos_encodings": "learned"}  # fmt: skip


class Doubling:
    """Digits and twice them; asked at the first two of three tokens. No task of recurx."""

    vocab_size, seq_len, num_puzzle_identifiers = 9, 3, 1

    def __init__(self) -> None:
        self.drawn = 0
        self.task = self

    def draw(self, count: int) -> dict[str, Tensor]:
        inputs = self._inputs(self.drawn, count)
        self.drawn += count
        labels = 2 * inputs
        labels[:, 2] = IGNORE
        return {"inputs": inputs, "labels": labels,
                "puzzle_identifiers": torch.zeros(count, dtype=torch.int32)}  # fmt: skip

    @staticmethod
    def _inputs(first: int, count: int) -> Tensor:
        return 1 + (torch.arange(first, first + count)[:, None] * torch.tensor([1, 3, 5])) % 4

    def held_out(self, count: int) -> Examples:
        inputs = self._inputs(0, count).numpy()
        return Examples(inputs, 2 * inputs * np.array([1, 1, 0]))

    def right(self, examples: Examples, answers: np.ndarray) -> np.ndarray:
        return (answers == 2 * examples.inputs)[:, :2].all(axis=1)

    def prepare_(self, model: RecursiveModel) -> None:
        with torch.no_grad():
            model.inner.embed_pos.embedding_weight.fill_(0.25)

    def pinned(self, config: TrainConfig) -> TrainConfig:
        return config

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def test_a_run_on_data_of_ones_own(tmp_path) -> None:
    config = TrainConfig("doubling", MODEL, batch_size=16, lr=0.02, warmup=5, ema=0.9)
    whole = Trainer(config, data=Doubling())
    assert (whole.model.inner.embed_pos.embedding_weight == 0.25).all()  # the data prepared it
    whole.run(steps=60)
    report = evaluate(whole.averaged(), whole.task, whole.held_out(8), max_steps=1, halt=None)
    assert report.exact == 1 and report.cells == 1
    Trainer(config, tmp_path, Doubling()).run(steps=25)
    resumed = Trainer.resume(tmp_path, Doubling())
    resumed.run(steps=60)
    assert differing(resumed, whole) == []


def test_only_the_two_that_name_tasks_know_them() -> None:
    """All else in `recurx.train` sees a task's examples at most."""
    knowing = {
        arrow.importer
        for arrow in arrows(ROOT)
        if arrow.importer.startswith("recurx.train")
        and arrow.imported.startswith("recurx.tasks")
        and arrow.imported != "recurx.tasks.base"
    }
    assert knowing == {"recurx.train.task_data", "recurx.train.presets"}


class Shelf:
    """`tasks.base.Split` of a file that has a seed for sorting."""

    path, sha256, rule = "numbers.txt", "of a seed", "the first ones"
    held_out = np.arange(3)

    def __init__(self, task: Sorting, seed: int) -> None:
        self.task, self.seed = task, seed

    def examples(self, rows: np.ndarray) -> Examples:
        return Sampler(self.task, self.seed, "held-out").draw(10).take(rows)

    def sampler(self, seed: int, reveal: int) -> Stream:
        return Sampler(self.task, self.seed + seed + reveal)


class Filed(Sorting):
    """A task that its own kind of file trains."""

    def split_file(self, path: str, hold_out: int, *, sha256: str | None = None, **how: Any):
        assert (path, hold_out, sha256, set(how)) == ("numbers.txt", 3, None, {"on_progress"})
        return Shelf(self, 7)


def test_a_task_of_others_is_trained_on_files_by_its_own_method(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "_MAKERS", dict(tasks._MAKERS))
    tasks.register("filed", Filed)
    config = TrainConfig("filed:length=3", MODEL, batch_size=4, puzzles="numbers.txt", hold_out=3)
    data = open_data(config)
    fresh = Sampler(data.task, 7).draw(4)
    assert (data.draw(4)["inputs"].numpy() == fresh.inputs).all()
    assert len(data.held_out(2)) == 2 and data.held_out_rule == "the first ones"
    trainer = Trainer(config)
    assert trainer.config.puzzles_sha256 == "of a seed"
    assert trainer.run(steps=2) == "steps" and len(trainer.held_out(99)) == 3
