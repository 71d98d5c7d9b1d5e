"""The core for fp32 by AMX: products against fp64, bugs that these checks see."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cpu import build

NAME = "amx_split"


def compiled(csrc: Path, folder: Path, real: bool = False) -> Path:
    """split_check.cpp with the headers of `csrc`, its tiles emulated unless `real`."""
    program = folder / "split_check"
    try:
        compiler, flags = build.settings(csrc)
    except build.native_tools.NotFound as missing:
        pytest.skip(f"no compiler: {missing}")
    if real:
        own = build.native_tools.ISA_FLAGS[NAME][0]
        flags = ["-std=c++17", "-O2", "-w", *own, f"-I{csrc}"]
    source = str(Path(__file__).with_name("split_check.cpp"))
    build.run(*compiler.command, *flags, source, "-o", str(program))
    return program


@pytest.mark.parametrize("real", [False, True], ids=["emulated", "real"])
def test_products_against_fp64(tmp_path: Path, real: bool) -> None:
    """Of many shapes and scales; exact where fp32 is; not finite where fp32 is not."""
    if real and NAME not in build.usable():
        pytest.skip(f"this processor (or this build) has no {NAME}")
    program = compiled(build.ROOT / "csrc", tmp_path, real)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "ok", lines[-1:]
    kinds = {"plain", "random", "rows", "columns", "depths", "exact", "poison", "ok"}
    assert {line.split()[0] for line in lines} == kinds


# (file, text, what a bug makes of it); BUG is true while that one is awake.
PRODUCT = "Tiles::template dot<0, 4, 6>();"
PLANTED = {
    **{
        f"product {part} of six left out": (
            "gemm_amx.hpp", PRODUCT, f"if (!(BUG && kPart == {part})) {PRODUCT}",
        )
        for part in range(1, 6)
    },
    "the first product of a chunk left out": (
        "gemm_amx.hpp", "Tiles::template dot<kC, kA, kB>();",
        "if (!BUG) Tiles::template dot<kC, kA, kB>();",
    ),
    "a product with another part of the panel": (
        "gemm_amx.hpp", "kPanelPart * kPanelStep",
        "(BUG && kPart == 4 ? 1 : kPanelPart) * kPanelStep",
    ),
    "the third part of A not cut": (
        "gemm_split.hpp", "memcpy(to + i * 64, &of[i],",
        "if (BUG && i == 2) memset(to + i * 64, 0, 32); else memcpy(to + i * 64, &of[i],",
    ),
    "the third part of B not cut": (
        "backward/pack_rows.hpp", "parts[i] = __builtin_convertvector(of[i], VU);",
        "parts[i] = BUG && i == 2 ? VU{} : __builtin_convertvector(of[i], VU);",
    ),
    "rows of the chunk before": (
        "gemm_split.hpp", "(long)step / SplitTiles::kChunkSteps * count",
        "(BUG ? 0 : (long)step / SplitTiles::kChunkSteps) * count",
    ),
    "sums of the chunk before lost": (
        "gemm_amx.hpp", "step > 0 ? sums : nullptr", "step > 0 && !BUG ? sums : nullptr",
    ),
    "parts of a panel in the wrong place": (
        "backward/pack_rows.hpp", " + i * kPart;", " + i * (BUG ? kPart / 2 : kPart);",
    ),
    "the first rows cut for every piece": (
        "gemm_split.hpp", "load(a.at(row, k))", "load(a.at(BUG ? row - rows.begin : row, k))",
    ),
    "rows of a later piece sought beyond it": (
        "gemm_split.hpp", "row - first)", "row - (BUG ? 0 : first))",
    ),
    "the rest of a step not cleared in A": (
        "gemm_split.hpp", "k < round_up(depth, kTileDepth);",
        "k < (BUG ? depth : round_up(depth, kTileDepth));",
    ),
    "the rest of a vector not cleared in A": (
        "gemm_split.hpp", "load_part(a.at(row, k), depth - k)",
        "load_part(a.at(row, k), BUG ? W : depth - k)",
    ),
    "the rest of a step not cleared in B": (
        "backward/pack_rows.hpp", "    run(l, weight, panel, l.in,",
        "    if (!BUG) run(l, weight, panel, l.in,",
    ),
    "the other half of a pair lost": (
        "backward/pack_rows.hpp", "(both & 0xffffu) | one[i] << 16",
        "(BUG ? VU{} : both & 0xffffu) | one[i] << 16",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with all bugs, of which RX_PLANTED_BUG wakes one."""
    folder = tmp_path_factory.mktemp("bugs")
    shutil.copytree(build.ROOT / "csrc" / "cpu", folder / "cpu")
    once = ("vec.hpp", "#pragma once", "#pragma once\nextern int rx_planted;")
    for number, (file, old, new) in enumerate([*PLANTED.values(), once]):
        text = (folder / "cpu" / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        awake = new.replace("BUG", f"(rx_planted == {number})")
        (folder / "cpu" / file).write_text(text.replace(old, awake))
    return compiled(folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *PLANTED])
def test_a_planted_bug_is_seen(planted: Path, bug: str | None) -> None:
    number = -1 if bug is None else list(PLANTED).index(bug)
    done = build.run_with_bug(planted, bug=number)
    assert (done.returncode == 0) == (bug is None), done.stdout
    assert done.stdout.splitlines()[-1].endswith("ok" if bug is None else "FAILED")
