"""`recurx.hybrid`, the public name of `recurx.experiments.hybrid`: language in front."""

from recurx.experiments.hybrid import (
    HybridConfig,
    HybridReasoner,
    HybridTrainer,
    PassageBank,
    load_encoder,
    packaged_encoder,
    task_bank,
)

__all__ = [
    "HybridConfig",
    "HybridReasoner",
    "HybridTrainer",
    "PassageBank",
    "load_encoder",
    "packaged_encoder",
    "task_bank",
]
