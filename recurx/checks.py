"""The arguments of `recurx.recurse`, checked before any work; each error says what to do.

What was checked once is remembered by shapes, dtypes and settings, so that the next call of the
same kind spends its time in the kernel and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recurx import backends
from recurx import route as routes
from recurx.errors import bad_argument
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec
from recurx.operands import CosSin, Operands, checked_beside, kind_of
from recurx.problem import Problem
from recurx.proof import as_net
from recurx.readings import read
from recurx.route import Route
from recurx.schedule import Schedule
from recurx.specs import NORM

SAVE = ("all", "block", "states")  # from most to least memory
PLAIN_TENSORS = (Tensor, nn.Parameter)
MAX_CHECKED = 4096
AnyNet = Net | Callable[[Tensor], Tensor]


class Given(NamedTuple):
    """The arguments of `recurse` as they came."""

    schedule: Schedule
    nets: Mapping[str, Any]
    x: Tensor
    carry: Mapping[str, Tensor]
    backend: str
    cos_sin: CosSin | None
    start_from: int
    stop_after: int | None
    save: str
    seed: int | Tensor | None = None
    key_mask: Tensor | None = None

    def settings(self) -> tuple[Any, ...]:
        """What is neither sizes nor nets."""
        rope = self.cos_sin
        tables = None if rope is None else tuple((t.shape, t.device) for t in rope)
        return self.backend, tables, self.start_from, self.stop_after, self.save


class Call(NamedTuple):
    """The arguments of `recurse`, checked.

    Args:
        specs, weights: of all nets that recurx can read, in the schedule's order.
        opaque: names of the nets that are plain callables.
        nets: all nets by name; None where `specs` and `weights` say all.
        checked: what is remembered of a call like this, None if nothing.
    """

    schedule: Schedule
    specs: tuple[tuple[str, NetSpec], ...]
    weights: tuple[Tensor, ...]
    opaque: tuple[str, ...]
    nets: Mapping[str, AnyNet] | None
    x: Tensor
    states: dict[str, Tensor]
    backend: str
    rope: CosSin | None
    start: int
    stop: int
    save: str
    checked: Checked | None
    seed: Tensor | None = None
    key_mask: Tensor | None = None

    def bound(self) -> Mapping[str, AnyNet]:
        """The nets with their weights."""
        return self.problem().bind(self.weights) if self.nets is None else self.nets

    def operands(self, states: Mapping[str, Tensor]) -> Operands:
        beside = self.rope, self.seed, self.key_mask
        return Operands(self.x, tuple(states.values()), self.weights, *beside)

    def problem(self) -> Problem:
        if self.checked is not None:
            return self.checked.problem
        x = self.x
        return Problem(
            self.schedule, self.specs, *x.shape, x.dtype, x.device.type,
            rope=self.rope is not None,
        )  # fmt: skip


# ---- what was checked before ---------------------------------------------------------------------


class Checked:
    """What is remembered of a checked call: its sizes as a problem, and its routes."""

    def __init__(self, call: Call) -> None:
        self.problem, self.start, self.stop = call.problem(), call.start, call.stop
        self._routes: dict[bool, tuple[tuple[int, ...], Route]] = {}

    def route(self, grad: bool) -> Route | None:
        """The settled route, if it was kept and nothing changed since."""
        found = self._routes.get(grad)
        return found[1] if found is not None and found[0] == routes.stamp() else None

    def keep(self, grad: bool, route: Route) -> None:
        self._routes[grad] = routes.stamp(), route


_checked: dict[Any, Checked] = {}


def checked(given: Given) -> Call:
    """The call, checked in full unless one with these sizes and settings was; all before any work.

    Raises:
        InvalidArgument: an argument is wrong; the message says which, and what to do.
    """
    if torch.compiler.is_compiling():
        return _check(given)
    return _checked_before(given) or _remember(_check(given), given)


def _checked_before(given: Given) -> Call | None:
    """The call, if one with these sizes and settings was checked; None: check it in full."""
    schedule, nets, x, carry, backend, cos_sin, start_from, stop_after, save, *beside = given
    if type(schedule) is not Schedule or type(nets) is not dict or type(carry) is not dict:
        return None
    if type(x) not in PLAIN_TENSORS or type(backend) is not str or type(save) is not str:
        return None
    if type(start_from) is not int or (stop_after is not None and type(stop_after) is not int):
        return None
    specs: list[tuple[str, NetSpec]] = []
    weights_of: dict[str, Sequence[Tensor]] = {}
    for name, module in nets.items():
        found = read(module, cos_sin is not None)
        if found is None:
            return None
        specs.append((name, found[0]))
        weights_of[name] = found[1]
    shape, dtype, device = x.shape, x.dtype, x.device
    checked = _checked.get((schedule, tuple(specs), shape, dtype, device, given.settings()))
    if checked is None or len(carry) != len(schedule.states):
        return None
    states = {}
    for name in schedule.states:
        state = carry.get(name)
        if not isinstance(state, Tensor) or state.shape != shape or state.dtype != dtype:
            return None
        if state.device != device:
            return None
        states[name] = state
    weights = [weight for name, _ in checked.problem.nets for weight in weights_of[name]]
    for weight in weights:
        if weight.device != device:
            return None
    return Call(
        schedule, checked.problem.nets, tuple(weights), (), None, x, states, backend, cos_sin,
        checked.start, checked.stop, save, checked,
        *checked_beside(checked.problem.changed, *beside, x),
    )  # fmt: skip


def _remember(call: Call, given: Given) -> Call:
    """Skip the checks of the next call of this kind, where they are about sizes alone."""
    x, specs = call.x, dict(call.specs)
    if call.opaque or type(x) not in PLAIN_TENSORS:
        return call
    if len(_checked) > MAX_CHECKED:
        _checked.clear()
    named = tuple((name, specs[name]) for name in given.nets)
    key = call.schedule, named, x.shape, x.dtype, x.device, given.settings()
    checked = _checked.get(key)  # made before where only the reading of a module was new
    if checked is None:
        checked = _checked[key] = Checked(call)
    return call._replace(checked=checked)


# ---- checks: all before any work, all with what to do ----------------------------------------


def _check(given: Given) -> Call:
    schedule, nets, x, carry, backend, cos_sin, start_from, stop_after, save, *beside = given
    bound = _check_nets(schedule, nets, cos_sin, x)
    start, stop = _check_range(schedule, start_from, stop_after)
    _check_states(schedule, x, carry)
    _check_tables(cos_sin)
    readable = {name: net for name, net in bound.items() if isinstance(net, Net)}
    for name, net in readable.items():
        _check_net_fits(name, net, x, cos_sin)
    if not isinstance(backend, str) or backend not in backends.NAMES:
        backends.get(str(backend))  # raises, with the known names
    if not isinstance(save, str) or save not in SAVE:
        raise bad_argument("recurse", "save", f"one of {SAVE}", repr(save))
    specs = tuple((name, net.spec) for name, net in readable.items())
    changed = [*schedule.changed, *(field for _, spec in specs for field in spec.changed)]
    return Call(
        schedule,
        specs,
        tuple(w for net in readable.values() for w in net.weights),
        tuple(name for name in bound if name not in readable),
        bound, x, {name: carry[name] for name in schedule.states}, backend, cos_sin, start, stop,
        save, None, *checked_beside(changed, *beside, x),
    )  # fmt: skip


def _check_nets(
    schedule: Schedule, nets: Mapping[str, Any], cos_sin: CosSin | None, x: Any
) -> dict[str, AnyNet]:
    if not isinstance(schedule, Schedule):
        raise bad_argument(
            "recurse", "schedule", "a recurx.Schedule", type(schedule).__name__,
            "Build one with Schedule.trm(h_cycles, l_cycles) or from Steps.",
        )  # fmt: skip
    _check_names("nets", "nets", nets, schedule.nets)
    called = {step.net for step in schedule.steps}
    return {
        name: as_net(nets[name], name, cos_sin) if name in called else _factor(nets[name], name, x)
        for name in schedule.nets
    }


def _factor(value: Any, name: str, x: Any) -> Net:
    """A learned factor among the nets: the weight of a norm that no step calls."""
    width = x.shape[-1] if isinstance(x, Tensor) and x.ndim else 1
    fits = isinstance(value, Tensor) and value.is_floating_point()
    if not fits or value.shape not in ((), (width,)):
        expected = f"a floating tensor, 0-d or [D={width}]: a factor of steps"
        raise bad_argument("recurse", f"nets[{name!r}]", expected, kind_of(value))
    spec = NetSpec((BlockSpec(NORM, width, 0, norm_weight=True),))
    return Net.trusted(spec, [value.expand(width)])


def _check_names(arg: str, what: str, given: Any, names: Sequence[str]) -> None:
    if not isinstance(given, Mapping) or set(given) != set(names):
        got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        expected = f"a dict with the {what} {sorted(names)}"
        raise bad_argument("recurse", arg, expected, got, "The schedule names them in its steps.")


def _check_range(schedule: Schedule, start_from: int, stop_after: int | None) -> tuple[int, int]:
    calls = len(schedule.steps)
    stop = calls if stop_after is None else stop_after
    for arg, value in (("start_from", start_from), ("stop_after", stop)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= calls:
            raise bad_argument("recurse", arg, f"0..{calls} (calls of the schedule)", repr(value))
    if stop < start_from:
        raise bad_argument("recurse", "stop_after", f"at least start_from={start_from}", stop)
    return start_from, stop


def _check_states(schedule: Schedule, x: Tensor, carry: Mapping[str, Tensor]) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        raise bad_argument("recurse", "x", "a floating [B, T, D] tensor", kind_of(x))
    _check_names("carry", "states", carry, schedule.states)
    for name in schedule.states:
        state = carry[name]
        if not isinstance(state, Tensor):
            raise bad_argument("recurse", f"carry[{name!r}]", "a tensor", type(state).__name__)
        if state.shape != x.shape or state.dtype != x.dtype or state.device != x.device:
            raise bad_argument(
                "recurse", f"carry[{name!r}]",
                f"shape, dtype and device of x: {list(x.shape)} {x.dtype} on {x.device}",
                f"{list(state.shape)} {state.dtype} on {state.device}",
                "Nothing is cast or moved silently; use .to(x) yourself.",
            )  # fmt: skip


def _check_tables(cos_sin: Any) -> None:
    if cos_sin is None:
        return
    if not isinstance(cos_sin, (tuple, list)) or len(cos_sin) != 2:
        got = f"{len(cos_sin)} of them" if isinstance(cos_sin, (tuple, list)) else type(cos_sin)
        raise bad_argument("recurse", "cos_sin", "two tables, (cos, sin), or None", got)
    for table, arg in zip(cos_sin, ("cos", "sin"), strict=True):
        if not isinstance(table, Tensor):
            raise bad_argument("recurse", f"cos_sin ({arg})", "a tensor", type(table).__name__)


def _check_net_fits(name: str, net: Net, x: Tensor, cos_sin: CosSin | None) -> None:
    spec, (_, tokens, hidden) = net.spec, x.shape
    if spec.hidden != hidden:
        raise bad_argument(
            "recurse", "x", f"width D={spec.hidden}, that of nets[{name!r}]", f"D={hidden}"
        )
    for block in spec.blocks:
        if block.kind == TOKEN_MLP and block.tokens != tokens:
            raise bad_argument(
                "recurse", "x", f"T={block.tokens}, that of the token MLP in nets[{name!r}]",
                f"T={tokens}", "A token MLP has a fixed number of tokens.",
            )  # fmt: skip
        if block.axial and block.axial[0] * block.axial[1] != tokens:
            expected = f"T = {block.axial[0]} x {block.axial[1]}, the grid of nets[{name!r}]"
            raise bad_argument("recurse", "x", expected, f"T={tokens}")
        if block.conv_dtype == "float32" and x.dtype.itemsize < 4:
            why = f"The convolution of nets[{name!r}] is in fp32 and would turn the states into it."
            raise bad_argument("recurse", "x", "fp32", str(x.dtype), why)
        if block.kind == ATTENTION and cos_sin is not None:
            shape = (block.line(tokens), block.head_dim)
            for table, arg in zip(cos_sin, ("cos", "sin"), strict=True):
                if tuple(table.shape) != shape or table.device != x.device:
                    raise bad_argument(
                        "recurse", f"cos_sin ({arg})",
                        f"[T, head_dim] = {list(shape)} on {x.device}",
                        f"{list(table.shape)} on {table.device}",
                        "Build it with recurx.rope_tables(T, head_dim).",
                    )  # fmt: skip
    for index, weight in enumerate(net.weights):
        if weight.device != x.device:
            raise bad_argument(
                "recurse", f"nets[{name!r}] weight {index}", f"device {x.device}, as x",
                str(weight.device), "Move the model with .to(device).",
            )  # fmt: skip
