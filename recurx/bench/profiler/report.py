"""A profile as people read it: text, one HTML file, a trace; all from the numbers of `Result`.

The words and the look are in the templates `report.txt.j2` and `report.html.j2`. The page has no
script and wants no network; every value in it is escaped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from recurx.bench.profiler.attribute import KINDS, NET_STAGES, STAGES, kind_of
from recurx.bench.profiler.result import Result, short
from recurx.bench.profiler.roofline import roofline
from recurx.bench.profiler.trace import chrome_trace, ranges

GROUPS = {
    "net": "recursion, by stage of a block (all net calls together)",
    "around": "around the recursion",
    "training": "training",
    "other": "everything else",
}
MAX_PLACES = 12
STRIP_WIDTH, STRIP_ROW = 1200, 20
NARROWEST = 0.35  # px: thinner ranges are left out of the strip


class Profile(Result):
    """Where one step of a recursive model spends its time; print it, or save it."""

    def __str__(self) -> str:
        return _rendered("report.txt.j2", self).rstrip()

    def save_json(self, path: str | Path) -> None:
        """All numbers, one JSON object."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def save_html(self, path: str | Path) -> None:
        """A report in one file: no network, light and dark, readable on a phone."""
        Path(path).write_text(html(self), encoding="utf-8")

    def save_trace(self, path: str | Path) -> None:
        """A trace for ui.perfetto.dev or chrome://tracing: nested ranges, down to operators."""
        Path(path).write_text(json.dumps(chrome_trace(self)), encoding="utf-8")


def html(result: Result) -> str:
    """The whole page."""
    return _rendered(
        "report.html.j2", result, drawing=roofline(result.rows, result.ceilings),
        strip=list(_strip(result)),
    )  # fmt: skip


@functools.cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"short": short, "spec": format, "kind_of": kind_of}
    made.globals |= {
        "KINDS": KINDS, "kind_of": kind_of, "MAX_PLACES": MAX_PLACES, "STRIP_WIDTH": STRIP_WIDTH,
        "STRIP_ROW": STRIP_ROW,
    }  # fmt: skip
    return made


def _rendered(template: str, p: Result, **more: Any) -> str:
    """A template filled with the result, and with what both templates make of it."""
    p20, p80 = np.quantile(p.step_ms, (0.2, 0.8))
    halts = {f"step {step}": count for step, count in sorted(p.halting.items())}
    cycles: dict[tuple[int, int, str], list[float]] = {}
    for call in p.calls:
        cycles.setdefault((call.recursion, call.cycle, call.net), []).append(call.ms)
    return _templates().get_template(template).render(
        p=p,
        host=p.device == "cpu",
        launched="operators that are no views" if p.device == "cpu" else "kernels",
        share=lambda ms: ms / p.ms if p.ms else 0.0,
        spread=f"p20 {short(p20)}, p80 {short(p80)}",
        tflops=", ".join(f"{rate:.3g} TFLOP/s {name}" for name, rate in p.ceilings.tflops.items()),
        syncs=sum(sync.count for sync in p.syncs),
        backward=any(row.backward_ms for row in p.rows),
        groups=[
            (title, rows, sum(row.ms for row in rows))
            for group, title in GROUPS.items()
            if (rows := [row for row in p.rows if row.group == group])
        ],
        cycles=cycles,
        backward_calls=any(call.backward_ms for call in p.calls),
        net_ms=sum(row.ms for row in p.rows if row.name in NET_STAGES),
        halts=halts | ({"later": p.halting_open} if p.halting_open else {}),
        **more,
    )  # fmt: skip


def _strip(p: Result) -> Iterator[tuple[str, str, int, float, float, float]]:
    """The step from left to right: (kind, name, level, left, width, ms) of every range, in px."""
    end = p.ops[-1].end or 1 if p.ops else 1
    labels = {label: name for name, (_, label) in STAGES.items()}
    for level, name, start, stop in ranges(p.ops, p.kind):
        left, width = STRIP_WIDTH * start / end, STRIP_WIDTH * (stop - start) / end
        if width >= NARROWEST:
            kind = kind_of(labels[name]) if name in labels else "frame"
            yield kind, name, level, left, width, (stop - start) * 1e-6
