"""`python -m recurx experiment NAME`: test one claim about recursion, with a table and a plot."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx import experiments
from recurx.cli import options
from recurx.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

    from recurx.experiments.settings import Options

RESULT = "result.json"
# Options of the command itself: all others of a run are settings of the experiment.
_NOT_SETTINGS = ("out", "json", "redraw", "no_plot", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, text) in experiments.EXPERIMENTS.items():
        module = experiments.load(name)
        one = names.add_parser(name, help=text, description=module.CLAIM)
        options.command(one, module.Options, functools.partial(run, name))


def run(name: str, asked: Options) -> int:
    from recurx.bench import drawing
    from recurx.cli import output

    module = experiments.load(name)
    plt = None
    if not asked.no_plot:  # known before the nets train, not after
        plt = drawing.pyplot(f"experiment {name}", "--no-plot")
    folder = Path(asked.out or f"runs/experiment-{name}")
    console = output.make_console()
    result = _kept(folder) if asked.redraw else _measured(name, asked, folder, console)
    for title, columns, rows in module.tables(result):
        console.print(output.table(title, columns, rows))
    console.print(f"Claim: {module.CLAIM}")
    for finding in result["findings"]:
        console.print(f"  {finding}")
    console.print("The claim showed." if result["holds"] else "The claim did NOT show.")
    written = [folder / RESULT]
    if plt is not None:
        written += drawing.save(
            plt, folder / "plot", module.SIZE, lambda figure: module.draw(result, figure)
        )
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    if asked.json:
        output.json_line(result)
    return 0


def _kept(folder: Path) -> dict[str, Any]:
    from recurx.experiments.session import read_json

    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise InvalidArgument(f"--redraw: no {RESULT} in {folder}; run the experiment first.")
    return result


def _measured(name: str, asked: Options, folder: Path, console: Console) -> dict[str, Any]:
    import torch

    from recurx.bench.provenance import provenance
    from recurx.experiments.session import Session, write_json

    device = asked.prepare(options.THREADS_OF_TINY_NETS)
    started = time.perf_counter()
    session = Session(folder, console, device=device, backend=asked.backend)
    module, said = experiments.load(name), dataclasses.asdict(asked)
    result = {
        "experiment": name,
        "claim": module.CLAIM,
        "settings": {key: value for key, value in said.items() if key not in _NOT_SETTINGS},
        "machine": provenance(device.type, torch.get_num_threads()),
        **module.measure(session, asked),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(folder / RESULT, result)
    return result
