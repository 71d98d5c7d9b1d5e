"""Sorting: one look against many (see `recurx.experiments.looks`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recurx.experiments import one_look

CLAIM = "A net that looks once cannot sort; the same net, looking again and again, can."
SIZE = one_look.SIZE
measure, tables, draw = one_look.measure, one_look.tables, one_look.draw


@dataclass(frozen=True)
class Options(one_look.Options):
    # Records: a place follows from counts of the keys, which one look can take, but what a place
    # holds has to be fetched from wherever its key is found, which is a second look. A look that
    # counted whole records instead would need as many counts as there are records, 512 here.
    task: str = "sort:length=16,values=32,tags=16"
    time_budget: float = 150.0
    supervision: int = 3
    calls: int = 2
    test_steps: int = 6
    set: tuple[tuple[str, Any], ...] = (("hidden_size", 32), ("num_heads", 4))
    halt_weight: float = 0.01
    layers: int = 3
    lr: float = 3e-3
