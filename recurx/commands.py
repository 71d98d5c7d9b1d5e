"""The command line: `python -m recurx env | demo | train | eval | experiment | ...`.

A mistake of the user ends in one line on stderr and exit code 2, never in a traceback; a run that
cannot go on (full disk, diverged training) ends so with code 1, a signal with 128 + n. Commands
import torch when they run, so that `--help` answers at once; but `train --help` imports it, since
its options are those of `recurx.train.TrainConfig`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import signal
import sys
from collections.abc import Sequence

from recurx.cli import options
from recurx.errors import RecurxError

# Command -> (module, one line of help). The module has `Options`, a dataclass, and `run(Options)`,
# which returns the exit code; or, with commands of its own, `add_arguments(parser)`.
COMMANDS = {
    "env": ("recurx.bench.env", "what this machine and this installation can do"),
    "demo": ("recurx.experiments.demo.command", "three minutes: a tiny model learns, engines race"),
    "train": ("recurx.experiments.answering.train", "train a model on a task, or resume"),
    "eval": (
        "recurx.experiments.answering.evaluate",
        "accuracy of a checkpoint, by steps of refinement",
    ),
    "profile": ("recurx.bench.profile", "where one step of a model spends its time, by domain"),
    "experiment": ("recurx.experiments.command", "test a claim about recursion: sort, ..."),
    "solve": (
        "recurx.experiments.answering.solve",
        "solve the Sudokus you type, or those of a file",
    ),
    "export": (
        "recurx.experiments.answering.export",
        "a checkpoint as an ONNX file, for other engines",
    ),
    "bench": ("recurx.bench.command", "measure this machine, show and compare measurements"),
}
TASKS = "recurx.experiments.tasks"  # registers its tasks, for a checkout that is not installed
USAGE_ERROR = 2
NO_MEMORY = "out of memory|not enough memory|t allocate memory"  # torch's words for it
SIGNALLED = 128  # + the number of the signal, as shells report it


def build_parser(asked: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command line.

    Args:
        asked: the command line. Only a command that stands in it adds its arguments: some tell
            what is registered (tasks, say), which others need not wait for.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recurx", description="Recursive reasoning models: train, refine, solve."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in asked:
            importlib.import_module(TASKS)
            loaded = importlib.import_module(module)
            if hasattr(loaded, "add_arguments"):
                loaded.add_arguments(command)
            else:
                options.command(command, loaded.Options, loaded.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    line = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # an ASCII locale is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = argparse.Namespace(command=" ".join(line[:1]))  # while modules are imported
    try:
        arguments = build_parser(line).parse_args(line)
        # NOTE: NumPy's Cython modules lose a Ctrl-C that comes while they are imported (one in
        # twenty), so they are imported before anything is printed.
        importlib.import_module("numpy.random")
        with options.json_alone(getattr(arguments, "json", False) is True):
            return int(arguments.execute(arguments))
    except (RecurxError, OSError) as error:
        said, code = str(error), getattr(error, "exit_code", USAGE_ERROR)
    except (MemoryError, RuntimeError) as error:
        text = (str(error).splitlines() or ["ask for less at once"])[0]
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, text):
            raise
        said, code = f"not enough memory: {text}", USAGE_ERROR
    except KeyboardInterrupt as error:
        said, code = "interrupted", SIGNALLED + (error.args[0] if error.args else signal.SIGINT)
    print(f"recurx {arguments.command}: {said}", file=sys.stderr)
    return code
