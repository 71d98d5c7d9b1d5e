"""`python -m recurx bench [run | report | compare | host]`: measure, show, compare."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurx.bench import lanes
from recurx.bench.cases import CASES, DTYPES, MODES
from recurx.bench.paths import check_writable
from recurx.bench.suites import SUITES
from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.options import file, option

SLOWER = 1  # exit code of `compare --fail` with a slower row
EPILOG = """\
Without an action: `run` with its defaults (suite "cpu", about a quarter of an hour on two cores;
"gpu" where there is one). Figures are worth something only on a machine that does nothing else.
"""


@dataclass(frozen=True)
class Run(lanes.Options):
    """What to measure, and how."""

    suite: str | None = option(None, "default: cpu, or gpu on a GPU", choices=tuple(SUITES))
    case: tuple[str, ...] = option((), "these cases, no suite", choices=tuple(CASES))
    mode: tuple[str, ...] = option(("step",), "of --case", choices=tuple(MODES))
    batch: tuple[int, ...] = option((1,), "of --case", least=1, metavar="B")
    engine: tuple[str, ...] = option(("all",), "all, recurx (every backend), recurx-NAME, eager, "
                                     "compile, ...", metavar="NAME")  # fmt: skip
    dtype: tuple[str, ...] = option(tuple(DTYPES), "of --case", choices=tuple(DTYPES))
    seconds: float = options.time(10.0, "of rounds, a case and batch")
    out: Path | None = file("JSON file (default: bench/results/DEVICE-DATE)", type=Path)


@dataclass(frozen=True)
class Report:
    files: tuple[Path, ...] = option((), "default: all of bench/results/", flag="", nargs="*",
                                     type=Path, metavar="FILE")  # fmt: skip
    write: tuple[Path, ...] = option(
        (), "make the tables between the markers of these files anew: <!-- bench:begin --> and "
        "<!-- bench:end --> for all, <!-- ratios:begin --> and <!-- ratios:end --> for one row a "
        "case", type=Path, metavar="PAGE.md",
    )  # fmt: skip
    plots: Path | None = file("folder for plots (default: bench/results/)", "FOLDER", Path)
    no_plots: bool = option(False, "tables only")


@dataclass(frozen=True)
class Compare:
    files: tuple[Path, ...] = option(
        (), "two, the older first; of one, or of the newest in bench/results/, each row is "
        "compared with the newest earlier one of the same device and case there", flag="",
        nargs="*", type=Path, metavar="FILE",
    )  # fmt: skip
    force: bool = option(False, "even if the devices differ")
    fail: bool = option(False, "exit 1 if a row of recurx is slower")


@dataclass(frozen=True)
class Host:
    out: Path | None = file("JSON file (default: none)", type=Path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.set_defaults(execute=lambda arguments: run(Run()))
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    for name, kind, act, text in (
        ("run", Run, run, "measure, and write a result file (the default)"),
        ("report", Report, report, "tables and plots from result files"),
        ("compare", Compare, compare, "which of two results is faster, row by row"),
        ("host", Host, host, "Python before the engine, microseconds a call"),
    ):
        options.command(actions.add_parser(name, help=text), kind, act)


# ---- run -----------------------------------------------------------------------------------------


def run(asked: Run) -> int:
    import importlib

    import torch

    from recurx.atomic import write_json
    from recurx.bench import quantities, results, variants
    from recurx.bench.predict import predict
    from recurx.bench.provenance import provenance, results_folder
    from recurx.bench.runner import Measurement
    from recurx.cli import output

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("--device cuda: torch sees no CUDA device.")
    if asked.cold and device == "cpu":
        raise InvalidArgument("--cold: overwrites a GPU's L2; on a CPU rounds are interleaved.")
    for module in asked.imports:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError, TypeError) as error:
            raise InvalidArgument(f"--import {module}: {error}.") from error
    threads = asked.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    groups = _groups(asked, "gpu" if device == "cuda" else "cpu")
    for group in groups:
        variants.check_engines(group.engines, device, group.mode)
    console = output.make_console()
    limit = asked.time_limit
    how = dataclasses.replace(
        asked, device=device, threads=threads,
        unit=asked.unit or ("step" if device == "cuda" else "net"),
        jobs=asked.jobs or (4 if device == "cuda" else 1),
        deadline=math.inf if limit is None else time.monotonic() + limit,
        say=lambda text: console.print(text, style="dim"),
    )  # fmt: skip
    facts = provenance(device, threads)
    moment = facts["date"][:16].replace(":", "")
    path = asked.out or results_folder() / f"{device}-{moment}.json"
    document: dict[str, Any] = {
        "schema": results.SCHEMA, "status": "partial", "provenance": facts, "groups": []
    }  # fmt: skip
    skipped = 0
    write_json(path, document)  # a path that nobody can write ends it now and not after minutes
    with _terminable():
        for group in groups:
            if how.left() <= 0:
                skipped += 1
                continue
            measurement = Measurement(group, how)
            try:
                measurement.run()
            except results.RecurxError as error:  # its reference failed: nothing to compare with
                how.say(f"{group.case} {group.mode} B={group.batch}: left out: {error}")
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


def _groups(asked: Run, default: str) -> tuple[Any, ...]:
    from recurx.bench.suites import Group, suite

    if not asked.case:
        return suite(asked.suite or default)
    if asked.suite:
        raise InvalidArgument("--suite: a suite names its cases; give --suite or --case.")
    if "solve" in asked.mode:
        for name in asked.case:
            if not CASES[name].task:
                raise InvalidArgument(f"--mode solve: {name} has no trained net.")
    return tuple(
        Group(case, mode, batch, asked.engine, asked.dtype, asked.seconds)
        for case in asked.case
        for mode in asked.mode
        for batch in asked.batch
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: with what was measured in the file."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

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


def host(asked: Host) -> int:
    from recurx.atomic import write_json
    from recurx.bench import host as hosts
    from recurx.cli import output

    check_writable(asked.out)
    document = hosts.run()
    heads = ("case", "batch", "dtype", "backend", "budget us", "p20 us", "p50 us", "p80 us", "")
    title = "from recurx.recurse to the engine, forward without gradient"
    output.make_console().print(output.table(title, heads, hosts.lines(document)))
    if asked.out:
        write_json(asked.out, document)
        print(f"written to {asked.out}")
    return 0


# ---- report and compare --------------------------------------------------------------------------


def report(asked: Report) -> int:
    from recurx import atomic
    from recurx.bench import pages, plots, results
    from recurx.bench import report as tables
    from recurx.bench.provenance import results_folder

    found = [results.load(path) for path in asked.files]
    found = sorted(found, key=lambda r: r.date) or results.load_folder(results_folder())
    found = [result for result in found if result.groups]  # a run may end before its first group
    if not found:
        raise InvalidArgument("bench report: no measurements in these files.")
    for path in asked.write:
        page = path.resolve()  # a link stays one
        try:
            text = page.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"--write {path}: not a page of text: {error}.") from error
        edited = pages.fill_in(text, found, str(path))
        with atomic.replacing(page) as new:
            new.write_text(edited, encoding="utf-8")
        print(f"written to {path}")
    if not asked.write:
        print(tables.markdown(found))
    if not asked.no_plots:
        for path in plots.draw(found, asked.plots or results_folder()):
            print(f"written to {path}")
    return 0


def compare(asked: Compare) -> int:
    from recurx.bench import compare as comparing
    from recurx.bench import results
    from recurx.bench.provenance import results_folder
    from recurx.cli import output

    given = [results.load(path) for path in asked.files]
    if len(given) > 2:
        raise InvalidArgument("bench compare: expected two files at most, the older first.")
    if len(given) == 2:
        before, after = given
    else:
        known = results.load_folder(results_folder())
        before, after = comparing.newest_two(given or known, known)
    found = comparing.compare(before, after, asked.force)
    console = output.make_console()
    lines = [
        (str(d.key), f"{d.before_ms:.4g}", f"{d.after_ms:.4g}", f"{d.ratio:.3f}",
         f"{d.low:.3f}-{d.high:.3f}", d.verdict if d.verdict == "same" else d.verdict.upper())
        for d in found
    ]  # fmt: skip
    heads = ("row", "A ms", "B ms", "B / A", "noise", "B is")
    console.print(output.table(f"A {before.path}\nB {after.path}", heads, lines))
    moved = comparing.machine_moved(found)
    if abs(moved - 1) > comparing.SMALLEST:
        console.print(
            f"PyTorch's own eager rows moved by {moved:.2f}: that much is the machine, not recurx."
        )
    for key, reason in comparing.lost(before, after):
        console.print(f"{key}: has no time in B: {reason}")
    slower, faster = comparing.beyond_the_machine(found)
    beyond = " than the machine's change explains" if abs(moved - 1) > comparing.SMALLEST else ""
    console.print(f"recurx: {len(slower)} rows slower, {len(faster)} faster in B{beyond}.")
    return SLOWER if asked.fail and slower else 0
