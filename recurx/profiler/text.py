"""The profile as text: by domain, in the order of the model."""

from __future__ import annotations

from collections.abc import Sequence

from recurx.profiler.result import Profile, Row, quantile, short

GROUPS = {
    "net": "recursion, by stage of a block (all net calls together)",
    "around": "around the recursion",
    "training": "training",
    "other": "everything else",
}
MAX_PLACES = 12


def render(profile: Profile) -> str:
    """Several lines; plain ASCII but for the user's own names."""
    parts = [_head(profile), _stages(profile), _calls(profile), _engines(profile)]
    parts += [_timeline(profile), _syncs(profile), _halting(profile)]
    parts.append("\n".join(["what recurx would replace", *_indent(profile.advice)]))
    if profile.notes:
        parts.append("\n".join(["notes", *_indent(profile.notes)]))
    parts.append("\n".join(["for Nsight, on a GPU", *_indent(profile.commands)]))
    return "\n\n".join(part for part in parts if part)


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _head(p: Profile) -> str:
    tflops = ", ".join(f"{value:.3g} TFLOP/s {name}" for name, value in p.ceilings.tflops.items())
    spread = f"p20 {short(quantile(p.step_ms, 0.2))}, p80 {short(quantile(p.step_ms, 0.8))}"
    kernels = "kernels" if p.device != "cpu" else "operators that are no views"
    lines = [
        f"{p.title}: one {p.kind}, B={p.batch}, {p.dtype} on {p.device} ({p.threads} threads)",
        f"  {short(p.ms)} ms (median of {len(p.step_ms)}; {spread})",
        f"  {p.launches} launches ({kernels}), {p.operators} ATen operators, "
        f"{sum(s.count for s in p.syncs)} host syncs",
        f"  ceilings measured in this run: {p.ceilings.gbs:.3g} GB/s copy, {tflops}",
        f"  {p.how}",
    ]
    return "\n".join(lines)


def _stages(p: Profile) -> str:
    backward = any(row.backward_ms for row in p.rows)
    head = f"{'':36s} {'ms':>9s} {'share':>6s}"
    head += f" {'forward':>9s} {'backward':>9s}" if backward else ""
    head += (
        f" {'launches':>8s} {'GFLOP':>8s} {'MB':>8s} {'TFLOP/s':>8s} {'GB/s':>7s} {'of roof':>7s}"
    )
    lines = [head]
    for group, title in GROUPS.items():
        rows = [row for row in p.rows if row.group == group]
        if not rows:
            continue
        total = sum(row.ms for row in rows)
        lines.append(f"{title:36s}  {short(total)} ms, {total / p.ms if p.ms else 0:.1%}")
        lines += [_row(row, backward) for row in rows]
    if p.idle_ms:
        lines.append(f"  {'GPU idle: waits for the host':34s} {p.idle_ms:9.3f} "
                     f"{p.idle_ms / p.ms:6.1%}")  # fmt: skip
    total = sum(row.ms for row in p.rows) + p.idle_ms
    lines.append(f"  {'sum':34s} {total:9.3f} {total / p.ms if p.ms else 0:6.1%}")
    return "\n".join(lines)


def _row(row: Row, backward: bool) -> str:
    split = f" {row.forward_ms:9.3f} {row.backward_ms:9.3f}" if backward else ""
    return (
        f"  {row.label[:34]:34s} {row.ms:9.3f} {row.share:6.1%}{split} {row.launches:8d} "
        f"{row.flops / 1e9:8.3g} {row.bytes / 1e6:8.3g} {row.tflops:8.3g} {row.gbs:7.3g} "
        f"{row.of_roof:6.0%} {row.limit}"
    )


def _calls(p: Profile) -> str:
    if not p.calls:
        return ""
    lines = [f"net calls ({len(p.calls)})"]
    groups: dict[tuple[int, int, str], list[float]] = {}
    for call in p.calls:
        groups.setdefault((call.recursion, call.cycle, call.net), []).append(
            call.forward_ms + call.backward_ms
        )
    for (recursion, cycle, net), times in groups.items():
        again = f"recursion {recursion}, " if recursion > 0 else ""
        where = f"cycle {cycle}, " if cycle >= 0 else ""
        lines.append(
            f"  {again}{where}net {net or '?'}: {len(times)} x {short(sum(times) / len(times))} ms "
            f"({short(min(times))} to {short(max(times))}), backward included"
            if any(c.backward_ms for c in p.calls)
            else f"  {again}{where}net {net or '?'}: {len(times)} x "
            f"{short(sum(times) / len(times))} ms ({short(min(times))} to {short(max(times))})"
        )
    return "\n".join(lines)


def _engines(p: Profile) -> str:
    lines = []
    for engine in p.engines:
        lines.append(f"  {engine.label}: {short(engine.ms)} ms, {short(engine.flops / 1e9)} GFLOP")
        for phase, ms, flops in engine.phases:
            rate = f", {flops / ms / 1e9:.3g} TFLOP/s" if flops and ms else ""
            lines.append(f"    {phase:12s} {ms:9.3f} ms{rate}")
    return "\n".join(["fused recursions (one operator each)", *lines]) if lines else ""


def _timeline(p: Profile) -> str:
    if p.timeline is None:
        return ""
    head = (
        f"inside the kernel: {len(p.timeline.owners)} owners, "
        f"{short(p.timeline.span_ms)} ms; mean of an owner"
    )
    return "\n".join([head, *(f"  {n:20s} {ms:9.4f} ms" for n, ms in p.timeline.phases().items())])


def _syncs(p: Profile) -> str:
    would = "" if p.device != "cpu" else ", or would if these tensors were on a GPU"
    if not p.syncs:
        return f"host syncs: none (no place where the host waits for the device{would})"
    lines = [f"host syncs: places where the host waits for the device{would}"]
    for sync in p.syncs[:MAX_PLACES]:
        lines.append(f"  {sync.count:3d} x {sync.place} [{sync.stage}] {sync.what}")
        if sync.text:
            lines.append(f"        {sync.text}")
    if len(p.syncs) > MAX_PLACES:
        lines.append(f"  and {len(p.syncs) - MAX_PLACES} more places (all in the JSON)")
    return "\n".join(lines)


def _halting(p: Profile) -> str:
    total = sum(p.halting.values()) + p.halting_open
    if not total:
        return ""
    lines = [f"halting: samples by the supervision step at which they halt ({p.halting_steps} run)"]
    for step in sorted(p.halting):
        count = p.halting[step]
        lines.append(f"  step {step:3d}  {count:5d}  {'#' * round(40 * count / total)}")
    if p.halting_open:
        lines.append(f"  later     {p.halting_open:5d}  {'#' * round(40 * p.halting_open / total)}")
    return "\n".join(lines)
