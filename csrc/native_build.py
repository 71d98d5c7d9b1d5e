"""Builds recurx._C: the CPU engine, and the CUDA kernels where a toolkit is found.

    python csrc/native_build.py      # in a checkout: puts the module beside recurx/*.py
    pip install .                    # the same code, called by setup.py

The module includes no torch header (raw pointers and a stream handle cross the border), so one
build serves every torch version. Objects go to build/, ninja compiles what changed.

    RECURX_NATIVE      0 installs pure Python, 1 makes a missing C++ compiler an error
    RECURX_CUDA        0 leaves CUDA out, 1 makes its absence or a failed compile an error
    RECURX_CUDA_ARCHS  e.g. "90" or "80;120": for these GPU generations; "all": every tested one
    RECURX_TIMELINE    1 lets the recursion kernels record when each phase ran (and slows them)
    CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as usual; a CXX that does not compile is an error

Unset, RECURX_CUDA builds the kernels where nvcc is found. Only pip looks at torch first: beside a
torch without CUDA nothing could call them, and they take minutes. In a checkout they are built
all the same, because tests read their machine code.

Linux only: elsewhere the install is pure Python. RECURX_NATIVE=1 tries macOS, which is untested.
"""

from __future__ import annotations

import os
import pprint
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import native_tools as tools
from native_tools import Compiler, Cuda, NotFound

ROOT = Path(__file__).resolve().parents[1]
SOABI = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
CUDA_SOURCES = "csrc/cuda/**/*.cu"


class BuildError(Exception):
    """The build was asked for something that it cannot do; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """One build: printable, and all that the ninja file depends on."""

    compiler: Compiler
    cuda: Cuda | None

    def cpp_sources(self) -> list[str]:
        """C++ files, relative to the checkout, lowest instruction set first.

        The order is the link order, and it matters: an inline function that two objects both emit
        is kept from the first, so no AVX-512 copy can reach the portable path.
        """
        levels = ["", *tools.ISA_FLAGS]
        found = [*_sources("csrc/*.cpp"), *_sources("csrc/cpu/*.cpp")]
        if self.cuda:
            found += _sources("csrc/cuda/*.cpp")
        kept = [path for path in found if _isa(path) in ("", *self.compiler.isas)]
        return sorted(kept, key=lambda path: (levels.index(_isa(path)), path))

    def cuda_sources(self) -> dict[str, list[str]]:
        """CUDA files with their target flags; a folder for a generation nvcc lacks is left out."""
        if self.cuda is None:
            return {}
        flags = {path: tools.gencode(path, self.cuda.archs) for path in _sources(CUDA_SOURCES)}
        return {path: targets for path, targets in flags.items() if targets}

    def own_generations(self) -> list[str]:
        """The generations, such as sm90a, whose own kernels are compiled in."""
        owned = {tools.own_generation(path) for path in self.cuda_sources()}
        return sorted(name for name in owned if name)


def _sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def _isa(path: str) -> str:
    """The instruction set in a file's name: csrc/cpu/gemm_avx512.cpp -> avx512, others -> ""."""
    return next((isa for isa in tools.ISA_FLAGS if Path(path).stem.endswith(f"_{isa}")), "")


# ---------------------------------------------------------------- the ninja file


def ninja_file(plan: Plan, pybind_include: str) -> str:
    """The whole build as one ninja file; sources are named relative to the build folder."""
    up = os.path.relpath(ROOT, _build_folder())
    python = sysconfig.get_path("include")
    defines = [f"-DRX_HAVE_{name.upper()}=1" for name in plan.compiler.isas]
    defines += [f"-DRX_HAVE_{name.upper()}=1" for name in plan.own_generations()]
    includes = [f"-I{up}/csrc", "-isystem", pybind_include, "-isystem", python]
    lines = ["ninja_required_version = 1.5"]
    cxx = [*plan.compiler.command, *tools.CXX_FLAGS, *defines, *includes]
    link = [*plan.compiler.command, "-shared", "-pthread"]
    libraries: list[str] = []
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    if plan.cuda:
        cxx += ["-DRX_CUDA=1", "-isystem", str(plan.cuda.include)]
        # cudart's symbols stay private, or they would answer calls meant for torch's own copy.
        exclude = "-Wl,--exclude-libs,ALL"
        libraries = [str(plan.cuda.cudart), "-ldl", "-lrt", "-lpthread", exclude]
        lines += _rule("nvcc", [*_nvcc(plan.cuda, plan.compiler), *defines, f"-I{up}/csrc"])
    lines += _rule("cxx", [*cxx, *shlex.split(os.environ.get("CXXFLAGS", ""))])
    libraries += shlex.split(os.environ.get("LDFLAGS", ""))
    lines += ["rule link", f"  command = {_shell(link)} $in -o $out {_shell(libraries)}"]
    lines += ["  description = link $out"]

    objects = []
    for path in plan.cpp_sources():
        flags = tools.ISA_FLAGS[_isa(path)][0] if _isa(path) else ()
        objects.append(_compile(lines, "cxx", up, path, flags))
    for path, flags in plan.cuda_sources().items():
        objects.append(_compile(lines, "nvcc", up, path, flags))
    lines += [f"build {MODULE}: link {' '.join(objects)}", f"default {MODULE}", ""]
    return "\n".join(lines)


