"""Training runs by name: a model, and the settings that suit it."""

from __future__ import annotations

import dataclasses
from typing import Any

from recurx import tasks
from recurx.errors import InvalidArgument, bad_argument
from recurx.train.config import TrainConfig

# "tiny" models train in minutes on two cores. One low call and one cycle a supervision step leave
# the refining to the outer loop.
_TINY_NET = {
    "hidden_size": 64, "num_heads": 4, "expansion": 2.0, "inner_multiple": 16, "L_layers": 1,
    "H_cycles": 1, "L_cycles": 2, "pos_encodings": "learned", "forward_dtype": "float32",
    "halt_max_steps": 8,
}  # fmt: skip
# Model fields by preset. The first five are the published sizes.
PRESETS: dict[str, dict[str, Any]] = {
    "trm-att": {"puzzle_emb_ndim": 512},
    "trm-mlp": {"puzzle_emb_ndim": 512, "mlp_t": True, "pos_encodings": "none"},
    "single-z": {"puzzle_emb_ndim": 512, "variant": "single_z"},
    "hier6": {"puzzle_emb_ndim": 512, "variant": "hier6"},
    "hrm": {"puzzle_emb_ndim": 512, "variant": "hrm"},
    "tiny-att": _TINY_NET,
    "tiny-mlp": {**_TINY_NET, "mlp_t": True},
}
# Published training values (TRM, arXiv 2510.04871, section 5) and what suits the tiny nets.
_FULL = {
    "batch_size": 768, "lr": 1e-4, "weight_decay": 1.0, "warmup": 2000, "ema": 0.999,
    "puzzle_emb_lr": 1e-4,
}  # fmt: skip
_TINY = {"batch_size": 64, "lr": 5e-3, "weight_decay": 0.01, "warmup": 50, "ema": 0.99}


def preset(name: str, task: str, **changes: Any) -> TrainConfig:
    """The run that a preset describes, on `task`, with fields of TrainConfig changed.

    Raises:
        InvalidArgument: unknown preset (the known ones are listed), task, or field.
    """
    if name not in PRESETS:
        raise InvalidArgument(f"train: expected a preset of {', '.join(PRESETS)}, got {name!r}.")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    for key in changes:
        if key not in known:
            raise bad_argument("train.preset", key, f"one of {', '.join(sorted(known))}", "unknown")
    values = {**(_TINY if name.startswith("tiny") else _FULL), **changes}
    values["model"] = {**PRESETS[name], **changes.get("model", {})}
    config = TrainConfig(task=task, **values)
    config.model_config(tasks.get(task))  # refuses what does not fit now, not at the first step
    return config
