"""`python -m recurx bench [run | report | compare]`: measure, show, and compare measurements."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recurx.bench.cases import CASES, DTYPES, MODES
from recurx.bench.suites import SUITES
from recurx.cli.options import positive, seconds

SLOWER = 1  # exit code of `compare --fail` with a slower row
EPILOG = """\
Without an action: `run` with its defaults (suite "cpu", about eight minutes on two cores; "gpu"
where there is one). Figures are worth something only on a machine that does nothing else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    _add_run(actions.add_parser("run", help="measure, and write a result file (the default)"))
    report = actions.add_parser("report", help="tables and plots from result files")
    report.add_argument("files", nargs="*", type=Path, help="default: all of bench/results/")
    report.add_argument(
        "--write", nargs="+", type=Path, default=(), metavar="PAGE.md",
        help="make the tables between the markers of these files anew: <!-- bench:begin --> and "
        "<!-- bench:end --> for all, <!-- ratios:begin --> and <!-- ratios:end --> for one row a "
        "case",
    )  # fmt: skip
    report.add_argument("--plots", type=Path, help="folder for plots (default: bench/results/)")
    report.add_argument("--no-plots", action="store_true", help="tables only")
    compare = actions.add_parser("compare", help="which of two results is faster, row by row")
    compare.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="two, the older first; "
        "of one, or of the newest in bench/results/, each row is compared with the newest earlier "
        "one of the same device and case there",
    )
    compare.add_argument("--force", action="store_true", help="even if the devices differ")
    compare.add_argument("--fail", action="store_true", help="exit 1 if a row of recurx is slower")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=list(SUITES), help="default: cpu, or gpu on a GPU")
    parser.add_argument("--case", nargs="+", choices=list(CASES), help="these cases, no suite")
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["step"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[1])
    parser.add_argument(
        "--engine", nargs="+", default=["all"],
        help="all, recurx (every backend), recurx-NAME, eager, compile, ... (default all)",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seconds", type=seconds, default=10.0, help="of rounds, a case and batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--unit", choices=("net", "step"), help="what torch.compile compiles (default: step on a "
        "GPU; net, one call, on a CPU, where it is as fast and compiles in a tenth of the time)",
    )  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="overwrite the GPU's L2 before a step")
    parser.add_argument(
        "--jobs", type=positive, help="workers that start at once (default 1; GPU 4)"
    )
    parser.add_argument("--start-timeout", type=seconds, default=300.0, help="to a first step")
    parser.add_argument("--time-limit", type=seconds, help="start nothing after this long")
    parser.add_argument(
        "--import", dest="imports", nargs="+", default=[], metavar="MODULE",
        help="imported first in every worker: registers a backend, say",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/DEVICE-DATE)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "report":
        return _report(arguments)
    if arguments.action == "compare":
        return _compare(arguments)
    if arguments.action is None:
        parser = argparse.ArgumentParser()
        _add_run(parser)
        arguments = parser.parse_args([])
    return _run(arguments)


# ---- run -----------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    import importlib

    import torch

    from recurx.atomic import write_json
    from recurx.bench import quantities, results, variants
    from recurx.bench.lanes import Options
    from recurx.bench.predict import predict
    from recurx.bench.provenance import provenance, results_folder
    from recurx.bench.runner import Measurement
    from recurx.cli import output
    from recurx.errors import InvalidArgument

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--device cuda: torch sees no CUDA device.")
    if arguments.cold and device == "cpu":
        raise InvalidArgument("--cold: overwrites a GPU's L2; on a CPU rounds are interleaved.")
    for module in arguments.imports:
        importlib.import_module(module)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    groups = _groups(arguments, "gpu" if device == "cuda" else "cpu")
    for group in groups:
        variants.check_engines(group.engines, device, group.mode)
    console = output.make_console()
    limit = arguments.time_limit
    options = Options(
        device=device, threads=threads, cold=arguments.cold, imports=tuple(arguments.imports),
        unit=arguments.unit or ("step" if device == "cuda" else "net"),
        jobs=arguments.jobs or (4 if device == "cuda" else 1),
        start_timeout=arguments.start_timeout,
        deadline=math.inf if limit is None else time.monotonic() + limit,
        say=lambda text: console.print(f"[dim]{text}[/dim]"),
    )  # fmt: skip
    facts = provenance(device, threads)
    path = (
        arguments.out or results_folder() / f"{device}-{facts['date'][:16].replace(':', '')}.json"
    )
    document: dict[str, Any] = {
        "schema": results.SCHEMA, "status": "partial", "provenance": facts, "groups": []
    }  # fmt: skip
    skipped = 0
    with _terminable():
        for group in groups:
            if options.left() <= 0:
                skipped += 1
                continue
            measurement = Measurement(group, options)
            try:
                measurement.run()
            except results.RecurxError as error:  # its reference failed: nothing to compare with
                options.say(f"{group.case} {group.mode} B={group.batch}: left out: {error}")
                skipped += 1
                continue
            finally:
                if measurement.lanes:
                    document["groups"].append(measurement.document())
                    quantities.against_ceilings(document)
                    predict(document)
                write_json(path, document)
            _show(document["groups"][-1], console)
    if not skipped:
        document["status"] = "complete"
    write_json(path, document)
    if skipped:
        console.print(f"{skipped} of {len(groups)} groups were left out")
    console.print(f"written to {path}")
    return 0


