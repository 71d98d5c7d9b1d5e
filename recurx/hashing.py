"""Hashes of frozen dataclasses, computed once: a key of every cache, they hold tens of others."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def hash_once(cls: type[T]) -> type[T]:
    """Decorate a frozen dataclass whose hash costs something: it is computed at its first use.

    The hash is left out of pickles, because that of a string differs from process to process.
    """
    full = cls.__hash__

    def once(self: Any) -> int:
        try:
            return self.__dict__["_hash"]
        except KeyError:
            self.__dict__["_hash"] = value = full(self)
            return value

    def state(self: Any) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    cls.__hash__ = once  # type: ignore[assignment]
    cls.__getstate__ = state  # type: ignore[method-assign,assignment]
    return cls
