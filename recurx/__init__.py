"""recurx: fused kernels for recursive reasoning models (HRM, TRM and their kin).

Names load on first use, so that `import recurx` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from recurx import _checkout

_checkout.install()

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
    "explain": "recurx.explain",
    "patch": "recurx.patch",
    "profile": "recurx.profile",
    "load_checkpoint": "recurx.checkpoint",
    "save_checkpoint": "recurx.checkpoint",
    "solve": "recurx.solve",
    "Answers": "recurx.solve",
    "Fill": "recurx.solve",
    "shipped": "recurx.shipped",
    "quantize": "recurx.quantize",
    "LaunchPlan": "recurx.plan",
    "cost": "recurx.plan",
    "RecurxError": "recurx.errors",
    "BackendUnavailable": "recurx.errors",
    "InvalidArgument": "recurx.errors",
    "CheckpointError": "recurx.errors",
    "UnsupportedModel": "recurx.errors",
    "QuantizationRefused": "recurx.errors",
}
_MODULES = (
    "models", "reference", "backends", "kernels", "plan", "tasks", "train", "hybrid", "fp8",
)  # fmt: skip

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"recurx.{name}")
    raise AttributeError(f"module 'recurx' has no attribute {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(ModuleType):
    """Keeps functions like `recurx.patch`, `recurx.solve` and `recurx.shipped` what they are.

    Modules of the same names define them, and Python's import sets a submodule as an attribute of
    its package, whoever imports it first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
