"""What `auto` chooses, from what, and by what: refusals, plans, comparisons, verdicts.

recurx/route.py puts the choices together, recurx/trials.py gathers what is known.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from recurx import backends
from recurx.errors import BackendUnavailable
from recurx.plan import Device, LaunchPlan
from recurx.plan.device import typical_cpu
from recurx.plan.launch import BACKENDS as PLANNED
from recurx.plan.launch import all_candidates, all_refusals
from recurx.problem import Problem
from recurx.verdicts import VERDICTS, Verdict, machine_of, subject_of

MARGIN = 0.95  # PyTorch is taken below this share of a fused backend's time: no verdict may flip
EAGER = "eager"
CALLS = "calls"  # the half of a recursion that has no gradient; the other is `window_half`
Where = torch.device | Device  # a device that is here, or the description of one


def window_half(save: str) -> str:
    """The window as a half of which there are verdicts."""
    return f"window save={save}"


@dataclass(frozen=True)
class Choice:
    """A backend, or one with a kind of plan ("triton/library"), why it, and whether nothing is left
    to compare or to time for it."""

    backend: str
    why: str
    settled: bool


class Compared:
    """Which backends gave right and which wrong answers here: of this process, never on disk."""

    def __init__(self) -> None:
        self._right: dict[tuple[object, ...], bool] = {}
        self.version = 0

    def get(self, half: str, name: str, problem: Problem, device: torch.device) -> bool | None:
        """True or False, None where nothing was compared yet."""
        return self._right.get(self._key(half, name, problem, device))

    def keep(
        self, half: str, name: str, problem: Problem, device: torch.device, right: bool
    ) -> None:
        self._right[self._key(half, name, problem, device)] = right
        self.version += 1

    def forget(self) -> None:
        """Compare everything anew."""
        self._right.clear()
        self.version += 1

    @staticmethod
    def _key(half: str, name: str, problem: Problem, device: torch.device) -> tuple[object, ...]:
        """By the shape of one sample, whatever a window saves."""
        sample = (problem.tokens, problem.hidden, problem.dtype, problem.nets, problem.rope)
        return (half.split()[0], name, device, *sample)


COMPARED = Compared()


def known(half: str, problem: Problem, device: Where) -> Verdict | None:
    """The verdict of a measurement, if there is one."""
    if isinstance(device, Device) or (device.type == "cuda" and not torch.cuda.is_available()):
        return None
    subject = subject_of(half, problem)
    machine = machine_of(device, torch.get_num_threads()) if autotune() else None
    return VERDICTS.get(subject, machine)


def refusal(name: str, problem: Problem, device: Where) -> str | None:
    """Why a backend does not run the problem there, or None."""
    if not isinstance(device, Device):
        return backends.why_not(name, problem)
    backend = backends.get(name)
    if not backend.runs_on(problem.device_type):
        return backends.why_not(name, problem)
    if (unknown := backends.unknown_fields(backend, problem)) is not None:
        return unknown
    base = name.partition("/")[0]
    if base in PLANNED and not all_candidates(problem, device, name):
        return "; ".join(all_refusals(problem, device, name)) or "has no plan for it"
    if device.kind == "cuda" and base == "cuda":
        return None
    return backends.get(base).why_unsupported(problem)  # what is left to a kind, its plans say


def autotune() -> bool:
    """Whether `auto` may measure: RECURX_AUTOTUNE is not 0."""
    return os.environ.get("RECURX_AUTOTUNE") != "0"


def _entrants(problem: Problem) -> list[str]:
    names = [n for n in backends.ORDER if backends.auto_may_take(n, problem.device_type)]
    return [entrant for name in names if name != EAGER for entrant in backends.entrants(name)]


def fused_for(problem: Problem, device: Where) -> list[str]:
    """What `auto` may take beside PyTorch: backends, and each kind of plan of those that have
    several; by predicted time, then `ORDER`."""
    names = [n for n in _entrants(problem) if refusal(n, problem, device) is None]
    if len(names) > 1 and problem.batch:
        names.sort(key=lambda name: predicted(name, problem, device))
    return names


def windows_for(problem: Problem, device: Where, asked: str) -> list[str]:
    """Whose window may serve under the requested name, best first: an explicit backend's own, or
    that of the backend which it hands over to; of "auto", what `backends.entrants` has."""
    names = [backends.get(asked).window_of or asked] if asked != "auto" else _entrants(problem)
    wanted = dataclasses.replace(problem, needs_grad=True)
    return [
        name
        for name in names
        if refusal(name, wanted, device) is None and backends.get(name).window(wanted) is not None
    ]


@functools.lru_cache(maxsize=1024)
def predicted(name: str, problem: Problem, device: Where) -> float:
    """Seconds that the best plan of a backend, or of one kind, is predicted to take; inf without a
    plan."""
    if name.partition("/")[0] not in PLANNED:
        return float("inf")
    where = described(device)
    plans = all_candidates(problem, where, name)
    return min((plan.seconds(where) for plan in plans), default=float("inf"))


@functools.lru_cache(maxsize=1024)
def plan_of(name: str, problem: Problem, device: Where) -> LaunchPlan:
    """How a backend runs the problem there."""
    backend: Any = backends.get(name)
    if not isinstance(device, Device) and hasattr(backend, "plan"):
        plan: LaunchPlan = backend.plan(problem, device)
        return plan
    return LaunchPlan.pick(problem, described(device), name)


def described(device: Where) -> Device:
    """A device by its rates: those of a CPU are not measured for this, which takes a second."""
    if isinstance(device, Device):
        return device
    return typical_cpu(torch.get_num_threads()) if device.type == "cpu" else Device.of(device)


def choose_calls(problem: Problem, device: Where, asked: str, proven: bool = False) -> Choice:
    """The backend of the calls without gradient under the requested name.

    Args:
        proven: whether only backends count that were compared here.

    Raises:
        BackendUnavailable: the backend asked for by name cannot run it; the message says why.
    """
    if problem.opaque:
        names = ", ".join(problem.opaque)
        return Choice(EAGER, f"{names} is foreign code, which only PyTorch can call", True)
    if asked != "auto":
        reason = refusal(asked, problem, device)
        if reason is not None:
            raise BackendUnavailable(
                f"recurx.recurse: backend {asked!r} {reason}. "
                f'Use backend="auto" to let recurx choose, or see recurx.explain(...).'
            )
        name, verdict = measured_best(CALLS, problem, device, asked)
        return Choice(name, "asked for" if verdict is None else comparison(verdict, name), True)
    fused = fused_for(problem, device)
    if not fused:
        return Choice(EAGER, "no other backend runs it here", True)
    if problem.batch == 0:
        return Choice(fused[0], "there is nothing to compute", True)
    times = {name: predicted(name, problem, device) for name in (*fused, EAGER)}
    return _choose(CALLS, problem, device, fused, times, proven)


def choose_window(
    problem: Problem, device: Where, asked: str, save: str, proven: bool = False
) -> Choice:
    """The backend whose backward the window has; "eager" is PyTorch's."""
    foreign = problem.opaque or asked == EAGER
    names = [] if foreign else windows_for(problem, device, asked)
    if not names:
        return Choice(EAGER, "", True)
    half = window_half(save)
    if asked != "auto" or problem.batch == 0:
        name, verdict = measured_best(half, problem, device, names[0])
        return Choice(name, "" if verdict is None else comparison(verdict, name), True)
    return _choose(half, problem, device, names, {}, proven)


