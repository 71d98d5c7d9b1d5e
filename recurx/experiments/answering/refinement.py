"""How `eval` and `solve` answer puzzles: what the user says, what the net recommends, defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.options import option, stated
from recurx.solving.options import Fill, Rules, Search

if TYPE_CHECKING:
    from recurx.tasks import Task


def _fill(text: str) -> float | str:
    """A probability, or "none"."""
    try:
        value = text if text == "none" else float(text)
    except ValueError:
        value = -1.0
    if value != "none" and not 0 <= float(value) <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability or none, got {text!r}")
    return value


@dataclass(frozen=True)
class Filling:
    """The options of `recurx.Fill`, whose token of blanks is the task's."""

    fill: float | str | None = option(None, "fill blanks one after the other, the likeliest and "
                                      f"all those over probability P first (default {Fill.above}); "
                                      "'none' does not", type=_fill, nargs="?", const=True,
                                      metavar="P")  # fmt: skip
    fill_every: int | None = option(None, "supervision steps before each filling (default "
                                    f"{Fill.steps}): as many as training had, or more",
                                    least=1)  # fmt: skip


@dataclass(frozen=True)
class Searching:
    """Whether there is a search; its own options are those of `recurx.Search`."""

    search: bool = option(False, "search over tries by the rules of the task, in place of "
                          "--rollouts and --select, and abstain where it ends without an "
                          "answer")  # fmt: skip


@dataclass(frozen=True)
class Refining:
    """Of commands that answer puzzles: what the user said of the arguments of `recurx.solve`."""

    how: dict[str, Any] = options.said(
        Rules, Filling, Searching, Search, title="how puzzles are answered",
        description="What is not given is what the net recommends, if it recommends anything (the "
        "9x9 net that ships does), else the default.",
    )  # fmt: skip


def arguments_of_solve(
    said: Mapping[str, Any], recommended: Mapping[str, Any] | None, task: Task
) -> dict[str, Any]:
    """The arguments of `recurx.solve`: what the user said, else what the net recommends (its
    checkpoint's extra["solve"]), else the defaults.

    Raises:
        InvalidArgument: `task` cannot do what is asked, or all tries would be the same.
    """
    said = dict(said)
    search = _search(said, task)
    fill, fill_every = said.pop("fill", None), said.pop("fill_every", None)
    values = {name: default for name, (default, _) in stated(Rules).items()}
    if unknown := set(recommended or ()) - {*values, "fill"}:
        raise InvalidArgument(
            f"the net recommends {', '.join(sorted(unknown))}, which recurx.solve does not have: "
            f"expected some of {', '.join(values)}, fill. Update recurx, or its file."
        )
    values |= {**(recommended or {}), "seed": Rules.seed, **said}
    if fill == "none":
        values.pop("fill", None)
    elif fill is not None or fill_every is not None:
        if task.blank is None:
            raise InvalidArgument(f"--fill: questions of {task.name} have no blanks.")
        before = values.get("fill")
        if fill is None and not before:
            raise InvalidArgument("--fill-every: nothing is filled; give --fill too.")
        asked: dict[str, Any] = {"blank": task.blank, **(before or {})}
        asked |= {"above": fill} if isinstance(fill, float) else {}
        asked |= {} if fill_every is None else {"steps": fill_every}
        values["fill"] = asked
        if "max_steps" not in said and not before:  # a blank at a time, and a step to judge
            values["max_steps"] = task.seq_len * asked.get("steps", 1) + 1
    if search is not None:
        for name in ("rollouts", "select"):
            values[name] = getattr(Rules, name)
        if not values["sigma"] and "init" not in said:
            values["init"] = "random"  # or all tries of a board would be the same
        return {**values, "search": search}
    if values["rollouts"] > 1 and not values["sigma"] and values["init"] == "learned":
        raise InvalidArgument(
            "--rollouts: without --sigma or --init random all tries of a puzzle are the same."
        )
    return by_rules(values, task)


def _search(said: dict[str, Any], task: Task) -> Search | None:
    """The search that was asked for, taken out of what the user said.

    Raises:
        InvalidArgument: there is none that these options could be of, or `task` has no rules.
    """
    named = {name: said.pop(name) for name in stated(Search) if name in said}
    if not said.pop("search", False):
        if named:
            raise InvalidArgument(f"{options.flags(named)}: only with --search; give that too.")
        return None
    if clash := {"rollouts", "select"} & said.keys():
        raise InvalidArgument(f"{options.flags(sorted(clash))}: not with --search, leave it out.")
    if not task.has_rules or (named.get("unique") and not task.counts):
        lacks = "an exact solver (--unique)" if task.has_rules else "rules"
        raise InvalidArgument(f"--search: the task {task.name} has no {lacks}.")
    return Search(task, **named)


def by_rules(how: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Arguments of `recurx.solve`, with the check of `task` where "select" is "rules".

    Raises:
        InvalidArgument: the task has no rules that tell right answers from wrong.
    """
    if how.get("select") != "rules":
        return dict(how)
    if not task.has_rules:
        raise InvalidArgument(
            f"--select rules: only labels tell right answers to {task.name} from wrong ones. Use "
            "--select q or vote."
        )
    return {**how, "select": task.accepts}
