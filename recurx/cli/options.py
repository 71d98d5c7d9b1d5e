"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import json
from typing import Any

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


def add_refinement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-steps", type=positive, default=16, metavar="N",
        help="supervision steps a puzzle may take (default 16)",
    )  # fmt: skip
    parser.add_argument(
        "--halt", choices=("q", "none"), default="q",
        help="q: a puzzle ends when the model says so (default); none: all steps",
    )  # fmt: skip
    parser.add_argument(
        "--halt-above", type=float, default=0.0, metavar="Q",
        help="q (logit of being right) that ends a puzzle: 0 (default) is even odds, 3 is 20 to 1",
    )  # fmt: skip
    parser.add_argument("--rollouts", type=positive, default=1, help="noisy copies (default 1)")
    parser.add_argument("--sigma", type=float, default=0.0, help="noise of rollouts (default 0)")
    parser.add_argument(
        "--select", choices=("q", "vote"), default="q", help="how a rollout is picked"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default 0)")


def refinement(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `recurx.solve` that `add_refinement` read."""
    return {
        "max_steps": arguments.max_steps,
        "halt": None if arguments.halt == "none" else arguments.halt,
        "halt_above": arguments.halt_above,
        "rollouts": arguments.rollouts,
        "sigma": arguments.sigma,
        "select": arguments.select,
        "seed": arguments.seed,
    }


def prepare_machine(arguments: argparse.Namespace) -> Any:
    """Set threads and return the torch device.

    Raises:
        InvalidArgument: the device or backend is unknown or not usable here.
    """
    import torch

    from recurx import backends
    from recurx.errors import InvalidArgument

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
