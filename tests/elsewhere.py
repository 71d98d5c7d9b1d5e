"""A device context that shows what forgets its device; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class Elsewhere(TorchFunctionMode):
    """Inside, a new tensor that says no device is an error: under `with torch.device("cuda")` it
    would not lie beside its operands, and a CPU generator could not fill it.

    Args:
        generators: only what draws from a generator, so that a caller's own code may run inside.
    """

    __module__ = "torch.stand_in"  # no mode of the user's, who would want to see operators

    def __init__(self, generators: bool = False) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        unplaced = func in _device_constructors() and kwargs.get("device") is None
        if unplaced and (kwargs.get("generator") is not None or not self.generators):
            raise RuntimeError(f"{func.__name__} makes a tensor on the default device")
        return func(*args, **kwargs)
