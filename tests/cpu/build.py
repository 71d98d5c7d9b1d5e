"""Builds the CPU engine a second time, with every instruction set emulated.

The sources are the same; AVX-512 vectors are lowered by the compiler and AMX tiles have a plain
body (csrc/cpu/tile.hpp), so all engines run on any processor. Objects are cached under build/ by
the hash of their sources.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import native_tools  # noqa: E402 (beside setup.py, no package)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
MODULE = "_cpu_emulated"
DEFINES = (
    *(f"-DRX_HAVE_{isa.upper()}=1" for isa in ISAS[1:]),
    "-DRX_PRETEND_ISA",
    "-DRX_EMULATE_AMX",
    f"-DRX_MODULE_NAME={MODULE}",
)


def sources() -> list[Path]:
    """bindings.cpp, the engines, and the driver that needs no Python."""
    return [
        ROOT / "csrc" / "bindings.cpp",
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
        ROOT / "tests" / "cpu" / "engines_check.cpp",
    ]


def build() -> tuple[Path, Path]:
    """(the extension module, the driver); raises native_tools.NotFound without a compiler."""
    import pybind11

    compiler = native_tools.find_compiler()
    vectors = native_tools.ISA_FLAGS["avx2"][0] if "avx2" in compiler.isas else ()
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-w", *vectors]
    flags += [*DEFINES, f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_path('include')}"]

    files = [*sources(), *sorted((ROOT / "csrc" / "cpu").glob("*.hpp"))]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cpu_emulated" / digest.hexdigest()[:16]
    module = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    driver = folder / "engines_check"
    if module.exists() and driver.exists():
        return module, driver

    folder.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(*compiler.command, *flags, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = dict(
            zip([s.stem for s in sources()], pool.map(compile_one, sources()), strict=True)
        )
    check, bindings = objects.pop("engines_check"), objects.pop("bindings")
    engines = list(objects.values())
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    run(*compiler.command, "-pthread", check, *engines, "-o", str(driver))
    shared = [*compiler.command, "-shared", "-pthread", *undefined]
    run(*shared, bindings, *engines, "-o", str(module))
    return module, driver


def load(path: Path) -> ModuleType:
    """Import the module at `path` under the name MODULE."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
