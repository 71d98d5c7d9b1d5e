"""The reckoning of GPU times in docs/engines.md: generated, and no wild guess beside the hand's."""

from __future__ import annotations

from pathlib import Path

import pytest

from recurx.bench import pages, reckoning
from recurx.bench.reckoning import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_page_holds_the_table_of_today():
    text = PAGE.read_text()
    assert pages.fill_in(text, [], str(PAGE)) == text, "run: make bench-report"
    assert reckoning.table() in text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.case} {row.batch} {row.plan}")
def test_the_model_is_near_what_was_reckoned_by_hand(row):
    """Within a quarter of the kernels as they were read, or of what they are to become."""
    least = min(row.read + row.redesigned)
    assert 0.75 * least < row.model(row.plan) < 1.25 * max(row.read)


def test_eager_is_near_what_was_reckoned_by_hand():
    for row in ROWS:
        if row.eager:
            eager = row.model("eager/operators")
            assert 0.8 * min(row.eager) < eager < 1.2 * max(row.eager), row
