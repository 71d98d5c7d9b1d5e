"""One look against many: nets of equal size that learn a task for equal times.

- recursive: a supervision step is a call of the net, `z <- L(z + x)`, or a few with gradient
  through all of them, and training goes on for several steps, without gradient from one to the
  next;
- one look: the very same net and parameters, trained and tested with one step;
- deep: one look of a net that spends these parameters on several narrower layers, each with
  weights of its own, instead of calling one layer again and again.

The claim showed if, averaged over seeds, the recursive net solves more than 95 % of held-out
examples exactly at the last step of its training, and the same net with one look less than 20 %.
The deep net is told beside them: it has depth, which is what one look lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.cli import options
from recurx.experiments import settings
from recurx.options import option

if TYPE_CHECKING:
    from recurx.experiments.session import Session
    from recurx.train import TrainConfig, Trainer

SIZE = (8.0, 4.0)
RECURSIVE, ONE_LOOK, DEEP = "recursive", "one look", "deep"
SOLVED, FAILED = 0.95, 0.20  # exact accuracies: what counts as solving a task, and as not


@dataclass(frozen=True)
class Options(settings.TrainedNets):
    preset: str = "tiny-att"
    supervision: int = option(4, "supervision steps of the recursive net in training", least=1)
    calls: int = option(1, "calls a supervision step of it, with gradient through all", least=1)
    test_steps: int = option(8, "supervision steps that it is tested with", least=1)
    set: tuple[tuple[str, Any], ...] = options.settings("a field of the model, not the preset's")
    halt_weight: float = option(0.5, "of the halting loss", metavar="WEIGHT")
    layers: int = option(4, "of the deep net", least=1)


def net_config(
    asked: Options,
    kind: str,
    seed: int,
    make: Callable[..., Trainer] | None = None,
) -> TrainConfig:
    """The training run of one kind of net.

    The recursive net draws a minimum of steps for every sample (exploration 1): else samples that
    are solved early leave, and the steps after that are never trained.
    """
    from recurx import tasks
    from recurx.errors import bad_argument
    from recurx.train import preset

    steps = asked.supervision if kind == RECURSIVE else 1
    model: dict[str, Any] = {
        "variant": "single_z", "H_cycles": 1, "L_cycles": 1, "halt_max_steps": steps,
        "halt_exploration_prob": 1.0, **dict(asked.set),
    }  # fmt: skip

    def config(**changes: Any) -> TrainConfig:
        return preset(
            asked.preset, asked.task, seed=seed, batch_size=asked.batch_size,
            lr=asked.lr, loss="softmax_cross_entropy", halt_weight=asked.halt_weight,
            model={**model, **changes},
        )  # fmt: skip

    if kind != DEEP:
        return config()
    limit, full = parameters(config(), make), config().model_config(tasks.get(asked.task))
    # An even width of the heads, which rotary tables need, sets the steps of the width.
    for narrower in range(full.hidden_size, 0, -2 * full.num_heads):
        one, two = (parameters(config(L_layers=n, hidden_size=narrower), make) for n in (1, 2))
        if one + (asked.layers - 1) * (two - one) <= limit:
            return config(L_layers=asked.layers, hidden_size=narrower)
    raise bad_argument(
        "experiment", "--layers", f"so few that they fit {limit:,} parameters", asked.layers
    )


def parameters(config: TrainConfig, make: Callable[..., Trainer] | None = None) -> int:
    """Number of parameters of the net that a run trains."""
    from recurx.train import Trainer

    return sum(p.numel() for p in (make or Trainer)(config).model.parameters())


def calls_a_step(calls: int) -> Callable[[Trainer], None]:
    """What makes a supervision step of a trainer's net so many calls `z <- L(z + x)`, with gradient
    through all of them.

    The published schedules end with a call that does not read x, and the shortest has two calls;
    parameters and initial states stay.
    """

    def prepare(trainer: Trainer) -> None:
        from recurx.schedule import INPUT, Schedule, Step

        call = Step("L", "z", ("z",), (INPUT,))
        trainer.model.inner.schedule = Schedule((call,) * calls, name=prepare.__name__)

    prepare.__name__ = f"{calls} calls a step"  # the session tells nets apart by it
    return prepare


def measure(
    session: Session,
    asked: Options,
    *,
    make: Callable[..., Trainer] | None = None,
    also: Callable[[Trainer, int], dict[str, Any]] = lambda trainer, steps: {},
) -> dict[str, Any]:
    """Train and test all kinds of nets.

    Args:
        make: as for `Session.net`.
        also: measures more of a trained net that is tested with so many steps.
    """
    from recurx.experiments.session import Course

    kinds = (RECURSIVE, ONE_LOOK, DEEP)
    session.total = len(kinds) * asked.seeds
    nets = []
    for seed in range(asked.seeds):
        for kind in kinds:
            steps = asked.supervision if kind == RECURSIVE else 1
            course = Course(seconds=asked.time_budget, eval_every=250, max_steps=steps)
            net = session.net(
                kind, net_config(asked, kind, seed, make), course,
                _measurer(asked, kind, also), make=make,
                prepare=calls_a_step(asked.calls if kind == RECURSIVE else 1),
            )  # fmt: skip
            nets.append(net)
    rows = [_summary(kind, [net for net in nets if net["label"] == kind]) for kind in kinds]
    return {"rows": rows, "nets": nets, **_verdict(rows)}


def _measurer(asked: Options, kind: str, also: Callable[[Trainer, int], dict[str, Any]]) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        from recurx.experiments.session import Course, look

        steps = max(asked.test_steps, asked.supervision) if kind == RECURSIVE else 1
        report = look(trainer, Course(max_steps=steps), trainer.held_out(asked.count))
        config = trainer.model.config
        return {
            "curve": list(report.curve),
            "calls": len(trainer.model.inner.schedule),
            "layers": config.L_layers,
            "width": config.hidden_size,
            "trained_steps": config.halt_max_steps,
            **also(trainer, steps),
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


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_kind = {row["kind"]: row for row in rows}
    recursive, deep = by_kind[RECURSIVE], by_kind[DEEP]
    curve, trained = recursive["curve"], recursive["trained_steps"]
    exact = {kind: row["exact"]["mean"] for kind, row in by_kind.items()}
    best = max(range(len(curve)), key=lambda i: (curve[i], -i))
    findings = [
        f"exact: recursive {exact[RECURSIVE]:.1%} in {trained} steps; the same net trained to look "
        f"once {exact[ONE_LOOK]:.1%}; one look of {deep['layers']} narrower layers "
        f"{exact[DEEP]:.1%}",
        f"trained with {trained}, tested with fewer and more: {curve[0]:.1%} after 1, best "
        f"{curve[best]:.1%} after {best + 1}, {curve[-1]:.1%} after {len(curve)}",
    ]
    return {"findings": findings, "holds": exact[RECURSIVE] > SOLVED and exact[ONE_LOOK] < FAILED}


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
            str(steps) if row["calls"] == 1 else f"{steps} x {row['calls']}",
            f"{row['training_steps']['mean']:,.0f}",
            f"{row['seconds']['mean']:.0f}",
            f"{100 * exact['mean']:.1f}{deviation}",
        ])  # fmt: skip
    title = f"{settings['task']}, {settings['preset']}, {settings['seeds']} seeds"
    columns = ["net", "parameters", "layers x width", "looks", "training steps", "s", "exact %"]
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
    from recurx.bench.drawing import COLOURS, INK

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
                f"trained with {trained}", (trained, 65), (4, 4), textcoords="offset points"
            )
        else:
            by_steps.axhline(100 * row["exact"]["mean"], color=colour, label=_legend(row))
        for net in nets:
            times = [point["seconds"] for point in net["learning"]]
            learning.plot(times, [100 * p["exact"] for p in net["learning"]], color=colour, lw=1)
    by_steps.set_xlabel("supervision steps at test time")
    by_steps.set_ylabel("held-out exact, %")
    by_steps.set_ylim(-3, 103)
    # Above the axes: the curve rises to the right for one task, to the left for another.
    by_steps.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    learning.set_xlabel("training time, s")


def _legend(row: dict[str, Any]) -> str:
    if row["kind"] == ONE_LOOK:
        return "the same net, trained to look once"
    return f"one look, {row['layers']} layers, no more parameters"
