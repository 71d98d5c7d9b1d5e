"""What `recurx.patch` gives back: a printable report, and the way to undo it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
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


def installed(module: nn.Module, method: str) -> Callable[..., object] | None:
    """The function that recurx put in place of `module.method`, or None."""
    bound = vars(module).get(method)
    if isinstance(bound, MethodType) and hasattr(bound.__func__, "recurx_recipe"):
        function: Callable[..., object] = bound.__func__
        return function
    return None


class PatchHandle:
    """Undoes a patch: `remove()`, or leave the `with` block.

    Deep copies that were made of a patched model stay patched; `recurx.patch` is called once per
    model, and `remove` concerns the modules that this call changed.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._methods: list[tuple[weakref.ref[nn.Module], str, Callable[..., object]]] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def report(self) -> Report:
        """What was swapped, what not, and why; with a patched class it grows with its instances."""
        return Report(tuple(self._entries))

    @property
    def modules(self) -> list[nn.Module]:
        """The living modules that this handle patched and did not restore."""
        living = [(ref(), method, function) for ref, method, function in self._methods]
        return [m for m, method, f in living if m is not None and installed(m, method) is f]

    def note(self, entry: Entry) -> None:
        """Add one entry to the report."""
        self._entries.append(entry)

    def install(self, module: nn.Module, method: str, function: Callable[..., object]) -> None:
        """Put `function` in place of `module.method`, in the instance only."""
        setattr(module, method, MethodType(function, module))
        self._methods.append((weakref.ref(module), method, function))

    def put(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute of an object or a class until `remove`, which leaves what somebody else
        has put there since."""
        own, before = name in vars(owner), vars(owner).get(name)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        setattr(owner, name, value)
        self._undo.append(undo)

    def remove(self) -> None:
        """Restore every module and class that this handle changed; a second call does nothing."""
        for ref, method, function in self._methods:
            module = ref()
            if module is not None and installed(module, method) is function:
                delattr(module, method)
        for undo in self._undo:
            undo()
        self._methods.clear()
        self._undo.clear()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return str(self.report)
