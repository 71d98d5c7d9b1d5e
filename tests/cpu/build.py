"""Builds the CPU engine a second time, so that every instruction set runs on any processor.

The sources are the same. An engine is compiled with the instructions of its own that are here;
wider vectors are lowered by the compiler, and AMX tiles have a plain body (csrc/cpu/tile.hpp).
Objects are cached under build/ by the hash of their sources.
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
DEFINES = ("-DRX_PRETEND_ISA", "-DRX_EMULATE_AMX", f"-DRX_MODULE_NAME={MODULE}")


def have(isas: Sequence[str]) -> list[str]:
    return [f"-DRX_HAVE_{isa.upper()}=1" for isa in isas]


def emulated() -> list[str]:
    """What the module has beside portable code: what this processor lacks, and AVX-512 for the
    fp32 states of AMX. The engines of recurx._C are the rest."""
    lacked = [isa for isa in ISAS[1:] if isa not in usable()]
    if "amx" in lacked and "avx512" not in lacked:
        lacked.insert(0, "avx512")
    return [*lacked, *(isa for isa in INT8 if isa.partition("_")[0] in lacked)]


def own_flags(isa: str) -> list[str]:
    """The instructions of an engine that this processor has: in doubt those of AVX2, which the
    compiler lowers wider vectors to."""
    level = ISAS.index({"avx2_vnni": "avx2", "avx512_vnni": "avx512"}.get(isa, isa))
    known = native_tools.find_compiler().isas
    found = [i for i in ISAS[1 : level + 1] if i in usable()] or [i for i in ISAS[1:2] if level]
    return [flag for i in found[-1:] if i in known for flag in native_tools.ISA_FLAGS[i][0]]


def _isa_of(source: Path) -> str:
    """The instruction set of an engine's file, "" of any other."""
    return source.stem.removeprefix("engine_") if source.stem.startswith("engine_") else ""


def sources(isas: Sequence[str]) -> list[Path]:
    """What all engines share, and portable code and those of `isas`."""
    others = tuple(f"engine_{isa}" for isa in native_tools.ISA_FLAGS if isa not in isas)
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
    isas = emulated()
    files = [ROOT / "csrc" / "bindings.cpp", *sources(isas)]
    return _linked(files, name, have(isas), ("-shared", *undefined))


def driver() -> Path:
    """The driver that needs no Python, of parts of the engines; their objects lie beside it.

    Raises native_tools.NotFound without a compiler.
    """
    files = [Path(__file__).with_name("engines_check.cpp"), *sources(ISAS)]
    return _linked(files, "engines_check", [*have(ISAS[1:]), *DOES_NOT_TRAIN])


def _linked(files: list[Path], name: str, more: Sequence[str], link: Sequence[str] = ()) -> Path:
    compiler, flags = settings(ROOT / "csrc")
    flags = [*flags, *more]
    own = [own_flags(isa) for isa in map(_isa_of, files) if isa]
    digest = hashlib.sha256(repr((compiler, flags, own)).encode())
    for file in [*files, *sorted((ROOT / "csrc" / "cpu").rglob("*.hpp"))]:
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "cpu_emulated" / digest.hexdigest()[:16]
    with locked(folder / "lock"):
        if not (folder / name).exists():
            compile_all(compiler, flags, files, folder, name, link)
    return folder / name


def compile_all(
    compiler: native_tools.Compiler, flags: list[str], files: list[Path], folder: Path, name: str,
    link: Sequence[str],
) -> None:  # fmt: skip
    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        own = own_flags(isa) if (isa := _isa_of(source)) else ()
        run(*compiler.command, *flags, *own, "-c", str(source), "-o", target)
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
    watched = ["-fsanitize=address,undefined"] if sanitized else []
    part = [*own_flags(name), *watched, *DOES_NOT_TRAIN]
    source = cpu / f"engine_{name}.cpp"
    run(*compiler.command, *flags, *part, "-c", str(source), "-o", str(engine))
    others = [beside / f"{s}.o" for s in ("engines_check", *(f.stem for f in sources(ISAS)))]
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
