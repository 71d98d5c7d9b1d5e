"""`python -m recurx experiment NAME`: test one claim about recursion, with a table and a plot."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx import experiments
from recurx.cli import options

if TYPE_CHECKING:
    from rich.console import Console

RESULT = "result.json"
# Options of the command itself: all others of a run are settings of the experiment.
_NOT_SETTINGS = ("command", "name", "out", "json", "redraw", "no_plot", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, text) in experiments.EXPERIMENTS.items():
        module = experiments.load(name)
        one = names.add_parser(name, help=text, description=module.CLAIM)
        one.add_argument("--seeds", type=options.positive, default=module.SEEDS, metavar="N",
                         help=f"nets of each kind, seeds 0..N-1 (default {module.SEEDS})",
                         )  # fmt: skip
        one.add_argument("--time-budget", type=options.seconds, default=module.SECONDS,
                         metavar="TIME", help="training of one net at most, in processor time on "
                         f"a CPU: 90s, 20m, 2h (default {module.SECONDS:g}s)")  # fmt: skip
        one.add_argument("--out", metavar="FOLDER", help="results, plot, and the nets that are "
                         f"finished: started again, it goes on (default: runs/experiment-{name})",
                         )  # fmt: skip
        one.add_argument("--redraw", action="store_true", help=f"train nothing: table and plot of "
                         f"{RESULT} in FOLDER")  # fmt: skip
        one.add_argument("--no-plot", action="store_true", help="no plot (it needs matplotlib)")
        options.add_machine(one)
        one.add_argument("--json", action="store_true", help="end with one line of JSON")
        module.add_arguments(one)


def run(arguments: argparse.Namespace) -> int:
    from recurx.cli import output, plotting

    module = experiments.load(arguments.name)
    plt = None
    if not arguments.no_plot:  # known before the nets train, not after
        plt = plotting.pyplot(f"experiment {arguments.name}", "--no-plot")
    folder = Path(arguments.out or f"runs/experiment-{arguments.name}")
    console = output.make_console()
    result = _kept(folder) if arguments.redraw else _measured(module, arguments, folder, console)
    for title, columns, rows in module.tables(result):
        console.print(output.table(title, columns, rows))
    console.print(f"Claim: {module.CLAIM}", markup=False)
    for finding in result["findings"]:
        console.print(f"  {finding}", markup=False)
    console.print("The claim showed." if result["holds"] else "The claim did NOT show.")
    written = [folder / RESULT]
    if plt is not None:
        written += plotting.save(
            plt, folder / "plot", module.SIZE, lambda figure: module.draw(result, figure)
        )
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    if arguments.json:
        output.json_line(result)
    return 0


def _kept(folder: Path) -> dict[str, Any]:
    from recurx.errors import InvalidArgument
    from recurx.experiments.session import read_json

    result: dict[str, Any] | None = read_json(folder / RESULT)
    if result is None:
        raise InvalidArgument(f"--redraw: no {RESULT} in {folder}; run the experiment first.")
    return result


def _measured(
    module: Any, arguments: argparse.Namespace, folder: Path, console: Console
) -> dict[str, Any]:
    import torch

    from recurx.bench.provenance import provenance
    from recurx.experiments.session import Session, write_json

    if arguments.threads is None:
        arguments.threads = options.THREADS_OF_TINY_NETS
    device = options.prepare_machine(arguments)
    started = time.perf_counter()
    session = Session(folder, console, device=device, backend=arguments.backend)
    settings = {k: v for k, v in vars(arguments).items() if k not in _NOT_SETTINGS}
    result = {
        "experiment": arguments.name,
        "claim": module.CLAIM,
        "settings": settings,
        "machine": provenance(device.type, torch.get_num_threads()),
        **module.measure(session, arguments),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(folder / RESULT, result)
    return result
