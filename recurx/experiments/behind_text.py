"""Language in front: one look against many (see `recurx.experiments.looks`), behind a text encoder.

A small frozen text encoder (all-MiniLM-L6-v2) reads every English sentence of a text by itself; its
token embeddings are the input of a tiny net, which has to put the sentences together. All kinds of
nets read the same embeddings, and their numbers of parameters leave the encoder out.

Tasks: `trades`, who has the ball after each of some trades; `order`, a chain of people
by age from shuffled sentences (`--task order:people=6,names=16,wordings=2,fewest=2 --calls 3`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.experiments import one_look

if TYPE_CHECKING:
    from recurx.experiments.hybrid import PassageBank
    from recurx.experiments.session import Session
    from recurx.train import Trainer

CLAIM = "Behind a frozen text encoder, one look cannot follow trades; looking on, it can."
SIZE = one_look.SIZE


@dataclass(frozen=True)
class Options(one_look.Options):
    task: str = "trades:trades=6,people=4,wordings=2"
    time_budget: float = 100.0
    supervision: int = 6
    test_steps: int = 12
    lr: float = 1.5e-3


def measure(session: Session, asked: Options, bank: PassageBank | None = None) -> dict[str, Any]:
    """`bank`: of another encoder than the packaged one, see `recurx.hybrid.task_bank`."""
    from recurx.experiments.hybrid import HybridTrainer, task_bank

    started = session.clock()
    bank = task_bank(asked.task, bank)
    encoder = {"passages": len(bank) - 1, "width": bank.width, "seconds": session.clock() - started}
    make = functools.partial(HybridTrainer, bank=bank)
    result = one_look.measure(
        session, asked, make=make, also=functools.partial(by_length, asked.count)
    )
    return {"encoder": encoder, **result}


def by_length(count: int, trainer: Trainer, steps: int) -> dict[str, Any]:
    """Exact accuracy after each of `steps`, for each number of answers, of held-out texts as they
    come in training."""
    import numpy as np

    from recurx.experiments.session import Course, look
    from recurx.experiments.tasks.english import EnglishTask
    from recurx.tasks import Sampler

    assert isinstance(trainer.task, EnglishTask)  # by task_bank
    mixed = Sampler(trainer.task, trainer.config.seed, "held-out").draw(count)
    lengths = trainer.task.lengths(mixed)
    curves = {
        str(n): list(look(trainer, Course(max_steps=steps), mixed.take(lengths == n)).curve)
        for n in np.unique(lengths).tolist()
    }
    return {"by_length": curves}


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    encoder = result["encoder"]
    title = f"exact % by number of answers (the encoder read {encoder['passages']} passages in "
    title += f"{encoder['seconds']:.0f} s, once)"
    lengths = list(result["nets"][0]["by_length"])
    lines = []
    for row in result["rows"]:
        curves = _mean_curves(result, row["kind"])
        last = row["trained_steps"] - 1
        lines.append([row["kind"], *(f"{100 * curves[n][last]:.0f}" for n in lengths)])
    return [*one_look.tables(result), (title, ["net", *lengths], lines)]


def draw(result: dict[str, Any], figure: Any) -> None:
    """As `one_look.draw`, with faint lines for texts that ask for fewer answers than the test."""
    from recurx.bench.drawing import COLOURS

    one_look.draw(result, figure)
    by_steps = figure.axes[0]
    curves = _mean_curves(result, one_look.RECURSIVE)
    longest = max(curves, key=int)
    for n, curve in curves.items():
        if n != longest:
            steps = range(1, len(curve) + 1)
            by_steps.plot(steps, [100 * e for e in curve], color=COLOURS[0], lw=1, alpha=0.35)
            by_steps.annotate(n, (1, 100 * curve[0]), (-9, -3), textcoords="offset points")


def _mean_curves(result: dict[str, Any], kind: str) -> dict[str, list[float]]:
    """{number of answers: exact accuracy after each step}, over the seeds."""
    nets = [net["by_length"] for net in result["nets"] if net["label"] == kind]
    return {
        n: [sum(values) / len(nets) for values in zip(*(net[n] for net in nets), strict=True)]
        for n in nets[0]
    }
