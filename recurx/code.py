"""What code names, in its file and beyond, and whether all of that is still what it was.

A proof holds for the functions and settings that were there. `Names` walks from a function through
everything that it names; `Code` does so from a method of a model around proved nets.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

OURS = ("torch.", "recurx.")  # whose functions are what they are
SCALARS = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device)
_MEMBERS = (dict, list, tuple, set, frozenset, collections.deque)
# What changes in place where nobody can see it, by the names of its classes.
_HIDDEN = {"Tensor", "Module", "ndarray", "bytearray", "memoryview", "array", "ContextVar",
           "ReferenceType", "count", "cycle", "generator", "Random", "Generator"}  # fmt: skip
_SETTINGS = ("types", "argparse", "collections", "_thread")  # whose objects are somebody's settings
_DEEPEST = 8  # of files and settings that lead to each other
_LARGE = 1024  # of tables
_HOLDERS = (staticmethod, classmethod, property, functools.partial, types.MethodType,
            functools.cached_property, type(functools.cache(len)))  # fmt: skip
_HELD = ("__func__", "fget", "func", "__wrapped__")
_of_functions = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_of_cells = attrgetter("cell_contents", "cell_contents")  # twice: of one it would give no tuple
_END = object()  # behind the last member, so that one more or less shows


def functions(value: Any, depth: int = 4) -> Iterator[types.FunctionType]:
    """The functions in a function, its decorators, a method, a property or a partial."""
    parts: list[Any] = []
    if isinstance(value, types.FunctionType):
        yield value
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                parts.append(cell.cell_contents)
    elif isinstance(value, _HOLDERS):
        parts = [getattr(value, name, None) for name in _HELD]
    for part in parts if depth else ():
        yield from functions(part, depth - 1)


def named(code: types.CodeType) -> set[str]:
    """The names and words in a function, and in those inside it."""
    found = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    return found.union(*(named(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def unwrapped(value: Any) -> Any:
    """Without the range that our profiler puts around a function."""
    if str(getattr(value, "__module__", "")).startswith(OURS[1]):
        return getattr(value, "__wrapped__", value)
    return value


class Names:
    """A walk through names; equal signatures compute alike while `kept` lives, whose ids are there.

    Args:
        follows: names that are read anew at every call, so that they may change.
    """

    def __init__(self, follows: Iterable[str] = ()) -> None:
        self.kept: list[Any] = []
        self.hidden: set[str] = set()  # classes of what changes unseen
        self._follows = frozenset(follows)
        self._scopes: dict[int, tuple[Mapping[str, Any], list[str]]] = {}
        self._watched: list[tuple[Any, Callable[[Any], Any]]] = []
        self._walked: set[int] = set()

    def id(self, value: Any) -> int:
        value = unwrapped(value)
        self.kept.append(value)
        return id(value)

    def of(self, value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
        """The signature of a function and of what it names and keeps, once; or of what holds it."""
        value = unwrapped(value)
        if not isinstance(value, types.FunctionType):
            held = (getattr(value, name, None) for name in (*_HELD, "args", "keywords", "__self__"))
            return tuple(self.value(part, (), seen, depth) for part in held if part is not None)
        foreign = depth > 0 and "site-packages" in value.__code__.co_filename
        if foreign or self.id(value) in self._walked or _known(value.__module__):
            return self.id(value.__code__)
        self._walked.add(id(value))
        self._watched.append((value, _of_functions))
        kept, names = [*_of_functions(value)[1:], vars(value)], named(value.__code__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                kept.append(cell.cell_contents)
                self._watched.append((cell, _of_cells))
        parts = [self.value(part, names, seen, depth) for part in kept]
        parts += self.look(value.__globals__, names, {}, depth + 1)
        return self.id(value.__code__), *parts

    def look(
        self, scope: Mapping[str, Any], names: Iterable[str], seen: dict[int, Any], depth: int = 0
    ) -> list[Any]:
        """The signature of these names in a namespace, and in those that they lead to."""
        found: list[Any] = []
        if id(scope) in seen or depth > _DEEPEST:
            return found
        seen[id(scope)] = scope
        known = self._scopes.setdefault(id(scope), (scope, []))[1]
        names = {name for name in names if isinstance(name, str)} - self._follows
        for name in sorted(names & scope.keys()):
            first = name not in known
            known += [name] if first else []
            if first or not isinstance(scope[name], SCALARS):
                found.append((name, self.value(scope[name], names, seen, depth)))
        return found

    def value(
        self, value: Any, names: Iterable[str] | None, seen: dict[int, Any], depth: int = 0
    ) -> Any:
        """The signature of a value, whose parts are watched: of files, classes and objects those
        that have these names; None: all parts of an object."""
        kind = type(value)
        if kind in SCALARS:
            return kind, repr(value)
        if isinstance(value, (types.FunctionType, *_HOLDERS)):
            return self.id(value), self.of(value, seen, depth)
        if not _HIDDEN.isdisjoint([c.__name__ for c in kind.__mro__]):
            self.hidden.add(kind.__name__)
            return self.id(value)
        names = None if names is None else {*names}
        if isinstance(value, types.ModuleType):
            if value is os and names and names & {"environ", "getenv"}:
                self.hidden.add("os.environ")
            if value.__name__.partition(".")[0] not in sys.stdlib_module_names:
                return kind, *self.look(vars(value), names or (), seen, depth + 1)
        elif isinstance(value, type):
            bases = [] if _known(value.__module__) else value.__mro__
            found = (self.look(vars(base), names or (), seen, depth) for base in bases)
            return self.id(value), *map(tuple, found)
        elif isinstance(value, _MEMBERS) or not _known(kind.__module__, _SETTINGS):
            if id(value) in seen:
                return seen[id(value)] if names is None else kind
            seen[id(value)] = kind  # while its parts are looked at: they may lead back
            if depth > _DEEPEST or (isinstance(value, _MEMBERS) and len(value) > _LARGE):
                self.hidden.add(f"{kind.__name__} that is too large or too deep")
                return kind
            parts = self._parts(value, kind, names)
            seen[id(value)] = kind, *[(n, self.value(v, names, seen, depth + 1)) for n, v in parts]
            return seen[id(value)]
        return self.id(value)

    def _parts(self, value: Any, kind: type, names: Any) -> list[tuple[Any, Any]]:
        """What an object or a table is made of, watched from now on."""
        found: list[tuple[Any, Any]] = []
        inside = getattr(value, "__dict__", None)
        if names is not None and not isinstance(value, _MEMBERS):
            own = [f for c in kind.__mro__ if not _known(c.__module__) for f in vars(c).values()]
            names |= {name for each in own for f in functions(each) for name in named(f.__code__)}
        for table in (t for t in (value, inside) if isinstance(t, dict)):
            chosen = [k for k in table if k not in self._follows]
            chosen = [k for k in chosen if names is None or table is value or k in names]
            found += [(repr(key), table[key]) for key in chosen]
            self._watched.append((table, lambda t, k=chosen: (*t, *[t[key] for key in k], _END)))
        if isinstance(value, _MEMBERS[1:]):
            found += [("", member) for member in value]
            self._watched.append((value, lambda members: (*members, _END)))
        slots = [n for c in kind.__mro__ for n, d in vars(c).items()
                 if isinstance(d, types.MemberDescriptorType) and hasattr(value, n)]  # fmt: skip
        if slots and not _known(kind.__module__):
            found += [(name, getattr(value, name)) for name in slots]
            self._watched.append((value, attrgetter(*slots, *slots)))
        return found

    def held(self) -> list[tuple[Any, Any, Any]]:
        """(namespace or value, what gets its parts, the parts), for `same`."""
        # Names twice: of a single one it would give no tuple.
        scopes = [(scope, itemgetter(*own, *own)) for scope, own in self._scopes.values() if own]
        return [(each, parts, parts(each)) for each, parts in (*scopes, *self._watched)]


def _known(module: Any, but: tuple[str, ...] = ()) -> bool:
    """Whether the functions of a file are what they are."""
    name = str(module)
    standard = name.partition(".")[0] in sys.stdlib_module_names and name not in but
    return f"{name}.".startswith(OURS) or standard


def same(held: list[tuple[Any, Any, Any]]) -> bool:
    """Whether all parts are the same objects."""
    try:
        return all(all(map(is_, parts(each), before)) for each, parts, before in held)
    except (KeyError, AttributeError, ValueError):  # one is gone
        return False


class Before(NamedTuple):
    """What a method read when the module was proved; holds no module."""

    signature: list[Any]
    kept: list[Any]
    follows: tuple[str, ...]


class Code:
    """A method of one module, with what it reads: methods, settings, functions of its file."""

    def __init__(self, module: nn.Module, method: str, follows: tuple[str, ...]) -> None:
        bases = [base for base in type(module).__mro__ if base is not object]
        bases = [base for base in bases if not base.__module__.startswith(OURS)]
        bases = [base for base in bases if "recurx_before" not in vars(base)]
        self.module, names, todo = weakref.ref(module), {method}, [method]
        while todo:
            called = todo.pop()
            for function in (f for b in bases for f in functions(vars(b).get(called))):
                new = named(function.__code__) - names
                names |= new
                todo += new
        names -= {"__class__", "__dict__", "__doc__", "__module__", "training", *follows}
        walk = Names(follows)
        scopes = [vars(module), *map(vars, bases)]
        found = [entry for scope in scopes for entry in walk.look(scope, names, {})]
        self.before, self._held = Before(found, walk.kept, follows), walk.held()
        self._absent = [(scope.keys(), frozenset(names - scope.keys())) for scope in scopes]

    def same(self) -> bool:
        """Whether nothing changed, at a glance."""
        return same(self._held) and all(keys.isdisjoint(a) for keys, a in self._absent)


_codes: dict[int, Code] = {}


def changed(module: nn.Module, method: str, before: Before | None) -> str | None:
    """What a method reads that is no longer as it was in the module that was proved; or None."""
    if before is None:
        return None
    found = _codes.get(id(module))
    if found is not None and found.module() is module and found.same():
        return None
    found = Code(module, method, before.follows)
    now = found.before.signature
    for entry, other in zip(now, before.signature, strict=False):
        if entry != other:
            return f"`{entry[0]}`, which its `{method}` reads, is not what it was"
    if len(now) != len(before.signature):
        return f"its `{method}` reads more than it did"
    _codes[id(module)] = found
    weakref.finalize(module, _codes.pop, id(module), None)
    return None


changed._dynamo_marked_constant = True  # type: ignore[attr-defined]
