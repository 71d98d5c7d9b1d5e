"""Every preset trains, in small; the time budget; TensorBoard's event files."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

import recurx.experiments.tasks  # noqa: F401
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.experiments.answering.progress import event_files
from recurx.train import PRESETS, Trainer, preset

TASK = "sort:length=5,values=4"
SMALL = {"hidden_size": 64, "num_heads": 2, "expansion": 2.0, "inner_multiple": 16, "L_layers": 1}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str) -> None:
    """Two steps move every weight, and the puzzle embedding's row, where the preset has one."""
    model = {**SMALL, "puzzle_emb_ndim": 64} if "puzzle_emb_ndim" in PRESETS[name] else SMALL
    if name == "hrm":
        model = {**model, "H_layers": 1}
    trainer = Trainer(preset(name, TASK, model=model, batch_size=4, lr=1e-2, warmup=0))
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    losses = [trainer.train_step().loss for _ in range(2)]
    assert all(0 < loss < 100 for loss in losses)
    still = [key for key, value in trainer.model.named_parameters()
             if torch.equal(value, before[key])]  # fmt: skip
    assert still == []
    if trainer.config.model.get("puzzle_emb_ndim"):
        # Sign SGD: from 0, two steps of +-lr each, up to the weight decay.
        row = trainer.model.puzzle_emb.weights[0].abs() / trainer.config.puzzle_emb_lr
        near = [(row - steps).abs() < 1e-3 for steps in (0, 1, 2)]
        assert torch.stack(near).any(0).all() and (row > 0.5).any()


def test_a_time_budget_ends_the_command(tmp_path, capsys) -> None:
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    arguments = ["train", TASK, "--time-budget", "0.3s", "--eval-count", "8", *small]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--json"]) == 0
    printed, said = capsys.readouterr()
    told = json.loads(printed)
    assert told["ended"] == "time" and told["step"] > 0 and "Time is up" in said
    assert Trainer.resume(tmp_path / "run").step == told["step"]


def train_with_events(folder, steps: int, *more: str) -> int:
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    where = ["--resume", str(folder)] if more else [TASK, "--out", str(folder), *small]
    return main(["train", *where, "--steps", str(steps), "--eval-every", "2", "--eval-count", "8",
                 "--tensorboard"])  # fmt: skip


def test_event_files_get_what_the_metrics_get(tmp_path, monkeypatch) -> None:
    """With a writer that remembers, so that it is tested where TensorBoard is not installed."""
    written, purged = [], []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")
            purged.append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert train_with_events(tmp_path / "run", 3) == 0
    assert train_with_events(tmp_path / "run", 4, "resume") == 0
    assert purged == [1, 4] and written.count("closed") == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert ("train/loss", line["loss"], line["step"]) in written
        assert ("train/lr", line["lr"], line["step"]) in written and line["lr"] > 0
        assert ("held_out/exact", line["held_out"]["exact"], line["step"]) in written
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(preset("tiny-mlp", TASK, model=SMALL, batch_size=2), tmp_path)
    with (
        pytest.raises(InvalidArgument, match=r"pip install 'recurx\[tensorboard\]'"),
        event_files(trainer),
    ):
        pass


def test_real_event_files_can_be_read_back(tmp_path) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs recurx[tensorboard]"
    )
    assert train_with_events(tmp_path / "run", 4) == 0
    events = reading.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("held_out/exact")] == [2, 4]
