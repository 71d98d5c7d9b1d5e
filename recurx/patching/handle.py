"""What `recurx.patch` gives back: a printable report, and the way to undo it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """One module or class that was looked at.

    Args:
        where: path of the module in the tree that was given ("" for the root), or a class name.
        kind: class of the module.
        patched: whether it runs on recurx now.
        details: what was swapped and what stays, or what differs.
    """

    where: str
    kind: str
    patched: bool
    details: tuple[str, ...]

    def __str__(self) -> str:
        state = "patched" if self.patched else "NOT patched"
        head = f"  {self.where or '(the module itself)'} ({self.kind}): {state}"
        return "\n".join([head, *(f"    {line}" for line in self.details)])


@dataclass(frozen=True)
class Report:
    """All entries of one call of `recurx.patch`; print it."""

    entries: tuple[Entry, ...]

    @property
    def patched(self) -> tuple[Entry, ...]:
        """Entries that run on recurx now."""
        return tuple(entry for entry in self.entries if entry.patched)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """Entries that resemble a recursion but differ; they run as before."""
        return tuple(entry for entry in self.entries if not entry.patched)

    def __str__(self) -> str:
        head = f"recurx.patch: {len(self.patched)} patched, {len(self.refused)} refused"
        return "\n".join([head, *(str(entry) for entry in self.entries)])


def installed(module: Any, method: str) -> Callable[..., object] | None:
    """The function that recurx put in place of `module.method`, or None."""
    bound = vars(module).get(method)
    if isinstance(bound, MethodType) and hasattr(bound.__func__, "recurx_recipe"):
        function: Callable[..., object] = bound.__func__
        return function
    return None


_ABSENT = object()


class PatchHandle:
    """Undoes a patch: `remove()`, or leave the `with` block.

    Deep copies that were made of a patched model stay patched; `recurx.patch` is called once per
    model, and `remove` concerns the modules that this call changed.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        # (owner, attribute, value (the function of a method), what it had itself before)
        self._put: list[tuple[weakref.ref[Any], str, Any, Any]] = []

    @property
    def report(self) -> Report:
        """What was swapped, what not, and why; with a patched class it grows with its instances."""
        return Report(tuple(self._entries))

    @property
    def modules(self) -> list[nn.Module]:
        """The living modules that this handle patched and did not restore."""
        living = [(ref(), name, function) for ref, name, function, _ in self._put]
        return [m for m, name, f in living if isinstance(m, nn.Module) and installed(m, name) is f]

    def note(self, entry: Entry) -> None:
        """Add one entry to the report."""
        self._entries.append(entry)

    def put(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute of an object or a class, which must allow weak references, until
        `remove`, which leaves what somebody else has put there since."""
        before = vars(owner).get(name, _ABSENT)
        if installed(owner, name) is not None:
            before = _ABSENT  # an earlier patch is no original
        setattr(owner, name, value)
        self._put.append((weakref.ref(owner), name, _function(value), before))

    def remove(self) -> None:
        """Restore every object that this handle changed; a second call does nothing."""
        while self._put:
            ref, name, value, before = self._put.pop()
            owner = ref()
            if owner is None or _function(vars(owner).get(name)) is not value:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return str(self.report)


def _function(value: Any) -> Any:
    """The function of a method, which holds its object; else the value itself."""
    return value.__func__ if isinstance(value, MethodType) else value
