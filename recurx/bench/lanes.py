"""How to measure, and a variant on its way through a group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recurx.bench.remote import Remote
from recurx.bench.variants import Variant


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        device: "cpu" or "cuda".
        unit: what torch.compile compiles: "net" (one call each) or "step" (all calls as one graph).
        cold: overwrite the GPU's L2 before every step.
        jobs: workers that start at the same time.
        start_timeout: seconds that a variant may take to its first step.
        deadline: time.monotonic() after which nothing is started.
        imports: modules that each worker imports first, such as one that registers a backend.
        say: prints a line of progress.
    """

    device: str
    threads: int
    unit: str = "net"
    cold: bool = False
    jobs: int = 1
    start_timeout: float = 300.0
    deadline: float = math.inf
    imports: tuple[str, ...] = ()
    say: Callable[[str], None] = print

    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Lane:
    """A variant in a group."""

    variant: Variant
    row: dict[str, Any]
    remote: Remote | None = None
    times: list[float] = field(default_factory=list)
    repeats: int = 1
    every: int = 1  # takes part in one round of so many

    def drop(self, status: str, reason: str) -> None:
        self.row |= {"status": status, "reason": reason}
        self.times.clear()
        self.end()

    def end(self) -> None:
        if self.remote is not None:
            self.remote.close()
            self.remote = None
