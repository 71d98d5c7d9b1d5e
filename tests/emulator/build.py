"""Build kernels for the emulator, once for each content of their sources, and call them.

    lib = load_kernels(["grid_sm80/launch.cu", "runtime.cu"], checked=True)
    lib.configure(seed=3)
    lib.call("rx_grid_sm80_run", recursion, plan, None)     # raises EmulatorFault with the report

Two builds exist of everything: *checked* sees every load and store of the kernel (the compiler's
thread sanitizer puts a call in front of each), *plain* sees only what goes through the wrappers and
must run with the race checker off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from locked import locked

RUNTIME = Path(__file__).parent / "runtime"
KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
# Kernels that only tests run: they include csrc/cuda/rx, or lie in a copy of csrc/cuda.
FIXTURES = Path(__file__).parent / "fixtures"
SUPPORTED = ("x86_64", "aarch64")

COMMON = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Else an inline variable of csrc/cuda is shared with whatever library of it was loaded before.
COMMON += ["-fno-gnu-unique"]
# native: the caches below are keyed by the CPU, and the products of the emulator want FMA.
SPEED = ["-O3", "-march=native"]
# One call of the emulator stays one place in the code, for that is how it knows an instruction.
COMMON += ["-fno-thread-jumps", "-fno-split-paths", "-fno-unswitch-loops", "-fno-partial-inlining"]
COMMON += ["-fno-ipa-cp-clone", "-fno-tree-tail-merge", "-fno-crossjumping"]
COMMON += ["-freorder-blocks-algorithm=simple", "-fno-optimize-sibling-calls"]
# Every access calls hooks.cpp instead of libtsan; -g1 lets reports name the source line.
CHECKED = ["-O2", "-march=native", "-g1", "-fsanitize=thread"]
CHECKED += ["--param", "tsan-instrument-func-entry-exit=0"]


class EmulatorFault(RuntimeError):
    """The emulator stopped a kernel: a race, a deadlock, a bad address, a misused instruction."""


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if sys.platform != "linux":
        return f"the emulator maps memory and reads symbols as Linux does, not {sys.platform}"
    if platform.machine() not in SUPPORTED:
        return (
            f"the emulator switches stacks on {' and '.join(SUPPORTED)}, not {platform.machine()}"
        )
    if shutil.which(compiler()) is None:
        return f"no C++ compiler: {compiler()!r} is not on PATH"
    return None


def compiler() -> str:
    """g++ alone emits the sanitizer calls that hooks.cpp answers."""
    return os.environ.get("EMU_CXX", "g++")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "recurx" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _machine_key() -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    native = subprocess.run(
        [compiler(), "-march=native", "-Q", "--help=target"], capture_output=True, text=True
    )
    return version.stdout + native.stdout


def _key(parts: Iterable[str], folders: Iterable[Path]) -> str:
    digest = hashlib.sha256(_machine_key().encode())
    for part in parts:
        digest.update(part.encode() + b"\0")
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
                digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file of this name in the cache; made under another name first, then moved into place.

    One process makes it; others that want it meanwhile wait: several files of tests load the same
    kernels, and processes that run them begin together.
    """
    path = cache_folder() / name
    if not path.exists():
        with locked(cache_folder() / f"{name}.lock"):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
                    made = Path(work) / name
                    make(made)
                    made.replace(path)
    os.utime(path)
    return path


def prune_cache(days: float = 14) -> None:
    """Removes what no test has used for some days: each edit of a kernel leaves a build behind."""
    for path in cache_folder().iterdir():
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_mtime < time.time() - days * 86400:
                path.unlink()


def object_file(source: Path, flags: Sequence[str]) -> Path:
    """Keyed by all that it may include: its own folder, the runtime, kernels' headers."""
    if source.is_relative_to(RUNTIME):
        root, folders = RUNTIME, {RUNTIME}
    else:
        # csrc/cuda or a copy of that, where a file may lie in a family's folder; or some folder.
        copies = (folder for folder in source.parents[:2] if (folder / "api.h").exists())
        root = next(copies, source.parent)
        folders = {RUNTIME, root}
        if not (root / "api.h").exists():
            folders |= {KERNELS, FIXTURES}
    name = str(source.relative_to(root))
    include = [word for folder in sorted(folders) for word in ("-I", folder)]
    key = _key([name, *COMMON, *flags], sorted(folders))
    command = [compiler(), *COMMON, *flags, *include, "-x", "c++", "-c", source, "-o"]
    return _cached(f"{source.stem}-{key}.o", lambda made: _run([*command, made]))


