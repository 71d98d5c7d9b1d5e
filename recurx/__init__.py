"""recurx: fused kernels for recursive reasoning models (HRM, TRM and their kin).

Names load on first use, so that `import recurx` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from recurx import _checkout


def _before_fork() -> None:
    from recurx.forking import wait_for_imports

    wait_for_imports()


_checkout.install()
os.register_at_fork(before=_before_fork)

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "Step": "recurx.schedule",
    "Schedule": "recurx.schedule",
    "Net": "recurx.nets",
    "NetSpec": "recurx.nets",
    "BlockSpec": "recurx.nets",
    "rope_tables": "recurx.nets",
    "Problem": "recurx.problem",
    "recurse": "recurx.api",
    "explain": "recurx.explanation",
    "patch": "recurx.patching",
    "profile": "recurx.bench.profiler",
    "load_checkpoint": "recurx.checkpoint",
    "save_checkpoint": "recurx.checkpoint",
    "solve": "recurx.solving.solve",
    "Answers": "recurx.solving.solve",
    "Fill": "recurx.solving.solve",
    "Search": "recurx.solving.solve",
    "shipped": "recurx.shipped_nets",
    "quantize": "recurx.quantization",
    "export_onnx": "recurx.onnx_export",
    "LaunchPlan": "recurx.plan",
    "cost": "recurx.plan",
    "RecurxError": "recurx.errors",
    "BackendUnavailable": "recurx.errors",
    "InvalidArgument": "recurx.errors",
    "CheckpointError": "recurx.errors",
    "UnsupportedModel": "recurx.errors",
    "QuantizationRefused": "recurx.errors",
}
# Attribute -> module.
_MODULES = {
    name: f"recurx.{name}"
    for name in (
        "models", "reference", "backends", "kernels", "plan", "tasks", "train", "fp8", "hybrid",
    )
}  # fmt: skip

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'recurx' has no attribute {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
