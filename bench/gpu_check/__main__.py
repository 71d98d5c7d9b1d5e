"""The command line of the check."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench.gpu_check
from bench.gpu_check import child, journal
from bench.gpu_check.phases import LOCK, ROOT, SECONDS, chosen
from bench.gpu_check.runner import Runner


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu_check", description=bench.gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--call", type=int, choices=tuple(SECONDS), default=1)
    parser.add_argument("--phases", nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="all but these")
    parser.add_argument("--seconds", type=float, help=f"of all together: {SECONDS} by call")
    parser.add_argument("--commit", help="what is checked, where git does not know it")
    parser.add_argument("--merge", action="store_true", help="no phase: the file of the journal")
    parser.add_argument("--list", action="store_true", help="print the phases")
    parser.add_argument("--import", dest="imports", nargs="+", default=[], metavar="MODULE",
                        help="imported first in every phase")  # fmt: skip
    asked = parser.parse_args()
    try:
        todo = chosen(asked.phases, asked.skip)
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        print("\n".join(f"{phase.limit:5.0f} s  {phase.name}" for phase in todo))
        return 0
    folder = asked.outdir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    if asked.merge:
        for lines in sorted(folder.glob("gpu-*.jsonl")):
            made = journal.document(journal.read(lines))
            journal.write(lines.with_suffix(".json"), made)
            print(f"{made['status']}: {lines.with_suffix('.json')}")
        return 0
    now = datetime.datetime.now(datetime.timezone.utc)
    moment = now.isoformat(timespec="seconds")
    result = folder / f"gpu-{moment[:19].replace(':', '')}-call-{asked.call}.json"
    lines = result.with_suffix(".jsonl")
    journal.append(lines, {
        "phase": "", "kind": "call", "planned": [phase.name for phase in todo], "call": asked.call,
        "date": moment, "command": " ".join(["python3 -m bench.gpu_check", *sys.argv[1:]]),
        "commit": asked.commit or _git("rev-parse", "HEAD"), "device": "cuda",
    })  # fmt: skip
    seconds = asked.seconds or SECONDS[asked.call]
    runner = Runner(result, environment(asked.imports), begin + seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runner.run(todo)
    except KeyboardInterrupt:
        print("interrupted")
    (folder / LOCK).unlink(missing_ok=True)
    made = journal.document(journal.read(lines))
    bad = [p["name"] for p in made["phases"] if p["status"] not in ("passed", "absent")]
    if "no gpu" in runner.ended.values():
        print("nothing to do: torch sees no NVIDIA GPU")
        return 0
    print(f"{made['status']} after {time.monotonic() - begin:.0f} s: {result}")
    print(f"not passed: {', '.join(bad)}" if bad else "all passed")
    return int(bool(bad))


def environment(imports: list[str]) -> dict[str, str]:
    """Of the phases: they find this checkout and its tests, whatever is installed."""
    tests = ROOT / "tests"
    paths = [str(ROOT), str(tests), str(tests / "device"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        child.IMPORT: ",".join(imports),
        "PYTEST_ADDOPTS": "",
        "RECURX_CACHE": os.environ.get("RECURX_CACHE", "0"),  # no verdict of an earlier build
    }


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
