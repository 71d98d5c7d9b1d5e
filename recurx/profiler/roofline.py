"""The roofline as a drawing: achieved FLOP/s of every stage against its FLOPs per byte.

Shapes and places only, in px; `report.html.j2` makes an SVG of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from recurx.measure import Ceilings
from recurx.profiler.attribute import kind_of
from recurx.profiler.result import Row

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 46
LEAST_INTENSITY, LEAST_SHARE = 1e-3, 1e-3
LABEL = 6.4, 14.0  # width of a letter and height of a line, px, of the page's 12 px font

Point = tuple[float, float]


class Disc(NamedTuple):
    """A stage: its kind colours the disc, its area is the share of the step."""

    kind: str
    x: float
    y: float
    radius: float
    note: str


class Drawing(NamedTuple):
    """The picture, `WIDTH` by `HEIGHT`."""

    lines: list[tuple[str, Point, Point]]  # class, from, to
    roof: list[Point]  # the slope of the copy bandwidth, the ridge, the level of the best product
    discs: list[Disc]  # the longest stage first
    texts: list[tuple[str, Point, str, str]]  # class, place, anchor, text
    width: int = WIDTH
    height: int = HEIGHT
    middle: Point = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2  # of the axes


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
    x = _Axis([*intensity, ridge, ridge * 4], LEFT, WIDTH - RIGHT)
    rates = [row.tflops for row in points] + list(roofs.tflops.values())
    lowest = min(*rates, roofs.gbs * x.low / 1e3)
    y = _Axis([*rates, max(lowest, min(rates) / 3)], HEIGHT - BOTTOM, TOP)
    made = Drawing([], [], [], [])
    _grid(made, x, y)
    _roofs(made, x, y, roofs)
    for row, at in zip(points, intensity, strict=True):
        note = f"{row.label}: {row.ms:.4g} ms, {row.tflops:.3g} TFLOP/s, {row.gbs:.3g} GB/s"
        radius = 3 + 22 * math.sqrt(min(1.0, row.share))
        made.discs.append(Disc(kind_of(row.name), x(at), y(row.tflops), radius, note))
    _names(made, [row.name.rpartition(": ")[2] for row in points])
    return made


class _Axis:
    """A logarithmic axis over whole decades, from pixel `begin` to pixel `end`."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.first = math.floor(math.log10(min(values)))
        self.last = max(math.ceil(math.log10(max(values))), self.first + 1)
        self.low, self.high = 10.0**self.first, 10.0**self.last
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return self.begin + (self.end - self.begin) * share

    @property
    def ticks(self) -> list[float]:
        return [10.0**n for n in range(self.first, self.last + 1)]


def _number(value: float) -> str:
    return f"{value:g}" if 1e-4 < value < 1e5 else f"1e{round(math.log10(value))}"


def _grid(made: Drawing, x: _Axis, y: _Axis) -> None:
    low, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in x.ticks:
        made.lines.append(("grid", (x(tick), TOP), (x(tick), low)))
        made.texts.append(("axis", (x(tick), low + 16), "middle", _number(tick)))
    for tick in y.ticks:
        made.lines.append(("grid", (LEFT, y(tick)), (right, y(tick))))
        made.texts.append(("axis", (LEFT - 6, y(tick) + 4), "end", _number(tick)))


def _roofs(made: Drawing, x: _Axis, y: _Axis, roofs: Ceilings) -> None:
    """The slope of the copy bandwidth up to the best product, and a level for each dtype."""

    def slope(at: float) -> Point:
        return x(at), y(at * roofs.gbs / 1e3)

    best = roofs.best_tflops
    start = max(x.low, y.low * 1e3 / roofs.gbs)
    ridge = best * 1e3 / roofs.gbs
    made.roof[:] = slope(start), slope(ridge), (x.end, y(best))
    for name, tflops in roofs.tflops.items():
        if tflops != best:
            level = slope(tflops * 1e3 / roofs.gbs)
            made.lines.append(("roof low", level, (x.end, level[1])))
        said = f"{name}: {tflops:.3g} TFLOP/s"
        made.texts.append(("axis", (x.end - 4, y(tflops) - 5), "end", said))
    at = slope(start * (ridge / start) ** 0.3)
    made.texts.append(("axis", (at[0] - 8, at[1] - 6), "end", f"copy: {roofs.gbs:.3g} GB/s"))


def _names(made: Drawing, names: Sequence[str]) -> None:
    """Labels where there is room: clear of discs and labels, else of labels."""
    boxes: list[tuple[float, ...]] = []
    discs = [(d.x - d.radius, d.y - d.radius, d.x + d.radius, d.y + d.radius) for d in made.discs]
    for disc, name in zip(made.discs, names, strict=True):
        box = _place(disc, name, [*boxes, *discs]) or _place(disc, name, boxes)
        if box is not None:
            boxes.append(box)
            made.texts.append(("label", (box[0], box[3] - 3), "start", name))


def _place(
    disc: Disc, name: str, taken: Sequence[tuple[float, ...]]
) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of a label beside a disc that overlaps no other, or None."""
    width, height = LABEL[0] * len(name) + 4, LABEL[1]
    x, y, gap = disc.x, disc.y, disc.radius + 3
    for left, top in (
        (x + gap, y - height / 2), (x - gap - width, y - height / 2),
        (x - width / 2, y - gap - height), (x - width / 2, y + gap),
        (x + gap, y - gap - height / 2), (x + gap, y + gap - height / 2),
        (x - gap - width, y + gap), (x - gap - width, y - gap - height),
    ):  # fmt: skip
        box = left, top, left + width, top + height
        inside = left > LEFT and box[2] < WIDTH - RIGHT and top > TOP
        inside = inside and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
