"""Training with deep supervision, and evaluation by the rules.

trainer = recurx.train.Trainer(recurx.train.preset("tiny-mlp", "sudoku-4x4"), "runs/first")
trainer.run(time_budget=60)
recurx.train.evaluate(trainer.averaged(), trainer.task, trainer.held_out(512))
"""

from recurx.train.captured import CapturedStep, CudaGraphs
from recurx.train.config import TrainConfig
from recurx.train.data import Data
from recurx.train.ema import Average
from recurx.train.evaluate import Report, evaluate
from recurx.train.optim import AdamATan2, Muon, SparseSignSGD
from recurx.train.presets import PRESETS, preset
from recurx.train.progress import Progress
from recurx.train.queue import SampleQueue
from recurx.train.run_folder import saved_config
from recurx.train.swap import provide_adam_atan2, swap
from recurx.train.task_data import TaskData, open_data
from recurx.train.trainer import Trainer

__all__ = [
    "PRESETS",
    "AdamATan2",
    "Average",
    "CapturedStep",
    "CudaGraphs",
    "Data",
    "Muon",
    "Progress",
    "Report",
    "SampleQueue",
    "SparseSignSGD",
    "TaskData",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "open_data",
    "preset",
    "provide_adam_atan2",
    "saved_config",
    "swap",
]
