"""What code names, in its file and beyond, and whether all of that is still what it was.

A proof holds for the functions and settings that were there. `Names` walks from a function through
everything that it names; `Code` does so from a method of a model around proved nets.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OURS = ("torch.", "recurx.")  # whose functions are what they are
SCALARS = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN = (*SCALARS, tuple, list, set, frozenset)
_OPAQUE = (types.FunctionType, types.BuiltinFunctionType, type, Tensor, nn.Module)
_DEEPEST = 8  # of files and settings that lead to each other
_LARGE = 64  # of tables that are no settings
_HOLDERS = (staticmethod, classmethod, property, functools.partial, types.MethodType,
            functools.cached_property, type(functools.cache(len)))  # fmt: skip


def functions(value: Any, depth: int = 4) -> Iterator[types.FunctionType]:
    """The functions in a function, its decorators, a method, a property or a partial."""
    parts: list[Any] = []
    if isinstance(value, types.FunctionType):
        yield value
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                parts.append(cell.cell_contents)
    elif isinstance(value, _HOLDERS):
        names = ("__func__", "fget", "func", "__wrapped__")
        parts = [getattr(value, name, None) for name in names]
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
        self._follows = frozenset(follows)
        self._scopes: dict[int, tuple[Mapping[str, Any], list[str]]] = {}
        self._walked: set[int] = set()

    def id(self, value: Any) -> int:
        value = unwrapped(value)
        self.kept.append(value)
        return id(value)

    def of(self, value: Any, depth: int = 0) -> tuple[Any, ...]:
        """The signature of the functions in a value, each walked through once."""
        found: list[Any] = []
        for function in functions(value):
            found.append(self.id(function.__code__))
            foreign = depth > 0 and "site-packages" in function.__code__.co_filename
            if not (foreign or found[-1] in self._walked or _known(function.__module__)):
                self._walked.add(found[-1])
                names = named(function.__code__)
                found += self.look(function.__globals__, names, {}, depth + 1)
        return tuple(found)

    def look(
        self, scope: Mapping[str, Any], names: Iterable[str], seen: dict[int, Any], depth: int = 0
    ) -> list[Any]:
        """The signature of these names in a namespace, and in those that they lead to."""
        found: list[Any] = []
        if id(scope) in seen or depth > _DEEPEST:
            return found
        seen[id(scope)] = scope
        known = self._scopes.setdefault(id(scope), (scope, []))[1]
        names = set(filter(_is_word, names)) - self._follows
        for name in sorted(names & scope.keys()):
            value, first = scope[name], name not in known
            known += [name] if first else []
            inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
            if isinstance(value, _PLAIN):
                found += [(name, type(value), repr(value))] if first else []
            elif inside is None or isinstance(value, _OPAQUE) or _is_standard(value):
                found += [(name, self.id(value), self.of(value, depth))] if first else []
            else:  # settings, or a file
                own = inside if type(value) is dict and len(inside) < _LARGE else names
                found.append((name, type(value), *self.look(inside, own, seen, depth + 1)))
        return found

    def held(self) -> list[tuple[Any, Any, Any]]:
        """(namespace, what gets its values, the values), for `same`."""
        found = []
        for scope, names in (given for given in self._scopes.values() if given[1]):
            values = itemgetter(*names, *names)  # twice: of a single name it would give no tuple
            found.append((scope, values, values(scope)))
        return found


def _is_word(name: Any) -> bool:
    return isinstance(name, str)


def _is_standard(value: Any) -> bool:
    """Whether it is a file of Python's own."""
    name = getattr(value, "__name__", "") if isinstance(value, types.ModuleType) else ""
    return name.partition(".")[0] in sys.stdlib_module_names


def _known(module: Any) -> bool:
    """Whether the functions of a file are what they are."""
    name = str(module)
    return f"{name}.".startswith(OURS) or name.partition(".")[0] in sys.stdlib_module_names


def same(held: list[tuple[Any, Any, Any]]) -> bool:
    """Whether all names mean the same objects; raises KeyError where one is gone."""
    return all(all(map(is_, values(scope), before)) for scope, values, before in held)


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
        try:
            return same(self._held) and all(keys.isdisjoint(a) for keys, a in self._absent)
        except KeyError:
            return False


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
