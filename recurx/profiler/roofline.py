"""The roofline as an SVG: achieved FLOP/s of every stage against its FLOPs per byte.

Plain SVG text, coloured by the CSS variables of the page (`html.py`): it follows the reader's light
or dark theme and needs neither a network nor a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from recurx.measure import Ceilings
from recurx.profiler.attribute import kind_of
from recurx.profiler.result import Row

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 46
LEAST_INTENSITY, LEAST_SHARE = 1e-3, 1e-3
LABEL = 6.4, 14.0  # width of a letter and height of a line, px, of the page's 12 px font


def roofline(rows: Sequence[Row], roofs: Ceilings) -> str:
    """An <svg>; "" if no stage computes. Stages that only move data have no place in it, and those
    that hardly take time are left out."""
    points = [
        row for row in rows
        if row.bytes > 0 and row.flops > LEAST_INTENSITY * row.bytes and row.share > LEAST_SHARE
    ]  # fmt: skip
    if not points:
        return ""
    intensity = [row.flops / row.bytes for row in points]
    ridge = roofs.best_tflops * 1e3 / roofs.gbs
    x = _Axis([*intensity, ridge, ridge * 4], LEFT, WIDTH - RIGHT)
    rates = [row.tflops for row in points] + list(roofs.tflops.values())
    lowest = min(*rates, roofs.gbs * x.low / 1e3)
    y = _Axis([*rates, max(lowest, min(rates) / 3)], HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y), _roofs(x, y, roofs), _points(x, y, points, intensity)]
    return (
        f'<svg class="roofline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Roofline: TFLOP/s of every stage against its FLOPs per byte">'
        f"{''.join(parts)}</svg>"
    )


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


def _grid(x: _Axis, y: _Axis) -> str:
    lines = []
    for tick in x.ticks:
        at = x(tick)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" '
                     f'y2="{HEIGHT - BOTTOM}"/>')  # fmt: skip
        lines.append(_text(at, HEIGHT - BOTTOM + 16, _number(tick), "middle"))
    for tick in y.ticks:
        at = y(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" '
                     f'y2="{at:.1f}"/>')  # fmt: skip
        lines.append(_text(LEFT - 6, at + 4, _number(tick), "end"))
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "FLOP per byte moved", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(
        f'<text class="axis" x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">TFLOP/s</text>'
    )
    return "".join(lines)


def _roofs(x: _Axis, y: _Axis, roofs: Ceilings) -> str:
    """The slope of the copy bandwidth up to the best product, and a level for each dtype."""
    best = roofs.best_tflops
    start = max(x.low, y.low * 1e3 / roofs.gbs)
    ridge = best * 1e3 / roofs.gbs
    found = [
        f'<polyline class="roof" points="{x(start):.1f},{y(start * roofs.gbs / 1e3):.1f} '
        f'{x(ridge):.1f},{y(best):.1f} {x.end:.1f},{y(best):.1f}"/>'
    ]
    for name, tflops in roofs.tflops.items():
        at = y(tflops)
        if tflops != best:
            found.append(f'<line class="roof low" x1="{x(tflops * 1e3 / roofs.gbs):.1f}" '
                         f'x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')  # fmt: skip
        found.append(_text(x.end - 4, at - 5, f"{name}: {tflops:.3g} TFLOP/s", "end"))
    third = start * (ridge / start) ** 0.3
    found.append(_text(x(third) - 8, y(third * roofs.gbs / 1e3) - 6,
                       f"copy: {roofs.gbs:.3g} GB/s", "end"))  # fmt: skip
    return "".join(found)


def _points(x: _Axis, y: _Axis, rows: Sequence[Row], intensity: Sequence[float]) -> str:
    """A disc for each stage, its area the share of the step; labels where there is room."""
    found, boxes = [], []
    radii = [3 + 22 * math.sqrt(min(1.0, row.share)) for row in rows]
    discs = [
        (x(at) - r, y(row.tflops) - r, x(at) + r, y(row.tflops) + r)
        for at, row, r in zip(intensity, rows, radii, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: -rows[i].share)
    for index in order:
        row = rows[index]
        at = x(intensity[index]), y(row.tflops)
        radius = radii[index]
        note = f"{row.label}: {row.ms:.4g} ms, {row.tflops:.3g} TFLOP/s, {row.gbs:.3g} GB/s"
        found.append(
            f'<circle class="{kind_of(row.name)}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" '
            f'r="{radius:.1f}"><title>{escape(note)}</title></circle>'
        )
    for index in order:
        row = rows[index]
        at = x(intensity[index]), y(row.tflops)
        # Clear of discs and labels if there is room, else of labels.
        name = row.name.rpartition(": ")[2]
        box = _place(at, radii[index], name, [*boxes, *discs])
        box = box or _place(at, radii[index], name, boxes)
        if box is not None:
            boxes.append(box)
            found.append(_text(box[0], box[3] - 3, name, "start", "label"))
    return "".join(found)


def _place(
    at: tuple[float, float], radius: float, name: str, taken: Sequence[tuple[float, ...]]
) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of a label beside a point that overlaps no other, or None."""
    width, height = LABEL[0] * len(name) + 4, LABEL[1]
    x, y = at
    gap = radius + 3
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


def _text(x: float, y: float, text: str, anchor: str, kind: str = "axis") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
