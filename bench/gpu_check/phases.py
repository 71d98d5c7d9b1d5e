"""The phases in their order, as data.

What would show a fault first comes first, and each kernel family has a process of its own. Kernels
are compiled beside whatever does not need them; what is timed runs alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.gpu_check import sizes
from bench.gpu_check.journal import ROOT

ALONE, BESIDE, COMPILING = "alone", "beside", "compiling"  # lanes
LOCK = "compiling.lock"  # beside the journal, of times.py
SECONDS = {1: 420.0, 2: 270.0}  # of a call
FAMILIES = (
    "owner", "grid", "cluster-2", "cluster-4", "cluster-8", "triton-tiled", "triton-persistent",
    "library",
)  # fmt: skip
OF_THE_MODULE = tuple(f for f in FAMILIES if f.startswith(("owner", "grid", "cluster")))
TESTS = (
    "test_cuda_kernels_on_gpu", "test_cuda_owner_on_gpu", "test_grid_on_gpu",
    "test_cluster_on_gpu", "test_triton_backend_on_gpu", "test_triton_window_on_gpu",
    "test_solve_on_gpu", "test_step_on_gpu", "test_profile_on_gpu",
)  # fmt: skip
TESTS_OF_THE_MODULE = (
    "test_cuda_owner_on_gpu", "test_cluster_on_gpu", "test_solve_on_gpu", "test_step_on_gpu",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Phase:
    """One process.

    Args:
        limit: seconds.
        needs: phases that must have ended, if they are run at all.
        lane: ALONE: no other but those BESIDE; phases of any other lane run together.
        quiet: nothing runs beside it, because it is timed.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ("versions",)
    lane: str = ALONE
    quiet: bool = False
    environ: dict[str, str] = field(default_factory=dict)


def phases() -> list[Phase]:
    built = ("versions", "build")
    found = [
        Phase("versions", python("versions"), 40, needs=()),
        Phase("build", python("build"), 200, lane=BESIDE),
        Phase("wrappers", pytest("test_wrappers_on_gpu"), 60),
    ]
    # Those that need no compiled module first: it is being compiled.
    for family in sorted(FAMILIES, key=lambda f: f in OF_THE_MODULE):
        compiled = family in OF_THE_MODULE
        needs, limit = (built, 25) if compiled else (("versions",), 45)  # Triton compiles first
        found.append(Phase(f"proof {family}", python("proof", family), limit, needs))
    found += [
        Phase("limits", python("limits"), 40, built, quiet=True),
        Phase("times", python("times"), 100, built, quiet=True),
    ]
    for case, mode, batch, way in sizes.COMPILED:
        name = f"compile {case} {mode} {batch} {way}"
        command = python("times", "compiled", case, mode, str(batch), way)
        few = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4"}  # of each of many
        found.append(Phase(name, command, 100, (*built, "times"), COMPILING, environ=few))
    for case, mode, batch in sizes.LATER:
        name = f"times {case} {mode} {batch}"
        command = python("times", "all", case, mode, str(batch))
        found.append(Phase(name, command, 50, built, quiet=True))
    for name in TESTS:  # some run while the module is being compiled
        needs = built if name in TESTS_OF_THE_MODULE else ("versions",)
        found.append(Phase(f"tests {name}", pytest(name), 45, needs))
    for tool in TOOLS:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86")
        command += python("proof", "--small", *OF_THE_MODULE, *sizes.SANITIZED_BESIDE)
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each allocation by itself
        found.append(Phase(f"sanitizer {tool}", command, 45, built, environ=alone))
    return [replace(phase, limit=phase.limit * sizes.PATIENCE) for phase in found]


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """A process of this package."""
    return (*child(), f"bench.gpu_check.{module}", *arguments)


def pytest(file: str, *arguments: str) -> tuple[str, ...]:
    """The tests of a file of tests/device, with the settings of this package."""
    settings = ("-c", "bench/gpu_check/pytest.ini", "--rootdir", str(ROOT))
    plugins = ("-p", "no:cacheprovider", "-p", "bench.gpu_check.pytest_lines")
    tests = (f"tests/device/{file}.py", "-m", "gpu", "-q", "-rs")
    return (*child(), "pytest", *settings, *plugins, *tests, *arguments)


def child() -> tuple[str, ...]:
    return (sys.executable, "-u", "-m", "bench.gpu_check.child")


def chosen(names: Sequence[str], skipped: Sequence[str]) -> list[Phase]:
    """Those called by a name or its first words ("proof", "proof owner"), all without names; the
    versions always.

    Raises:
        ValueError: a name that calls no phase; the known ones are listed.
    """
    found = phases()

    def called(phase: Phase, by: Sequence[str]) -> bool:
        return any(f"{phase.name} ".startswith(f"{name} ") for name in by)

    for name in (*names, *skipped):
        if not any(called(phase, [name]) for phase in found):
            known = ", ".join(phase.name for phase in found)
            raise ValueError(f"gpu_check: phase: expected one of {known}, got {name!r}")
    return [
        phase for phase in found
        if phase.name == "versions"
        or ((not names or called(phase, names)) and not called(phase, skipped))
    ]  # fmt: skip
