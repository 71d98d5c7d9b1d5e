"""Products of permutations: one look against many (see `recurx.experiments.looks`).

The product of a prefix needs that of the prefix before it, and permutations do not commute, so that
counting is no way out as it is for sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

from recurx.experiments import one_look

CLAIM = "A net that looks once cannot multiply permutations; looking again and again, it can."
SIZE = one_look.SIZE
measure, tables, draw = one_look.measure, one_look.tables, one_look.draw


@dataclass(frozen=True)
class Options(one_look.Options):
    task: str = "compose:degree=3,length=7"
    seeds: int = 3
    time_budget: float = 35.0
    supervision: int = 7
    test_steps: int = 14
