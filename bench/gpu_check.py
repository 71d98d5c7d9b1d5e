"""Run all that needs a GPU, phase by phase, and leave one JSON file and one log.

Started by bench/gpu_check.sh, which says what for. Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

_SMI_FIELDS = "name,driver_version,memory.total,clocks.max.sm"
ROOT = Path(__file__).resolve().parent.parent
TOTAL = 520.0  # seconds for all phases together
KERNEL_TESTS = ["tests/device", "tests/kernels"]
# Racecheck watches shared memory and needs the sanitizer's own bookkeeping for each access: small
# shapes, one dtype.
SANITIZED = ["-k", "(golden_words or right_and_bit_equal or rows_and_depths) and not 1536"]


@dataclass(frozen=True)
class Phase:
    name: str
    command: list[str]
    limit: float  # seconds


@dataclass
class Result:
    name: str
    command: str
    status: str  # passed, failed, timeout, missing
    seconds: float
    limit: float
    last_lines: list[str]


def phases(quick: bool, folder: Path, figures: bool = False) -> list[Phase]:
    """Proof, with a few figures at its end; or, for all figures, the build and the full suite."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    share = 0.5 if quick else 1.0
    build = Phase("build", [python, "csrc/native_build.py"], 120)
    if figures:
        return [build, _benchmarks("gpu", folder, 0.9 * (TOTAL - build.limit))]
    found = [
        build,
        Phase("conformance", [*pytest, "tests/device/test_wrappers_on_gpu.py"], 50),
        Phase("kernel tests", [*pytest, *KERNEL_TESTS], 90 * share),
        Phase("gpu tests", [*pytest, "-m", "gpu", "tests", "--ignore=tests/device"], 60 * share),
    ]
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        found.append(Phase(tool, [*command, *pytest, *KERNEL_TESTS, *SANITIZED], 35 * share))
    ops = [*pytest, "bench/ops", "--benchmark-json", str(folder / "ops.json"), "-k"]
    ops += ["test_kernel and 64 and not compile" if quick else "test_kernel and (64 or 512)"]
    found.append(Phase("operations", ops, 30 * share))
    return [*found, _benchmarks("gpu-quick", folder, 65)]


def _benchmarks(suite: str, folder: Path, limit: float) -> Phase:
    """The suite, which ends by itself: what it has measured is in its file in any case."""
    command = [sys.executable, "-m", "recurx", "bench", "run", "--suite", suite]
    command += ["--time-limit", str(limit - 20), "--out", str(folder / f"bench-{suite}.json")]
    return Phase("benchmarks", command, limit)


def environment() -> dict[str, str]:
    """Children build for this device alone, and the sanitizer sees each allocation by itself."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "PYTHONPATH": path,
        "RECURX_CUDA": "1",  # a build without its CUDA part must fail here, not fall back
        "RECURX_CUDA_ARCHS": f"{major}{minor}",
        "PYTHONUNBUFFERED": "1",
    }


def run_phase(phase: Phase, log_path: Path, environ: dict[str, str], limit: float) -> Result:
    """Run one command in a process group of its own; its output goes to the log."""
    line = " ".join(phase.command)
    start = time.monotonic()
    if shutil.which(phase.command[0]) is None:
        return Result(phase.name, line, "missing", 0.0, limit, [f"{phase.command[0]}: not found"])
    if phase.name in ("memcheck", "racecheck", "synccheck"):
        environ = environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log_path.open("ab") as log:
        log.write(f"\n===== {phase.name}: {line}\n".encode())
        log.flush()
        offset = log.tell()
        child = subprocess.Popen(
            phase.command,
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "passed" if child.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "timeout"
    with log_path.open("rb") as log:
        log.seek(offset)
        tail = log.read().decode(errors="replace").splitlines()[-8:]
    return Result(phase.name, line, status, round(time.monotonic() - start, 1), limit, tail)


def run_all(
    todo: list[Phase],
    folder: Path,
    environ: dict[str, str],
    total: float,
    after: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Every phase, each within its own limit and all within `total` seconds.

    `after` gets what is there after every phase: a machine may be taken away between two.
    """
    end = time.monotonic() + total
    results = []
    for phase in todo:
        left = end - time.monotonic()
        if left < 5:
            line = " ".join(phase.command)
            results.append(Result(phase.name, line, "timeout", 0.0, 0.0, ["no time was left"]))
            after(results)
            continue
        limit = min(phase.limit, left)
        result = run_phase(phase, folder / "gpu_check.log", environ, limit)
        print(f"{result.name:14s} {result.status:8s} {result.seconds:6.1f} s", flush=True)
        results.append(result)
        after(results)
    return results


def no_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed for this Python"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    return None


def versions() -> dict[str, str]:
    found = {}
    queries = {
        "nvidia_smi": ["nvidia-smi", "--format=csv,noheader", f"--query-gpu={_SMI_FIELDS}"],
        "nvcc": ["nvcc", "--version"],
        "compute_sanitizer": ["compute-sanitizer", "--version"],
    }
    for name, command in queries.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            found[name] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--quick", action="store_true", help="half the time for tests and figures")
    parser.add_argument(
        "--figures", action="store_true", help="no proof: build, and all the time for benchmarks"
    )
    arguments = parser.parse_args()
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    folder = arguments.outdir.resolve()
    report = folder / "gpu_check.json"
    (folder / "gpu_check.log").write_text("")
    reason = no_gpu()
    if reason:
        print(f"gpu_check: nothing to do: {reason}")
        report.write_text(json.dumps({"status": "no gpu", "reason": reason}, indent=1) + "\n")
        return 0
    from recurx.atomic import write_json
    from recurx.bench.provenance import provenance  # imports torch, which may be missing

    start = time.monotonic()
    todo = phases(arguments.quick, folder, arguments.figures)
    command = ["bench/gpu_check.sh", *sys.argv[1:]]
    content = provenance("cuda", os.cpu_count() or 1, command)
    content |= {"versions": versions(), "quick": arguments.quick, "figures": arguments.figures}

    def write(results: list[Result]) -> None:
        passed = all(r.status == "passed" for r in results)
        state = "passed" if len(results) == len(todo) else "not finished"
        content["status"] = state if passed else "failed"
        content["seconds"] = round(time.monotonic() - start, 1)
        content["phases"] = [asdict(result) for result in results]
        write_json(report, content)

    run_all(todo, folder, environment(), TOTAL, write)
    print(f"{content['status']} in {content['seconds']} s: {report}")
    return int(content["status"] != "passed")


if __name__ == "__main__":
    sys.exit(main())
