"""Sorting: one look against many (see `recurx.experiments.looks`)."""

from __future__ import annotations

import argparse

from recurx.experiments import looks

CLAIM = "A net that looks once cannot sort; the same net, looking again and again, can."
SEEDS, SECONDS, SIZE = 1, 240.0, looks.SIZE
measure, tables, draw = looks.measure, looks.tables, looks.draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Long, of values twice as many as the net is wide: of few values one layer can count every one.
    looks.add_arguments(
        parser, task="sort:length=32,values=64", supervision=3, calls=2, lr=4e-3, halt_weight=0.01,
        fields={"hidden_size": 32, "num_heads": 2},
    )  # fmt: skip
