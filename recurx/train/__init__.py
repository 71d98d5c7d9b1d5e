"""Training with deep supervision, and evaluation by the rules.

trainer = recurx.train.Trainer(recurx.train.preset("tiny-mlp", "sudoku-4x4"), "runs/first")
trainer.run(time_budget=60)
recurx.train.evaluate(trainer.averaged(), trainer.task, trainer.held_out(512))
"""

from recurx.train.captured import CapturedStep, CudaGraphs
from recurx.train.config import PRESETS, TrainConfig, preset
from recurx.train.ema import Average
from recurx.train.evaluate import Report, evaluate
from recurx.train.optim import AdamATan2, SparseSignSGD
from recurx.train.progress import Progress
from recurx.train.puzzles import PuzzleSampler, PuzzleSplit
from recurx.train.queue import SampleQueue
from recurx.train.swap import provide_adam_atan2, swap
from recurx.train.trainer import Trainer

__all__ = [
    "PRESETS",
    "AdamATan2",
    "Average",
    "CapturedStep",
    "CudaGraphs",
    "Progress",
    "PuzzleSampler",
    "PuzzleSplit",
    "Report",
    "SampleQueue",
    "SparseSignSGD",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "preset",
    "provide_adam_atan2",
    "swap",
]
