"""No backend answers by weights of before: every way of writing, every backend, every mode.

The answers are those by fresh copies of the weights (writes.py), and they moved at all.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import recurx
from recurx.backends import weight_cache
from tests.kernels.writes import (
    CASES,
    ENGINES,
    IN_PLACE,
    MODES,
    WAYS,
    Stack,
    answer,
    by_data,
    contiguous,
    of_copies,
    same,
)


def edited(weight: Tensor, picks: random.Random) -> Tensor:
    """Other values for a weight, in most cases but a few elements of it."""
    values = contiguous(weight)
    rows, columns = values.shape
    what = picks.randrange(4)
    if what == 0:  # one element, such that bf16 states show it
        values[picks.randrange(rows), picks.randrange(columns)] += picks.choice((-1, 1)) * 4
    elif what == 1:
        values[picks.randrange(rows)] *= -1.5
    elif what == 2:
        values[:, picks.randrange(columns)] += 0.75
    else:
        values = torch.randn(rows, columns) / columns**0.5
    return values


def edit_and_compare(backend: str, mode: str, ways, count: int, first: int = 0) -> None:
    """`count` edits by these ways in turn, beginning with the `first`-th."""
    picks, stack = random.Random(first), Stack()
    before, moved = answer(stack, backend, mode), 0
    for number in range(first, first + count):
        way, linear = ways[number % len(ways)], picks.choice(stack.linears())
        way(linear, edited(linear.weight, picks))
        now = answer(stack, backend, mode)
        assert same(now, of_copies(stack, backend, mode)), way.__name__
        moved += not same(now, before)
        before = now
    assert moved >= 0.8 * count, "the edits are large enough to be seen"


# Of each mode; those of all modes together go through all ways.
COUNTS = {"eager": 26, "cpu": 150, "triton tiled": 5, "triton persistent": 7, "cuda owner": 5,
          "cuda grid": 5}  # fmt: skip


@pytest.mark.parametrize("engine, mode", CASES)
def test_every_write_is_seen(engine: str, mode: str) -> None:
    count = COUNTS[engine]
    with ENGINES[engine]() as backend:
        edit_and_compare(backend, mode, WAYS, count, MODES.index(mode) * count)


def test_there_are_more_than_500_edits() -> None:
    counts = {name: 0 for name in ENGINES}
    for engine, _ in CASES:
        counts[engine] += COUNTS[engine]
    assert sum(counts.values()) >= 500 and min(counts.values()) >= len(WAYS)


def versions(weights: list[Tensor]) -> object:
    return [-1 if w.is_inference() else w._version for w in weights]


def sampled(weights: list[Tensor]) -> object:
    whole = [w.detach().flatten() for w in weights if w.is_contiguous()]
    return versions(weights), [w[:: w.numel() // 256 + 1].tolist() for w in whole]


@pytest.mark.parametrize("rule", [versions, sampled])
def test_the_rules_of_before_miss_edits(native, monkeypatch, rule) -> None:
    monkeypatch.setattr(native, "packed", weight_cache.WeightCache(16, rule))
    with pytest.raises(AssertionError, match="by_"):
        edit_and_compare("cpu", "eval", IN_PLACE, 100)


def test_a_version_counter_misses_edits_on_a_gpu(monkeypatch) -> None:
    with ENGINES["triton persistent"]() as backend:
        tapes = weight_cache.WeightCache(16, versions)
        monkeypatch.setattr(recurx.backends.get("triton"), "tapes", tapes)
        with pytest.raises(AssertionError, match="by_data"):
            edit_and_compare(backend, "eval", (by_data,), 2)
