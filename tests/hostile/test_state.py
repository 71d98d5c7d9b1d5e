"""Code whose answer hangs on a value that somebody changes later: in a table, an object, a closure.

A case gives a factor that a layer's code reads, and an edit of it. Afterwards the answer is the
net's own; what cannot be watched is not proved at all.
"""

from __future__ import annotations

import array
import collections
import contextvars
import dataclasses
import functools
import itertools
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import recurx
from recurx import code, probing
from recurx.nets import rope_tables
from recurx.readings import read
from tests.hostile import models
from tests.hostile.test_corpus import CLOSE, SCHEDULE, own, quiet

Case = tuple[Callable[[Any], Any], Callable[[], Any]]  # (factor of a layer, edit)


def one(layer: Any) -> float:
    return 1.0


FACTOR: Callable[[Any], Any] = one


class Reads(models.Layer):
    def forward(self, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        return super().forward(cos_sin, hidden_states) * FACTOR(self)


@dataclasses.dataclass(slots=True)
class Slots:
    value: float = 1.0

    def __call__(self, layer: Any) -> float:
        return self.value


class Plain:
    value = 1.0

    def __init__(self) -> None:
        self.inside = {"a": [1.0]}

    def __call__(self, layer: Any) -> float:
        return self.inside["a"][0]

    def method(self, layer: Any) -> float:
        return self.inside["a"][0]


def at(holder: Any, key: Any) -> Case:
    return lambda layer: holder[key], lambda: holder.__setitem__(key, 0.5)


def of_object(kind: Callable[[], Any]) -> Case:
    holder = kind()
    return lambda layer: holder.value, lambda: setattr(holder, "value", 0.5)


def called(name: str | None = None) -> Case:
    made = Plain()
    factor = made if name is None else getattr(made, name)
    return factor, lambda: made.inside["a"].__setitem__(0, 0.5)


def of_class() -> Case:
    holder: Any = type("Settings", (), {"value": 1.0})
    return lambda layer: holder.value, lambda: setattr(holder, "value", 0.5)


def of_function(change: str) -> Case:
    cell = 1.0

    def factor(layer: Any, value: float = 1.0, *, more: float = 1.0) -> float:
        return value * more * cell

    def edit() -> None:
        nonlocal cell
        if change == "cell":
            cell = 0.5
        elif change == "__defaults__":
            factor.__defaults__ = (0.5,)
        else:
            factor.__kwdefaults__["more"] = 0.5

    return factor, edit


def of_partial() -> Case:
    held = [1.0]
    return functools.partial(lambda held, layer: held[0], held), lambda: held.__setitem__(0, 0.5)


def of_slots_called() -> Case:
    made = Slots()
    return made, lambda: setattr(made, "value", 0.5)


def nested(depth: int) -> Case:
    innermost: dict[str, Any] = {"a": 1.0}
    table = innermost
    for _ in range(depth):
        table = {"a": table}

    def factor(layer: Any) -> float:
        found: Any = table
        while isinstance(found, dict):
            found = found["a"]
        return found

    return factor, lambda: innermost.__setitem__("a", 0.5)


# What the guard watches: proved before the edit, its own code after it.
WATCHED: dict[str, Callable[[], Case]] = {
    "list": lambda: at([1.0], 0),
    "deque": lambda: at(collections.deque([1.0]), 0),
    "large dict": lambda: at(dict.fromkeys(range(100), 1.0), 5),
    "default dict": lambda: at(collections.defaultdict(float, a=1.0), "a"),
    "nested": lambda: nested(5),
    "object": lambda: of_object(Plain),
    "namespace": lambda: of_object(lambda: types.SimpleNamespace(value=1.0)),
    "slots": lambda: of_object(Slots),
    "class": of_class,
    "callable object": called,
    "callable with slots": of_slots_called,
    "bound method": lambda: called("method"),
    "cell": lambda: of_function("cell"),
    "defaults": lambda: of_function("__defaults__"),
    "keyword defaults": lambda: of_function("__kwdefaults__"),
    "partial": of_partial,
}


def numbers() -> Case:
    count = itertools.count()
    return lambda layer: 1.0 if next(count) < 5000 else 0.5, lambda: [
        next(count) for _ in range(6000)
    ]


def context() -> Case:
    variable = contextvars.ContextVar("variable", default=1.0)
    return lambda layer: variable.get(), lambda: variable.set(0.5)


def environment() -> Case:
    os.environ["RECURX_TEST_FACTOR"] = "1"
    return (
        lambda layer: float(os.environ["RECURX_TEST_FACTOR"]),
        lambda: os.environ.__setitem__("RECURX_TEST_FACTOR", "0.5"),
    )


# What nobody can watch: not proved.
HIDDEN: dict[str, Callable[[], Case]] = {
    "tensor": lambda: at(torch.ones(1), 0),
    "array": lambda: at(array.array("d", [1.0]), 0),
    "bytes": lambda: (lambda held: (lambda layer: held[0], lambda: held.__setitem__(0, 2)))(
        bytearray(b"\x01")
    ),
    "counter": numbers,
    "context": context,
    "environment": environment,
    "too deep": lambda: nested(20),
    "too large": lambda: at(dict.fromkeys(range(5000), 1.0), 5),
}


def distance_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, float]:
    """Whether it was proved before the edit, and how far it is from its own code after it."""
    factor, edit = case
    monkeypatch.setitem(globals(), "FACTOR", factor)
    monkeypatch.setenv("RECURX_TEST_FACTOR", "1")
    net = models.stack().requires_grad_(False)
    for layer in net.layers:
        layer.__class__ = Reads
    torch.manual_seed(3)
    x, z_h, z_l = torch.randn(3, 2, models.TOKENS, models.WIDTH)
    carry = {"z_H": z_h, "z_L": z_l}
    tables = rope_tables(models.TOKENS, models.WIDTH // models.HEADS)

    def answer() -> Tensor:
        with quiet():
            return recurx.recurse(SCHEDULE, {"L": net}, x, carry, cos_sin=tables)["z_H"]

    answer()
    proved = read(net, True) is not None
    edit()
    got = answer()  # before its own code runs, which counts its calls
    want = own(net, x, carry, tables)[0]
    return proved, float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", [*WATCHED, *HIDDEN])
def test_a_value_that_changes_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proved, error = distance_of({**WATCHED, **HIDDEN}[name](), monkeypatch)
    assert error < CLOSE
    assert proved == (name in WATCHED)


@pytest.mark.parametrize("name", ["list", "slots", "cell", "defaults", "bound method", "tensor"])
def test_unwatched_it_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before parts of values were watched."""
    monkeypatch.setattr(probing, "_known", {})
    monkeypatch.setattr(code, "_HIDDEN", set())
    monkeypatch.setattr(code, "same", lambda held: True)
    monkeypatch.setattr("recurx.readings.same", lambda held: True)
    _, error = distance_of({**WATCHED, **HIDDEN}[name](), monkeypatch)
    assert error > 100 * CLOSE
