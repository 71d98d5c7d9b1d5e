"""A recursion as data: which net is called on which states, in which order.

One call is `write <- N(sum(state) + (sum(inject)))`, sums taken left to right in the dtype of the
states. Every published variant is a list of such calls, so adding one needs a builder of a few
lines here and no kernel. `"x"` names the embedded input; all other names are states of the carry.

The order of the additions is part of the contract: floating-point addition is not associative,
and a flat `(z_L + z_H) + x` drifts visibly from `z_L + (z_H + x)` within one recursion.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from recurx.errors import bad_argument
from recurx.hashing import hash_once

INPUT = "x"  # the embedded input: readable by every step, written by none


def _names(step_field: str, value: str | Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise bad_argument("Step", step_field, "identifiers like 'z_L'", repr(name))
    return names


# What a step may have beside its sums, and what it is in TRM and HRM.
FACTORS = {"damping": 1.0, "scale": 1.0, "noise": 0.0}
LEARNED = "learned factors"


@dataclass(frozen=True)
class Step:
    """A net call: `write <- (1 - l) write + l net(scale * sum(state) + (sum(inject))) + noise`.

    Args:
        net: name of the net that is called, e.g. `"L"`.
        write: name of the state that receives the result; not `"x"`.
        state: names that are summed first, left to right; at least one.
        inject: names that are summed apart and added to that sum; may be empty.
        damping: l, the share of the new value; 1: `write` is overwritten.
        scale: factor of the first sum. Either may be learned: a name instead of a number, under
            which the nets of `recurx.recurse` hold a parameter, 0-d or [D].
        noise: standard deviation of normal noise that is added to what is written, from a counter:
            the same for the same seed, call, sample and element; 0: none.

    Raises:
        InvalidArgument: a name is no identifier, `state` is empty, `write` is `"x"`, or a factor is
            no finite number.

    Source of damping and noise: EqR (arXiv 2605.21488), l = 0.95 and noise 0.01.
    """

    net: str
    write: str
    state: tuple[str, ...]
    inject: tuple[str, ...] = ()
    damping: float | str = 1.0
    scale: float | str = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in FACTORS:
            value = getattr(self, name)
            if isinstance(value, str) and name != "noise":
                _names(name, value)
                continue
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not math.isfinite(value) or (name == "noise" and value < 0):
                raise bad_argument("Step", name, "a finite number", repr(value))
            object.__setattr__(self, name, float(value))
        _names("net", (self.net,))
        _names("write", (self.write,))
        object.__setattr__(self, "state", _names("state", self.state))
        object.__setattr__(self, "inject", _names("inject", self.inject))
        if self.write == INPUT:
            raise bad_argument(
                "Step", "write", "the name of a state", repr(INPUT), "`x` is the input: read-only."
            )
        if not self.state:
            raise bad_argument(
                "Step", "state", "at least one name", "()", "Put `x` there if alone."
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """All names that the net's input is the sum of, in the order of the additions."""
        return self.state + self.inject

    @property
    def changed(self) -> tuple[str, ...]:
        """Which factors are not as in TRM and HRM; LEARNED too if one of them is."""
        names = [name for name, plain in FACTORS.items() if getattr(self, name) != plain]
        return (*names, *[LEARNED] * bool(self.learned))

    @property
    def learned(self) -> dict[str, str]:
        """{factor: its name} of those that are learned."""
        both = {"damping": self.damping, "scale": self.scale}
        return {field: name for field, name in both.items() if isinstance(name, str)}

    def __str__(self) -> str:
        terms = " + ".join(self.state)
        if self.scale != 1:
            terms = f"{self.scale} * ({terms})"
        if self.inject:
            terms += f" + ({' + '.join(self.inject)})"
        value = f"{self.net}({terms})"
        if self.damping != 1:
            rest = self.learned.get("damping")
            rest = f"{1 - self.damping:.6g}" if rest is None else f"(1 - {rest})"
            value = f"{rest} * {self.write} + {self.damping} * {value}"
        return f"{self.write} <- {value}" + (f" + {self.noise} * noise" if self.noise else "")


