"""Variants of 2026 against the same net without them: EqR, ConvSwiGLU, and feedback.

Nets of one size train for equal numbers of steps on one task. Each is asked once, from the learned
start, and with several tries at random starts, of which q or the residual of the state picks.

The claim showed if each variant's best way of asking beat the best of its baseline (`BASELINES`)
with every seed, by a mean that exceeds the larger of the two standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.experiments import settings
from recurx.options import option

if TYPE_CHECKING:
    from recurx.experiments.session import Session
    from recurx.train import TrainConfig

CLAIM = (
    "EqR (damping, noise, random starts, choice by residuals), its random starts alone, ConvSwiGLU "
    "(URM), and feedback of the last answer, each solve more than the same net without them after "
    "equally many steps."
)
SIZE = (11.0, 4.2)
PLAIN = "plain"
_EQR = {"damping": 0.95, "noise": 0.01}  # arXiv 2605.21488
_ATTENTION = {"mlp_t": False}
_CONV = {"block": "conv:2"}  # URM's ConvSwiGLU (arXiv 2512.14693), in the dtype of the states
# Name -> (title, fields of the model, fields of the training).
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    PLAIN: ("plain TRM", {}, {}),
    "starts": ("random starts", {}, {"random_starts": True}),
    "eqr": ("EqR", _EQR, {"random_starts": True}),
    "softmax": ("softmax fed back", {"feedback": "softmax"}, {}),
    "argmax": ("argmax fed back", {"feedback": "argmax"}, {}),
    "conv": ("ConvSwiGLU", _CONV, {}),
    "attention": ("attention", _ATTENTION, {}),
    "attention-conv": ("attention, ConvSwiGLU", _ATTENTION | _CONV, {}),
}
# What a variant is compared with, where it is not plain TRM; itself, where it is a baseline.
BASELINES = {"attention": "attention", "attention-conv": "attention"}
# Ways of asking a net: arguments of `recurx.solve`; R stands for the number of tries.
WAYS: dict[str, dict[str, Any]] = {
    "one try": {},
    "tries, q": {"rollouts": "R", "init": "random", "select": "q"},
    "tries, vote": {"rollouts": "R", "init": "random", "select": "vote"},
    "tries, residual": {"rollouts": "R", "init": "random", "select": "residual"},
}


@dataclass(frozen=True)
class Options(settings.TrainedNets):
    seeds: int = 3
    time_budget: float = 300.0  # the number of steps ends a net long before
    variants: tuple[str, ...] = option(tuple(VARIANTS), f"of {', '.join(VARIANTS)}",
                                       choices=tuple(VARIANTS), metavar="NAME")  # fmt: skip
    steps: int = option(600, "of training, the same for every net", least=1)
    supervision: int = option(4, "supervision steps a sample", least=1)
    tries: int = option(4, "tries of a puzzle", least=2)


def net_config(asked: Options, name: str, seed: int) -> TrainConfig:
    """The training run of one variant; nothing else depends on `name`."""
    from recurx.train import preset

    _, model, training = VARIANTS[name]
    sizes = {"H_cycles": 2, "L_cycles": 2, "halt_max_steps": asked.supervision}
    common = {"seed": seed, "batch_size": asked.batch_size, "lr": asked.lr}
    return preset(asked.preset, asked.task, model={**sizes, **model}, **common, **training)


def measure(session: Session, asked: Options) -> dict[str, Any]:
    from recurx.errors import InvalidArgument
    from recurx.experiments.session import Course, spread

    names = list(dict.fromkeys(asked.variants))
    for name in names:
        if (baseline := _baseline(name)) not in names:
            raise InvalidArgument(
                f"--variants: the claim compares {name} with {baseline}, which is missing."
            )
    session.total = len(names) * asked.seeds
    course = Course(
        seconds=asked.time_budget, steps=asked.steps,
        eval_every=max(1, asked.steps // 6), max_steps=asked.supervision,
    )  # fmt: skip
    nets = []
    for seed in range(asked.seeds):  # seeds outside: stopped half-way, variants still compare
        for name in names:
            config = net_config(asked, name, seed)
            nets.append(session.net(name, config, course, _measurer(asked)))
    rows = []
    for name in names:
        own = [net for net in nets if net["label"] == name]
        ways = {way: spread([net["exact"][way] for net in own]) for way in WAYS}
        step_ms = spread([1e3 * net["seconds"] / net["steps"] for net in own])
        sizes = {"parameters": own[0]["parameters"]}
        rows.append({"name": name, **sizes, "ways": ways, "step_ms": step_ms})
    return {"rows": rows, "nets": nets, **_verdict(rows)}


def _measurer(asked: Options) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        from recurx.train import evaluate

        model, examples = trainer.averaged(), trainer.held_out(asked.count)
        found = {}
        for way, said in WAYS.items():
            how = {key: asked.tries if value == "R" else value for key, value in said.items()}
            report = evaluate(
                model, trainer.task, examples, device=trainer.device, halt=None,
                max_steps=asked.supervision, **how,
            )  # fmt: skip
            found[way] = report.exact
        return {"exact": found}

    return measured


def _best(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return max(row["ways"].items(), key=lambda item: item[1]["mean"])


def _baseline(name: str) -> str:
    return BASELINES.get(name, PLAIN)


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    best, findings, holds = {row["name"]: _best(row) for row in rows}, [], True
    for name, (way, exact) in best.items():
        if _baseline(name) == name:
            said = f"{exact['mean']:.1%} exact by {way}, its best way"
            findings.append(f"{VARIANTS[name][0]}: {said}")
            continue
        plain = best[_baseline(name)][1]
        gains = [a - b for a, b in zip(exact["values"], plain["values"], strict=True)]
        noise = max(exact["deviation"] or 0.0, plain["deviation"] or 0.0)
        gain = exact["mean"] - plain["mean"]
        showed = all(g > 0 for g in gains) and gain > noise
        holds = holds and showed
        findings.append(
            f"{VARIANTS[name][0]}: {exact['mean']:.1%} by {way}, {100 * gain:+.1f} points, "
            f"more with {sum(g > 0 for g in gains)} of {len(gains)} seeds (standard deviation up "
            f"to {100 * noise:.1f} points): {'yes' if showed else 'no'}"
        )
    return {"findings": findings, "holds": holds}


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    settings = result["settings"]
    lines = []
    for row in result["rows"]:
        cells = [
            f"{100 * way['mean']:.1f} ± {100 * (way['deviation'] or 0):.1f}"
            for way in row["ways"].values()
        ]
        size = f"{row['parameters']:,}" if "parameters" in row else "–"  # not in older results
        lines.append([VARIANTS[row["name"]][0], size, *cells, f"{row['step_ms']['mean']:.1f}"])
    title = f"{settings['task']}, {settings['preset']}, {settings['steps']} steps, "
    title += f"{settings['seeds']} seeds, {settings['tries']} tries; exact %"
    return [(title, ["variant", "parameters", *WAYS, "ms a step"], lines)]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Left: accuracy against training steps, the mean of the seeds; right: by way of asking."""
    from recurx.bench.drawing import COLOURS

    learning, ways = figure.subplots(1, 2, width_ratios=[1, 1])
    width = 0.8 / len(result["rows"])
    for number, row in enumerate(result["rows"]):
        colour, again = COLOURS[number % len(COLOURS)], number >= len(COLOURS)
        curves = [net["learning"] for net in result["nets"] if net["label"] == row["name"]]
        length = min(map(len, curves))
        means = [100 * sum(c[i]["exact"] for c in curves) / len(curves) for i in range(length)]
        steps = [point["step"] for point in curves[0][:length]]
        label, dashes = VARIANTS[row["name"]][0], "--" if again else "-"
        learning.plot(steps, means, color=colour, lw=2, ls=dashes, label=label)
        places = [place + number * width for place in range(len(WAYS))]
        heights = [100 * way["mean"] for way in row["ways"].values()]
        ways.bar(places, heights, width, color=colour, alpha=0.6 if again else 1.0)
    ways.set_xticks([place + 0.4 for place in range(len(WAYS))], list(WAYS), fontsize=8)
    learning.set_xlabel("training steps")
    learning.set_ylabel("held-out exact, %")
    learning.legend(fontsize=8)
