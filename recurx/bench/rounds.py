"""Samples of several things in turn, so that slow minutes of the machine hit all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Turn:
    """What is timed in one round of `every`: `sample` gives seconds, which go to `times`, or None
    if it failed and is to be left out from then on."""

    sample: Callable[[], float | None]
    times: list[float] = field(default_factory=list)
    every: int = 1


def interleave(
    turns: Sequence[Turn], rounds: int, fewest: int = 0, late: Callable[[], bool] = lambda: False
) -> None:
    """Rounds of one sample each, in turn, so that slow minutes of the machine hit all alike. The
    first `fewest` are done even if it is `late`."""
    running = list(turns)
    for index in range(rounds):
        for turn in list(running):
            if index >= fewest and late():
                return
            if index % turn.every:
                continue
            seconds = turn.sample()
            if seconds is None:
                running.remove(turn)
            else:
                turn.times.append(seconds)
