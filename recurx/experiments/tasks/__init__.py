"""Tasks that test claims about recursion: each needs many dependent operations, and few rules.

`recurx.tasks.get` finds them by the entry points of an installed recurx. Where recurx is not
installed, importing this package makes them known, as the command line does.
"""

from __future__ import annotations

from recurx import tasks
from recurx.experiments.tasks.chain import Chain
from recurx.experiments.tasks.compose import Compose
from recurx.experiments.tasks.ordering import Ordering
from recurx.experiments.tasks.reach import Reach
from recurx.experiments.tasks.sorting import Sorting
from recurx.experiments.tasks.trades import Trades

# The same names and classes stand in pyproject.toml, as entry points.
TASKS = {
    "sort": Sorting,
    "chain": Chain,
    "compose": Compose,
    "reach": Reach,
    "order": Ordering,
    "trades": Trades,
}
for _name, _maker in TASKS.items():
    tasks.register(_name, _maker)
