"""Errors that recurx raises on purpose.

Each message names the operation, the argument, what was expected, what came, and what to do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps"


class RecurxError(Exception):
    """Base class of every error that recurx raises on purpose."""

    exit_code = 2  # of a command that it ends: the user's mistake


class InvalidArgument(RecurxError, ValueError):
    """An argument has the wrong shape, dtype, device, name or value."""


class BackendUnavailable(RecurxError, RuntimeError):
    """A backend that was asked for by name cannot run here, or cannot run this problem."""


class CudaError(RecurxError, RuntimeError):
    """CUDA, or the host code of a kernel, refused a launch; the message has the error's name."""


class CheckpointError(RecurxError, ValueError):
    """A checkpoint is damaged, or does not fit the model; the message names key and shape."""


class RunFailed(RecurxError, RuntimeError):
    """A training run cannot go on: it diverged, or another one has its folder."""

    exit_code = 1


class SaveFailed(RecurxError, OSError):
    """A file could not be written; the message says what is lacking. An older one is unchanged."""

    exit_code = 1


class UnsupportedModel(RecurxError, TypeError):
    """`recurx.patch` does not recognise the model; the message says what differs."""


class QuantizationRefused(RecurxError, ValueError):
    """`recurx.quantize` found that a model behaves differently with fewer bits; see `.gate`."""

    def __init__(self, message: str, gate: object) -> None:
        super().__init__(message)
        self.gate = gate


class RecurxWarning(UserWarning):
    """Something runs otherwise than was asked for; the message says why, and what to do."""


@contextmanager
def reading(path: object, what: str, hint: str = "") -> Iterator[None]:
    """Whatever fails inside becomes a CheckpointError that names the file and `what` was read: the
    parsers of damaged bytes raise anything, so no list of types would do."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
        text = f"{path}: {what}: {type(error).__name__}: {reason}. {hint}"
        raise CheckpointError(text.rstrip()) from error


def bad_argument(op: str, arg: str, expected: str, got: object, hint: str = "") -> InvalidArgument:
    """Build (not raise) the error for one bad argument of `op`.

    >>> raise bad_argument("recurse", "x", "a [B, T, D] tensor", (3, 4), "add a batch dimension")
    """
    message = f"recurx.{op}: argument `{arg}`: expected {expected}, got {got}."
    return InvalidArgument(f"{message} {hint}".rstrip())


def no_compiled_module(error: ImportError) -> str:
    """Why the compiled engines are out of reach, and the command that brings them."""
    return f"needs the compiled module recurx._C ({error}); {how_to_compile()}"


def how_to_compile(tool: str = "a C++ compiler", variables: str = "") -> str:
    """What to run, with `tool` on PATH, so that this copy gets its engines: a clause.

    pip needs the flags: it keeps the wheel that it built without a compiler and would install
    that one again.
    """
    if sys.platform != "linux":
        return f"the engines are compiled on Linux only, and this is {sys.platform}"
    script = Path(__file__).resolve().parents[1] / "csrc" / "native_build.py"
    command = f"python {script}" if script.is_file() else f"{REINSTALL} {_source()}"
    return f"with {tool} on PATH run: {variables}{command}"


def _source() -> str:
    """What pip installed recurx from, as pip wants to read it again."""
    from importlib.metadata import PackageNotFoundError, distribution  # 10 ms, seldom needed

    try:
        text = distribution("recurx").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    came_from = json.loads(text or "{}")  # a package index leaves none
    vcs = came_from.get("vcs_info", {}).get("vcs")
    return f"{vcs}+{came_from['url']}" if vcs else came_from.get("url", "recurx")
