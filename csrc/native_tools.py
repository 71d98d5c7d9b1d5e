"""What this machine can compile: the C++ compiler, its instruction sets, the CUDA toolkit.

Standard library only, so that it runs in pip's build isolation before anything is installed.
Every "no" is a sentence that ends up in what the build prints and in `python -m recurx env`.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread")

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_VNNI = (*_AVX512, "-mavx512vnni")
_DOT = (*_VNNI, "-mavx512bf16")
_AMX = (*_DOT, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
_BF16 = ("-march=armv8.2-a+bf16",)
# File suffix -> flags, and macros of which one proves that the compiler really targets it: some
# compilers for other processors merely warn about an unknown -m flag. Lowest level first.
ISA_FLAGS = {
    "avx2": (("-mavx2", "-mfma"), ("__AVX2__",)),
    "avx2_vnni": (("-mavx2", "-mfma", "-mavxvnni"), ("__AVXVNNI__",)),
    "avx512": (_AVX512, ("__AVX512DQ__",)),
    "avx512_vnni": (_VNNI, ("__AVX512VNNI__",)),
    "avx512_bf16": (_DOT, ("__AVX512BF16__",)),
    "amx": (_AMX, ("__AMX_BF16__", "__AMXBF16__")),  # the second: clang before 16
    "amx_split": (_AMX, ("__AMX_BF16__", "__AMXBF16__")),
    "neon": ((), ("__aarch64__",)),
    "neon_bf16": (_BF16, ("__ARM_FEATURE_BF16_VECTOR_ARITHMETIC",)),
    "neon_bfmmla": (_BF16, ("__ARM_FEATURE_BF16_VECTOR_ARITHMETIC",)),
}

# Words that may stand before the compiler in CXX: they run it, or answer from a cache.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")

# The generations that the kernels are tested for. Machine code runs on its own generation and on
# later ones with the same first digit (sm_80 code on sm_86 and sm_89), and each costs a minute or
# two of compiling (docs/engines.md has the table); a newer GPU compiles the PTX at first use.
ALL_CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# What a build from source makes: Ampere, Ada, Hopper, and the GPUs of this machine.
CUDA_ARCHS = ("80", "90")
# What a wheel for other machines holds (.ci/wheel.py): code for every generation, none twice.
WHEEL_CUDA_ARCHS = ("80", "90", "100", "120")


class NotFound(Exception):
    """The tool is missing; the message is one clause saying what was looked for."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]  # e.g. ("g++",) or, from CXX, ("ccache", "g++", "-m64")
    version: str
    isas: tuple[str, ...]  # keys of ISA_FLAGS that it accepts

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} {self.version}"

    def for_nvcc(self) -> list[str]:
        """nvcc's options that name this compiler: the program alone, its own flags apart."""
        launcher, *rest = self.command
        program, *flags = rest if Path(launcher).name in LAUNCHERS and rest else self.command
        return ["-ccbin", program, *(word for flag in flags for word in ("-Xcompiler", flag))]


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: str
    include: Path
    cudart: Path  # libcudart_static.a: the module then imports without a driver or a toolkit
    archs: tuple[str, ...]  # as nvcc lists them: "80", "90", ...
    found_by: str


def find_compiler() -> Compiler:
    """The first C++17 compiler that can build a Python extension: CXX, else c++, g++, clang++.

    CXX is split as a shell would. NotFound says of each that was tried why it will not do.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    candidates = [tuple(wanted)] if wanted else [("c++",), ("g++",), ("clang++",)]
    refused = []
    for command in candidates:
        reason = _why_not(command)
        if reason is None:
            isas = tuple(isa for isa in ISA_FLAGS if _targets(command, isa))
            return Compiler(command, _first_version(_output(*command, "--version")), isas)
        refused.append(f"{shlex.join(command)} {reason}")
    raise NotFound(f"no C++ compiler ({'; '.join(refused)})")


def _why_not(command: tuple[str, ...]) -> str | None:
    """Why `command` cannot build a Python extension, with its own words; None if it can."""
    if shutil.which(command[0]) is None:
        return "is not on PATH"
    headers = sysconfig.get_path("include")
    cxx17 = "#include <string_view>\n"
    words = _refusal(command, ["-std=c++17", f"-I{headers}"], f"#include <Python.h>\n{cxx17}")
    if words is None:
        return None
    refusal = _refusal(command, ["-std=c++17"], cxx17)
    if refusal is None:
        return f"finds no Python.h under {headers} (on Debian: apt install python3-dev): {words}"
    return f"does not compile C++17: {refusal}"


def _targets(command: tuple[str, ...], isa: str) -> bool:
    flags, macros = ISA_FLAGS[isa]
    absent = " && ".join(f"!defined({macro})" for macro in macros)
    return _refusal(command, list(flags), f"#if {absent}\n#error other target\n#endif\n") is None


def _refusal(command: tuple[str, ...], flags: list[str], source: str) -> str | None:
    """The line of the compiler's output that says most about why it refuses; None if it accepts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        line = [*command, *flags, "-c", str(path), "-o", str(path.with_suffix(".o"))]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        except OSError as error:  # not a program of this machine
            return str(error)
    if done.returncode == 0:
        return None
    said = [text.strip() for text in (done.stderr + done.stdout).splitlines() if text.strip()]
    telling = next((text for text in said if "error" in text.lower()), said[0] if said else "")
    return telling[:300] or f"exit status {done.returncode}, without a word"


