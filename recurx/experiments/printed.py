"""What several commands print of answers, as plain text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def curve(accuracies: Sequence[float]) -> str:
    """Exact accuracy against steps of refinement, one line a step, with bars of plain ASCII."""
    return "\n".join(
        f"  {step:3d} {'step ' if step == 1 else 'steps'} {share:7.1%}  {'#' * round(40 * share)}"
        for step, share in enumerate(accuracies, start=1)
    )


def side_by_side(boards: Sequence[str], gap: str = "     ") -> str:
    """Blocks of lines next to each other."""
    columns = [board.splitlines() for board in boards]
    widths = [max(map(len, lines)) for lines in columns]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(gap.join(map(str.ljust, row, widths)).rstrip() for row in rows)
