"""Finding what can be patched in an instance, a class or an imported module, and doing it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from recurx import backends
from recurx.api import SAVE
from recurx.errors import BackendUnavailable, UnsupportedModel, bad_argument
from recurx.patching.adapter import Adapter
from recurx.patching.handle import Entry, PatchHandle
from recurx.patching.lucidrains import Lucidrains
from recurx.patching.official import Official
from recurx.route import Request, route

ADAPTERS: tuple[Adapter, ...] = (Official(), Lucidrains())


@dataclasses.dataclass(frozen=True)
class _How:
    """What the caller of `patch` chose for every module."""

    backend: str
    save: str
    probe: bool


_KNOWN = "official TRM, single-z, hier6 and HRM code, and lucidrains' TinyRecursiveModel"


def patch(
    model: nn.Module | type[nn.Module] | ModuleType,
    backend: str = "auto",
    *,
    save: str = "all",
    probe: bool = True,
) -> PatchHandle:
    """Run the recursion of official TRM / HRM code, or of lucidrains', on recurx.

    Args:
        model: a module with the recursion anywhere in its tree (loss head, ACT wrapper, DDP,
            `torch.compile`d or to be compiled); or a class, or an imported module with such
            classes: then every instance built from now on is patched.
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
            differs. Nothing was changed.
        BackendUnavailable: an explicit backend cannot run this model here.
    """
    if backend not in backends.NAMES:
        backends.get(backend)  # raises, with the known names
    if save not in SAVE:
        raise bad_argument("patch", "save", f"one of {SAVE}", repr(save))
    how = _How(backend, save, probe)
    handle = PatchHandle()
    if isinstance(model, nn.Module):
        _patch_instance(handle, model, how)
        if not handle.report.patched:
            raise UnsupportedModel(_refusal(handle, type(model).__name__))
    elif isinstance(model, type) and issubclass(model, nn.Module):
        _patch_class(handle, model, how)
    elif isinstance(model, ModuleType):
        _patch_module(handle, model, how)
    else:
        raise UnsupportedModel(
            f"recurx.patch: expected a torch module, a class of them or an imported module, "
            f"got {type(model).__name__}."
        )
    return handle


def find(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    """(path, module, adapter) of everything in the tree that resembles a recursion."""
    return [
        (name, module, adapter)
        for name, module in model.named_modules()
        if "_orig_mod" not in module._modules  # torch.compile's wrapper: its child is found too
        for adapter in ADAPTERS
        if adapter.resembles(module)
    ]


def _patch_instance(handle: PatchHandle, model: nn.Module, how: _How) -> None:
    ready: list[tuple[nn.Module, str, Callable[..., object]]] = []
    handle.looked_at(model, functools.partial(_patch_instance, handle, how=how))
    for where, module, adapter in find(model):
        differences = adapter.differences(module)
        details: list[str] = []
        if not differences:
            recipe = dataclasses.replace(adapter.recipe(module, how.backend), save=how.save)
            details = adapter.describe(module, recipe)
            details.append(f"backend: {_resolve(adapter, module, recipe)}")
            try:
                details.append(
                    adapter.probe(module, recipe) if how.probe else "not probed, as asked"
                )
                ready.append((module, adapter.method, adapter.replacement(recipe)))
            except UnsupportedModel as error:
                differences = [str(error)]
        entry = Entry(where, type(module).__name__, not differences, tuple(differences or details))
        handle.note(entry)
    for module, method, function in ready:  # all or nothing: no error comes after this line
        handle.put_method(module, method, function)


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


def _patch_class(handle: PatchHandle, cls: type[nn.Module], how: _How) -> None:
    """Patch each instance at the end of its construction."""
    neighbours = vars(sys.modules.get(cls.__module__, ModuleType(""))).values()
    if not any(_is_known_class(c) for c in (cls, *neighbours)):
        handle.note(Entry(cls.__qualname__, "class", False, ("it has no recursion known here",)))
        raise UnsupportedModel(_refusal(handle, cls.__qualname__))
    original: Callable[..., None] = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:  # a subclass is not complete yet, and may do anything
            before = len(handle.report.patched)
            _patch_instance(handle, self, how)
            if len(handle.report.patched) == before:
                raise UnsupportedModel(_refusal(handle, cls.__qualname__))

    handle.put(cls, "__init__", __init__)
    details = ("instances built from now on are patched; those that exist are not",)
    handle.note(Entry(cls.__qualname__, "class", True, details))


def _patch_module(handle: PatchHandle, module: ModuleType, how: _How) -> None:
    known = [value for value in vars(module).values() if _is_known_class(value)]
    if not known:
        raise UnsupportedModel(_refusal(handle, f"module {module.__name__}"))
    for cls in dict.fromkeys(known):
        _patch_class(handle, cls, how)


def _is_known_class(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and any(adapter.resembles_class(value) for adapter in ADAPTERS)
    )


def _refusal(handle: PatchHandle, what: str) -> str:
    lines = [f"recurx.patch: nothing to patch in {what}. Known: {_KNOWN}."]
    for entry in handle.report.refused:
        lines.append(f"  {entry.where or 'the module'} ({entry.kind}) differs:")
        lines += [f"    {line}" for line in entry.details]
    if not handle.report.refused:
        lines.append("  No module in it resembles one of them.")
    return "\n".join(lines)
