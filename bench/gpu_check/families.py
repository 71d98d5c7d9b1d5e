"""Kernel families as kinds of plan, and how a backend is held to one of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from recurx import backends
from recurx.plan import Device
from recurx.plan.launch import LaunchPlan, all_candidates, all_refusals
from recurx.problem import Problem


@dataclass(frozen=True)
class Family:
    """Plans of a backend: those of one kind, with these settings."""

    backend: str
    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    def holds(self, plan: LaunchPlan) -> bool:
        return plan.kind == self.kind and set(self.settings) <= set(plan.settings)


# A kind that this build does not know is reported as absent.
FAMILIES = {
    "owner": Family("cuda", "owner"),
    "grid": Family("cuda", "grid"),
    **{f"cluster-{n}": Family("cuda", "cluster", (("cluster", n),)) for n in (2, 4, 8)},
    "triton-tiled": Family("triton", "tiled"),
    "triton-persistent": Family("triton", "persistent"),
    "library": Family("triton", "library"),
}


@contextlib.contextmanager
def held(family: Family) -> Iterator[None]:
    """Inside, the family's backend knows no plan but its own, and remembers none from before."""
    places = [
        importlib.import_module(f"recurx.{part}.{family.backend}") for part in ("plan", "backends")
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(_forget, places[1])
        for place in places:
            if hasattr(place, "candidates"):
                every = place.candidates
                stack.enter_context(mock.patch.object(place, "candidates", _only(family, every)))
        _forget(places[1])
        yield


def _only(family: Family, every: Any) -> Any:
    return lambda *given, **named: [p for p in every(*given, **named) if family.holds(p)]


def _forget(module: Any) -> None:
    """Empty what a backend's module and object remember of their plans."""
    for owner in (module, module.BACKEND):
        for value in list(vars(owner).values()):
            getattr(value, "cache_clear", lambda: None)()
    backends.changed()


def why_not(family: Family, problem: Problem, device: Device) -> tuple[str, str] | None:
    """("absent" | "refused", the reason) inside `held`, or None if a plan of the family runs."""
    reason = backends.get(family.backend).why_unavailable()
    if reason is not None:
        return "absent", reason
    reason = backends.why_not(family.backend, problem)
    if reason is None and all_candidates(problem, device, family.backend):
        return None
    reasons = [text for text in all_refusals(problem, device, family.backend)
               if family.kind in text.partition(":")[0]]  # fmt: skip
    if reasons or reason:
        return "refused", "; ".join(reasons) or str(reason)
    if family.settings:
        return "refused", f"no plan {family.kind} {dict(family.settings)} for {problem}"
    return "absent", f"backend {family.backend} has no plan {family.kind}"
