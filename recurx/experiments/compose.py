"""Products of permutations: one look against many (see `recurx.experiments.looks`).

The product of a prefix needs that of the prefix before it, and permutations do not commute, so that
counting is no way out as it is for sorting.
"""

from __future__ import annotations

import argparse

from recurx.experiments import one_look

CLAIM = "A net that looks once cannot multiply permutations; looking again and again, it can."
SEEDS, SECONDS, SIZE = 3, 35.0, one_look.SIZE
measure, tables, draw = one_look.measure, one_look.tables, one_look.draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    one_look.add_arguments(parser, task="compose:degree=3,length=7", supervision=7)
