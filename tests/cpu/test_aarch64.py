"""The engines of aarch64: cross-compiled, and run by qemu's user mode, against fp64.

The extension module would need a Python for aarch64; the driver needs none.
"""

from __future__ import annotations

import hashlib
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
ENGINES = ("neon", "neon_bf16")


@pytest.fixture(scope="module")
def driver() -> Path:
    flags = ["-std=c++17", "-O2", "-w", f"-I{build.ROOT / 'csrc'}"]
    flags += [f"-DRX_HAVE_{name.upper()}=1" for name in ENGINES]
    kept = [*sorted((build.ROOT / "csrc" / "cpu").glob("*.[ch]pp")), build.sources()[-1]]
    digest = hashlib.sha256(repr(flags).encode())
    for file in kept:
        digest.update(file.read_bytes())
    folder = build.ROOT / "build" / "cpu_aarch64" / digest.hexdigest()[:16]
    if (folder / "check").exists():
        return folder / "check"
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in kept:
        isa = source.stem.removeprefix("engine_")
        x86 = isa in build.native_tools.ISA_FLAGS and isa not in ENGINES
        if source.suffix != ".cpp" or x86:
            continue
        own = build.native_tools.ISA_FLAGS[isa][0] if isa in ENGINES else ()
        objects.append(str(folder / f"{source.stem}.o"))
        build.run(CXX, *flags, *own, "-c", str(source), "-o", objects[-1])
    build.run(CXX, "-static", "-pthread", *objects, "-o", str(folder / "check"))
    return folder / "check"


@pytest.mark.parametrize(
    ("processor", "isas"),
    [("max", {"portable", *ENGINES}), ("cortex-a72", {"portable", "neon"})],
)
def test_every_engine_of_a_processor_against_fp64(
    driver: Path, processor: str, isas: set[str]
) -> None:
    """Those that it lacks instructions for are not offered: qemu would end the program."""
    done = subprocess.run([QEMU, "-cpu", processor, driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {*isas, "ok"} and len(lines) > 10


def test_the_build_knows_them_by_the_compiler() -> None:
    found = {
        isa for isa in build.native_tools.ISA_FLAGS if build.native_tools._targets((CXX,), isa)
    }
    assert found == set(ENGINES)


def test_bf16_products_are_bfdot(driver: Path) -> None:
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    assert objdump, "comes with the compiler"
    for name in ENGINES:
        code = subprocess.run(
            [objdump, "-d", str(driver.parent / f"engine_{name}.o")], capture_output=True, text=True
        ).stdout
        assert ("bfdot" in code) == (name == "neon_bf16") and "fmla" in code
