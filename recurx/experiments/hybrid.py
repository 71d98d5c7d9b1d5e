"""Language in front: a frozen encoder reads, a tiny net looks once or many times, and answers.

Shuffled English sentences, each about two neighbours of a chain ("Tom is older than Mia."), and the
question "Order them by age." A small frozen text encoder (all-MiniLM-L6-v2) reads every sentence by
itself; its token embeddings are the input of a tiny net, which has to join the sentences. Two kinds
of nets, with the same parameters, learn this for equal times from chains of 2 to N people:

- recursive: deep supervision over several steps, as TRM trains;
- one look: the very same net, called once, `z_H <- L(z_H + (z_L + x))`.

The claim showed if, averaged over seeds, the recursive net orders more than 90 % of held-out texts
about N people exactly at its last trained step, and the net that looks once less than 20 %. Held
out are sets of people.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from recurx.cli import options

if TYPE_CHECKING:
    from recurx.experiments.session import Session
    from recurx.hybrid import PassageBank
    from recurx.train import TrainConfig, Trainer

CLAIM = "Behind a frozen encoder, one look cannot order a chain of people; looking on, it can."
SEEDS, SECONDS = 1, 400.0
SIZE = (8.0, 3.4)
RECURSIVE, ONE_LOOK = "recursive", "one look"
ORDERED, FAILED = 0.90, 0.20  # exact accuracies: what counts as ordering, and as not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--people", type=options.positive, default=8, metavar="N",
                        help="in the longest chain (default 8)")  # fmt: skip
    parser.add_argument("--names", type=options.positive, default=16, help="that there are "
                        "(default 16)")  # fmt: skip
    parser.add_argument("--wordings", type=options.positive, default=2, help="of a sentence: "
                        "1, 2, or with the younger one first too 3, 4 (default 2)")  # fmt: skip
    parser.add_argument("--width", type=options.positive, default=64, help="of the net "
                        "(default 64)")  # fmt: skip
    parser.add_argument("--supervision", type=options.positive, default=8, metavar="N",
                        help="supervision steps that the recursive net is trained with (default 8)",
                        )  # fmt: skip
    parser.add_argument("--test-steps", type=options.positive, default=16, metavar="M",
                        help="supervision steps that it is tested with (default 16)")  # fmt: skip
    parser.add_argument("--batch-size", type=options.positive, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=options.positive, default=500, metavar="N",
                        help="held-out texts of the final accuracy (default 500)")  # fmt: skip


def task_name(arguments: argparse.Namespace) -> str:
    return (
        f"order:people={arguments.people},names={arguments.names},"
        f"wordings={arguments.wordings},fewest=2"
    )


def net_config(arguments: argparse.Namespace, kind: str, seed: int) -> TrainConfig:
    """The training run of one kind of net; nothing but the number of steps depends on `kind`.

    The recursive net draws a minimum of steps for every sample (exploration 1): else short chains,
    which are right early, leave, and the steps after that are never trained.
    """
    from recurx.train import preset

    model: dict[str, Any] = {
        "hidden_size": arguments.width, "H_cycles": 1, "L_cycles": 2, "halt_exploration_prob": 1.0,
        "halt_max_steps": arguments.supervision if kind == RECURSIVE else 1,
    }  # fmt: skip
    return preset(
        "tiny-att", task_name(arguments), seed=seed, batch_size=arguments.batch_size,
        lr=arguments.lr, loss="softmax_cross_entropy", model=model,
    )  # fmt: skip


def look_once(trainer: Trainer) -> None:
    """Make a supervision step of the trainer's net one net call; parameters and states stay."""
    from recurx.schedule import Schedule, Step

    once = Step("L", "z_H", ("z_H",), ("z_L", "x"))
    trainer.model.inner.schedule = Schedule((once,), name="one look")


def measure(
    session: Session, arguments: argparse.Namespace, bank: PassageBank | None = None
) -> dict[str, Any]:
    """`bank`: of another encoder than the packaged one."""
    import functools

    from recurx.experiments.session import Plan
    from recurx.hybrid import HybridTrainer, task_bank

    kinds = (RECURSIVE, ONE_LOOK)
    session.total = len(kinds) * arguments.seeds
    started = session.clock()
    bank = task_bank(task_name(arguments), bank)
    reading = session.clock() - started
    nets = []
    for seed in range(arguments.seeds):
        for kind in kinds:
            steps = arguments.supervision if kind == RECURSIVE else 1
            plan = Plan(seconds=arguments.time_budget, eval_every=300, max_steps=steps)
            net = session.net(
                kind, net_config(arguments, kind, seed), plan, _measurer(arguments, kind),
                prepare=None if kind == RECURSIVE else look_once,
                make=functools.partial(HybridTrainer, bank=bank),
            )  # fmt: skip
            nets.append(net)
    rows = [_summary(kind, [net for net in nets if net["label"] == kind]) for kind in kinds]
    encoder = {"passages": len(bank) - 1, "width": bank.width, "seconds": reading}
    return {"rows": rows, "nets": nets, "encoder": encoder, **_verdict(rows)}


