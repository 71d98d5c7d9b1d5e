"""A training run that is interrupted, see tests/alone.py."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import recurx
from recurx.train import Trainer
from tests.train.test_train import TASK, differing, tiny


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_usable_checkpoint(tmp_path, number: signal.Signals) -> None:
    def interrupt(progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = Trainer(tiny(), tmp_path)
    assert trainer.run(steps=50, on_step=interrupt) == "interrupted"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert 3 <= trainer.step < 50
    assert differing(Trainer.resume(tmp_path), trainer) == []
    checkpoint = recurx.load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.extra["task"] == TASK and checkpoint.extra["step"] == trainer.step
    batch = {"inputs": torch.from_numpy(trainer.held_out(4).inputs)}
    built = recurx.solve(checkpoint.build(), batch)
    assert torch.equal(built.q, recurx.solve(trainer.averaged(), batch).q)
