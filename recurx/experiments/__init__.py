"""Experiments: each tests one claim about recursive reasoning, by one command, on a laptop.

An experiment is a module of this package with

    CLAIM: str                       # one sentence that the measurement can refute
    Options                          # its options and their defaults (`settings.Options`)
    measure(session, asked)          # trains through `session.net`; returns a result, JSON-ready
    tables(result)                   # [(title, columns, rows of strings)]
    draw(result, figure)             # fills a matplotlib figure of SIZE inches
    SIZE: tuple[float, float]

and a line in EXPERIMENTS. It imports no torch before `measure` runs. `measure` returns at least
"findings" (sentences with the measured figures) and "holds": whether the claim showed, by a rule
that the module states.

`tasks` (what nets learn) and `hybrid` stand by themselves, below the command line; `answering` and
`demo` are commands of their own. `hub` keeps nets on the Hugging Face Hub.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from recurx.errors import InvalidArgument

# Name -> (module, one line of help).
EXPERIMENTS = {
    "compose": ("recurx.experiments.compose", "one look against many: products of permutations"),
    "exit": ("recurx.experiments.exit", "halting where the answer stands: how much faster"),
    "hybrid": ("recurx.experiments.behind_text", "one look against many, behind a text encoder"),
    "sort": ("recurx.experiments.sort", "one look against many: sorting"),
    "variants": ("recurx.experiments.variants", "random starts and feedback against plain TRM"),
    "windows": ("recurx.experiments.windows", "how much of the recursion needs a gradient"),
}


def load(name: str) -> ModuleType:
    """The module of an experiment.

    Raises:
        InvalidArgument: unknown name; the known ones are listed.
    """
    if name not in EXPERIMENTS:
        raise InvalidArgument(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return importlib.import_module(EXPERIMENTS[name][0])