def _groups(arguments: argparse.Namespace, default: str) -> tuple[Any, ...]:
    from recurx.bench.suites import Group, suite
    from recurx.errors import InvalidArgument

    if not arguments.case:
        return suite(arguments.suite or default)
    if arguments.suite:
        raise InvalidArgument("--suite: a suite names its cases; give --suite or --case.")
    if "solve" in arguments.mode:
        for name in arguments.case:
            if not CASES[name].task:
                raise InvalidArgument(f"--mode solve: {name} has no trained net.")
    return tuple(
        Group(case, mode, batch, tuple(arguments.engine), tuple(arguments.dtype), arguments.seconds)
        for case in arguments.case
        for mode in arguments.mode
        for batch in arguments.batch
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: with what was measured in the file."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: nobody sends us signals there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(group: dict[str, Any], console: Any) -> None:
    from recurx.bench.report import best_ours
    from recurx.cli import output

    rows = {row["variant"]: row for row in group["rows"]}
    lines = []
    for name, row in rows.items():
        if row["status"] != "timed":
            lines.append((name, row["status"], "", "", "", "", row["reason"]))
            continue
        ours = best_ours(rows, row["dtype"])
        factor = "" if ours is None else f"{row['p50_ms'] / ours['p50_ms']:.2f}x"
        times = [f"{row[q]:.4g}" for q in ("p20_ms", "p50_ms", "p80_ms")]
        note = row.get("note", "")
        if "exact" in row:
            note = f"{row['exact']:.0%} exact in {row['steps_mean']:.1f} steps {note}"
        predicted = row.get("predicted_ms")
        lines.append((name, *times, f"{predicted:.4g}" if predicted else "", factor, note))
    title = f"{group['case']} {group['mode']} B={group['batch']}"
    heads = ("variant", "p20 ms", "p50 ms", "p80 ms", "predicted", "times recurx", "")
    console.print(output.table(title, heads, lines))


# ---- report and compare --------------------------------------------------------------------------


def _report(arguments: argparse.Namespace) -> int:
    from recurx import atomic
    from recurx.bench import plots, report, results
    from recurx.bench.provenance import results_folder

    found = [results.load(path) for path in arguments.files]
    found = sorted(found, key=lambda r: r.date) or results.load_folder(results_folder())
    for path in arguments.write:
        page = path.resolve()  # a link stays one
        edited = report.fill_in(page.read_text(encoding="utf-8"), found, str(path))
        with atomic.replacing(page) as new:
            new.write_text(edited, encoding="utf-8")
        print(f"written to {path}")
    if not arguments.write:
        print(report.markdown(found))
    if not arguments.no_plots:
        for path in plots.draw(found, arguments.plots or results_folder()):
            print(f"written to {path}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from recurx.bench import compare, results
    from recurx.bench.provenance import results_folder
    from recurx.cli import output
    from recurx.errors import InvalidArgument

    given = [results.load(path) for path in arguments.files]
    if len(given) > 2:
        raise InvalidArgument("bench compare: expected two files at most, the older first.")
    if len(given) == 2:
        before, after = given
    else:
        known = results.load_folder(results_folder())
        before, after = compare.newest_two(given or known, known)
    found = compare.compare(before, after, arguments.force)
    console = output.make_console()
    lines = [
        (str(d.key), f"{d.before_ms:.4g}", f"{d.after_ms:.4g}", f"{d.ratio:.3f}",
         f"{d.low:.3f}-{d.high:.3f}", d.verdict if d.verdict == "same" else d.verdict.upper())
        for d in found
    ]  # fmt: skip
    heads = ("row", "A ms", "B ms", "B / A", "noise", "B is")
    console.print(output.table(f"A {before.path}\nB {after.path}", heads, lines))
    moved = compare.machine_moved(found)
    if abs(moved - 1) > compare.SMALLEST:
        console.print(
            f"PyTorch's own eager rows moved by {moved:.2f}: that much is the machine, not recurx."
        )
    for key, reason in compare.lost(before, after):
        console.print(f"{key}: has no time in B: {reason}")
    slower, faster = compare.beyond_the_machine(found)
    beyond = " than the machine's change explains" if abs(moved - 1) > compare.SMALLEST else ""
    console.print(f"recurx: {len(slower)} rows slower, {len(faster)} faster in B{beyond}.")
    return SLOWER if arguments.fail and slower else 0
