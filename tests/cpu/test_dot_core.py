"""The core for AVX512_BF16: what its instruction computes, bugs that the checks see."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cpu import build

NAME = "avx512_bf16"


def test_the_emulation_has_the_bits_of_the_instruction(tmp_path: Path) -> None:
    """Two million lanes of ordinary numbers, and of tiny ones and denormals."""
    if NAME not in build.usable():
        pytest.skip(f"this processor (or this build) has no {NAME}")
    compiler, _ = build.settings(build.ROOT / "csrc")
    source = str(build.ROOT / "tests" / "cpu" / "dot_check.cpp")
    flags = ["-std=c++17", "-O2", "-w", f"-I{build.ROOT / 'csrc'}"]
    said = []
    for define in ("-DRX_REAL_DOT", "-DRX_EMULATE_DOT"):
        program = str(tmp_path / define)
        own = build.native_tools.ISA_FLAGS[NAME][0]
        build.run(*compiler.command, *flags, *own, define, source, "-o", program)
        said.append(subprocess.run([program], capture_output=True, text=True).stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 2


PLANTED = {
    "pairs that straddle": ("dot_kernel.hpp", "a + r * lda + 2 * k", "a + r * lda + 2 * k + 1"),
    "weights of a pair exchanged": (
        "backward/pack_rows.hpp", "bits | bits_of(x, r + 1, col + side * W, 0) << 16",
        "bits_of(x, r + 1, col + side * W, 0) | bits << 16",
    ),
    "the last pair dropped": ("dot_kernel.hpp", "k < pairs; ++k", "k + 1 < pairs; ++k"),
    "the tail of the depth dropped": ("dot_kernel.hpp", "k < pairs; ++k", "false; ++k"),
    "the second depth from the first's weights": (
        "gemm_dot.hpp", "b += kDepth / kTileDepth * kPanelStep", "b += 0",
    ),
    "sums of the panel before": (
        "gemm_dot.hpp", "V acc[kM][2];\n          clear(acc);",
        "static thread_local V acc[kM][2];\n          if (panel == first) clear(acc);",
    ),
    "a wrong row after a tile of 13": ("micro_kernel.hpp", "row += kRows - 1;", "row += kRows;"),
    "the odd key of the last pair": ("attention_dot.hpp", "ceil_div(T, 2), acc", "T / 2, acc"),
    "the last block of keys unmasked": (
        "softmax.hpp", "in_tail ? exp2<kCoarse>(load(scores + whole) - max) : V{}",
        "exp2<kCoarse>(load(scores + whole) - max)",
    ),
    "the odd tile of keys left out": ("attention_dot.hpp", "tile < head.key_tiles)", "T < 0)"),
    "the odd tile of columns left out": ("attention_dot.hpp", "if (d < dim)", "if (d < 0)"),
    "one row's softmax for all": (
        "attention_dot.hpp", "acc[r][1] * inverse[r]", "acc[r][1] * inverse[0]",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    """By the driver that compares every engine with fp64, at the tolerance it has for all."""
    try:
        program = build.edited(NAME, (PLANTED[bug],), tmp_path)
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the engine: {missing}")
    done = subprocess.run([str(program), NAME], capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if line.endswith("FAILED")]
    assert done.returncode == 1 and wrong, done.stdout
    assert all(" bf16 " in line for line in wrong), "fp32 states run on another core"


@pytest.mark.slow
def test_no_access_outside_its_memory(tmp_path: Path) -> None:
    """The driver under the address and undefined-behaviour sanitizers; a panel too many is seen."""
    panels = ("gemm_dot.hpp", "panel < last; ++panel", "panel <= last; ++panel")
    for edits, word in (((), "ok"), ((panels,), "heap-buffer-overflow")):
        folder = tmp_path / word
        try:
            program = build.edited(NAME, edits, folder, sanitized=True)
        except build.native_tools.NotFound as missing:
            pytest.skip(f"cannot build the engine: {missing}")
        done = subprocess.run([str(program), NAME], capture_output=True, text=True)
        assert (done.returncode == 0) == (word == "ok"), done.stdout + done.stderr
        assert word in done.stdout + done.stderr and "runtime error" not in done.stderr
