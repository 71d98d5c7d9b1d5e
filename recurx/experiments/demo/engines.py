"""Runs one supervision step of a model on every engine that this machine has, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recurx import backends, recurse, reference
from recurx.bench.turns import Turn, interleave
from recurx.measure import seconds_of
from recurx.models import RecursiveModel
from recurx.models.inner import problem_of_model
from recurx.proof import as_net

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
        device: where.
        first: seconds of the first call, with packing or compiling.
        seconds: of each later call.
        logits: of the last call.
    """

    name: str
    dtype: str
    step: Step | None
    refused: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    logits: Tensor | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def sample(self) -> float:
        """Seconds of one call, whose logits are kept."""

        def run() -> None:
            assert self.step is not None
            self.logits = self.step()

        return seconds_of(run, self.device)


def eager(model: RecursiveModel, inputs: Tensor) -> Lane:
    """Plain PyTorch: the operations of the official code, in their order."""
    return _lane("eager PyTorch", model, inputs, _on_backend(model, inputs, "eager"))


def compiled(model: RecursiveModel, inputs: Tensor) -> Lane:
    return _lane(COMPILED, model, inputs, _compiled(model, inputs))


def engines(model: RecursiveModel, inputs: Tensor) -> list[Lane]:
    """recurx's own engines, fastest first, with the reason of those that cannot run this."""
    made = []
    problem = problem_of_model(model, len(inputs))
    for name in backends.ORDER:
        if name != "eager":
            reason = backends.why_not(name, problem) or ""
            step = None if reason else _on_backend(model, inputs, name)
            made.append(_lane(f"recurx {name}", model, inputs, step, reason))
    return made


def _lane(
    name: str, model: RecursiveModel, inputs: Tensor, step: Step | None, refused: str = ""
) -> Lane:
    return Lane(name, model.config.forward_dtype, step, refused, inputs.device)


def race(lanes: list[Lane], repeats: int, seconds: float) -> None:
    """One call of each engine to warm up, then rounds of all of them until either limit.

    Of an engine that is too slow for rounds the first call is reported; one that compiles in it has
    no result then.
    """
    deadline = time.perf_counter() + seconds

    def late() -> bool:
        return time.perf_counter() > deadline

    running = [lane for lane in lanes if lane.step is not None and _start(lane, late)]
    quick = [x for x in running if x.name == COMPILED or x.first <= seconds * SLOW_SHARE]
    interleave([Turn(lane.sample, lane.seconds) for lane in quick], repeats, late=late)
    for lane in running:
        if lane.seconds:
            continue
        if lane.name == COMPILED:
            lane.refused = TIME_IS_UP
        else:
            lane.seconds.append(lane.first)


def _start(lane: Lane, late: Callable[[], bool]) -> bool:
    """The first call; False, with the reason in the lane, if it fails or is compiled too late."""
    if lane.logits is not None:
        return True
    if lane.name == COMPILED and late():
        lane.refused = TIME_IS_UP
        return False
    try:
        lane.first = lane.sample()
    except Exception as error:  # whatever torch.compile meets where there is no C++ compiler
        lane.refused = f"{type(error).__name__}: {_first_line(error)}"
        return False
    return True


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
