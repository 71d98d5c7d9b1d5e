"""What `recurx.patch` gives back: a printable report, and the way to undo it."""

from __future__ import annotations

import copy
import copyreg
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from recurx.errors import RecurxWarning, UnsupportedModel


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
        state = "watched" if self.patched and self.kind == "class" else state
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
        classes = sum(entry.kind == "class" for entry in self.patched)
        counts = [f"{len(self.patched) - classes} patched", f"{len(self.refused)} refused"]
        counts += [f"{classes} classes watched"] if classes else []
        head = f"recurx.patch: {', '.join(counts)}"
        return "\n".join([head, *(str(entry) for entry in self.entries)])


def installed(module: Any, method: str) -> Callable[..., object] | None:
    """The function that recurx put in place of `module.method`, or None."""
    function: Any = getattr(type(module), method, None)
    return function if hasattr(function, "recurx_recipe") else None


def original(cls: type, method: str) -> Any:
    """The method that a class has without a patch."""
    while hasattr(getattr(cls, method), "recurx_recipe"):
        cls = next(base for base in cls.__mro__[1:] if base is not cls)
    return getattr(cls, method)


def patched_class(cls: type, method: str, function: Any) -> type:
    """A class like `cls` in all but one method: what an instance becomes when it is patched.

    A method in the instance would belong to the original in every shallow copy. A copy of the
    instance is patched too; a pickle holds an instance of `cls`.
    """

    def reduced(self: Any) -> Any:
        return super(new, self).__reduce_ex__(4)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        made, arguments, *rest = super(new, self).__reduce_ex__(protocol)  # type: ignore[misc]
        # pickle itself refuses `__newobj__` with another class than that of the object
        made = {new: cls, copyreg.__newobj__: cls.__new__}.get(made, made)
        return made, tuple(cls if value is new else value for value in arguments), *rest

    def __copy__(self: Any) -> Any:
        own = getattr(cls, "__copy__", None)
        return own(self) if own else copy._reconstruct(self, None, *reduced(self))  # type: ignore[attr-defined]

    def __deepcopy__(self: Any, memo: Any) -> Any:
        own = getattr(cls, "__deepcopy__", None)
        return own(self, memo) if own else copy._reconstruct(self, memo, *reduced(self))  # type: ignore[attr-defined]

    methods = [__reduce_ex__, __copy__, __deepcopy__]
    body: dict[str, Any] = {function.__name__: function for function in methods}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {method: function, BEFORE: (cls, getattr(cls, method))}
    new = type(cls)(cls.__name__, (cls,), body)
    return new


def replaced_below(module: Any, method: str) -> bool:
    """Whether somebody replaced the method of the module's class after the patch."""
    before = getattr(type(module), BEFORE, None)
    return before is not None and getattr(before[0], method) is not before[1]


def fall_back(module: Any, recipe: Any, method: str, why: str) -> Any:
    """The model's own method, where its code is no longer what was patched.

    Raises:
        UnsupportedModel: a fused backend was asked for by name.
    """
    said = f"recurx.patch: {type(module).__name__} changed after the patch: {why}. "
    refresh = "After a change of the model's code call `handle.refresh()`"
    before = getattr(type(module), BEFORE, None)
    if before is None or recipe.backend not in ("auto", "eager"):
        remove = f"{refresh}, or `handle.remove()`; backend {recipe.backend!r} never falls back."
        raise UnsupportedModel(said + remove)
    if not torch.compiler.is_compiling() and said not in _told:
        _told.add(said)
        own = "From now on the model's own code runs, on PyTorch. "
        warnings.warn(f"{said}{own}{refresh}.", RecurxWarning, stacklevel=3)
    return getattr(before[0], method).__get__(module)


_ABSENT = object()
_told: set[str] = set()
BEFORE = "recurx_before"  # of a patched class: the class before, and its method


class PatchHandle:
    """Undoes a patch: `remove()`, or leave the `with` block.

    Copies that were made of a patched model stay patched; `recurx.patch` is called once per
    model, and `remove` concerns the modules that this call changed.
    """

    def __init__(self) -> None:
        self._looked: list[tuple[weakref.ref[nn.Module], Callable[[nn.Module], None]]] = []
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
        living = [(ref(), cls) for ref, name, cls, _ in self._put if name == "__class__"]
        return [module for module, cls in living if isinstance(module, cls)]

    def note(self, entry: Entry) -> None:
        """Add one entry to the report."""
        self._entries.append(entry)

    def looked_at(self, model: nn.Module, look: Callable[[nn.Module], None]) -> None:
        """Remember how to look at a model again, for `refresh`."""
        self._looked.append((weakref.ref(model), look))

    def refresh(self) -> Report:
        """Look at the model again, after its code changed: patch what recurx knows now, restore
        what it does not know. Returns the new report."""
        looked, self._looked = self._looked, []
        others = [entry for entry in self._put if entry[1] != "__class__"]
        self._put = [entry for entry in self._put if entry[1] == "__class__"]
        self.remove()
        self._put, self._entries = others, [e for e in self._entries if e.kind == "class"]
        for ref, look in looked:
            model = ref()
            if model is not None:
                look(model)
        return self.report

    def put(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute of an object or a class, which must allow weak references, until
        `remove`, which leaves what somebody else has put there since."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._put.append((weakref.ref(owner), name, _function(value), before))

    def put_method(self, module: nn.Module, method: str, function: Any) -> None:
        """Replace a method of one module until `remove`, by changing the module's class."""
        cls = type(module)
        while hasattr(vars(cls).get(method), "recurx_recipe"):  # an earlier patch is no original
            cls = cls.__mro__[1]
        new = patched_class(cls, method, function)
        module.__class__ = new
        self._put.append((weakref.ref(module), "__class__", new, cls))

    def remove(self) -> None:
        """Restore every object that this handle changed; a second call does nothing."""
        while self._put:
            ref, name, value, before = self._put.pop()
            owner = ref()
            if name == "__class__":
                if type(owner) is value:
                    owner.__class__ = before
                elif isinstance(owner, value):  # somebody derived a class from ours: empty it
                    for method, function in list(vars(value).items()):
                        if hasattr(function, "recurx_recipe"):
                            delattr(value, method)
                continue
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
