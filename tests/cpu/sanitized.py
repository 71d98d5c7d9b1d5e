"""Builds tests/cpu/random_check.cpp and the engines under a sanitizer of g++ or clang.

From a copy of csrc/cpu with a few edits: pieces of scratch get a redzone each, waiting threads let
others run early, and there are bugs, all off, of which the driver turns one on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cpu import build

FOLDER = build.ROOT / "build" / "cpu_sanitized"
ADDRESS, THREAD = "address,undefined", "thread"
EDITS = (
    (
        "workspace.hpp", "used += (count * sizeof(T) + 63) / 64 * 64;",
        "used = take_before_redzone(base, used, count * sizeof(T));",
    ),
    ("machine.hpp", "return data;", "return without_redzones(data, bytes);"),
    ("pool.cpp", "kSpins = 4000", "kSpins = 50"),
)  # fmt: skip
# Expressions of csrc/cpu and what a bug makes of them, by what the driver then says: all bugs but
# those of barriers, which come after them.
BUGS = {
    "a panel too many": (
        "AddressSanitizer", "gemm.hpp", "panel < last", "panel <= last",
    ),
    "no room for the rest of a tile of rows": (
        "AddressSanitizer", "workspace.hpp", "w.rows + Core::kSpareRows", "w.rows",
    ),
    "a row too few in a window's scratch": (
        "AddressSanitizer", "backward/workspace.hpp", "z.rows + Core::kSpareRows", "z.rows - 1",
    ),
    "the angles of a token too many": (
        "AddressSanitizer", "qkv.hpp", "to.cos + (long)to.position[row] * dim",
        "to.cos + ((long)to.position[row] + 1) * dim",
    ),
    "a shift by all bits": ("runtime error", "noise.cpp", "b >> 8", "b >> 32"),
    "a token too many under a convolution": (
        "AddressSanitizer", "variant_rows.hpp", "t < tokens + width", "t < tokens + width + 4",
    ),
    "no room for the gradient of a convolution's bias": (
        "AddressSanitizer", "backward/variant_space.hpp", "2 * (z.taps + 1)", "z.taps",
    ),
    "padding that is not cleared": (
        "other bits", "token_mlp.hpp", "t < round_up(tokens, kAlign)", "t < tokens",
    ),
}  # fmt: skip
SOURCES = ("run", "run_window", "solve", "noise", "variant_pack", "pool", "checks")
X86 = ("avx2", "avx512", "avx512_bf16", "amx", "amx_split")
ENGINES = ("portable", *X86, "neon", "neon_bf16", "neon_bfmmla")


def engines() -> list[str]:
    """Those that this processor runs, the portable one at least."""
    return [name for name in ENGINES if name in build.usable()] or ["portable"]


def edit(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text, f"{file} has no {old!r} any more"
    (folder / file).write_text(text.replace(old, new))


def digest(key: object, *files: Path) -> str:
    found = hashlib.sha256(repr(key).encode())
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def leave_out_barriers(folder: Path) -> list[str]:
    """Makes bugs of all barriers that a team meets at; their places, in the order of the bugs."""
    places: list[str] = []
    for path in sorted(folder.rglob("*.hpp")):
        lines = path.read_text().splitlines(keepends=True)
        for at, line in enumerate(lines):
            if re.search(r"\bteam\.sync\(\);", line):
                skip = f"if (rx_planted != {len(BUGS) + len(places)}) team.sync();"
                lines[at] = line.replace("team.sync();", skip)
                places.append(f"{path.relative_to(folder)}:{at + 1}")
        path.write_text("".join(lines))
    return places


def program(sanitizer: str, names: list[str]) -> tuple[Path, list[str]]:
    """(the driver with those engines, places of the barriers); where `why_not` is None."""
    compiler = build.native_tools.find_compiler()
    tests = Path(__file__).parent
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-w", "-DRX_EMULATE_AMX"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags += ["-include", str(tests / "sanitized.hpp")]
    if sanitizer == ADDRESS and "clang" not in " ".join(compiler.command):
        # Calls instead of code at every access: half the compiler's time.
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]
    with tempfile.TemporaryDirectory() as temporary:
        cpu = Path(temporary, "cpu")
        shutil.copytree(build.ROOT / "csrc" / "cpu", cpu)
        for change in EDITS:
            edit(cpu, *change)
        for number, (_, file, old, new) in enumerate(BUGS.values()):
            edit(cpu, file, old, f"(rx_planted == {number} ? {new} : {old})")
        places = leave_out_barriers(cpu)
        headers = digest((compiler, flags), *cpu.rglob("*.hpp"), *tests.glob("*.hpp"))
        objects = []
        for source in (*SOURCES, *(f"engine_{name}" for name in names), "random_check"):
            path = (tests if source == "random_check" else cpu) / f"{source}.cpp"
            own, _ = build.native_tools.ISA_FLAGS.get(source.removeprefix("engine_"), ((), ()))
            to = FOLDER / digest((headers, own), path) / f"{source}.o"
            if not to.exists():
                to.parent.mkdir(parents=True, exist_ok=True)
                part = f"{to}.{os.getpid()}"
                line = [*flags, *own, f"-I{temporary}", "-c", str(path), "-o", part]
                build.run(*compiler.command, *line)
                os.replace(part, to)
            objects.append(str(to))
    check = FOLDER / digest(objects) / "check"
    if not check.exists():
        check.parent.mkdir(parents=True, exist_ok=True)
        build.run(*compiler.command, *flags, *objects, "-o", str(check))
    return check, places


@functools.cache
def why_not(sanitizer: str) -> str | None:
    """Why nothing can be built with it and run, or None."""
    try:
        compiler = build.native_tools.find_compiler()
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "probe.cpp"), str(Path(folder, "probe"))
            source.write_text("int main() { return 0; }\n")
            flags = ["-pthread", f"-fsanitize={sanitizer}"]
            build.run(*compiler.command, *flags, str(source), "-o", target)
            build.run(*same_addresses(), target)
    except (build.native_tools.NotFound, RuntimeError) as error:
        return f"no sanitizer of {sanitizer}: {error}"
    return None


@functools.cache
def same_addresses() -> tuple[str, ...]:
    """Runs a program without address randomisation, where that may be: sanitizers of 2022 do not
    bear all that kernels of 2024 choose."""
    setarch = ("setarch", platform.machine(), "-R")
    may = shutil.which("setarch") and subprocess.run([*setarch, "true"]).returncode == 0
    return setarch if may else ()


def run(check: Path, first: int, count: int, engine: str = "", bug: int = -1) -> tuple[int, str]:
    """(exit status, output) of the driver over cases [first, first + count)."""
    environment = {
        **os.environ,
        "RECURX_CPU_THREADS": "own",  # libgomp is not instrumented
        "RX_PLANTED_BUG": str(bug),
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [*same_addresses(), str(check), str(first), str(count), engine]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr
