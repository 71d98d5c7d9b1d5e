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


# (file, text, what a bug makes of it); BUG is true while that one is awake.
PLANTED = {
    "pairs that straddle": (
        "dot_kernel.hpp", "a + r * lda + 2 * k", "a + r * lda + 2 * k + BUG",
    ),
    "weights of a pair exchanged": (
        "backward/pack_rows.hpp", "both = one[i] | other[i] << 16;",
        "both = BUG ? other[i] | one[i] << 16 : one[i] | other[i] << 16;",
    ),
    "the last pair dropped": ("dot_kernel.hpp", "k < pairs; ++k", "k + BUG < pairs; ++k"),
    "the tail of the depth dropped": ("dot_kernel.hpp", " < pairs; ++k", " < pairs && !BUG; ++k"),
    "the second depth from the first's weights": (
        "gemm_dot.hpp", "b += kDepth / kTileDepth * kPanelStep",
        "b += BUG ? 0 : kDepth / kTileDepth * kPanelStep",
    ),
    "sums of the panel before": (
        "gemm_dot.hpp", "V acc[kM][2];\n          clear(acc);",
        "static thread_local V kept[kM][2];\n          V own[kM][2];\n"
        "          V(&acc)[kM][2] = BUG ? kept : own;\n"
        "          if (!BUG || panel == first) clear(acc);",
    ),
    "a wrong row after a tile of 13": (
        "micro_kernel.hpp", "row += kRows - 1;", "row += kRows - !BUG;",
    ),
    "the odd key of the last pair": (
        "attention_dot.hpp", "ceil_div(T, 2), acc", "BUG ? T / 2 : ceil_div(T, 2), acc",
    ),
    "the last block of keys unmasked": (
        "softmax.hpp", "in_tail ? exp2<kCoarse>(load(scores + whole) - max) : V{}",
        "in_tail | (VI{} - (int)BUG) ? exp2<kCoarse>(load(scores + whole) - max) : V{}",
    ),
    "the odd tile of keys left out": (
        "attention_dot.hpp", "tile < head.key_tiles)", "tile < (BUG ? 0 : head.key_tiles))",
    ),
    "the odd tile of columns left out": (
        "attention_dot.hpp", "if (d < dim)", "if (d < (BUG ? 0 : dim))",
    ),
    "one row's softmax for all": (
        "attention_dot.hpp", "acc[r][1] * inverse[r]", "acc[r][1] * inverse[BUG ? 0 : r]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver that compares every engine with fp64, at the tolerance it has for all."""
    try:
        return build.with_bugs(NAME, list(PLANTED.values()), tmp_path_factory.mktemp("bugs"))
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the engine: {missing}")


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(planted: Path, bug: str) -> None:
    done = build.run_with_bug(planted, NAME, bug=list(PLANTED).index(bug))
    wrong = [line for line in done.stdout.splitlines() if line.endswith("FAILED")]
    assert done.returncode == 1 and wrong, done.stdout
    assert all(" bf16 " in line for line in wrong), "fp32 states run on another core"


@pytest.mark.slow
def test_with_all_bugs_asleep_it_is_right(planted: Path) -> None:
    done = build.run_with_bug(planted, NAME)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_no_access_outside_its_memory(tmp_path: Path) -> None:
    """The driver under the address and undefined-behaviour sanitizers; a panel too many is seen."""
    panels = ("gemm_dot.hpp", "panel < last; ++panel", "panel < last + BUG; ++panel")
    try:
        program = build.with_bugs(NAME, [panels], tmp_path, sanitized=True)
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the engine: {missing}")
    for bug, word in ((-1, "ok"), (0, "heap-buffer-overflow")):
        done = build.run_with_bug(program, NAME, bug=bug)
        assert (done.returncode == 0) == (word == "ok"), done.stdout + done.stderr
        assert word in done.stdout + done.stderr and "runtime error" not in done.stderr