def measured_best(
    half: str, problem: Problem, device: Where, asked: str
) -> tuple[str, Verdict | None]:
    """Of the kinds of plan of the backend asked for the fastest by a verdict, with that; the
    backend itself, whose model decides, where none has one."""
    verdict = known(half, problem, device)
    if verdict is None or isinstance(device, Device):
        return asked, None
    times, kinds = dict(verdict.seconds), backends.entrants(asked) if "/" not in asked else ()
    alive = [name for name in kinds if name in times
             and COMPARED.get(half, name, problem, device) is not False
             and refusal(name, problem, device) is None]  # fmt: skip
    if not alive:
        return asked, None
    return min(alive, key=lambda name: times[name]), verdict


def _choose(
    half: str, problem: Problem, device: Where, fused: list[str], times: dict[str, float],
    proven: bool,
) -> Choice:  # fmt: skip
    """Among fused backends (best prediction first) and PyTorch, by all that is known."""
    right: dict[str, bool | None] = dict.fromkeys(fused)
    if not isinstance(device, Device):
        right = {name: COMPARED.get(half, name, problem, device) for name in fused}
    alive = [name for name in fused if (right[name] if proven else right[name] is not False)]
    if not alive:
        wrong = "gave a wrong answer or could not be compared"
        return Choice(EAGER, f"{', '.join(fused)} {wrong}", not proven)
    verdict = known(half, problem, device)
    if verdict is not None and verdict.chosen not in (*alive, EAGER):
        verdict = None  # of a backend that is not there today
    timed = isinstance(device, Device) or not autotune()
    if verdict is not None:
        sure = verdict.chosen == EAGER or right[verdict.chosen] is not None
        return Choice(verdict.chosen, comparison(verdict), sure)
    best = alive[0]
    if best in times and times[EAGER] < MARGIN * times[best] < float("inf"):
        return Choice(EAGER, f"predicted to be faster than {best}", timed)
    sure = isinstance(device, Device) or right[best] is not None
    return Choice(best, "predicted to be fastest" if times else "", timed and sure)


def comparison(verdict: Verdict, chosen: str = "") -> str:
    """How `chosen`, or the verdict's choice, stands to PyTorch, or PyTorch to the fastest other."""
    times = dict(verdict.seconds)
    if not times:
        return "as stored with the run"
    took = times.pop(chosen or verdict.chosen)
    if not times:
        return "measured, alone"
    rival = EAGER if EAGER in times else min(times, key=lambda name: times[name])
    return f"measured, {times[rival] / took:.2f}x as fast as {rival}"
