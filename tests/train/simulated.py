"""The backends that a training step is tried on; Triton's launches are run by the interpreter."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from recurx import backends

BACKENDS = ["eager", "auto", "cpu", "triton"]


@contextlib.contextmanager
def on(backend: str) -> Iterator[list[str]]:
    """Inside, `backend` runs on CPU tensors; yields the names of the engines as they run.

    Skips the test where the machine lacks the backend.
    """
    ran: list[str] = []
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            if importlib.util.find_spec("triton") is None:
                pytest.skip("triton has no wheel for this platform")
            folder = str(Path(__file__).resolve().parents[1] / "kernels")
            if folder not in sys.path:  # the interpreter lies with the kernels' tests
                sys.path.insert(0, folder)
            from simulate import triton_on_cpu

            stack.enter_context(triton_on_cpu("tiled"))
        for name in ("cpu", "triton"):
            engine = backends.get(name)
            missing = engine.why_unavailable()
            if name == backend and missing is not None:
                pytest.skip(f"backend {name} {missing}")
            stack.enter_context(mock.patch.object(engine, "run", _noting(engine.run, name, ran)))
        yield ran


def _noting(run: Callable[..., Any], name: str, ran: list[str]) -> Callable[..., Any]:
    def noting(*arguments: Any, **keywords: Any) -> Any:
        ran.append(name)
        return run(*arguments, **keywords)

    return noting
