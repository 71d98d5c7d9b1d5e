"""Sorting: one look against many (see `recurx.experiments.looks`)."""

from __future__ import annotations

import argparse

from recurx.experiments import one_look

CLAIM = "A net that looks once cannot sort; the same net, looking again and again, can."
SEEDS, SECONDS, SIZE = 1, 150.0, one_look.SIZE
measure, tables, draw = one_look.measure, one_look.tables, one_look.draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Records: a place follows from counts of the keys, which one look can take, but what a place
    # holds has to be fetched from wherever its key is found, which is a second look. A look that
    # counted whole records instead would need as many counts as there are records, 512 here.
    one_look.add_arguments(
        parser, task="sort:length=16,values=32,tags=16", supervision=3, calls=2, layers=3,
        lr=3e-3, halt_weight=0.01, fields={"hidden_size": 32, "num_heads": 4},
    )  # fmt: skip
