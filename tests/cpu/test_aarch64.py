"""The engines of aarch64: cross-compiled, and run by qemu's user mode.

The extension module would need a Python for aarch64. Two drivers need none: one holds calls against
fp64, the other holds calls, solves and windows against the portable engine, whose gradients the
tests on x86 hold against fp64.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cpu import build

CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (CXX, QEMU) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {' and no '.join(MISSING)} (Debian: apt install g++-aarch64-linux-gnu qemu-user)",
)
ENGINES = ("neon", "neon_bf16", "neon_bfmmla")
SOURCES = (
    "run", "run_window", "solve", "noise", "pool", "checks", "dispatch", "variant_pack", "hash",
)  # fmt: skip
# Expressions of csrc/cpu/dot_kernel.hpp, BFMMLA's loop, and what a bug makes of them.
BUGS = {
    "the first of two rows twice": ("p + ld", "p"),
    "the first of two columns twice": (
        "mmla(c[r + 1][v], x, column[v][1])", "mmla(c[r + 1][v], x, column[v][0])",
    ),
    "the first of two pairs twice": ("load(p + W)", "load(p)"),
    "the last pair of an odd number dropped": ("(k < pairs)", "false"),
    "the other accumulator": (
        "mmla(c[r][v], x, column[v][0])", "mmla(c[r + 1][v], x, column[v][0])",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> Path:
    """A folder with the drivers `engines_check` and `random_check`, and with `planted`, which is
    the first with all bugs: RX_PLANTED_BUG says which one is on."""
    cpu, tests = build.ROOT / "csrc" / "cpu", Path(__file__).parent
    flags = ["-std=c++17", "-O1", "-w", f"-I{tests}"]
    flags += [f"-DRX_HAVE_{name.upper()}=1" for name in ENGINES]
    digest = hashlib.sha256(repr((flags, BUGS)).encode())
    for file in sorted([*cpu.rglob("*.[ch]pp"), *tests.glob("*.[ch]pp")]):
        digest.update(file.read_bytes())
    folder = build.ROOT / "build" / "cpu_aarch64" / digest.hexdigest()[:16]
    if (folder / "planted").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cpu, folder / "bugs" / "cpu")
    kernel = folder / "bugs" / "cpu" / "dot_kernel.hpp"
    text = kernel.read_text()
    for number, (old, new) in enumerate(BUGS.values()):
        assert text.count(old) == 1, f"{kernel.name} has {text.count(old)} times {old!r}"
        text = text.replace(old, f"(rx_planted == {number} ? {new} : {old})")
    kernel.write_text(text.replace("#pragma once", "#pragma once\nextern int rx_planted;"))
    stub = folder / "wakes.cpp"
    stub.write_text(
        '#include <cstdlib>\nint rx_planted = std::atoi(std::getenv("RX_PLANTED_BUG"));\n'
    )

    def compiled(source: Path, to: str, *more: str) -> str:
        isa = source.stem.removeprefix("engine_")
        own = build.native_tools.ISA_FLAGS[isa][0] if isa in ENGINES else ()
        target = str(folder / f"{to}.o")
        build.run(CXX, *flags, *own, *more, "-c", str(source), "-o", target)
        return target

    real = f"-I{cpu.parent}"
    engines = [f"engine_{name}" for name in ("portable", *ENGINES)]
    shared = [compiled(cpu / f"{name}.cpp", name, real) for name in (*SOURCES, *engines)]
    checks = [compiled(tests / f"{n}.cpp", n, real) for n in ("engines_check", "random_check")]
    with_bugs = kernel.with_name(f"{engines[-1]}.cpp")
    bugs = compiled(with_bugs, "bugs", f"-I{folder / 'bugs'}", *build.DOES_NOT_TRAIN)
    link = (CXX, "-static", "-pthread")
    for check in checks:
        build.run(*link, check, *shared, "-o", check.removesuffix(".o"))
    parts = [checks[0], bugs, compiled(stub, "wakes"), *shared[:-1]]
    build.run(*link, *parts, "-o", str(folder / "planted"))
    return folder


def emulate(processor: str, *command: str, bug: int = -1) -> tuple[int, str]:
    """(exit status, output) of a program on that processor."""
    line = [QEMU, "-cpu", processor, *command]
    environ = {**os.environ, "RX_PLANTED_BUG": str(bug), "RECURX_CPU_THREADS": "own"}
    done = subprocess.run(line, capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("processor", "isas"),
    [("max", {"portable", *ENGINES}), ("cortex-a72", {"portable", "neon"})],
)
def test_every_engine_of_a_processor_against_fp64(
    programs: Path, processor: str, isas: set[str]
) -> None:
    """Those that it lacks instructions for are not offered: qemu would end the program."""
    status, said = emulate(processor, str(programs / "engines_check"))
    assert status == 0, said
    lines = said.splitlines()
    assert {line.split()[0] for line in lines} == {*isas, "ok"} and len(lines) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "count"), [("neon_f32", 8), ("neon_bf16", 6), ("bfdot_bf16", 6), ("bfmmla_bf16", 6)]
)
def test_calls_solves_and_windows_of_random_shapes(programs: Path, engine: str, count: int) -> None:
    """Bit-equal reruns, and the portable engine's results; BFMMLA has the bits of BFDOT."""
    words = (str(programs / "random_check"), "0", str(count), engine, "3", "against")
    status, said = emulate("max", *words)
    assert status == 0 and "ok" in said.splitlines(), said
    for kind in ("run", "solve", "window"):
        found = [float(d) for d in re.findall(rf": {kind} (\S+)$", said, re.MULTILINE)]
        # No solve where samples draw what they drop: a queue moves them.
        assert found and (kind == "solve" or len(found) == count)
        assert engine != "bfmmla_bf16" or not any(found)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(programs: Path, bug: str) -> None:
    words = (str(programs / "planted"), ENGINES[-1])
    status, said = emulate("max", *words, bug=list(BUGS).index(bug))
    wrong = [line for line in said.splitlines() if line.endswith("FAILED")]
    assert status == 1 and wrong and all(" bf16 " in line for line in wrong), said


def test_with_all_bugs_asleep_it_is_right(programs: Path) -> None:
    status, said = emulate("max", str(programs / "planted"), ENGINES[-1])
    assert status == 0, said


def test_the_build_knows_them_by_the_compiler() -> None:
    found = {
        isa for isa in build.native_tools.ISA_FLAGS if build.native_tools._targets((CXX,), isa)
    }
    assert found == set(ENGINES)


def test_bf16_products_are_by_their_instruction(programs: Path) -> None:
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    assert objdump, "comes with the compiler"
    for name in ENGINES:
        code = subprocess.run(
            [objdump, "-d", str(programs / f"engine_{name}.o")], capture_output=True, text=True
        ).stdout
        assert ("bfdot\t" in code) == (name == "neon_bf16")
        assert ("bfmmla\t" in code) == (name == "neon_bfmmla")
        assert "fmla\t" in code
