"""Training with deep supervision, and evaluation by the rules.

trainer = recurx.train.Trainer(recurx.train.preset("tiny-mlp", "sudoku-4x4"), "runs/first")
trainer.run(time_budget=60)
recurx.train.evaluate(trainer.averaged(), trainer.task, trainer.held_out(512))
"""

from recurx.train.config import PRESETS, TrainConfig, preset
from recurx.train.ema import Average
from recurx.train.evaluate import Report, evaluate
from recurx.train.optim import AdamATan2, SparseSignSGD
from recurx.train.trainer import Progress, Trainer

__all__ = [
    "PRESETS",
    "AdamATan2",
    "Average",
    "Progress",
    "Report",
    "SparseSignSGD",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "preset",
]
