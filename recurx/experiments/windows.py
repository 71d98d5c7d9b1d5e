"""Gradient windows: the same net and the same forward, with gradient through fewer or more calls.

HRM back-propagates through the last call of each of its two nets (its 1-step gradient), TRM through
the whole last cycle; the calls before the window run without gradient. Nets of equal size train for
equal numbers of steps, so that memory and time are results and not settings.

The claim showed if the last cycle beat the 1-step gradient with every seed, by a mean that exceeds
the larger of the two standard deviations.
"""

from __future__ import annotations

import argparse
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.experiments import settings
from recurx.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from recurx.experiments.session import Session
    from recurx.models import ModelConfig
    from recurx.train import TrainConfig

CLAIM = "A gradient through the whole last cycle (TRM) teaches more than HRM's 1-step gradient."
SIZE = (8.0, 3.4)
ONE_STEP, CYCLE = "1-step", "cycle"
# What windows are called on the command line; a number is that of the calls.
NAMES = {
    ONE_STEP: "HRM's 1-step gradient",
    CYCLE: "TRM's last cycle",
    "full": "full BPTT",
}


def window(text: str) -> str:
    """1-step, cycle, full, or a number of calls."""
    if text not in NAMES and not (text.isdecimal() and int(text) > 0):
        known = ", ".join(NAMES)
        raise argparse.ArgumentTypeError(f"expected {known} or a number of calls, got {text!r}")
    return text


@dataclass(frozen=True)
class Options(settings.TrainedNets):
    seeds: int = 3
    time_budget: float = 300.0  # the number of steps ends a net long before
    windows: tuple[str, ...] = option(("1", ONE_STEP, CYCLE, "full"), "1-step, cycle, full, or a "
                                      "number of calls", type=window, metavar="WINDOW")  # fmt: skip
    steps: int = option(500, "of training, the same for every net", least=1)
    h_cycles: int = option(2, "cycles a supervision step", least=1)
    l_cycles: int = option(4, "low calls a cycle", least=1)
    # With more, the refinement between supervision steps makes up for a short window.
    supervision: int = option(2, "supervision steps a sample", least=1)


def title(row: dict[str, Any]) -> str:
    """What a row of the result is called in tables and legends."""
    plain = "last call" if row["calls"] == 1 else f"last {row['calls']} calls"
    return NAMES.get(row["window"], plain)


def calls(name: str, config: ModelConfig) -> int:
    """Number of calls in the window that `name` means for this model."""
    schedule = config.schedule
    cycle = len(schedule) // config.H_cycles
    # The last call of the low net and the last of the high one: the two that end the recursion.
    known = {ONE_STEP: 2, CYCLE: cycle, "full": len(schedule)}
    return known[name] if name in known else int(name)


def net_config(asked: Options, name: str, seed: int) -> TrainConfig:
    """The training run of one window; nothing but `grad_window` depends on `name`."""
    from recurx import tasks
    from recurx.train import preset

    model: dict[str, Any] = {
        "H_cycles": asked.h_cycles, "L_cycles": asked.l_cycles,
        "halt_max_steps": asked.supervision,
    }  # fmt: skip
    common: dict[str, Any] = {
        "seed": seed, "batch_size": asked.batch_size, "lr": asked.lr,
    }  # fmt: skip
    plain = preset(asked.preset, asked.task, model=model, **common)
    model["grad_window"] = calls(name, plain.model_config(tasks.get(plain.task)))
    return preset(asked.preset, asked.task, model=model, **common)


def measure(session: Session, asked: Options) -> dict[str, Any]:
    from recurx.errors import InvalidArgument
    from recurx.experiments.session import Course

    missing = {ONE_STEP, CYCLE} - set(asked.windows)
    if missing:
        raise InvalidArgument(
            f"--windows: the claim is about 1-step and cycle, and {', '.join(missing)} is missing."
        )
    course = Course(
        seconds=asked.time_budget, steps=asked.steps,
        eval_every=max(1, asked.steps // 6), max_steps=asked.supervision,
    )  # fmt: skip
    names = list(dict.fromkeys(asked.windows))
    session.total = len(names) * asked.seeds
    nets = []
    for seed in range(asked.seeds):  # seeds outside: stopped half-way, windows still compare
        for name in names:
            config = net_config(asked, name, seed)
            nets.append(session.net(f"window {name}", config, course, _measurer(asked)))
            nets[-1]["window"] = name
    rows = [_summary(name, [net for net in nets if net["window"] == name]) for name in names]
    return {"rows": rows, "nets": nets, **_verdict(rows, asked)}


def _measurer(asked: Options) -> Any:
    def measured(trainer: Any) -> dict[str, Any]:
        from recurx.experiments.session import Course, look

        course = Course(max_steps=asked.supervision)
        report = look(trainer, course, trainer.held_out(asked.count))
        config = trainer.model.config
        return {
            "calls": config.schedule.window,
            "of": len(config.schedule),
            "exact": report.exact,
            "cells": report.cells,
            "curve": list(report.curve),
            "kept_bytes": kept_bytes(trainer.config, trainer.device, trainer.model.backend),
        }

    return measured


def kept_bytes(config: TrainConfig, device: Any = "cpu", backend: str = "auto") -> int:
    """Bytes that autograd holds between forward and backward of one training step.

    Storages that are kept for several operations count once; weights and buffers, which are there
    in any case, do not. All of it is held when the backward starts, so this is the peak.
    """
    import torch

    from recurx.train import Trainer

    trainer = Trainer(config, device=device, backend=backend, captured=False)
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers())
    }
    held: weakref.WeakSet[_Held] = weakref.WeakSet()
    kept: list[int] = []

    def pack(tensor: Tensor) -> _Held:
        saved = _Held(tensor)
        held.add(saved)
        return saved

    def unpack(saved: _Held) -> Tensor:
        if not kept:  # the backward starts
            storages = [other.tensor.untyped_storage() for other in held]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            kept.append(sum(size for at, size in sizes.items() if at not in own))
        return saved.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        trainer.train_step()
    return kept[0]


