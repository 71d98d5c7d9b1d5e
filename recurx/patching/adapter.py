"""What `recurx.patch` needs to know about one family of code. One file a family implements it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from recurx.code import Before
from recurx.problem import Problem
from recurx.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """What a replacement needs beyond the module itself. Holds no module and no tensor.

    Args:
        schedule: the net calls.
        cycles: what the configuration said of their number at the time of the patch: (H_cycles,
            L_cycles), or lucidrains' (num_refinement_blocks, num_latent_refinements).
        backend, save: as given to `recurx.recurse`; foreign networks run on PyTorch.
        code: what the method's own code read, which may not change.
    """

    schedule: Schedule
    cycles: tuple[int, int]
    backend: str
    save: str = "all"
    code: Before | None = None


class Adapter(Protocol):
    """One family of recursive models."""

    method: str  # the method that is replaced
    follows: tuple[str, ...]  # settings that the replacement reads anew at every call

    def resembles(self, module: nn.Module) -> bool:
        """Whether `module` is meant to be of this family, as far as its names tell."""

    def resembles_class(self, cls: type) -> bool:
        """The same for a class, of which only the methods are known."""

    def differences(self, module: nn.Module) -> list[str]:
        """What keeps `module` from being patched, one sentence each; empty if nothing."""

    def recipe(self, module: nn.Module, backend: str) -> Any:
        """The recipe (a `Recipe`) of a module without differences."""

    def problem(self, module: nn.Module, recipe: Any) -> Problem:
        """The recursion as backends see it, for one sample."""

    def replacement(self, recipe: Any) -> Callable[..., object]:
        """A function for `module.method`; it carries `recipe` as attribute `recurx_recipe`."""

    def describe(self, module: nn.Module, recipe: Any) -> list[str]:
        """What runs on recurx and what stays PyTorch."""

    def probe(self, module: nn.Module, recipe: Any) -> str:
        """Compare replacement and original on a small batch; what was compared, in a sentence.

        Raises UnsupportedModel if they differ. Leaves random state, flags and gradients alone.
        """


def signature_difference(owner: object, method: str, expected: list[str]) -> list[str]:
    """What is odd about the parameters of `method` of the class of `owner`, if anything."""
    function = getattr(owner if isinstance(owner, type) else type(owner), method, None)
    if function is None:
        return [f"it has no method `{method}`"]
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    if names != expected:
        return [f"`{method}` takes ({', '.join(names)}), expected ({', '.join(expected)})"]
    return []
