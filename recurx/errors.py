"""Errors that recurx raises on purpose.

Each message names the operation, the argument, what was expected, what came, and what to do.
"""

from __future__ import annotations


class RecurxError(Exception):
    """Base class of every error that recurx raises on purpose."""


class InvalidArgument(RecurxError, ValueError):
    """An argument has the wrong shape, dtype, device, name or value."""


class BackendUnavailable(RecurxError, RuntimeError):
    """A backend that was asked for by name cannot run here, or cannot run this problem."""


class CudaError(RecurxError, RuntimeError):
    """CUDA, or the host code of a kernel, refused a launch; the message has the error's name."""


class CheckpointError(RecurxError, ValueError):
    """A checkpoint is damaged, or does not fit the model; the message names key and shape."""


class UnsupportedModel(RecurxError, TypeError):
    """`recurx.patch` does not recognise the model; the message says what differs."""


class QuantizationRefused(RecurxError, ValueError):
    """`recurx.quantize` found that a model behaves differently with fewer bits; see `.gate`."""

    def __init__(self, message: str, gate: object) -> None:
        super().__init__(message)
        self.gate = gate


def bad_argument(op: str, arg: str, expected: str, got: object, hint: str = "") -> InvalidArgument:
    """Build (not raise) the error for one bad argument of `op`.

    >>> raise bad_argument("recurse", "x", "a [B, T, D] tensor", (3, 4), "add a batch dimension")
    """
    message = f"recurx.{op}: argument `{arg}`: expected {expected}, got {got}."
    return InvalidArgument(f"{message} {hint}".rstrip())