@hash_once
@dataclass(frozen=True, repr=False)
class Schedule:
    """The net calls of one supervision step, and where the gradient starts.

    Args:
        steps: the calls, in order.
        grad_from: index of the first call inside the gradient window; calls before it run without
            gradient. 0 is full back-propagation through the recursion. NOTE: the window is
            invisible in the forward; only gradients tell a wrong one.
        detach_carry: with True (the detached carry of HRM and TRM) no gradient flows into the
            states that enter. False is allowed with `grad_from=0` only.
        name: how the schedule calls itself when printed.

    Raises:
        InvalidArgument: no steps, or a `grad_from` outside them.
    """

    steps: tuple[Step, ...]
    grad_from: int = 0
    detach_carry: bool = True
    name: str = "custom"
    key: str = field(init=False, repr=False, compare=False)  # all of it as one string
    # Names of the states, in order of first appearance (the order of the flat op), and of the nets,
    # in order of first call; after these learned factors, which lie among the nets.
    states: tuple[str, ...] = field(init=False, repr=False, compare=False)
    nets: tuple[str, ...] = field(init=False, repr=False, compare=False)
    # Which factors of steps are not as in TRM and HRM, each once.
    changed: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps = tuple(self.steps)
        object.__setattr__(self, "steps", steps)
        if not steps or not all(isinstance(step, Step) for step in steps):
            raise bad_argument("Schedule", "steps", "one Step or more", repr(self.steps))
        if not isinstance(self.name, str) or set(self.name) & set("/|="):
            raise bad_argument("Schedule", "name", "a str without '/', '|', '='", repr(self.name))
        if isinstance(self.grad_from, bool) or not isinstance(self.grad_from, int):
            raise bad_argument("Schedule", "grad_from", "an int", repr(self.grad_from))
        if not 0 <= self.grad_from < len(steps):
            raise bad_argument(
                "Schedule", "grad_from", f"0 <= grad_from < {len(steps)} (the number of steps)",
                self.grad_from, "Run under torch.no_grad() when no call shall have gradient.",
            )  # fmt: skip
        if not self.detach_carry and self.grad_from != 0:
            raise bad_argument(
                "Schedule", "detach_carry", "True when grad_from > 0",
                f"False with grad_from={self.grad_from}",
                "No gradient can pass the calls before the window; set grad_from=0.",
            )  # fmt: skip
        calls = [_key(step) for step in steps]
        head = f"{self.name}/{self.grad_from}/{int(self.detach_carry)}"
        object.__setattr__(self, "key", "/".join([head, *calls]))
        names = dict.fromkeys(name for step in steps for name in (*step.reads, step.write))
        object.__setattr__(self, "states", tuple(name for name in names if name != INPUT))
        nets = dict.fromkeys(step.net for step in steps)
        learned = dict.fromkeys(name for step in steps for name in step.learned.values())
        if both := set(learned) & set(nets):
            raise bad_argument("Schedule", "steps", "factors called unlike nets", sorted(both))
        object.__setattr__(self, "nets", (*nets, *learned))
        changed = dict.fromkeys(name for step in steps for name in step.changed)
        object.__setattr__(self, "changed", tuple(changed))

    @classmethod
    def from_key(cls, key: str) -> Schedule:
        """The schedule whose `key` is given."""
        name, grad_from, detach_carry, *calls = key.split("/")
        steps = []
        for call in calls:
            net, write, state, inject, *factors = call.split(",")
            reads = tuple(state.split("+")), tuple(inject.split("+")) if inject else ()
            steps.append(Step(net, write, *reads, *map(_factor, factors)))
        return cls(tuple(steps), int(grad_from), detach_carry == "1", name)

    # ---- builders, one a published system -------------------------------------------------

    @classmethod
    def trm(cls, h_cycles: int, l_cycles: int, window: int | str | None = None) -> Schedule:
        """TRM: per cycle n x `z_L <- L(z_L + (z_H + x))`, then `z_H <- L(z_H + (z_L))`.

        The window is the last whole cycle. Source: "Less is More: Recursive Reasoning with Tiny
        Networks" (arXiv 2510.04871), section 4 and its pseudocode.
        """
        cycle = [Step("L", "z_L", ("z_L",), ("z_H", INPUT))] * _count("trm", "l_cycles", l_cycles)
        cycle += [Step("L", "z_H", ("z_H",), ("z_L",))]
        return cls._cycles(f"trm({h_cycles}, {l_cycles})", "trm", cycle, h_cycles, window)

    @classmethod
    def hrm(cls, h_cycles: int, l_cycles: int, window: int | str | None = None) -> Schedule:
        """HRM: like TRM with two nets, `z_H <- H(z_H + (z_L))`; the window is the last two calls.

        Source: "Hierarchical Reasoning Model" (arXiv 2506.21734), section 2, the 1-step gradient.
        """
        cycle = [Step("L", "z_L", ("z_L",), ("z_H", INPUT))] * _count("hrm", "l_cycles", l_cycles)
        cycle += [Step("H", "z_H", ("z_H",), ("z_L",))]
        window = 2 if window is None else window
        return cls._cycles(f"hrm({h_cycles}, {l_cycles})", "hrm", cycle, h_cycles, window)

    @classmethod
    def single_z(cls, h_cycles: int, l_cycles: int, window: int | str | None = None) -> Schedule:
        """TRM with one state: a cycle is n x `z <- L(z + (x))`, then `z <- L(z)` (ablations)."""
        cycle = [Step("L", "z", ("z",), (INPUT,))] * _count("single_z", "l_cycles", l_cycles)
        cycle += [Step("L", "z", ("z",))]
        return cls._cycles(f"single_z({h_cycles}, {l_cycles})", "single_z", cycle, h_cycles, window)

    @classmethod
    def hier(
        cls, n: int, h_cycles: int = 3, l_cycles: int | None = None, window: int | str | None = None
    ) -> Schedule:
        """TRM with n low-level states: call k writes z_Lk from the sum of all n (TRM, ablations).

        `l_cycles` calls a cycle (default n, at most n), then `z_H <- L(z_H + (z_L1+..+z_Ln))`.
        """
        n = _count("hier", "n", n)
        calls = n if l_cycles is None else _count("hier", "l_cycles", l_cycles)
        if calls > n:
            raise bad_argument("Schedule.hier", "l_cycles", f"at most n={n}", calls)
        lows = tuple(f"z_L{k}" for k in range(1, n + 1))
        cycle = [Step("L", low, lows, ("z_H", INPUT)) for low in lows[:calls]]
        cycle += [Step("L", "z_H", ("z_H",), lows)]
        return cls._cycles(f"hier({n}, {h_cycles}, {calls})", "hier", cycle, h_cycles, window)

    @classmethod
    def _cycles(
        cls, name: str, op: str, cycle: list[Step], repeat: int, window: int | str | None
    ) -> Schedule:
        steps = tuple(cycle) * _count(op, "h_cycles", repeat)
        schedule = cls(steps, grad_from=len(steps) - len(cycle), name=name)
        return schedule if window is None or window == "cycle" else schedule.with_window(window)

    # ---- derived --------------------------------------------------------------------------

    def with_window(self, window: int | str) -> Schedule:
        """The same calls with the gradient window on the last `window` of them, or `"full"`."""
        calls = len(self.steps)
        if window == "full":
            window = calls
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= calls:
            raise bad_argument(
                "Schedule.with_window", "window", f"1..{calls} or 'full'", repr(window)
            )
        return dataclasses.replace(self, grad_from=calls - window)

    def with_factors(
        self, damping: float | str = 1.0, scale: float | str = 1.0, noise: float = 0.0
    ) -> Schedule:
        """The same calls, each with these factors; see `Step`. EqR: `damping=0.95, noise=0.01`."""
        factors: Any = {"damping": damping, "scale": scale, "noise": noise}
        return dataclasses.replace(
            self, steps=tuple(dataclasses.replace(step, **factors) for step in self.steps)
        )

    @property
    def window(self) -> int:
        """Number of calls inside the gradient window."""
        return len(self.steps) - self.grad_from

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        last = len(self.steps) - 1
        head = f"<Schedule {self.name}: {len(self)} net calls, gradient from call {self.grad_from}"
        head += f" (window {self.window} of {len(self)})"
        head += "" if self.detach_carry else ", gradient flows into the carry"
        period = _period(self.steps)
        repeat = len(self.steps) // period
        body = ";\n                   ".join(_run_lengths(self.steps[:period]))
        body = f"{repeat} x [ {body} ]" if repeat > 1 else body
        return f"{head}>\n  calls 0..{last}: {body}"


def _key(step: Step) -> str:
    key = f"{step.net},{step.write},{'+'.join(step.state)},{'+'.join(step.inject)}"
    return f"{key},{step.damping},{step.scale},{step.noise}" if step.changed else key


def _factor(text: str) -> Any:
    return text if text.isidentifier() else float(text)


def _count(op: str, arg: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad_argument(f"Schedule.{op}", arg, "an int >= 1", repr(value))
    return value


def _period(steps: tuple[Step, ...]) -> int:
    """Length of the shortest prefix that, repeated, gives all of `steps`."""
    total = len(steps)
    lengths = (n for n in range(1, total + 1) if total % n == 0)
    return next(n for n in lengths if steps[:n] * (total // n) == steps)


def _run_lengths(steps: Sequence[Step]) -> list[str]:
    runs = [(step, len(list(group))) for step, group in itertools.groupby(steps)]
    return [f"{count} x {step}" if count > 1 else str(step) for step, count in runs]