def _object_files(sources: Iterable[Path], flags: Sequence[str]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: object_file(source, flags), sources))


def build(sources: Sequence[Path], checked: bool, flags: Sequence[str] = ()) -> Path:
    """A shared library of kernel sources and the emulator. Only the kernels are instrumented."""
    flags = [*(CHECKED if checked else SPEED), "-DRX_EMU", *flags]
    objects = _object_files(sources, flags)
    objects += _object_files(sorted(RUNTIME.glob("*.cpp")), SPEED)
    link = [compiler(), "-shared", "-pthread", "-Wl,-Bsymbolic", *objects, "-ldl", "-o"]
    name = f"{sources[0].stem}-{_key([o.name for o in objects], [])}.so"
    return _cached(name, lambda made: _run([*link, made]))


_WRAPPERS = re.compile(r"/rx/\w+\.cuh:|/more_rx\.cuh:|/cuda_names\.h:")


def source_lines(message: str) -> str:
    """Replaces <library+0xaddress> in a report by file:line, as far as addr2line knows."""

    def resolve(match: re.Match[str]) -> str:
        if shutil.which("addr2line") is None:
            return match[0]
        # A return address: the access is in the instruction before it.
        address = hex(int(match[2], 16) - 1)
        command = ["addr2line", "-i", "-e", match[1], address]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        # Inlined, the innermost first: a wrapper says less than the line that calls it.
        outside = [line for line in lines if line and not _WRAPPERS.search(line)]
        line = (outside or lines)[0].strip()
        name = line.rsplit("/", 1)[-1].split(" ")[0]
        return match[0] if line.startswith("??") or not name else name

    return re.sub(r"<([^<>]+?)\+(0x[0-9a-f]+)>", resolve, message)


class Emulated:
    """A built library: its C entries, and the emulator's settings and counters."""

    def __init__(self, path: Path, checked: bool) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emu_set.argtypes = [ctypes.c_char_p, ctypes.c_double]
        self.library.emu_stat.argtypes = [ctypes.c_char_p]
        self.library.emu_stat.restype = ctypes.c_double
        self.library.emu_watch.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        self.checked = checked
        self.configure(race=checked)

    def configure(self, **settings: float) -> None:
        """seed, async (0 eager, 1 lazy, 2 random), random_order, race, banks, workers, ...

        The names and meanings are those of Config in runtime/emu.h.
        """
        for name, value in settings.items():
            if name == "race" and value and not self.checked:
                raise ValueError("race: this build does not show the emulator its loads and stores")
            if self.library.emu_set(name.encode(), float(value)):
                raise ValueError(f"the emulator has no setting {name!r}")

    def stat(self, name: str) -> int:
        return int(self.library.emu_stat(name.encode()))

    def reset_stats(self) -> None:
        self.library.emu_reset_stats()

    def watch(self, pointer: int, size: int, name: str) -> None:
        """Check global memory for races too; names are kept by the library."""
        self.library.emu_watch(pointer, size, name.encode())

    def unwatch_all(self) -> None:
        self.library.emu_unwatch_all()

    def call(self, entry: str, *arguments: object) -> None:
        """Calls a C entry that returns 0 or an error code; raises EmulatorFault."""
        if getattr(self.library, entry)(*arguments):
            raise EmulatorFault(last_error(self.library))


def last_error(library: ctypes.CDLL) -> str:
    library.rx_cuda_last_error.restype = ctypes.c_char_p
    return source_lines(library.rx_cuda_last_error().decode())


def load_kernels(names: Sequence[str], checked: bool, folder: Path = KERNELS) -> Emulated:
    """Files of csrc/cuda by their paths there; the first may come from a mutated copy of that."""
    sources = [folder / names[0], *(KERNELS / name for name in names[1:])]
    return Emulated(build(sources, checked), checked)
