"""Bugs planted in the source of the engine's window, a stage each: the judgement rejects them all.

The sources are copied, every bug is written into the copy behind a number, and the copy is compiled
once, for the portable instruction set alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from recurx import Schedule
from recurx.backends import cpu
from recurx.nets import ATTENTION, TOKEN_MLP
from tests.cpu import build
from tests.cpu.test_cpu_window import assert_right, case, on_engine

TRM = dict(schedule=Schedule.trm(1, 1))
WINDOW = dict(schedule=Schedule.trm(2, 1))
MANY = dict(schedule=Schedule.trm(1, 1), batch=40)  # each call is summed alone
TOKENS = dict(schedule=Schedule.trm(1, 1), kind=TOKEN_MLP)
TWO_SLICES = dict(schedule=Schedule.trm(1, 1), batch=90, hidden=32, inner=32)

# name: (file, text, text with `bug` for whether the bug is there, the case that shows it)
BUGS = {
    "rotation of q and k not taken back": (
        "heads.hpp", "float y[256];\n      if (rotate",
        "float y[256];\n      if (!bug && rotate", TRM,
    ),
    "scale of the gradient of q": (
        "heads.hpp", "leave(s.d_q, scale(),", "leave(s.d_q, bug ? 1.f : scale(),", TRM
    ),
    "base of the scores in the gradient of k": (
        "heads.hpp", "leave(s.d_k, 1.f / kLog2e,", "leave(s.d_k, bug ? 1.f : 1.f / kLog2e,", TRM
    ),
    "softmax without its sum": (
        "heads.hpp", "(load(d_s + i) - delta)", "(load(d_s + i) - (bug ? 0.f : delta))", TRM
    ),
    "only the first queries count": (
        "heads.hpp", "first < tokens; first +=", "first < (bug ? 1 : tokens); first +=",
        dict(schedule=Schedule.trm(1, 1), tokens=40),
    ),
    "gate and up swapped": (
        "finishes.hpp",
        "store(d_gate_up.at(row, col), d * up * slope);\n"
        "        store(d_gate_up.at(row, width + col)",
        "store(d_gate_up.at(row, bug ? width + col : col), d * up * slope);\n"
        "        store(d_gate_up.at(row, bug ? col : width + col)", TRM,
    ),
    "slope of silu": (
        "finishes.hpp", "sigmoid + silu * (1.f - sigmoid)",
        "sigmoid + (bug ? V{} : silu * (1.f - sigmoid))", TRM,
    ),
    "norm without its mean": (
        "row_passes.hpp", "y(row, col) * mean)", "y(row, col) * (bug ? 0.f : mean))", TRM
    ),
    "norm over padded tokens": (
        "row_passes.hpp", "reduce_add(products) / width",
        "reduce_add(products) / (bug ? padded : width)", TOKENS,
    ),
    "residual path lost": (
        "block_backward.hpp", "return load(sum + row * ld + col); }",
        "return bug ? V{} : load(sum + row * ld + col); }", TRM,
    ),
    "token MLP's middle taken from the wrong slab": (
        "block_backward.hpp", "k.token_gate_up + (long)first * D * 2 * inner",
        "k.token_gate_up + (bug ? 0 : (long)first * D * 2 * inner)",
        dict(schedule=Schedule.trm(1, 1), kind=TOKEN_MLP, batch=3, hidden=544, tokens=5, blocks=1),
    ),
    "weight gradient of the wrong input": (
        "block_backward.hpp", "sum_rows(mixer_in, ws.wide, RowsOf<State>{k.h, D, D})",
        "sum_rows(mixer_in, ws.wide, RowsOf<State>{bug ? k.mid : k.h, D, D})", TRM,
    ),
    "calls overwrite each other's weight gradient": (
        "block_backward.hpp", "ws.fresh[at] = false;", "ws.fresh[at] = bug;", MANY
    ),
    "a gathered call is lost": (
        "window.hpp", "place{filled * rows(),",
        "place{(bug ? ws.group[net] - 1 : filled) * rows(),", TRM,
    ),
    "window off by one": (
        "window.hpp", "if (!ws.active[call]) continue;\n      copy",
        "if (!ws.active[call] || (bug && call == 0)) continue;\n      copy", WINDOW,
    ),
    "gradient of an overwritten state survives": (
        "window.hpp", "ws.given[step.write] = false;\n      const bool enters",
        "ws.given[step.write] = bug;\n      const bool enters",
        dict(schedule=Schedule.hrm(1, 2, window="full")),
    ),
    "stale z_H": (
        "window.hpp", "now[step.write] = ws.blocks[net.num_blocks - 1].out;",
        "if (!bug || call > 0) now[step.write] = ws.blocks[net.num_blocks - 1].out;",
        dict(schedule=Schedule.trm(2, 1, window="full")),
    ),
    "the last sample of a slice lost": (
        "window.hpp", "{ return slice.end - slice.begin; }",
        "{ return slice.end - slice.begin - (bug && slice.begin > 0); }", TWO_SLICES,
    ),
    "another block's weight": (
        "block_backward.hpp", "ws.backward[number * weights_per_block + which]",
        "ws.backward[(bug ? 0 : number) * weights_per_block + which]", TRM,
    ),
}  # fmt: skip


def _compile() -> Path:
    import pybind11

    compiler = build.native_tools.find_compiler()
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-w", "-DRX_MODULE_NAME=_cpu_planted"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = sorted((build.ROOT / "csrc" / "cpu").rglob("*.?pp"))
    digest = hashlib.sha256(repr((compiler, flags, BUGS)).encode())
    for file in (*sources, build.ROOT / "csrc" / "bindings.cpp"):
        digest.update(file.read_bytes())
    folder = build.ROOT / "build" / "cpu_planted" / digest.hexdigest()[:16]
    module = folder / f"_cpu_planted{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build.ROOT / "csrc" / "cpu", folder / "cpu")
    shutil.copy(build.ROOT / "csrc" / "bindings.cpp", folder)
    for number, (name, text, planted, _) in enumerate(BUGS.values(), 1):
        file = folder / "cpu" / "backward" / name
        before = file.read_text()
        assert before.count(text) == 1, f"{name} has {before.count(text)} times {text!r}"
        file.write_text(before.replace(text, planted.replace("bug", f"(rx_planted == {number})")))
    vectors = folder / "cpu" / "vec.hpp"
    vectors.write_text(
        vectors.read_text().replace("#pragma once", "#pragma once\nextern int rx_planted;")
    )
    (folder / "planted.cpp").write_text("int rx_planted = 0;\n")
    names = ["run", "run_window", "pool", "dispatch", "engine_portable"]
    files = [folder / "bindings.cpp", folder / "planted.cpp"]
    files += [folder / "cpu" / f"{name}.cpp" for name in names]
    build.run(*compiler.command, *flags, f"-I{folder}", "-shared", *map(str, files),
              "-o", str(module))  # fmt: skip
    return module


@pytest.fixture(scope="module")
def planted():
    """(the backend over the portable engine with all bugs, the number of the one that is there)."""
    try:
        path = _compile()
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the engine: {missing}")
    engine = cpu.Cpu(build.load(path, "_cpu_planted"))
    return engine, ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "rx_planted")


def given_by(shown: dict):
    return case(**{"kind": ATTENTION, "dtype": torch.float32, **shown})


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_rejected(planted, name, monkeypatch) -> None:
    monkeypatch.setenv("RECURX_CPU_ISA", "portable")
    engine, number = planted
    given = given_by(BUGS[name][-1])
    assert_right(on_engine(engine, given), given)
    number.value = list(BUGS).index(name) + 1
    try:
        with pytest.raises(AssertionError, match=r"gradients: error|any\(\)"):
            assert_right(on_engine(engine, given), given)
    finally:
        number.value = 0
