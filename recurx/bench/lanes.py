"""How to measure, and a variant on its way through a group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from recurx.bench.remote import Remote
from recurx.bench.variants import Variant
from recurx.cli import options
from recurx.options import option


@dataclass(frozen=True)
class Options:
    """How to measure. `device`, `threads`, `unit` and `jobs` are None until the command knows them.

    Args:
        deadline: time.monotonic() after which nothing is started.
        say: prints a line of progress.
    """

    device: str | None = option(None, "default: cuda if there is one", choices=("cpu", "cuda"))
    threads: int | None = options.THREADS
    unit: str | None = option(
        None, "what torch.compile compiles (default: step, all calls as one graph, on a GPU; net, "
        "one call, on a CPU, where it is as fast and compiles in a tenth of the time)",
        choices=("net", "step"),
    )  # fmt: skip
    cold: bool = option(False, "overwrite the GPU's L2 before a step")
    jobs: int | None = option(None, "workers that start at once (default 1; GPU 4)", least=1)
    start_timeout: float = options.time(300.0, "to a first step")
    time_limit: float | None = options.time(None, "start nothing after this long")
    imports: tuple[str, ...] = option((), "imported first in every worker: registers a backend, "
                                      "say", flag="--import", metavar="MODULE")  # fmt: skip
    deadline: float = math.inf
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
