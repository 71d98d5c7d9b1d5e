"""Reports of `train.evaluate` on parts of the examples: one of all, and back from JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recurx.train import Report


def merged(parts: Sequence[Report]) -> Report:
    """The report of all examples, from those of their parts."""
    count = sum(part.count for part in parts)
    known = sum(part.known_cells for part in parts)
    longest = max(len(part.curve) for part in parts)
    # A part that ended early keeps its answers.
    curves = [[*part.curve, *part.curve[-1:] * (longest - len(part.curve))] for part in parts]
    steps: Counter[int] = Counter()
    verdicts: Counter[str] = Counter()
    for part in parts:
        steps.update(part.histogram)
        verdicts.update(part.verdicts)

    def mean(values: Iterable[float]) -> float:
        """Of whole numbers that were divided by the examples of their part."""
        pairs = zip(values, parts, strict=True)
        return sum(round(value * part.count) for value, part in pairs) / count

    cells = sum(round(part.cells * part.known_cells) for part in parts if part.cells is not None)
    return Report(
        count=count,
        exact=mean(part.exact for part in parts),
        cells=cells / known if known else None,
        steps_mean=mean(part.steps_mean for part in parts),
        seconds=sum(part.seconds for part in parts),
        curve=tuple(mean(values) for values in zip(*curves, strict=True)),
        histogram=dict(sorted(steps.items())),
        known_cells=known,
        verdicts=dict(verdicts),
        wrong=sum(part.wrong for part in parts),
    )


def of(values: Mapping[str, Any]) -> Report:
    """The report that `to_dict` made, after JSON; what else is in `values` is left out."""
    known = {field.name: values[field.name] for field in dataclasses.fields(Report)}
    histogram = {int(steps): count for steps, count in known["histogram"].items()}
    return Report(**known | {"curve": tuple(known["curve"]), "histogram": histogram})