def find_cuda() -> Cuda:
    """The CUDA toolkit: CUDA_HOME, else nvcc on PATH, else NVIDIA's PyPI wheels, else NotFound."""
    looked: list[str] = []
    for root, found_by in _cuda_roots(looked):
        nvcc = root / "bin" / "nvcc"
        if not nvcc.is_file():
            looked.append(f"{found_by} has no bin/nvcc")
            continue
        cudart = next(_glob(root, "lib64", "lib", "targets/*/lib", name="libcudart_static.a"), None)
        header = next(_glob(root, "include", "targets/*/include", name="cuda_runtime.h"), None)
        if cudart is None or header is None:
            missing = "libcudart_static.a" if cudart is None else "cuda_runtime.h"
            looked.append(f"{found_by} has no {missing}")
            continue
        version = _first_version(_output(str(nvcc), "--version"))
        listed = re.findall(r"compute_(\d+)", _output(str(nvcc), "--list-gpu-arch"))
        archs = tuple(arch for arch in _wanted_archs() if arch in listed)
        if not archs:
            looked.append(f"nvcc {version} ({found_by}) knows none of sm_{_wanted_archs()}")
            continue
        return Cuda(nvcc, version, header.parent, cudart, archs, found_by)
    raise NotFound("; ".join(looked))


def _cuda_roots(looked: list[str]) -> Iterator[tuple[Path, str]]:
    """Candidate toolkit folders in order of preference; what is absent is noted in `looked`."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        yield Path(home), "CUDA_HOME"
    else:
        looked.append("CUDA_HOME is unset")
    on_path = shutil.which("nvcc")
    if on_path:
        yield _toolkit_of(on_path), "nvcc on PATH"
    else:
        looked.append("no nvcc on PATH")
    wheels = [root for site in _sites() for root in glob.glob(f"{site}/nvidia/cu1[2-9]")]
    for root in wheels:
        yield Path(root), "NVIDIA's PyPI wheels"
    if not wheels:
        looked.append("no NVIDIA wheel with nvcc")


def _sites() -> list[str]:
    """Where Python packages may lie, those of the environment that pip installs into included.

    In build isolation sys.path lacks that environment; sysconfig has it.
    """
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [place for place in dict.fromkeys(places) if place]


def torch_without_cuda() -> str | None:
    """The version of a torch that cannot use CUDA; None if torch has CUDA or is not installed yet.

    Read from the text of torch/version.py: importing torch takes seconds, and in build isolation
    its own requirements are out of reach.
    """
    for site in _sites():
        try:
            text = Path(site, "torch", "version.py").read_text()
        except OSError:
            continue
        named = dict(re.findall(r"^(__version__|cuda)\b.*= *'([^']*)'", text, re.MULTILINE))
        return None if "cuda" in named else named.get("__version__", "of unknown version")
    return None


def _toolkit_of(nvcc: str) -> Path:
    """The toolkit folder behind `nvcc`, which may be a shell script that calls the real one."""
    dryrun = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parents[1]


def _wanted_archs() -> tuple[str, ...]:
    """RECURX_CUDA_ARCHS="90" (or "80;90", or "all") names the list."""
    wanted = os.environ.get("RECURX_CUDA_ARCHS", "").strip()
    named = ALL_CUDA_ARCHS if wanted == "all" else tuple(re.findall(r"\d+", wanted))
    return named or tuple(sorted({*CUDA_ARCHS, *_newer_archs_here()}, key=int))


def _newer_archs_here() -> set[str]:
    """Generations of this machine's GPUs that no code of CUDA_ARCHS runs on."""
    if shutil.which("nvidia-smi") is None:
        return set()
    listed = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = {"".join(match) for match in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}
    return {arch for arch in found if int(arch) >= 100}


def own_generation(source: str) -> str:
    """The only generation that runs a file: "sm90a" in a folder `name_sm90a`, else ""."""
    return "".join(re.findall(r"_(sm\d+[af])$", Path(source).parent.name))


def gencode(source: str, archs: tuple[str, ...]) -> list[str]:
    """nvcc's target flags for one file; empty if none of `archs` can hold it.

    Always -gencode: the -arch=sm_90a shorthand also asks for plain sm_90 code, which has no wgmma.
    """
    own = own_generation(source).removeprefix("sm")
    if own:
        return [f"-gencode=arch=compute_{own},code=sm_{own}"] if own[:-1] in archs else []
    # Not PTX of the newest: sm_110 runs neither code for sm_100 nor PTX for sm_120.
    ptx = min((arch for arch in archs if int(arch) >= 90), key=int, default=max(archs, key=int))
    sass = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*sass, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def _glob(root: Path, *folders: str, name: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(root.glob(f"{folder}/{name}"))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def _first_version(text: str) -> str:
    """`g++ (Debian 12.2.0-14) 12.2.0` -> 12.2.0; `... release 13.0, V13.0.88` -> 13.0.88."""
    found = re.search(r"\d+\.\d+\.\d+", text)
    return found.group() if found else "of unknown version"
