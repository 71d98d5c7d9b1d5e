"""The roofline as a drawing: achieved FLOP/s of every stage against its FLOPs per byte.

Shapes and places only, in px; `report.html.j2` makes an SVG of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from recurx.bench.profiler.attribute import kind_of
from recurx.bench.profiler.ceilings import Ceilings
from recurx.bench.profiler.result import Row

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 46
LEAST_INTENSITY, LEAST_SHARE = 1e-3, 1e-3
LABEL = 6.4, 14.0  # width of a letter and height of a line, px, of the page's 12 px font

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Disc(NamedTuple):
    """A stage: its kind colours the disc, its area is the share of the step."""

    kind: str
    x: float
    y: float
    radius: float
    note: str


class Axis:
    """A logarithmic axis over whole decades, from pixel `begin` to pixel `end`."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.first = math.floor(math.log10(min(values)))
        self.last = max(math.ceil(math.log10(max(values))), self.first + 1)
        self.low, self.begin, self.end = 10.0**self.first, begin, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return self.begin + (self.end - self.begin) * share

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of every decade."""
        decades = range(self.first, self.last + 1)
        return [(self(10.0**n), f"{10.0**n:g}" if -4 < n < 5 else f"1e{n}") for n in decades]


class Drawing(NamedTuple):
    """The picture, `WIDTH` by `HEIGHT`: what lies between its axes, FLOP per byte and TFLOP/s."""

    x: Axis
    y: Axis
    roof: list[Point]  # the slope of the copy bandwidth, the ridge, the level of the best product
    slope: Point  # where the slope is named
    discs: list[Disc]  # the longest stage first
    names: list[tuple[float, float, str]]  # those of the stages: left, baseline, text
    width: int = WIDTH
    height: int = HEIGHT


def roofline(rows: Sequence[Row], roofs: Ceilings) -> Drawing | None:
    """None if no stage computes. Stages that only move data have no place in it, and those that
    hardly take time are left out."""
    points = [
        row for row in rows
        if row.bytes > 0 and row.flops > LEAST_INTENSITY * row.bytes and row.share > LEAST_SHARE
    ]  # fmt: skip
    if not points:
        return None
    points.sort(key=lambda row: -row.share)
    intensity = [row.flops / row.bytes for row in points]
    ridge = roofs.best_tflops * 1e3 / roofs.gbs
    x = Axis([*intensity, ridge, ridge * 4], LEFT, WIDTH - RIGHT)
    rates = [row.tflops for row in points] + list(roofs.tflops.values())
    lowest = min(*rates, roofs.gbs * x.low / 1e3)
    y = Axis([*rates, max(lowest, min(rates) / 3)], HEIGHT - BOTTOM, TOP)

    def slope(at: float) -> Point:
        return x(at), y(at * roofs.gbs / 1e3)

    start = max(x.low, y.low * 1e3 / roofs.gbs)
    roof = [slope(start), slope(ridge), (x.end, y(roofs.best_tflops))]
    discs = [
        Disc(
            kind_of(row.name), x(at), y(row.tflops), 3 + 22 * math.sqrt(min(1.0, row.share)),
            f"{row.label}: {row.ms:.4g} ms, {row.tflops:.3g} TFLOP/s, {row.gbs:.3g} GB/s",
        )
        for row, at in zip(points, intensity, strict=True)
    ]  # fmt: skip
    names = _names(discs, [row.name.rpartition(": ")[2] for row in points])
    return Drawing(x, y, roof, slope(start * (ridge / start) ** 0.3), discs, names)


def _names(discs: Sequence[Disc], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """Labels where there is room: clear of discs and labels, else of labels."""
    boxes: list[Box] = []
    made = []
    round_them = [(d.x - d.radius, d.y - d.radius, d.x + d.radius, d.y + d.radius) for d in discs]
    for disc, name in zip(discs, names, strict=True):
        box = _place(disc, name, [*boxes, *round_them]) or _place(disc, name, boxes)
        if box is not None:
            boxes.append(box)
            made.append((box[0], box[3] - 3, name))
    return made


def _place(disc: Disc, name: str, taken: Sequence[Box]) -> Box | None:
    """(left, top, right, bottom) of a label beside a disc that overlaps no other, or None."""
    width, height = LABEL[0] * len(name) + 4, LABEL[1]
    x, y, gap = disc.x, disc.y, disc.radius + 3
    for left, top in (
        (x + gap, y - height / 2), (x - gap - width, y - height / 2),
        (x - width / 2, y - gap - height), (x - width / 2, y + gap),
        (x + gap, y - gap - height / 2), (x + gap, y + gap - height / 2),
        (x - gap - width, y + gap), (x - gap - width, y - gap - height),
    ):  # fmt: skip
        right, bottom = left + width, top + height
        inside = left > LEFT and right < WIDTH - RIGHT and top > TOP and bottom < HEIGHT - BOTTOM
        if inside and not any(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
            for other in taken
        ):
            return left, top, right, bottom
    return None
