"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recurx.errors import InvalidArgument

if TYPE_CHECKING:
    from recurx.tasks import Task

# NOTE: a second thread gains a 64-wide net little and can cost it 40 times the time: if the other
# core is busy, every operation waits for a thread that does not run (measured on two cores).
THREADS_OF_TINY_NETS = 1

SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """90, 90s, 20m or 2h."""
    unit = SECONDS.get(text[-1:], 0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time like 90, 90s, 20m or 2h, got {text!r}")
    return value


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON if it reads as such, else a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--backend", default="auto", help="engine of the recursion (default auto)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="trained weights (default: the net that ships for the task)",
                        )  # fmt: skip


def add_trained_nets(parser: argparse.ArgumentParser, lr: float = 2e-3) -> None:
    """Options of experiments that train nets and test them at the end; `lr` is a default."""
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--count", type=positive, default=1000, metavar="N",
                        help="held-out examples of the final accuracy (default 1000)")  # fmt: skip


# Arguments of `recurx.solve` that `eval` and `solve` have options for, with their defaults.
REFINEMENT: dict[str, Any] = {
    "max_steps": 16, "halt": "q", "halt_above": 0.0, "patience": 2, "rollouts": 1, "sigma": 0.0,
    "select": "q", "init": "learned", "init_scale": 1.0,
}  # fmt: skip


def add_refinement(parser: argparse.ArgumentParser) -> None:
    """Options for `REFINEMENT`. Their own default is None: a net may recommend values."""
    group = parser.add_argument_group(
        "how puzzles are answered", "What is not given is what the net recommends, if it "
        "recommends anything (the 9x9 net that ships does), else the default.",
    )  # fmt: skip
    group.add_argument(
        "--max-steps", type=positive, metavar="N",
        help="supervision steps a puzzle may take (default 16; may exceed those of training)",
    )  # fmt: skip
    group.add_argument(
        "--halt", choices=("q", "fixed-point", "any", "none"),
        help="a puzzle ends when the model says so (q, default), when its answer stays the same "
        "(fixed-point), at the first of both (any), or after all steps (none)",
    )  # fmt: skip
    group.add_argument(
        "--halt-above", type=float, metavar="Q",
        help="q (logit of being right) that ends a puzzle: 0 (default) is even odds, 3 is 20 to 1",
    )  # fmt: skip
    group.add_argument(
        "--patience", type=positive, metavar="N",
        help="steps without a change that are a fixed point (default 2)",
    )  # fmt: skip
    group.add_argument(
        "--fill", type=_fill, nargs="?", const=True, metavar="P", help="fill blanks one after the "
        "other, the likeliest and all those over probability P first (default 0.99); 'none' does "
        "not",
    )  # fmt: skip
    group.add_argument("--fill-every", type=positive, metavar="N",
                       help="supervision steps before each filling (default 1): as many as "
                       "training had, or more")  # fmt: skip
    group.add_argument("--rollouts", type=positive, metavar="N",
                        help="tries of each puzzle (default 1)")  # fmt: skip
    group.add_argument("--sigma", type=float, help="noise in each step of a try (default 0)")
    group.add_argument(
        "--init", choices=("learned", "random"),
        help="where tries start: all at the learned states (default), or all but the first at "
        "random ones",
    )  # fmt: skip
    group.add_argument("--init-scale", type=float, metavar="STD",
                        help="deviation of random starts (default 1)")  # fmt: skip
    group.add_argument(
        "--select", choices=("q", "vote", "rules"), help="how the answer is picked among tries: "
        "the most confident (q, default), the most frequent (vote), or the first that obeys the "
        "rules of the task, and then no more are made (rules)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of all randomness (default 0)")


def _fill(text: str) -> float | str:
    """A probability, or "none"."""
    try:
        value = text if text == "none" else float(text)
    except ValueError:
        value = -1.0
    if value != "none" and not 0 <= float(value) <= 1:
        raise argparse.ArgumentTypeError(f"expected a probability or none, got {text!r}")
    return value


def refinement(
    arguments: argparse.Namespace, recommended: Mapping[str, Any] | None, task: Task
) -> dict[str, Any]:
    """The arguments of `recurx.solve` that `add_refinement` read: what the user said, else what
    the net recommends (its checkpoint's extra["solve"]), else the defaults."""
    values: dict[str, Any] = {**REFINEMENT, **(recommended or {}), "seed": arguments.seed}
    for key in REFINEMENT:
        given = getattr(arguments, key)
        if given is not None:
            values[key] = None if given == "none" else given
    if arguments.fill == "none":
        values.pop("fill", None)
    elif arguments.fill is not None or arguments.fill_every is not None:
        values |= _filling(arguments, values, task)
    if values["rollouts"] > 1 and not values["sigma"] and values["init"] == "learned":
        raise InvalidArgument(
            "--rollouts: without --sigma or --init random all tries of a puzzle are the same."
        )
    return by_rules(values, task)


def _filling(
    arguments: argparse.Namespace, values: Mapping[str, Any], task: Task
) -> dict[str, Any]:
    """What a user who asked for filling, or for another one than the net, gets: its arguments
    "fill" and "max_steps"."""
    recommended = values.get("fill")
    if task.blank is None:
        raise InvalidArgument(f"--fill: questions of {task.name} have no blanks.")
    if arguments.fill is None and not recommended:
        raise InvalidArgument("--fill-every: nothing is filled; give --fill too.")
    fill = {"blank": task.blank, **(recommended or {})}
    if isinstance(arguments.fill, float):
        fill["above"] = arguments.fill
    if arguments.fill_every is not None:
        fill["steps"] = arguments.fill_every
    steps = values["max_steps"]
    if arguments.max_steps is None and not recommended:  # a blank at a time, and a step to judge
        steps = task.seq_len * fill.get("steps", 1) + 1
    return {"fill": fill, "max_steps": steps}


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


def prepare_machine(arguments: argparse.Namespace) -> Any:
    """Set threads and return the torch device.

    Raises:
        InvalidArgument: the device or backend is unknown or not usable here.
    """
    import torch

    from recurx import backends

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.backend not in backends.NAMES:
        known = ", ".join(backends.NAMES)
        raise InvalidArgument(f"--backend: expected one of {known}, got {arguments.backend!r}.")
    try:
        return torch.empty(0, device=arguments.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"--device {arguments.device}: not usable here: {reason}") from error
