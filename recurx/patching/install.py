"""Finding what can be patched in an instance, a class or an imported module, and doing it."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from torch import nn

from recurx import backends
from recurx.api import SAVE
from recurx.code import Code
from recurx.errors import (
    BackendUnavailable,
    InvalidArgument,
    RecurxWarning,
    UnsupportedModel,
    bad_argument,
)
from recurx.patching import sharded
from recurx.patching.adapter import Adapter
from recurx.patching.handle import Entry, PatchHandle
from recurx.patching.official import Official
from recurx.route import Request, route

GROUP = "recurx.adapters"  # of entry points


@functools.cache
def adapters() -> dict[str, Adapter]:
    """By the name of their system. The first that knows a module takes it: those of packages, ours
    (recurx/experiments/systems) among them, come before the official code that many follow."""
    found = {point.name: point.load()() for point in entry_points(group=GROUP)}
    return {**found, "official TRM, single-z, hier6 and HRM code": Official()}


# What runs where, and the recipe, of a module and its adapter; raises _Differs.
Examine = Callable[[nn.Module, Adapter], tuple[list[str], Any]]


def patch(
    model: nn.Module | type[nn.Module] | ModuleType,
    backend: str = "auto",
    *,
    save: str = "all",
    probe: bool = True,
) -> PatchHandle:
    """Run the recursion of official TRM / HRM code, or of later systems (see Raises), on recurx.

    Args:
        model: a module with the recursion anywhere in its tree (loss head, ACT wrapper, DDP,
            `torch.compile`d or to be compiled); or a class, or an imported module with such
            classes: then every instance built from now on is patched, or warns and is as it was.
        backend: what runs the recursion, see `recurx.recurse`. An explicit one that cannot run
            here raises at once.
        save: what the gradient window keeps for its backward: "all", "block" or "states" trades
            memory for work, see `recurx.recurse`. A net of foreign code takes "all".
        probe: compare with the original on a small random batch before the swap, in training and
            evaluation; costs about two supervision steps. False trusts the nets' own proofs.

    Returns:
        A handle: `.report` prints what was swapped and what not and why, `.remove()` restores;
        it is a context manager too.

    Raises:
        UnsupportedModel: nothing in there is code that recurx knows; the message says what
            differs, and which systems are known. Nothing was changed.
        BackendUnavailable: an explicit backend cannot run this model here.
    """
    if backend not in backends.NAMES:
        backends.get(backend)  # raises, with the known names
    if save not in SAVE:
        raise bad_argument("patch", "save", f"one of {SAVE}", repr(save))
    examine = functools.partial(_examined, backend=backend, save=save, probe=probe)
    handle = PatchHandle()
    if isinstance(model, nn.Module):
        _patch_instance(handle, model, examine)
        if not handle.report.patched:
            raise UnsupportedModel(_refusal(handle, type(model).__name__))
    elif isinstance(model, type) and issubclass(model, nn.Module):
        _patch_class(handle, model, examine)
    elif isinstance(model, ModuleType):
        known = [value for value in vars(model).values() if _is_known_class(value)]
        if not known:
            raise UnsupportedModel(_refusal(handle, f"module {model.__name__}"))
        for cls in dict.fromkeys(known):
            _patch_class(handle, cls, examine)
    else:
        raise UnsupportedModel(
            f"recurx.patch: expected a torch module, a class of them or an imported module, "
            f"got {type(model).__name__}."
        )
    return handle


def find(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    """(path, module, adapter) of everything in the tree that resembles a recursion."""
    found = (
        (name, module, next((a for a in adapters().values() if a.resembles(module)), None))
        for name, module in model.named_modules()
        if "_orig_mod" not in module._modules  # torch.compile's wrapper: its child is found too
    )
    return [(name, module, adapter) for name, module, adapter in found if adapter is not None]


def _patch_instance(handle: PatchHandle, model: nn.Module, examine: Examine) -> None:
    ready: list[tuple[nn.Module, str, Callable[..., object]]] = []
    handle.looked_at(model, functools.partial(_patch_instance, handle, examine=examine))
    for where, module, adapter in find(model):
        try:
            details, recipe = examine(module, adapter)
            ready.append((module, adapter.method, adapter.replacement(recipe)))
            handle.note(Entry(where, type(module).__name__, True, tuple(details)))
        except _Differs as differs:
            handle.note(Entry(where, type(module).__name__, False, differs.args))
    for module, method, function in ready:  # all or nothing: no error comes after this line
        handle.put_method(module, method, function)


class _Differs(Exception):
    """What keeps a module from being patched, a sentence an argument."""


def _examined(
    module: nn.Module, adapter: Adapter, backend: str, save: str, probe: bool
) -> tuple[list[str], Any]:
    """What runs where, and the recipe, of a module that can be patched."""
    # Pieces of weights cannot be run, and nothing of theirs may run before their root's forward.
    module = sharded.stand_in(module) if sharded.is_sharded(module) else module
    try:
        differences = adapter.differences(module)
        if differences:
            raise _Differs(*differences)
        recipe = dataclasses.replace(adapter.recipe(module, backend), save=save)
        details = adapter.describe(module, recipe)
        details.append(f"backend: {_resolve(adapter, module, recipe)}")
        details.append(adapter.probe(module, recipe) if probe else "not probed, as asked")
        code = Code(module, adapter.method, adapter.follows).before
        recipe = dataclasses.replace(recipe, code=code)
    except (UnsupportedModel, InvalidArgument) as error:
        raise _Differs(str(error)) from error
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        # The code of somebody else: whatever is missing in it, it is not what recurx knows.
        raise _Differs(f"it cannot be read: {type(error).__name__}: {error}") from error
    return details, recipe


def _resolve(adapter: Adapter, module: nn.Module, recipe: Any) -> str:
    """The backend that runs the recipe; raises for an explicit one that cannot."""
    problem = adapter.problem(module, recipe)
    if not problem.opaque:
        chosen = route(problem, None, Request(recipe.backend)).backend
    elif recipe.backend in ("auto", "eager") and recipe.save == "all":
        chosen = "eager"
    else:
        raise BackendUnavailable(
            f"recurx.patch: backend {recipe.backend!r} with save={recipe.save!r} cannot run a "
            f"network of foreign code ({type(getattr(module, 'network', module)).__name__}). "
            f'Use backend="auto" and save="all".'
        )
    return chosen if recipe.backend == chosen else f"{recipe.backend} -> {chosen}"


def _patch_class(handle: PatchHandle, cls: type[nn.Module], examine: Examine) -> None:
    """Patch each instance at the end of its construction."""
    neighbours = vars(sys.modules.get(cls.__module__, ModuleType(""))).values()
    if not any(_is_known_class(c) for c in (cls, *neighbours)):
        handle.note(Entry(cls.__qualname__, "class", False, ("it has no recursion known here",)))
        raise UnsupportedModel(_refusal(handle, cls.__qualname__))
    original: Callable[..., None] = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is not cls:  # a subclass is not complete yet, and may do anything
            return
        before = handle.report
        _patch_instance(handle, self, examine)
        if handle.report.patched == before.patched:  # building a model works as without recurx
            said = _refusal(handle, cls.__qualname__, len(before.refused))
            said += "\n  It was built and runs as before."
            warnings.warn(said, RecurxWarning, stacklevel=2)

    handle.put(cls, "__init__", __init__)
    details = (
        "each instance built from now on is compared and patched, or warns and runs as before",
        "instances of subclasses, and those that exist, are left alone: patch them themselves",
    )
    handle.note(Entry(cls.__qualname__, "class", True, details))


def _is_known_class(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and any(adapter.resembles_class(value) for adapter in adapters().values())
    )


def _refusal(handle: PatchHandle, what: str, since: int = 0) -> str:
    lines = [f"recurx.patch: nothing to patch in {what}. Known: {', '.join(adapters())}."]
    for entry in handle.report.refused[since:]:
        lines.append(f"  {entry.where or 'the module'} ({entry.kind}) differs:")
        lines += [f"    {line}" for line in entry.details]
    if not handle.report.refused:
        lines.append("  No module in it resembles one of them.")
    lines.append(
        "  What to do: run it as it is, or call recurx.recurse(schedule, {net: lambda h: net(h)}, "
        "...) in its place, which runs the loop over your own network."
    )
    return "\n".join(lines)