def _measurer(arguments: argparse.Namespace, kind: str) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        """Exact accuracy after every step, for every number of people."""
        import numpy as np

        from recurx.experiments.session import Plan, look
        from recurx.tasks import Sampler

        plan = Plan(max_steps=arguments.test_steps if kind == RECURSIVE else 1)
        longest = trainer.held_out(arguments.count)
        # Every length is as frequent as any other; few short texts are distinct.
        mixed = Sampler(trainer.task, trainer.config.seed, "held-out").draw(arguments.count)
        people = (mixed.answers > 0).sum(axis=1)
        curves = {
            str(n): list(look(trainer, plan, mixed.take(people == n)).curve)
            for n in np.unique(people).tolist()
        }
        curves[str(arguments.people)] = curve = list(look(trainer, plan, longest).curve)
        return {
            "curve": curve,
            "by_people": curves,
            "calls": len(trainer.model.inner.schedule),
            "tokens": trainer.model.config.tokens,
            "trained_steps": trainer.model.config.halt_max_steps,
        }

    return measured


def _summary(kind: str, nets: list[dict[str, Any]]) -> dict[str, Any]:
    from recurx.experiments.session import spread

    first = nets[0]
    same = ("parameters", "calls", "tokens", "trained_steps")
    last = first["trained_steps"] - 1
    return {
        "kind": kind,
        **{key: first[key] for key in same},
        "training_steps": spread([net["steps"] for net in nets]),
        "seconds": spread([net["seconds"] for net in nets]),
        "exact": spread([net["curve"][last] for net in nets]),
        "by_people": {
            n: sum(net["by_people"][n][last] for net in nets) / len(nets)
            for n in first["by_people"]
        },
        "curve": [
            sum(net["curve"][i] for net in nets) / len(nets) for i in range(len(first["curve"]))
        ],
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    recursive, once = rows
    curve, trained = recursive["curve"], recursive["trained_steps"]
    most, least = (row["exact"]["mean"] for row in (recursive, once))
    longest_of_one = max(
        (int(n) for n, exact in once["by_people"].items() if exact > ORDERED), default=1
    )
    findings = [
        f"exact: recursive {most:.1%}, one look of the same net {least:.1%}",
        f"the recursive net after step 1: {curve[0]:.1%}, after step {trained}, its last in "
        f"training: {curve[trained - 1]:.1%}, after {len(curve)}: {curve[-1]:.1%}",
        f"chains that one look orders ({ORDERED:.0%} exact): up to {longest_of_one} people"
        if longest_of_one > 1
        else f"one look orders no length of chain ({ORDERED:.0%} exact)",
    ]
    return {"findings": findings, "holds": most > ORDERED and least < FAILED}


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    settings, encoder = result["settings"], result["encoder"]
    lines = []
    for row in result["rows"]:
        exact, steps = row["exact"], row["trained_steps"]
        deviation = "" if exact["deviation"] is None else f" ± {100 * exact['deviation']:.1f}"
        lines.append([
            row["kind"],
            f"{row['parameters']:,}",
            f"{steps} x {row['calls']}",
            f"{row['training_steps']['mean']:,.0f}",
            f"{row['seconds']['mean']:.0f}",
            f"{100 * exact['mean']:.1f}{deviation}",
        ])  # fmt: skip
    title = f"ordering {settings['people']} people from English, {settings['seeds']} seeds"
    columns = ["net", "parameters", "steps x calls", "trained steps", "s", "exact %"]
    lengths = list(result["rows"][0]["by_people"])
    by_people = [
        [row["kind"], *(f"{100 * row['by_people'][n]:.0f}" for n in lengths)]
        for row in result["rows"]
    ]
    read = f"exact % by number of people (the encoder read {encoder['passages']} passages in "
    read += f"{encoder['seconds']:.0f} s, once)"
    curve = [
        [str(i), f"{100 * exact:.1f}", "" if i <= settings["supervision"] else "more than trained"]
        for i, exact in enumerate(result["rows"][0]["curve"], start=1)
    ]
    return [
        (title, columns, lines),
        (read, ["net", *lengths], by_people),
        ("recursive, by steps", ["after step", "exact %", ""], curve),
    ]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Left: accuracy against supervision steps, a line a length; right: against training time."""
    from recurx.plotting import COLOURS, INK

    by_steps, learning = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    recursive, once = result["rows"]
    first = next(net for net in result["nets"] if net["label"] == RECURSIVE)
    longest = str(result["settings"]["people"])
    shown = [n for n in first["by_people"] if int(n) % 2 == 0 or n == longest]
    for n in shown:
        curve = recursive["curve"] if n == longest else first["by_people"][n]
        strong = n == longest
        by_steps.plot(
            range(1, len(curve) + 1), [100 * e for e in curve], "o-", ms=3, color=COLOURS[0],
            lw=2 if strong else 1, alpha=1 if strong else 0.3 + 0.5 * int(n) / int(longest),
        )  # fmt: skip
        by_steps.annotate(n, (1, 100 * curve[0]), (-9, -3), textcoords="offset points", fontsize=7)
    by_steps.plot([], [], "o-", ms=3, color=COLOURS[0], label="recursive, by number of people")
    by_steps.axhline(
        100 * once["exact"]["mean"], color=COLOURS[1], label=f"one look, {longest} people"
    )
    trained = recursive["trained_steps"]
    by_steps.axvline(trained, color=INK, lw=0.8, ls=":")
    by_steps.annotate(f"trained with {trained}", (trained, 0), (4, 4), textcoords="offset points")
    for net in result["nets"]:
        times = [point["seconds"] for point in net["learning"]]
        colour = COLOURS[0] if net["label"] == RECURSIVE else COLOURS[1]
        learning.plot(times, [100 * p["exact"] for p in net["learning"]], color=colour, lw=1)
    by_steps.set_xlabel("supervision steps at test time")
    by_steps.set_ylabel("held-out texts ordered exactly, %")
    by_steps.set_ylim(-3, 103)
    by_steps.legend(fontsize=8, loc="center right")
    learning.set_xlabel("training time, s")
