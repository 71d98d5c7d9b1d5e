"""Sorting: the same net, looking once or many times.

Three kinds of nets of equal size learn to sort for equal times:

- recursive: deep supervision over several steps, as TRM trains;
- one call: the very same net and parameters, called once on the input;
- deep: one look of a net that spends these parameters on several narrower layers, each with
  weights of its own, instead of calling one layer again and again.

The claim showed if, averaged over seeds, the recursive net sorts more than 95 % of held-out
sequences exactly at its last trained step, and neither net that looks once sorts 20 %.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from recurx.cli import options

if TYPE_CHECKING:
    from recurx.experiments.session import Session
    from recurx.train import TrainConfig, Trainer

CLAIM = "A net that looks once cannot sort a long sequence; called again and again, it can."
SEEDS, SECONDS = 1, 180.0
SIZE = (8.0, 3.4)
RECURSIVE, ONE_CALL, DEEP = "recursive", "one call", "deep"
SORTED, FAILED = 0.95, 0.20  # exact accuracies: what counts as sorting, and as not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=options.positive, default=16, help="default 16")
    parser.add_argument("--values", type=options.positive, default=16, help="values are 0..N-1 "
                        "(default 16)")  # fmt: skip
    parser.add_argument("--preset", default="tiny-att", help="default tiny-att")
    parser.add_argument("--supervision", type=options.positive, default=4, metavar="N",
                        help="supervision steps that the recursive net is trained with (default 4)",
                        )  # fmt: skip
    parser.add_argument("--test-steps", type=options.positive, default=16, metavar="M",
                        help="supervision steps that it is tested with (default 16)")  # fmt: skip
    parser.add_argument("--layers", type=options.positive, default=4, metavar="N",
                        help="of the deep net (default 4)")  # fmt: skip
    parser.add_argument("--batch-size", type=options.positive, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=options.positive, default=1000, metavar="N",
                        help="held-out sequences of the final accuracy (default 1000)")  # fmt: skip


def net_config(arguments: argparse.Namespace, kind: str, seed: int) -> TrainConfig:
    """The training run of one kind of net.

    The recursive net draws a minimum of steps for every sample (exploration 1): else samples that
    are sorted early leave, and the steps after that are never trained.
    """
    from recurx.train import preset

    steps = arguments.supervision if kind == RECURSIVE else 1
    model: dict[str, Any] = {
        "H_cycles": 1, "L_cycles": 1, "halt_max_steps": steps, "halt_exploration_prob": 1.0,
    }  # fmt: skip

    def config(**changes: Any) -> TrainConfig:
        return preset(
            arguments.preset, f"sort:length={arguments.length},values={arguments.values}",
            seed=seed, batch_size=arguments.batch_size, lr=arguments.lr,
            loss="softmax_cross_entropy", model={**model, **changes},
        )  # fmt: skip

    if kind != DEEP:
        return config()
    limit = parameters(config())
    heads = config().model_config().num_heads
    width = config().model_config().hidden_size
    # Heads of an even width (for rotary tables) bound the steps in which the width can shrink.
    for narrower in range(width, 0, -2 * heads):
        candidate = config(L_layers=arguments.layers, hidden_size=narrower)
        if parameters(candidate) <= limit:
            return candidate
    from recurx.errors import bad_argument

    raise bad_argument(
        "experiment sort", "--layers", f"so few that they fit {limit:,} parameters",
        arguments.layers,
    )  # fmt: skip


def parameters(config: TrainConfig) -> int:
    """Number of parameters of the net that a run trains."""
    from recurx.models import TRM

    return sum(p.numel() for p in TRM(config.model_config()).parameters())


def look_once(trainer: Trainer) -> None:
    """Make a supervision step of the trainer's net one net call, `z_H <- L(z_H + (z_L + x))`.

    The published schedules have two calls at least; parameters and initial states stay.
    """
    from recurx.schedule import Schedule, Step

    once = Step("L", "z_H", ("z_H",), ("z_L", "x"))
    trainer.model.inner.schedule = Schedule((once,), name="one call")


def measure(session: Session, arguments: argparse.Namespace) -> dict[str, Any]:
    from recurx.experiments.session import Plan

    kinds = (RECURSIVE, ONE_CALL, DEEP)
    session.total = len(kinds) * arguments.seeds
    nets = []
    for seed in range(arguments.seeds):
        for kind in kinds:
            steps = arguments.supervision if kind == RECURSIVE else 1
            plan = Plan(seconds=arguments.time_budget, eval_every=250, max_steps=steps)
            net = session.net(
                kind, net_config(arguments, kind, seed), plan, _measurer(arguments, kind),
                prepare=None if kind == RECURSIVE else look_once,
            )  # fmt: skip
            nets.append(net)
    rows = [_summary(kind, [net for net in nets if net["label"] == kind]) for kind in kinds]
    return {"rows": rows, "nets": nets, **_verdict(rows, arguments)}


def _measurer(arguments: argparse.Namespace, kind: str) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        from recurx.experiments.session import Plan, look

        steps = arguments.test_steps if kind == RECURSIVE else 1
        report = look(trainer, Plan(max_steps=steps), trainer.held_out(arguments.count))
        config = trainer.model.config
        return {
            "curve": list(report.curve),
            "calls": len(trainer.model.inner.schedule),
            "layers": config.L_layers,
            "width": config.hidden_size,
            "trained_steps": config.halt_max_steps,
        }

    return measured


def _summary(kind: str, nets: list[dict[str, Any]]) -> dict[str, Any]:
    from recurx.experiments.session import spread

    first = nets[0]
    same = ("parameters", "calls", "layers", "width", "trained_steps")
    return {
        "kind": kind,
        **{key: first[key] for key in same},
        "training_steps": spread([net["steps"] for net in nets]),
        "seconds": spread([net["seconds"] for net in nets]),
        "exact": spread([net["curve"][net["trained_steps"] - 1] for net in nets]),
        "curve": [
            sum(net["curve"][i] for net in nets) / len(nets) for i in range(len(first["curve"]))
        ],
    }


def _verdict(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    by_kind = {row["kind"]: row for row in rows}
    recursive = by_kind[RECURSIVE]
    curve, trained = recursive["curve"], recursive["trained_steps"]
    exact = {kind: row["exact"]["mean"] for kind, row in by_kind.items()}
    best = max(range(len(curve)), key=lambda i: (curve[i], -i))
    findings = [
        f"exact: recursive {exact[RECURSIVE]:.1%}, one call of the same net "
        f"{exact[ONE_CALL]:.1%}, {by_kind[DEEP]['layers']} layers of the same parameters "
        f"{exact[DEEP]:.1%}",
        f"the recursive net after step 1: {curve[0]:.1%}, after step {trained}, its last in "
        f"training: {curve[trained - 1]:.1%}",
        f"tested with {len(curve)} steps: {curve[-1]:.1%}; best after {best + 1}: "
        f"{curve[best]:.1%}",
    ]
    holds = exact[RECURSIVE] > SORTED and max(exact[ONE_CALL], exact[DEEP]) < FAILED
    return {"findings": findings, "holds": holds}


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    settings = result["settings"]
    lines = []
    for row in result["rows"]:
        exact, steps = row["exact"], row["trained_steps"]
        deviation = "" if exact["deviation"] is None else f" ± {100 * exact['deviation']:.1f}"
        lines.append([
            row["kind"],
            f"{row['parameters']:,}",
            f"{row['layers']} x {row['width']}",
            f"{steps} x {row['calls']}",
            f"{row['training_steps']['mean']:,.0f}",
            f"{row['seconds']['mean']:.0f}",
            f"{100 * exact['mean']:.1f}{deviation}",
        ])  # fmt: skip
    title = f"sorting {settings['length']} values of 0..{settings['values'] - 1}, "
    title += f"{settings['seeds']} seeds"
    columns = ["net", "parameters", "layers x width", "steps x calls", "trained steps", "s",
               "exact %"]  # fmt: skip
    curve = [
        [str(i), f"{100 * exact:.1f}", "" if i <= settings["supervision"] else "more than trained"]
        for i, exact in enumerate(result["rows"][0]["curve"], start=1)
    ]
    return [
        (title, columns, lines),
        ("recursive, by steps", ["after step", "exact %", ""], curve),
    ]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Left: accuracy against supervision steps; right: against training time."""
    from recurx.plotting import COLOURS, INK

    by_steps, learning = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    for row, colour in zip(result["rows"], COLOURS, strict=False):
        nets = [net for net in result["nets"] if net["label"] == row["kind"]]
        if row["kind"] == RECURSIVE:
            for net in nets:
                steps = range(1, len(net["curve"]) + 1)
                by_steps.plot(steps, [100 * e for e in net["curve"]], color=colour, lw=0.6)
            steps = range(1, len(row["curve"]) + 1)
            means = [100 * e for e in row["curve"]]
            by_steps.plot(steps, means, "o-", ms=3, color=colour, label="recursive")
            trained = row["trained_steps"]
            by_steps.axvline(trained, color=INK, lw=0.8, ls=":")
            by_steps.annotate(
                f"trained with {trained}", (trained, 0), (4, 4), textcoords="offset points"
            )
        else:
            by_steps.axhline(100 * row["exact"]["mean"], color=colour, label=_legend(row))
        for net in nets:
            times = [point["seconds"] for point in net["learning"]]
            learning.plot(times, [100 * p["exact"] for p in net["learning"]], color=colour, lw=1)
    by_steps.set_xlabel("supervision steps at test time")
    by_steps.set_ylabel("held-out sequences sorted exactly, %")
    by_steps.set_ylim(-3, 103)
    by_steps.legend(fontsize=8, loc="center right")
    learning.set_xlabel("training time, s")


def _legend(row: dict[str, Any]) -> str:
    if row["kind"] == ONE_CALL:
        return "one call of the same net"
    return f"one look, {row['layers']} layers, no more parameters"
