"""The profile as one HTML file: no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from recurx.profiler.attribute import KINDS, NET_STAGES, STAGES, kind_of
from recurx.profiler.result import Profile, quantile, short
from recurx.profiler.roofline import roofline
from recurx.profiler.style import STYLE
from recurx.profiler.text import GROUPS, MAX_PLACES
from recurx.profiler.trace import ranges

STRIP_WIDTH, STRIP_ROW = 1200, 20
NARROWEST = 0.35  # px: thinner ranges are left out of the strip


def render(profile: Profile) -> str:
    """The whole page."""
    body = [
        _head(profile), _stages(profile), _strip(profile), _roofline(profile), _calls(profile),
        _engines(profile), _timeline(profile), _syncs(profile), _halting(profile),
        _advice(profile), _commands(profile), _footer(profile),
    ]  # fmt: skip
    numbers = json.dumps(profile.to_dict()).replace("<", "\\u003c")
    kinds = "".join(f".{k} {{ fill: var(--{k}); background: var(--{k}); }}\n" for k in KINDS)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The browser itself refuses any request that this page might make.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
            '<link rel="icon" href="data:,">',
            f"<title>{escape(profile.title)}: recurx profile</title>",
            f"<style>{STYLE}{kinds}</style></head><body>",
            *(part for part in body if part),
            f'<script type="application/json" id="recurx-profile">{numbers}</script>',
            "</body></html>",
        ]
    )


def _head(p: Profile) -> str:
    tiles = [
        (f"{short(p.ms)} ms", f"one {p.kind}, median of {len(p.step_ms)}"),
        (f"{p.launches}", "kernels" if p.device != "cpu" else "operators that are no views"),
        (f"{sum(s.count for s in p.syncs)}", "host syncs" + _would(p)),
    ]
    if p.patched_ms:
        tiles.append((f"{p.ms / p.patched_ms:.2f}x", f"on recurx: {short(p.patched_ms)} ms"))
    spread = f"p20 {short(quantile(p.step_ms, 0.2))}, p80 {short(quantile(p.step_ms, 0.8))} ms"
    made = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>'
                   for a, b in tiles)  # fmt: skip
    return (
        f"<h1>{escape(p.title)}</h1><p class='dim'>B={p.batch}, {escape(p.dtype)} on "
        f"{escape(p.device)}, {p.threads} threads, torch {escape(p.versions['torch'])}; {spread}"
        f'</p><div class="tiles">{made}</div>'
    )


def _would(p: Profile) -> str:
    return "" if p.device != "cpu" else " (if it ran on a GPU)"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _table(
    head: Sequence[str], rows: Iterable[str | Sequence[str]], wide: Sequence[int] = ()
) -> str:
    """`rows` hold ready HTML, cells or a whole <tr>; a phone leaves out the columns `wide`."""

    def cells(values: Sequence[str], tag: str) -> str:
        hidden = [' class="wide"' if n in wide else "" for n in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(hidden, values, strict=True)
        )

    body = "".join(row if isinstance(row, str) else f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _bar(kind: str, share: float) -> str:
    return f'<div class="bar"><i class="{kind}" style="width:{100 * share:.1f}%"></i></div>'


def _legend(p: Profile) -> str:
    seen = {kind_of(row.name) for row in p.rows}
    keys = "".join(
        f'<span><i class="{k}"></i>{escape(KINDS[k])}</span>' for k in KINDS if k in seen
    )
    return f'<div class="keys">{keys}</div>'


def _stages(p: Profile) -> str:
    backward = any(row.backward_ms for row in p.rows)
    head = ["stage", "", "ms", "share", *(["forward", "backward"] if backward else []),
            "launches", "GFLOP", "MB", "TFLOP/s", "GB/s", "of roof"]  # fmt: skip
    longest = max((row.share for row in p.rows), default=1.0) or 1.0
    rows: list[str | list[str]] = []
    for group, title in GROUPS.items():
        members = [row for row in p.rows if row.group == group]
        if members:
            total = sum(row.ms for row in members)
            share = total / p.ms if p.ms else 0.0
            rows.append(
                f'<tr class="group"><td colspan="2">{escape(title)}</td><td>{short(total)}</td>'
                f"<td>{share:.1%}</td></tr>"
            )
        for row in members:
            bar = _bar(kind_of(row.name), row.share / longest)
            halves = [f"{row.forward_ms:.3f}", f"{row.backward_ms:.3f}"] if backward else []
            rows.append([
                escape(row.label), bar,
                f"{row.ms:.3f}", f"{row.share:.1%}", *halves, str(row.launches),
                f"{row.flops / 1e9:.3g}", f"{row.bytes / 1e6:.3g}", f"{row.tflops:.3g}",
                f"{row.gbs:.3g}", f"{row.of_roof:.0%} {row.limit[:3]}.",
            ])  # fmt: skip
    if p.idle_ms:
        rows.append(["GPU idle: waits for the host", "", f"{p.idle_ms:.3f}",
                     f"{p.idle_ms / p.ms:.1%}"])  # fmt: skip
    first = 6 if backward else 4
    wide = (*(range(4, 6) if backward else ()), *range(first + 1, first + 6))
    return _section("Stages", _legend(p), _table(head, rows, wide), f'<p class="dim">{p.how}</p>')


def _strip(p: Profile) -> str:
    """The step from left to right, outer ranges above inner ones."""
    if not p.ops:
        return ""
    end = p.ops[-1].end or 1
    labels = {label: name for name, (_, label) in STAGES.items()}
    depth, rects = 0, []
    for level, name, start, stop in ranges(p.ops, p.kind):
        left, width = STRIP_WIDTH * start / end, STRIP_WIDTH * (stop - start) / end
        if width < NARROWEST:
            continue
        depth = max(depth, level)
        kind = kind_of(labels[name]) if name in labels else "frame"
        note = escape(f"{name}: {short((stop - start) * 1e-6)} ms traced")
        rects.append(
            f'<rect class="{kind}" x="{left:.2f}" y="{level * STRIP_ROW}" width="{width:.2f}" '
            f'height="{STRIP_ROW - 2}"><title>{note}</title></rect>'
        )
        if kind == "frame" and width > 7 * len(name):
            rects.append(
                f'<text x="{left + 4:.1f}" y="{level * STRIP_ROW + 13}">{escape(name)}</text>'
            )
    height = (depth + 1) * STRIP_ROW
    svg = (
        f'<svg class="strip" viewBox="0 0 {STRIP_WIDTH} {height}" role="img" '
        f'aria-label="The step in time: nested ranges">{"".join(rects)}</svg>'
    )
    return _section(
        "The step in time", f'<figure><div class="scroll">{svg}</div><figcaption>As traced, from '
        "left to right; every operator is in the trace file.</figcaption></figure>",
    )  # fmt: skip


def _roofline(p: Profile) -> str:
    svg = roofline(p.rows, p.ceilings)
    if not svg:
        return ""
    tflops = ", ".join(f"{v:.3g} TFLOP/s {k}" for k, v in p.ceilings.tflops.items())
    return _section(
        "Roofline", f'<figure><div class="scroll">{svg}</div><figcaption>Ceilings measured in '
        f"the same run: {p.ceilings.gbs:.3g} GB/s copy, {escape(tflops)}. The area of a disc is "
        "the stage's share of the step; above the slope, caches serve the bytes."
        "</figcaption></figure>",
    )  # fmt: skip


def _calls(p: Profile) -> str:
    if not p.calls:
        return ""
    longest = max(c.forward_ms + c.backward_ms for c in p.calls) or 1.0
    rows = []
    for c in p.calls:
        total = c.forward_ms + c.backward_ms
        name = f"call {c.call}: net {c.net or '?'}"
        name += f", recursion {c.recursion}" if c.recursion > 0 else ""
        rows.append([escape(name), str(c.cycle) if c.cycle >= 0 else "-",
                     _bar("product", total / longest), f"{c.forward_ms:.3f}",
                     f"{c.backward_ms:.3f}" if c.backward_ms else "-"])  # fmt: skip
    table = _table(["net call", "cycle", "", "forward ms", "backward ms"], rows)
    inside = sum(row.ms for row in p.rows if row.name in NET_STAGES)
    return _section(
        "Net calls", f"<details><summary>{len(p.calls)} calls, {short(inside)} ms</summary>{table}"
        "</details>",
    )  # fmt: skip


def _engines(p: Profile) -> str:
    parts = []
    for engine in p.engines:
        parts.append(f"<p>{escape(engine.label)}: {short(engine.ms)} ms, "
                     f"{short(engine.flops / 1e9)} GFLOP</p>")  # fmt: skip
        if engine.phases:
            rows = [[escape(phase), f"{ms:.3f}", f"{flops / ms / 1e9:.3g}" if flops and ms else "-"]
                    for phase, ms, flops in engine.phases]  # fmt: skip
            parts.append(_table(["phase of the engine", "ms", "TFLOP/s"], rows))
    return _section("Fused recursions", *parts) if parts else ""


def _timeline(p: Profile) -> str:
    if p.timeline is None:
        return ""
    rows = [[escape(name), f"{ms:.4f}"] for name, ms in p.timeline.phases().items()]
    text = (
        f"<p>{len(p.timeline.owners)} owners, {short(p.timeline.span_ms)} ms; mean of an owner.</p>"
    )
    return _section("Inside the kernel", text, _table(["phase", "ms"], rows))


def _syncs(p: Profile) -> str:
    would = " (or would, if these tensors were on a GPU)" if p.device == "cpu" else ""
    if not p.syncs:
        return _section("Host syncs", f"<p>None: the host never waits for the device{would}.</p>")
    rows = [
        [f"{escape(s.what)}<br><code>{escape(s.text)}</code><br>"
         f'<span class="dim">{escape(s.place)}</span>', escape(s.stage), str(s.count)]
        for s in p.syncs[:MAX_PLACES]
    ]  # fmt: skip
    return _section("Host syncs", f"<p>Places where the host waits for the device{would}.</p>",
                    _table(["place", "stage", "times"], rows))  # fmt: skip


def _halting(p: Profile) -> str:
    total = sum(p.halting.values()) + p.halting_open
    if not total:
        return ""
    counts: list[tuple[str, int]] = [(f"step {n}", p.halting[n]) for n in sorted(p.halting)]
    if p.halting_open:
        counts.append(("later", p.halting_open))
    rows = [[name, _bar("training", n / total), str(n)] for name, n in counts]  # fmt: skip
    return _section(
        "Halting", f"<p>Samples by the supervision step at which they halt; {p.halting_steps} "
        "steps were run.</p>", _table(["halts at", "", "samples"], rows),
    )  # fmt: skip


def _advice(p: Profile) -> str:
    text = f"<pre>{escape(chr(10).join(p.advice))}</pre>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in p.notes)
    return _section("What recurx would replace", text, f"<ul>{notes}</ul>" if notes else "")


def _commands(p: Profile) -> str:
    return _section("For Nsight, on a GPU", f"<pre>{escape(chr(10).join(p.commands))}</pre>")


def _footer(p: Profile) -> str:
    versions: dict[str, Any] = p.versions
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    text += ". All numbers are in this file as JSON."
    return f"<footer><p>recurx profile; {escape(text)}</p></footer>"
