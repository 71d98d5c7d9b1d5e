"""Early exit: a net that stops where its answer stands, against always taking every step.

A small net learns 6x6 Sudoku. Then held-out puzzles are solved under several halting rules and
under the fixed number of steps of published evaluations, in interleaved rounds on one engine, so
that halting is all that differs. The times are wall times of this machine.

The claim showed if one rule solved no fewer puzzles than the fixed steps with every seed, was at
least three times as fast with every seed, and the nets solve most puzzles at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.experiments import settings
from recurx.options import option

if TYPE_CHECKING:
    from recurx.experiments.session import Session

CLAIM = "Halting by q or at a fixed point is 3 times as fast as always 16 steps, and no less exact."
SIZE = (8.0, 3.4)
TARGET, LEARNED = 3.0, 0.5
TASK, STEPS = "sudoku-6x6:clues=12", 16
# Two cycles of four calls: most puzzles take one or two supervision steps. At the published
# exploration of 0.1 few samples go deep, and late steps unlearn.
MODEL = {
    "H_cycles": 2, "L_cycles": 3, "halt_max_steps": STEPS, "halt_exploration_prob": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Options(settings.Options):
    task: str = TASK
    seeds: int = 2
    time_budget: float = 120.0
    count: int = 512
    rounds: int = option(5, "of timing every rule once", least=1)
    steps: int | None = option(None, "of training at most", least=1)


def measure(session: Session, asked: Options) -> dict[str, Any]:
    from recurx.experiments.session import Course
    from recurx.train import preset

    session.total = asked.seeds
    course = Course(seconds=asked.time_budget, steps=asked.steps, eval_every=500)
    nets = [
        session.net(
            "exit", preset(asked.preset, asked.task, seed=seed, model=MODEL), course,
            _measurer(asked),
        )
        for seed in range(asked.seeds)
    ]  # fmt: skip
    rows = _rows(nets)
    return {"rows": rows, "nets": nets, **_verdict(rows)}


def _measurer(asked: Options) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        from dataclasses import asdict

        from recurx.bench.budgets import budget_curve, compare_exits, doubling

        model, examples = trainer.averaged(), trainer.held_out(asked.count)
        given = (model, trainer.task, examples)
        exits = compare_exits(*given, max_steps=STEPS, rounds=asked.rounds, device=trainer.device)
        points = budget_curve(*given, doubling(2 * STEPS), halt=None, device=trainer.device)
        return {"exits": [asdict(e) for e in exits], "points": [asdict(p) for p in points]}

    return measured


def _rows(nets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every rule what it came to with each seed."""
    from recurx.experiments.session import spread

    fields = ("exact", "steps_mean", "seconds", "speedup")
    return [
        {"name": rule["name"]}
        | {field: spread([net["exits"][number][field] for net in nets]) for field in fields}
        for number, rule in enumerate(nets[0]["exits"])
    ]


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    fixed = rows[0]
    equal = [row for row in rows[1:] if _no_less(row["exact"], fixed["exact"])]
    if not equal:
        return {"findings": [f"no rule solved as many as {fixed['name']}"], "holds": False}
    best = max(equal, key=lambda row: row["speedup"]["low"])
    speeds = " and ".join(f"{speed:.1f}" for speed in best["speedup"]["values"])
    finding = (
        f"{best['name']}: {best['exact']['mean']:.1%} exact in {best['steps_mean']['mean']:.1f} "
        f"steps, {speeds} times as fast as {fixed['name']} with {fixed['exact']['mean']:.1%}"
    )
    holds = best["speedup"]["low"] >= TARGET and fixed["exact"]["low"] > LEARNED
    return {"findings": [finding], "holds": holds}


def _no_less(exact: dict[str, Any], fixed: dict[str, Any]) -> bool:
    return all(a >= b for a, b in zip(exact["values"], fixed["values"], strict=True))


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    settings = result["settings"]
    lines = []
    for row in result["rows"]:
        speed = row["speedup"]
        lines.append([
            row["name"],
            f"{100 * row['exact']['mean']:.1f}",
            f"{row['steps_mean']['mean']:.1f}",
            f"{1000 * row['seconds']['mean'] / settings['count']:.2f}",
            f"{speed['mean']:.1f}",
            f"{speed['low']:.1f} to {speed['high']:.1f}",
        ])  # fmt: skip
    title = f"{settings['task']}, {settings['count']} held-out puzzles, {settings['seeds']} seeds"
    columns = ["a puzzle ends at", "exact %", "steps", "ms a puzzle", "times as fast", "by seed"]
    return [(title, columns, lines)]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Left: accuracy after a fixed number of steps, of every net; right: rules against time."""
    from recurx.bench.budgets.shown import draw_exits
    from recurx.bench.drawing import COLOURS, INK

    steps, exits = figure.subplots(1, 2, width_ratios=[1, 1])
    for net, colour in zip(result["nets"], COLOURS, strict=False):
        found = [(p["max_steps"], 100 * p["exact"]) for p in net["points"]]
        steps.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=4,
                   label=f"seed {net['seed']}")  # fmt: skip
    steps.axvline(STEPS, color=INK, linewidth=1, linestyle="--")
    steps.set_xscale("log", base=2)
    steps.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    steps.set_xlabel(f"fixed steps ({STEPS} in training)")
    steps.set_ylabel("held-out exact, %")
    steps.set_ylim(0, 102)
    steps.legend(loc="lower right", fontsize=8)
    means = [
        {key: row[key]["mean"] for key in ("exact", "seconds", "speedup")} | {"name": row["name"]}
        for row in result["rows"]
    ]
    draw_exits(means, exits)
