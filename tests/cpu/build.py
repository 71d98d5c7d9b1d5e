"""Builds the CPU engine a second time, with every instruction set emulated.

The sources are the same; AVX-512 vectors are lowered by the compiler and AMX tiles have a plain
body (csrc/cpu/tile.hpp), so all engines run on any processor. Objects are cached under build/ by
the hash of their sources.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests.locked import locked

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import native_tools  # noqa: E402 (beside setup.py, no package)

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_split")
MODULE = "_cpu_emulated"
INT8 = ("avx2_vnni", "avx512_vnni")  # engines of nothing else
# The driver neither trains nor quantizes, and the window is most of an engine's code.
DOES_NOT_TRAIN = ("-DRX_WITHOUT_WINDOW",)
OF_DRIVER = (*DOES_NOT_TRAIN, *(f"-URX_HAVE_{isa.upper()}" for isa in INT8))
DEFINES = (
    *(f"-DRX_HAVE_{isa.upper()}=1" for isa in (*ISAS[1:], *INT8)),
    "-DRX_PRETEND_ISA",
    "-DRX_EMULATE_AMX",
    f"-DRX_MODULE_NAME={MODULE}",
)


def sources(without: Sequence[str] = ()) -> list[Path]:
    """The engines, those of other processors than x86 left out."""
    neon = [isa for isa in native_tools.ISA_FLAGS if isa.startswith("neon")]
    others = tuple(f"engine_{isa}" for isa in (*neon, *without))
    found = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [file for file in found if not file.stem.endswith(others)]


@functools.cache
def settings(include: Path) -> tuple[native_tools.Compiler, list[str]]:
    """The compiler and its flags; raises native_tools.NotFound without one."""
    import pybind11

    compiler = native_tools.find_compiler()
    vectors = native_tools.ISA_FLAGS["avx2"][0] if "avx2" in compiler.isas else ()
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-w", *vectors]
    flags += [*DEFINES, f"-I{include}", f"-I{pybind11.get_include()}"]
    return compiler, [*flags, f"-I{sysconfig.get_path('include')}"]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def module() -> Path:
    """The extension module; raises native_tools.NotFound without a compiler."""
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    name = f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    files = [ROOT / "csrc" / "bindings.cpp", *sources()]
    return _linked(files, name, (), ("-shared", *undefined))


def driver() -> Path:
    """The driver that needs no Python, of parts of the engines; their objects lie beside it.

    Raises native_tools.NotFound without a compiler.
    """
    files = [Path(__file__).with_name("engines_check.cpp"), *sources(INT8)]
    return _linked(files, "engines_check", OF_DRIVER)


def _linked(files: list[Path], name: str, more: Sequence[str], link: Sequence[str] = ()) -> Path:
    compiler, flags = settings(ROOT / "csrc")
    flags = [*flags, *more]
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    for file in [*files, *sorted((ROOT / "csrc" / "cpu").rglob("*.hpp"))]:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cpu_emulated" / digest.hexdigest()[:16]
    with locked(folder / "lock"):
        if not (folder / name).exists():
            _compile(compiler, flags, files, folder, name, link)
    return folder / name


def _compile(
    compiler: native_tools.Compiler, flags: list[str], files: list[Path], folder: Path, name: str,
    link: Sequence[str],
) -> None:  # fmt: skip
    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(*compiler.command, *flags, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, files))
    part = str(folder / f"{name}.part")
    run(*compiler.command, *link, "-pthread", *objects, "-o", part)
    os.replace(part, folder / name)


def usable() -> list[str]:
    """Instruction sets of this processor, as the built module says; [] without one."""
    try:
        from recurx import _C

        return list(_C.cpu_isas())
    except (ImportError, AttributeError):
        return []


def with_bugs(
    name: str, bugs: Sequence[tuple[str, str, str]], folder: Path, sanitized: bool = False
) -> Path:
    """The driver with the engine of csrc/cpu/engine_`name`.cpp compiled anew from headers with
    bugs, with its own instructions if this processor has them. All bugs share one compilation;
    RX_PLANTED_BUG is the number of the one that is awake, -1: none (`run_with_bug`).

    `bugs`: (file, old, new) of csrc/cpu; every occurrence of `old` is replaced, and BUG in `new`
        is true while that bug is awake.
    `sanitized`: the memory of all engines under g++'s sanitizers of addresses and undefined
        behaviour (their accesses only in this engine).
    """
    beside = driver().parent
    cpu = folder / "csrc" / "cpu"
    shutil.copytree(ROOT / "csrc" / "cpu", cpu)
    for number, (file, old, new) in enumerate(bugs):
        text = (cpu / file).read_text()
        assert old in text, f"{file} has no {old!r} any more"
        awake = new.replace("BUG", f"(rx_planted == {number})")
        (cpu / file).write_text(text.replace(old, awake))
    vectors = (cpu / "vec.hpp").read_text()
    (cpu / "vec.hpp").write_text(
        vectors.replace("#pragma once", "#pragma once\nextern int rx_planted;", 1)
    )
    stub = folder / "wakes.cpp"
    stub.write_text(
        '#include <cstdlib>\nint rx_planted = std::atoi(std::getenv("RX_PLANTED_BUG"));\n'
    )
    compiler, flags = settings(folder / "csrc")
    engine = folder / f"engine_{name}.o"
    own = native_tools.ISA_FLAGS[name][0] if name in usable() else ()
    watched = ["-fsanitize=address,undefined"] if sanitized else []
    part = [*own, *watched, *DOES_NOT_TRAIN]
    source = cpu / f"engine_{name}.cpp"
    run(*compiler.command, *flags, *part, "-c", str(source), "-o", str(engine))
    others = [beside / f"{s}.o" for s in ("engines_check", *(f.stem for f in sources(INT8)))]
    objects = [str(o) for o in others if o.name != engine.name]
    link = [*compiler.command, "-pthread", *watched]
    run(*link, *objects, str(engine), str(stub), "-o", str(folder / "check"))
    return folder / "check"


def run_with_bug(program: Path, *words: str, bug: int = -1) -> subprocess.CompletedProcess[str]:
    """The driver of `with_bugs`, with one of its bugs awake or with none."""
    environ = {**os.environ, "RX_PLANTED_BUG": str(bug)}
    return subprocess.run([str(program), *words], capture_output=True, text=True, env=environ)


def load(path: Path, name: str = MODULE) -> ModuleType:
    """Import the module at `path` under the name that it was built with."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
