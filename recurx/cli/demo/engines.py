"""Runs one supervision step of a model on every engine that this machine has, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurx import backends, recurse, reference
from recurx.models import RecursiveModel
from recurx.nets import as_net
from recurx.problem import Problem

Step = Callable[[], Tensor]  # -> logits [B, T, vocab]

COMPILED = "torch.compile"
SLOW_SHARE = 0.1  # a first call that takes more of the time than this is not repeated
TIME_IS_UP = "left out: the engines above used up the time for this table"


@dataclass
class Lane:
    """One engine in the race.

    Args:
        name, dtype: what runs.
        step: one supervision step; None, with the reason in `refused`, if it cannot run.
        first: seconds of the first call, with packing or compiling.
        seconds: of each later call.
        logits: of the last call.
    """

    name: str
    dtype: str
    step: Step | None
    refused: str = ""
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    logits: Tensor | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def eager(model: RecursiveModel, inputs: Tensor) -> Lane:
    """Plain PyTorch: the operations of the official code, in their order."""
    return Lane("eager PyTorch", model.config.forward_dtype, _on_backend(model, inputs, "eager"))


def compiled(model: RecursiveModel, inputs: Tensor) -> Lane:
    return Lane(COMPILED, model.config.forward_dtype, _compiled(model, inputs))


def engines(model: RecursiveModel, inputs: Tensor) -> list[Lane]:
    """recurx's own engines, fastest first, with the reason of those that cannot run this."""
    made = []
    for name in backends.ORDER:
        if name != "eager":
            reason = backends.why_not(name, _problem(model, inputs))
            step = None if reason else _on_backend(model, inputs, name)
            made.append(Lane(f"recurx {name}", model.config.forward_dtype, step, reason or ""))
    return made


def race(runners: list[Lane], repeats: int, seconds: float) -> None:
    """One call of each engine to warm up, then rounds of all of them until either limit.

    Interleaved, so that a slow minute of the machine hits every engine alike. Of an engine that is
    too slow for rounds the first call is reported; one that compiles in it has no result then.
    """
    deadline = time.perf_counter() + seconds
    running = [lane for lane in runners if lane.step is not None and _start(lane, deadline)]
    for turn in range(repeats):
        for lane in running:
            late = time.perf_counter() > deadline
            slow = late or lane.first > seconds * SLOW_SHARE
            if turn == 0 and slow and lane.name != COMPILED:
                lane.seconds.append(lane.first)
            elif not late and (not slow or lane.name == COMPILED):
                assert lane.step is not None
                taken, lane.logits = timed(lane.step)
                lane.seconds.append(taken)
    for lane in running:
        if not lane.seconds:
            lane.refused = TIME_IS_UP


def _start(lane: Lane, deadline: float) -> bool:
    """The first call; False, with the reason in the lane, if it fails or is compiled too late."""
    assert lane.step is not None
    if lane.logits is not None:
        return True
    if lane.name == COMPILED and time.perf_counter() > deadline:
        lane.refused = TIME_IS_UP
        return False
    try:
        lane.first, lane.logits = timed(lane.step)
    except Exception as error:  # whatever torch.compile meets where there is no C++ compiler
        lane.refused = f"{type(error).__name__}: {_first_line(error)}"
        return False
    return True


def timed(step: Step) -> tuple[float, Tensor]:
    """Wall seconds of one call, the device's work included, and its logits."""
    start = time.perf_counter()
    logits = step()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, logits


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _data(inputs: Tensor) -> dict[str, Tensor]:
    identifiers = torch.zeros(len(inputs), dtype=torch.int32, device=inputs.device)
    return {"inputs": inputs, "puzzle_identifiers": identifiers}


def _on_backend(model: RecursiveModel, inputs: Tensor, backend: str) -> Step:
    inner, data = model.inner, _data(inputs)

    @torch.no_grad()
    def step() -> Tensor:
        before, inner.backend = inner.backend, backend
        try:
            logits: Tensor = inner(inner.initial_states(len(inputs)), data)[1]
        finally:
            inner.backend = before
        return logits

    return step


def _compiled(model: RecursiveModel, inputs: Tensor) -> Step:
    """Each net as one compiled call. NOTE: the whole step as one graph unrolls to 21 calls, which
    takes minutes to compile on two cores and runs no faster on a CPU."""
    inner, data, tables = model.inner, _data(inputs), model.inner.cos_sin()

    def as_one(net: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        bound = as_net(net)
        return torch.compile(lambda h: reference.call(h, bound, tables), dynamic=False)

    nets = {name: as_one(net) for name, net in inner.nets().items()}

    @torch.no_grad()
    def step() -> Tensor:
        x = inner.embed(data["inputs"], data["puzzle_identifiers"])
        states = inner.initial_states(len(inputs))
        return inner.heads(recurse(inner.schedule, nets, x, states, backend="eager"))[0]

    return step


def _problem(model: RecursiveModel, inputs: Tensor) -> Problem:
    config, inner = model.config, model.inner
    specs = tuple((name, as_net(inner.nets()[name]).spec) for name in inner.schedule.nets)
    return Problem(
        inner.schedule, specs, len(inputs), config.tokens, config.hidden_size, config.dtype,
        inputs.device.type, inner.cos_sin() is not None,
    )  # fmt: skip