class _Held:
    """What autograd saved, as long as it holds it: a graph that was dropped before the backward
    frees it, and its address may be given to another tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _summary(name: str, nets: list[dict[str, Any]]) -> dict[str, Any]:
    from recurx.experiments.session import spread

    return {
        "window": name,
        "calls": nets[0]["calls"],
        "of": nets[0]["of"],
        "exact": spread([net["exact"] for net in nets]),
        "kept_bytes": nets[0]["kept_bytes"],
        "step_ms": spread([1e3 * net["seconds"] / net["steps"] for net in nets]),
        "steps": min(net["steps"] for net in nets),
    }


def _verdict(rows: list[dict[str, Any]], asked: Options) -> dict[str, Any]:
    by_name = {row["window"]: row for row in rows}
    one, cycle = by_name[ONE_STEP], by_name[CYCLE]
    gains = [c - o for o, c in zip(one["exact"]["values"], cycle["exact"]["values"], strict=True)]
    noise = max(one["exact"]["deviation"] or 0.0, cycle["exact"]["deviation"] or 0.0)
    gain = cycle["exact"]["mean"] - one["exact"]["mean"]
    findings = [
        f"exact accuracy: last cycle {cycle['exact']['mean']:.1%}, 1-step "
        f"{one['exact']['mean']:.1%}; a gain of {100 * gain:+.1f} points, positive with "
        f"{sum(g > 0 for g in gains)} of {len(gains)} seeds (standard deviation up to "
        f"{100 * noise:.1f} points)",
        f"the last cycle keeps {cycle['kept_bytes'] / one['kept_bytes']:.1f} times the memory and "
        f"takes {cycle['step_ms']['mean'] / one['step_ms']['mean']:.2f} times the time a step",
    ]
    short = [row["window"] for row in rows if row["steps"] < asked.steps]
    if short:
        findings.append(f"time ran out before all steps were done: {', '.join(short)}")
    holds = all(g > 0 for g in gains) and gain > noise and not short
    return {"findings": findings, "holds": holds}


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    settings = result["settings"]
    lines = []
    for row in result["rows"]:
        exact = row["exact"]
        deviation = "" if exact["deviation"] is None else f" ± {100 * exact['deviation']:.1f}"
        lines.append([
            title(row),
            f"{row['calls']} of {row['of']}",
            f"{100 * exact['mean']:.1f}{deviation}",
            f"{100 * exact['low']:.1f} to {100 * exact['high']:.1f}",
            f"{row['kept_bytes'] / 2**20:.1f}",
            f"{row['step_ms']['mean']:.1f}",
        ])  # fmt: skip
    heading = f"{settings['task']}, {settings['preset']}, {settings['steps']} steps, "
    heading += f"{settings['seeds']} seeds"
    columns = ["window", "calls", "exact %", "lowest to highest", "kept MiB", "ms a step"]
    return [(heading, columns, lines)]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Left: accuracy against training steps, mean and every seed; right: against kept memory."""
    from recurx.bench.drawing import COLOURS

    learning, cost = figure.subplots(1, 2, width_ratios=[3, 2])
    for row, colour in zip(result["rows"], COLOURS, strict=False):
        curves = [n["learning"] for n in result["nets"] if n["window"] == row["window"]]
        length = min(map(len, curves))
        steps = [point["step"] for point in curves[0][:length]]
        for curve in curves:
            learning.plot(
                steps, [100 * p["exact"] for p in curve[:length]], color=colour, lw=0.6, alpha=0.6
            )
        means = [100 * sum(c[i]["exact"] for c in curves) / len(curves) for i in range(length)]
        text = f"{title(row)} ({row['calls']} of {row['of']})"
        learning.plot(steps, means, color=colour, lw=2, label=text)
        deviation = 100 * (row["exact"]["deviation"] or 0.0)
        cost.errorbar(
            row["kept_bytes"] / 2**20, 100 * row["exact"]["mean"], yerr=deviation, fmt="o",
            color=colour, capsize=3,
        )  # fmt: skip
    learning.set_xlabel("training steps")
    learning.set_ylabel("held-out exact, %")
    learning.legend(fontsize=8)
    cost.set_xlabel("MiB kept for the backward")
    cost.set_xlim(left=0)
    cost.set_ylabel("final exact, %")