def _nvcc(cuda: Cuda, compiler: Compiler) -> list[str]:
    host = [*compiler.for_nvcc(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    include = ["-I", str(cuda.include)]  # NVIDIA's PyPI wheels have no nvcc.profile that says so
    return [
        str(cuda.nvcc),
        "-std=c++17",
        "-O3",
        "-cudart",
        "static",
        *host,
        *include,
        "-DRX_CUDA=1",
        "--threads=4",  # generations of a file at once: one kernel takes ptxas ten seconds each
        *(["-DRX_TIMELINE=1"] if os.environ.get("RECURX_TIMELINE") == "1" else []),
    ]


def _rule(name: str, command: list[str]) -> list[str]:
    line = f"  command = {_shell(command)} $flags -MMD -MF $out.d -c $in -o $out"
    return [f"rule {name}", line, "  depfile = $out.d", "  deps = gcc", "  description = $in"]


def _compile(lines: list[str], rule: str, up: str, path: str, flags) -> str:
    target = _escape(path.removeprefix("csrc/") + ".o")
    lines += [f"build {target}: {rule} {_escape(f'{up}/{path}')}", f"  flags = {_shell(flags)}"]
    return target


def _shell(words) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


# ---------------------------------------------------------------- deciding and building


def build(destination: Path, by_pip: bool = False) -> str:
    """Compile the module into `destination`, record the decision there, return it as a sentence.

    `by_pip`: leave CUDA out beside a torch that has none, unless RECURX_CUDA=1.

    Raises:
        BuildError: RECURX_NATIVE=1, RECURX_CUDA=1 or CXX asks for what this machine lacks, a build
            tool is missing, or the sources do not compile.
    """
    native, cuda_wanted = _wanted("RECURX_NATIVE"), _wanted("RECURX_CUDA")
    try:
        compiler = _find_compiler(native)
    except NotFound as reason:
        named = "RECURX_NATIVE=1" if native == "1" else f"CXX={os.environ.get('CXX', '')}"
        if native == "1" or (native == "auto" and sys.platform == "linux" and named != "CXX="):
            raise BuildError(f"recurx: {named}, but {reason}") from None
        (destination / MODULE).unlink(missing_ok=True)
        return _record(destination, f"recurx: pure Python, no compiled engine: {reason}.", None)
    try:
        cuda: Cuda | None = _find_cuda(cuda_wanted, by_pip)
        why_cpu_only = ""
    except NotFound as reason:
        if cuda_wanted == "1":
            raise BuildError(f"recurx: RECURX_CUDA=1, but {reason}") from None
        cuda, why_cpu_only = None, str(reason)

    plan = Plan(compiler, cuda)
    if not _ninja(plan):
        if cuda is None or cuda_wanted == "1" or not _ninja(Plan(compiler, None)):
            raise BuildError(
                f"recurx: the sources do not compile with {compiler}"
                f"{f' and nvcc {cuda.version}' if cuda else ''}; the compiler's words are above. "
                f"RECURX_NATIVE=0 installs pure Python instead, RECURX_CUDA=0 leaves CUDA out."
            )
        why_cpu_only = f"nvcc {cuda.version} does not compile csrc/cuda, its words are above"
        plan = Plan(compiler, None)
    _install(_build_folder() / MODULE, destination / MODULE)
    return _record(destination, _sentence(plan, why_cpu_only), plan)


def _wanted(variable: str) -> str:
    value = os.environ.get(variable, "") or "auto"
    if value not in ("auto", "0", "1"):
        raise BuildError(f"recurx: {variable}={value!r}: expected 0, 1 or auto")
    return value


def _find_compiler(wanted: str) -> Compiler:
    if wanted == "0":
        raise NotFound("RECURX_NATIVE=0 asks for that")
    if sys.platform != "linux" and not (sys.platform == "darwin" and wanted == "1"):
        raise NotFound(f"the engine is compiled on Linux, and this is {sys.platform}")
    return tools.find_compiler()


def _find_cuda(wanted: str, by_pip: bool) -> Cuda:
    if wanted == "0":
        raise NotFound("RECURX_CUDA=0 asks for that")
    if not _sources(CUDA_SOURCES):
        raise NotFound(f"this source tree has no {CUDA_SOURCES}")
    found = tools.find_cuda()
    torch = tools.torch_without_cuda() if by_pip and wanted == "auto" else None
    if torch is not None:
        raise NotFound(f"torch {torch} has no CUDA (RECURX_CUDA=1 builds the kernels all the same)")
    return found


def _build_folder() -> Path:
    return ROOT / "build" / f"native-{SOABI}"


def _ninja(plan: Plan) -> bool:
    """Compile and link `plan` in the build folder; False if a compiler refused something."""
    import fcntl  # not at the top: Windows has none, and setup.py imports this file there too

    try:
        import pybind11
    except ImportError:
        raise BuildError("recurx: building needs pybind11: pip install pybind11 ninja") from None
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise BuildError("recurx: building needs ninja: pip install pybind11 ninja")
    folder = _build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(_progress(plan), flush=True)
    with open(folder / "lock", "w") as lock:  # two builds of one checkout wait for each other
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = ninja_file(plan, pybind11.get_include())
        if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != text:
            (folder / "build.ninja").write_text(text)
        command = [ninja, "-C", str(folder), "-j", _jobs()]
        return subprocess.run(command).returncode == 0


def _progress(plan: Plan) -> str:
    """What is about to be compiled. `pip install -v` shows it, and ninja's count after it."""
    kernels = plan.cuda_sources()
    cuda = f" and {len(kernels)} files with nvcc {plan.cuda.version}" if plan.cuda else ""
    minutes = "; CUDA takes minutes, RECURX_CUDA=0 leaves it out" if kernels else ""
    files = len(plan.cpp_sources())
    return f"recurx: compiling {files} files with {plan.compiler}{cuda} on {_jobs()} cores{minutes}"


def _jobs() -> str:
    return os.environ.get("MAX_JOBS") or str(_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _install(module: Path, target: Path) -> None:
    """Copy, then rename: writing into a module that a running process has mapped would kill it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(module, fresh)
    os.replace(fresh, target)


def _sentence(plan: Plan, why_cpu_only: str) -> str:
    isas = ", ".join(("portable", *plan.compiler.isas))
    engines = f"CPU engine ({isas}; {plan.compiler})"
    if plan.cuda is None:
        return f"recurx: built the {engines} without CUDA: {why_cpu_only}."
    archs = ", ".join(f"sm_{arch}" for arch in plan.cuda.archs)
    cuda = f"CUDA kernels ({archs}; nvcc {plan.cuda.version} from {plan.cuda.found_by})"
    return f"recurx: built the {engines} and the {cuda}."


def _record(destination: Path, sentence: str, plan: Plan | None) -> str:
    """Write recurx/_build_info.py beside the module, so the facts travel with it into a wheel."""
    info = {
        "sentence": sentence,
        "compiler": str(plan.compiler) if plan else None,
        "isas": plan.compiler.isas if plan else (),
        "nvcc": plan.cuda.version if plan and plan.cuda else None,
        "cuda_archs": plan.cuda.archs if plan and plan.cuda else (),
    }
    text = f'"""Written by csrc/native_build.py."""\n\nINFO = {pprint.pformat(info)}\n'
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "_build_info.py").write_text(text)
    return sentence


if __name__ == "__main__":
    try:
        print(build(ROOT / "recurx"))
    except BuildError as error:
        sys.exit(str(error))
