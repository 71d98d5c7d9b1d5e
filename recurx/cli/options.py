"""Command lines made from dataclasses whose fields are options (`recurx.options`)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from recurx.errors import InvalidArgument
from recurx.options import file, option, stated

# NOTE: a second thread gains a 64-wide net little and can cost it 40 times the time: if the other
# core is busy, every operation waits for a thread that does not run (measured on two cores).
THREADS_OF_TINY_NETS = 1

SECONDS = {"s": 1, "m": 60, "h": 3600}
MOST = 2**63 - 1  # what the libraries below take for a whole number
# OpenMP ends the process where the system refuses it a thread.
THREADS = option(None, "CPU threads (default: torch's choice)", least=1,
                 most=max(64, 4 * (os.cpu_count() or 1)))  # fmt: skip

answers: TextIO | None = None  # stdout, while a command runs that prints JSON alone there


@contextlib.contextmanager
def json_alone(wanted: bool) -> Iterator[None]:
    """If `wanted`, all that is printed inside goes to stderr, but for `output.json_line`."""
    global answers
    before, answers = answers, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr if wanted else sys.stdout):
            yield
    finally:
        answers = before


def command(parser: argparse.ArgumentParser, kind: type, run: Callable[[Any], int]) -> None:
    """Give a command its options; what is parsed has `execute`, which calls `run` with a `kind`."""
    add(parser, kind)
    parser.set_defaults(execute=lambda arguments: run(read(arguments, kind)))


def add(parser: Any, kind: type, only_said: bool = False) -> None:
    """Add every option of `kind` to a parser or group.

    Args:
        only_said: what the user does not say is left out of the namespace, defaults and all.
    """
    for name, (default, about) in stated(kind).items():
        form = {key: value for key, value in about.items() if key not in ("flag", "least", "most")}
        several = isinstance(default, tuple)
        if isinstance(default, bool):
            form["action"] = "store_true"
        else:
            sample = default[0] if several and default else default
            limits = {"least": about.get("least", -MOST), "most": about.get("most", MOST)}
            known = {int: functools.partial(whole, **limits), float: number}
            found = int if "least" in about else form.get("type", type(sample))
            form["type"] = known.get(found, form.get("type", str))
            if "least" in about:
                form.setdefault("metavar", "N")
        if several and "action" not in form:
            form.setdefault("nargs", "+")
        if "choices" in form:
            form["choices"] = ["none" if choice is None else choice for choice in form["choices"]]
        form["help"] = _help(about["help"], default)
        form["default"] = argparse.SUPPRESS if only_said else list(default) if several else default
        flag = about.get("flag", flags([name]))
        if flag:
            parser.add_argument(flag, dest=name, **form)
        else:
            parser.add_argument(name, **form)
    for field in dataclasses.fields(kind):
        if "said" in field.metadata:
            group = parser.add_argument_group(*field.metadata["group"])
            for part in field.metadata["said"]:
                add(group, part, only_said=True)


def _help(text: str, default: Any) -> str:
    """The help of an option, with its default unless it tells that itself."""

    def shown(value: Any) -> str:
        if isinstance(value, tuple):
            return "=".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else f"{value}"

    if "default" not in text and default is not None and default is not False and default != ():
        values = default if isinstance(default, tuple) else (default,)
        text = f"{text} (default {' '.join(map(shown, values))})"
    return text.replace("%", "%%")


def said(*kinds: type, title: str, description: str) -> Any:
    """A field that holds the options of `kinds` that the user said, as a dict: their defaults are
    somebody else's to give. They are a group of their own in the help."""
    metadata = {"said": kinds, "group": (title, description)}
    return dataclasses.field(default_factory=dict, metadata=metadata)


def read(arguments: argparse.Namespace, kind: type) -> Any:
    """The `kind` that a command line says."""
    values = _values(arguments, kind)
    for field in dataclasses.fields(kind):
        if "said" in field.metadata:
            parts = [_values(arguments, part) for part in field.metadata["said"]]
            values[field.name] = {key: value for part in parts for key, value in part.items()}
    return kind(**values)


def _values(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    found = {}
    for name, (default, about) in stated(kind).items():
        if hasattr(arguments, name):
            value = getattr(arguments, name)
            if value == "none" and None in about.get("choices", ()):
                value = None
            several = isinstance(default, tuple)
            empty = [] in value if several and value else isinstance(value, list) and default != ()
            if empty:  # what argparse makes of "--lr=--"
                raise InvalidArgument(f"{flags([name])}: expected a value, got '--'.")
            found[name] = tuple(value) if several else value
    return found


def flags(names: Any) -> str:
    """Fields as they are said: "--batch-size, --lr"."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


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


def whole(text: str, least: int, most: int = MOST) -> int:
    """A whole number from `least` to `most`."""
    known = text.removeprefix("-").isdecimal() and len(text) <= 20
    if not known or not least <= int(text) <= most:
        limits = f" from {least} on" if most == MOST else f" {least}..{most}"
        raise argparse.ArgumentTypeError(f"expected a whole number{limits}, got {text[:80]!r}")
    return int(text)


def number(text: str) -> float:
    """A number; infinity is one, NaN is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text[:80]!r}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON if it reads as such, else a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def time(default: float | None, help: str) -> Any:
    """An option in seconds."""
    return option(default, f"{help}: 90s, 20m, 2h", type=seconds, metavar="TIME")


def settings(help: str) -> Any:
    """An option of fields and their values, said once for each."""
    return option((), f"{help}, e.g. hidden_size=128", type=setting, action="append",
                  metavar="KEY=VALUE")  # fmt: skip


@dataclass(frozen=True)
class Json:
    json: bool = option(False, "end with one line of JSON")


@dataclass(frozen=True)
class Weights:
    checkpoint: str | None = file("trained weights (default: the net that ships for the task)")


@dataclass(frozen=True)
class Machine:
    """Where a command runs."""

    device: str = option("cpu", "cpu or cuda")
    backend: str = option("auto", "engine of the recursion")
    threads: int | None = THREADS

    def prepare(self, threads: int | None = None) -> Any:
        """Set threads (`threads` if none were asked for) and return the torch device.

        Raises:
            InvalidArgument: the device or backend is unknown or not usable here.
        """
        import torch

        from recurx import backends

        chosen = self.threads or threads
        if chosen:
            torch.set_num_threads(chosen)
        if self.backend not in backends.NAMES:
            known = ", ".join(backends.NAMES)
            raise InvalidArgument(f"--backend: expected one of {known}, got {self.backend!r}.")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidArgument(f"--device {self.device}: not usable here: {reason}") from error


def local_device(asked: Any) -> Any:
    """`asked`, on the GPU that torchrun gave this process if any GPU was asked for."""
    if asked.device == "cuda" and "LOCAL_RANK" in os.environ:
        return dataclasses.replace(asked, device=f"cuda:{os.environ['LOCAL_RANK']}")
    return asked
